"""Values of any type come back from results of any format, and SQL says the same of all formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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


NOW = 1_800_000_000_123_456_789
PER = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
TIMES: dict[str, Any] = {
    **{f"timestamp {unit}": pa.array([NOW // per, None, -1], pa.timestamp(unit)) for unit, per in PER.items()},
    **{f"zoned {unit}": pa.array([NOW // per, None, -1], pa.timestamp(unit, "UTC")) for unit, per in PER.items()},
    **{f"interval {unit}": pa.array([90_061_123, None, -1], pa.duration(unit)) for unit in PER},
    "time s": pa.array([1, None, 86_399], pa.time32("s")),
    "time ms": pa.array([1, None, 86_399_999], pa.time32("ms")),
    "time ns": pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    "list of ns": pa.array([[NOW], None, []], pa.list_(pa.timestamp("ns"))),
    "map of ns": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.time64("ns"))),
    "list of intervals": pa.array([[1], None, []], pa.list_(pa.duration("ns"))),
}


def ended(place: Path, form: str, columns: dict[str, Any], *, declared: bool = True) -> tuple[Any, list[Any]]:
    """A finished sink that holds these columns of the source, and what was refused."""
    kinds = {name: name_of(stored_type(array.type)) for name, array in columns.items()}
    sink = sink_for(str(place), output="rows", format=form, columns=kinds | {"x": "int64"} if declared else None)
    sink.claim("job")
    count = len(next(iter(columns.values())))
    writer = sink.open("attempt", Chunk(0, count, {}))
    given = pa.array(map(str, range(count))), pa.table({"x": range(count)}), pa.table(columns)
    refused = writer.add_table(*given) if declared else writer.add_rows(given[0], given[1].to_pylist(), given[2])
    sink.finalize([writer.close()], [], {"job": "job"})
    return sink, refused


@pytest.mark.parametrize("declared", [True, False])
def test_times_of_every_unit_are_kept_side_by_side(tmp_path: Path, declared: bool) -> None:
    answers = []
    for form in FORMATS:
        sink, refused = ended(tmp_path / form, form, TIMES, declared=declared)
        assert refused == []
        flat = [name for name in TIMES if " of " not in name]
        listed = ", ".join(f'"{name}"::varchar, typeof("{name}")' for name in flat)
        answers.append([list(row.values()) for row in query(sink, [], f"select {listed} from results").to_pylist()])
        if form == "parquet":
            kept = pq.read_table(next((tmp_path / form).glob("part-*")))
            for name, array in TIMES.items():
                assert kept[name].combine_chunks() == array.cast(kept[name].type), name
                assert name.endswith(" s") or kept[name].type == array.type, name
    assert answers[0] == answers[1] == answers[2]
    text = next((tmp_path / "csv").glob("part-*")).read_text()
    assert "2027-01-15 08:00:00.123456789," in text
    assert '"[""2027-01-15 08:00:00.123456789""]"' in text
    assert "23:59:59.999999999" in text


def test_times_that_text_does_not_tell_cost_their_rows_there(tmp_path: Path) -> None:
    far = {
        "seconds": pa.array([2**45, 0, 0, 0], pa.timestamp("ms")),
        "endless": pa.array([0, 2**63 - 1, 0, 0], pa.timestamp("ns")),
        "interval": pa.array([0, 0, 2**62, 0], pa.duration("s")),
        "fine": pa.array([0, 0, 0, 7], pa.duration("ns")),
        "day": pa.array([0, 0, 0, 2_932_897], pa.date32()),  # the first one of the year 10000
    }
    sink, refused = ended(tmp_path / "out", "parquet", far)
    assert refused == []
    kept = pq.read_table(next((tmp_path / "out").glob("part-*")))
    assert [kept[name].combine_chunks() for name in far] == list(far.values())
    for form in ("csv", "jsonl"):
        far["seconds"] = pa.array([2**51, 0, 0, 0], pa.timestamp("ms"))
        sink, refused = ended(tmp_path / form, form, far)
        assert [at for at, _ in refused] == [0, 1, 2]
        assert "column 'seconds': timestamp[ms] 2251799813685248 is too far away" in refused[0][1].message
        assert rows(sink, [])["fine"].to_pylist() == [7]
        assert "10000-01-01" in next((tmp_path / form).glob("part-*")).read_text()


def test_text_that_is_not_utf_8_costs_its_row_and_no_other(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff\xfe", None], pa.binary()).view(pa.string())
    columns = {
        "text": text,
        "coded": pa.DictionaryArray.from_arrays(pa.array([0, 0, 2]), text),
        "listed": pa.ListArray.from_arrays([0, 1, 1, 2], text),
        "fine": pa.array([1, 2, 3], pa.duration("ns")),
    }
    for form in FORMATS:
        sink, refused = ended(tmp_path / form, form, columns)
        assert [at for at, _ in refused] == [1, 2]
        assert refused[0][1].message == "column 'text': its text is not valid UTF-8: b'\\xff\\xfe'"
        assert refused[1][1].message == "column 'listed': its text is not valid UTF-8"
        assert query(sink, [], "select text, fine::varchar as fine from results").num_rows == 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_column_without_a_name_and_maps_come_back_as_they_are(tmp_path: Path, form: str) -> None:
    columns = {
        "": pa.array([1, 2]),
        "map": pa.array([[], [("k", float("nan"))]], pa.map_(pa.string(), pa.float64())),
        "V": pa.array([1, 2]),
        "v/~": pa.array([3, 4]),
    }
    sink, refused = ended(tmp_path / "out", form, columns)
    assert refused == []
    assert rows(sink, []).column_names == ["key", *columns, "x"]
    assert rows(sink, [])["v/~"].to_pylist() == [3, 4]
    text = next((tmp_path / "out").glob("part-*")).read_bytes()
    if form == "csv":
        assert text.splitlines()[:2] == [b"key,,map,V,v/~,x", b"0,1,{},1,3,0"]
    if form == "jsonl":
        assert [json.loads(line)["map"] for line in text.splitlines()] == [{}, {"k": None}]
        assert [json.loads(line)[""] for line in text.splitlines()] == [1, 2]


@pytest.mark.parametrize("form", FORMATS)
def test_sorted_rows_keep_their_nanoseconds(tmp_path: Path, form: str) -> None:
    kinds = {name: name_of(array.type) for name, array in TIMES.items()}
    sink = sink_for(str(tmp_path / f"out.{form}"), output="rows", columns=kinds | {"at": "int64"}, order="at")
    sink.claim("job")
    writer = sink.open("attempt", Chunk(0, 3, {}))
    order = pa.table({**TIMES, "at": [2, 1, 0]})
    assert writer.add_table(pa.array(["c", "b", "a"]), pa.table({"n": [1]}).select([]), order) == []
    sink.finalize([writer.close()], [], {"job": "job"})
    if form == "parquet":
        kept = pq.read_table(tmp_path / "out.parquet")
        for name, array in TIMES.items():
            assert kept[name].combine_chunks() == array.take([2, 1, 0]).cast(kept[name].type), name
    else:
        assert "2027-01-15 08:00:00.123456789" in (tmp_path / f"out.{form}").read_text().splitlines()[-1]
