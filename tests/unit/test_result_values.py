"""Values of any type come back from results of any format, and SQL says the same of all formats."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tally.sinks.columns import name_of, stored_type, type_named
from tally.sinks.factory import reopen, sink_for
from tally.sinks.query import query, rows
from tally.sources.base import Chunk

FORMATS = ("parquet", "csv", "jsonl")
AT = datetime(2026, 3, 29, 1, 2, 3, 4, tzinfo=UTC)
VALUES: dict[str, Any] = {
    "int64": pa.array([2**63 - 1, None, -(2**63)]),
    "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "float64": pa.array([0.1, None, 1e300]),
    "float32": pa.array([0.5, None, 1.5], pa.float32()),
    "float16": pa.array([1.5, None, -0.25], pa.float16()),
    "decimal": pa.array([Decimal("12345678901234567890123456.789"), None, Decimal("0.100")], pa.decimal128(38, 3)),
    "small decimal": pa.array([Decimal("0.10"), None, Decimal("-1.25")], pa.decimal128(9, 2)),
    "large decimal": pa.array(
        [Decimal("1234567890123456789012345678901234567890.500"), None, None], pa.decimal256(50, 3)
    ),
    "bytes": pa.array([b"\xff\x00", None, b"a"]),
    "fixed bytes": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "interval": pa.array([timedelta(days=1, microseconds=1), None, timedelta(0)], pa.duration("us")),
    "interval in seconds": pa.array([90_061, None, 0], pa.duration("s")),
    "time": pa.array([time(1, 2, 3, 4), None, time(0)]),
    "timestamp": pa.array([AT.replace(tzinfo=None), None, datetime(1, 1, 1)]),  # noqa: DTZ001
    "zoned": pa.array([AT, None, AT], pa.timestamp("us", "Europe/Berlin")),
    "date": pa.array([date(2026, 1, 1), None, date(1, 1, 1)]),
    "truth": pa.array([True, None, False]),
    "text": pa.array(["007", None, ""]),
    "dictionary": pa.array(["x", None, "y"]).dictionary_encode(),
    "list": pa.array([[1, 2], None, []]),
    "list of decimals": pa.array([[Decimal("1.10")], None, []], pa.list_(pa.decimal128(9, 2))),
    "struct": pa.array([{"a": 2**60, "b": "x"}, None, {"a": None, "b": ""}]),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "empty": pa.nulls(3),
}


def written(place: str, name: str, form: str, *, keep: str = "kept", **options: Any) -> Any:
    """A finished sink that holds one column of VALUES, kept from the source."""
    array = VALUES[name]
    sink = sink_for(
        place, output="rows", format=form, columns={keep: name_of(stored_type(array.type)), "x": "float64"}, **options
    )
    sink.claim("job")
    writer = sink.open("attempt", Chunk(0, 3, {}))
    results = pa.table({"x": [0.5, 1.5, 2.5]})
    assert writer.add_table(pa.array(["a", "b", "c"]), results, pa.table({keep: array})) == []
    sink.finalize([writer.close()], [], {"job": "job"})
    return sink


@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_type_come_back_from_every_format(tmp_path: Path, name: str) -> None:
    array = VALUES[name]
    plain = array.cast(stored_type(array.type)) if name != "dictionary" else array.dictionary_decode()
    assert type_named(name_of(plain.type)) == plain.type
    found = {form: rows(written(str(tmp_path / form), name, form), [])["kept"] for form in FORMATS}
    expected = plain.to_pylist()
    if name.startswith("interval"):
        expected = [None if each is None else each // timedelta(microseconds=1) * 1000 for each in expected]
    for form, column in found.items():
        values = column.to_pylist()
        if name.startswith("interval"):
            values = [None if each is None else each.nanoseconds + each.days * 86_400 * 10**9 for each in values]
        assert values == expected, form
    assert len({str(column.type) for form, column in found.items() if name != "empty"}) <= 1


@pytest.mark.parametrize(
    ("sql", "answer"),
    [
        ("select sum(x::int) as n from results", 4),  # to the nearest even number
        ("select count(*) as n from results where kept < 0", 1),
        ("select max(kept) - 1 as n from results", 2**63 - 2),
        ("select typeof(x) || typeof(kept) as n from results limit 1", "DOUBLEBIGINT"),
        ("select string_agg(x::varchar, '/') as n from results", "0.5/1.5/2.5"),
    ],
)
def test_the_same_sql_says_the_same_of_every_format(tmp_path: Path, sql: str, answer: Any) -> None:
    for form in FORMATS:
        assert query(written(str(tmp_path / form), "int64", form), [], sql)["n"].to_pylist() == [answer]


@pytest.mark.parametrize("form", FORMATS)
def test_columns_that_differ_in_capitals_are_never_taken_for_each_other(tmp_path: Path, form: str) -> None:
    sink = written(str(tmp_path / "out"), "text", form, keep="X")
    assert rows(sink, []).to_pylist()[0] == {"key": "a", "X": "007", "x": 0.5}
    found = query(sink, [], "select * from results limit 1")
    assert found.to_pylist() == [{"key": "a", "X_1": "007", "x_1": 0.5}] or found.column_names == ["key", "X_1", "x_2"]
    with pytest.raises(Exception, match='"x" not found'):
        query(sink, [], "select x from results")
    text = next((tmp_path / "out").glob("part-*")).read_bytes()
    if form != "parquet":
        assert text.splitlines()[0] == {"csv": b"key,X,x", "jsonl": b'{"key":"a","X":"007","x":0.5}'}[form]


def test_text_of_zoned_times_does_not_depend_on_the_machines_zone(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.unit.test_result_values import query, written
for form in ("csv", "jsonl"):
    sink = written(sys.argv[1] + form, "zoned", form)
    print(next(Path(sink.place).glob("part*")).read_text())
    print(query(sink, [], "select kept::varchar as t from results"))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / zone[:2])],
            env={**os.environ, "TZ": zone},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for zone in ("America/New_York", "Asia/Tokyo")
    }
    assert len(said) == 1
    assert "2026-03-29 01:02:03.000004+00" in said.pop()


def test_formulas_are_escaped_if_that_is_asked_for(tmp_path: Path) -> None:
    names = ["=1+1", "+x", "-x", "@x", "\tx", "x=1", "-1", ""]

    def text(**options: Any) -> tuple[str, str]:
        place = tmp_path / ("escaped.csv" if options else "plain.csv")
        sink = reopen(
            sink_for(str(place), output="rows", columns={"name": "string", "n": "int64"}, **options).describe()
        )
        sink.claim("job")
        writer = sink.open("attempt", Chunk(0, len(names), {}))
        assert (
            writer.add_table(pa.array([f"={n}" for n in names]), pa.table({"name": names, "n": [-1] * len(names)}))
            == []
        )
        sink.finalize([writer.close()], [{"key": "=k", "stage": "read", "error": "@x"}], {"job": "job"})
        return place.read_text(), place.with_name(place.name.replace(".csv", ".dead.csv")).read_text()

    rows, dead = text()
    assert rows.splitlines()[1] == "==1+1,=1+1,-1"
    assert dead.splitlines()[1] == "=k,read,@x"
    rows, dead = text(escape_formulas=True)
    assert [line.split(",")[1] for line in rows.splitlines()[1:]] == [
        *("'=1+1", "'+x", "'-x", "'@x", "'\tx", "x=1", "'-1", '""'),
    ]
    assert all(line.startswith("'=") and line.endswith(",-1") for line in rows.splitlines()[1:])
    assert dead.splitlines()[1] == "'=k,read,'@x"
    with pytest.raises(ValueError, match="escape_formulas: is for results in CSV"):
        sink_for(str(tmp_path / "out"), output="rows", escape_formulas=True)


def test_large_integers_are_kept_beside_results_one_by_one(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job")
    writer = sink.open("attempt", Chunk(0, 2, {}))
    info = [{"id": 2**64 - 1}, {"id": 1}]
    assert writer.add(["a", "b"], [{"x": 1}, {"x": 2}], info) == []
    sink.finalize([writer.close()], [], {"job": "job"})
    assert [int(row["id"]) for row in rows(sink, []).to_pylist()] == [2**64 - 1, 1]
