"""Values of tables come back as they stood in the file: to the last digit, whatever stands thousands of rows later."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import orc

from tally.errors import SpecError, StorageError
from tally.scorers.base import Scorer
from tally.sources.base import ChunkLimit, Timings
from tally.sources.tables.source import TableSource


def kept(work: Path, place: Path, columns: str = "*", **options: Any) -> pa.Table:
    """The kept columns of a table; nothing may be dead."""
    scorer = Scorer()
    scorer.input, scorer.batch_size = "table", 65_536
    options.setdefault("features", [])
    source = TableSource.describe([str(place)], keep=columns.split(","), **options).located(str(work))
    source.prepare()
    batches = []
    for chunk in source.plan(None, 0, lambda: ChunkLimit(1 << 20, 1 << 40)):
        for batch in source.read(chunk, scorer, Timings()):
            assert not batch.dead
            batches.append(batch.info)
    return pa.concat_tables(batches)


# -- beyond the sample --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_each_of_many_long_ids_comes_back(tmp_path: Path, suffix: str) -> None:
    ids = range(900_000_000_000_000_001, 900_000_000_000_260_001)
    place = tmp_path / f"ids.{suffix}"
    if suffix == "csv":
        place.write_text("id,a,b,c\n" + "".join(f"{each},1,2,3\n" for each in ids))
    else:
        place.write_text("".join(f'{{"id":{each},"a":1,"b":2,"c":3}}\n' for each in ids))
    found = kept(tmp_path / "work", place, "id")
    assert found["id"].to_pylist() == list(ids)


LATER: dict[str, tuple[list[str], list[str], Any]] = {
    "zeros before": (["1", "2"], ["00725"], pa.string()),
    "a plus sign": (["1", "2"], ["+4930"], pa.string()),
    "a code": (["1", "2"], ["AB12"], pa.string()),
    "underscores": (["1", "2"], ["1_000"], pa.string()),
    "the last digit of int64": (["1", "2"], ["9223372036854775807", "-9223372036854775808"], pa.int64()),
    "more than int64": (["1", "2"], ["18446744073709551615"], pa.string()),
    "fractions": (["1", "2"], ["2.5", "-1e-3"], pa.float64()),
    "fractions beside long ids": (["1", "9007199254740993"], ["2.5"], pa.string()),
    "more digits than float64 holds": (["1.5", "2.25"], ["0.1234567890123456789"], pa.string()),
    "all digits of a float64": (["1.5"], ["0.10000000000000001", "1.000000000000000056e-01", "0.1"], pa.float64()),
    "more than float64 reaches": (["1.5"], ["1e400"], pa.string()),
    "no date": (["2026-01-01"], ["2026-02-30"], pa.string()),
    "times beside dates": (["2026-01-01"], ["2026-01-05 13:45:00"], pa.timestamp("us")),
    "nanoseconds": (["2026-01-01 00:00:00"], ["2026-01-01 00:00:00.123456789"], pa.string()),
    "nine digits, the last of them zeros": (
        ["2026-01-01 00:00:00"],
        ["2026-01-01 00:00:00.123456000"],
        pa.timestamp("us"),
    ),
    "truth values": (["true"], ["yes"], pa.string()),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("role", ["kept", "key"])
def test_what_comes_after_the_sample_keeps_its_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, role: str
) -> None:
    monkeypatch.setattr("tally.sources.tables.delimited.SAMPLE_ROWS", 10)
    first, later, kind = LATER[name]
    cells = first * 20 + later + first
    place = tmp_path / "a.csv"
    place.write_text("v,x\n" + "".join(f"{cell},1\n" for cell in cells))
    found = kept(tmp_path / "work", place, "x" if role == "key" else "v", by=["v"] if role == "key" else [])["v"]
    assert found.type == kind
    assert all(map(same, sorted(found.to_pylist(), key=str), sorted(cells, key=lambda each: str(parsed(each, kind)))))


def test_columns_of_json_that_appear_late_are_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tally.sources.tables.jsonlines.SAMPLE_ROWS", 3)
    lines = [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 12345678901234567890, "b": "x"}, {"a": 5}]
    place = tmp_path / "a.jsonl"
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert kept(tmp_path / "work", place).to_pylist() == [{"a": str(line["a"]), "b": line.get("b")} for line in lines]


def test_files_beyond_those_whose_types_were_inferred_are_like_them_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("schema", "ingest"):
        monkeypatch.setattr(f"tally.sources.tables.{module}.LOOKED_AT", 2)
    for number, value in enumerate(("1", "2", "3", "00725")):
        (tmp_path / f"in{number}.csv").write_text(f"id,v\n{value},1\n")
    with pytest.raises(StorageError, match=r"in3\.csv: column 'id' holds other values than BIGINT") as refused:
        kept(tmp_path / "work", tmp_path / "in*.csv", "id")
    assert refused.value.hint == "say how to read it, as in csv types={id: VARCHAR}"
    found = kept(tmp_path / "again", tmp_path / "in*.csv", "id", csv={"types": {"id": "VARCHAR"}})
    assert found["id"].to_pylist() == ["1", "2", "3", "00725"]


# -- any CSV ------------------------------------------------------------------------------------------


def parsed(cell: str, kind: pa.DataType) -> Any:
    """What a cell should be as a value of a type."""
    if pa.types.is_integer(kind):
        return int(cell)
    if pa.types.is_floating(kind):
        return float(cell)
    if pa.types.is_timestamp(kind):
        return datetime.fromisoformat(cell)
    return cell


def same(value: Any, cell: str) -> bool:
    """Whether a value tells all that a cell of a CSV file says."""
    plain = cell.strip(" ")
    if value is None:
        return cell == ""
    if isinstance(value, str):
        return value == cell
    if isinstance(value, bool):
        return str(value).lower() == plain.lower()
    if isinstance(value, int):
        return str(value) == plain
    if isinstance(value, float):
        digits = re.sub(r"[eE].*|[^0-9]", "", plain).lstrip("0")
        return not digits or Decimal(plain) == Decimal(f"{value:.{len(digits) - 1}e}")
    if isinstance(value, datetime):
        return datetime.fromisoformat(plain.replace("/", "-")) == value
    return isinstance(value, date) and "-".join(each.zfill(2) for each in re.split("[-/]", plain)) == str(value)


CELLS = st.one_of(
    st.text(st.sampled_from("ab ,;|\t\"'#-.é漢\n\r01"), max_size=6),
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(-1000, 1000, allow_nan=False).map(str),
    st.integers(0, 999).map(lambda each: f"{each:05d}"),
    st.dates().map(str),
    st.datetimes(min_value=datetime(1000, 1, 1)).map(str),  # noqa: DTZ001  # CSV has none either
    st.sampled_from(
        ["", "true", "FALSE", "NaN", "inf", "null", "NA", "=1+1", " 7", "1_000", "0x1F", "+5", "-0", "1e5"]
    ),
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_csv_file_is_read_as_python_reads_it(data: st.DataObject) -> None:
    width = data.draw(st.integers(2, 4))
    columns = [
        data.draw(
            st.lists(data.draw(st.sampled_from([CELLS, st.integers().map(str), st.just("")])), min_size=4, max_size=4)
        )
        for _ in range(width)
    ]
    rows = list(zip(*columns, strict=True))
    delim = data.draw(st.sampled_from(",;\t|"))
    newline = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    # Python's writer leaves line endings other than its own without quotes.
    several = any(re.search(r"[\r\n]", cell) for row in rows for cell in row)
    quoting = csv.QUOTE_ALL if several or data.draw(st.booleans()) else csv.QUOTE_MINIMAL
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delim, lineterminator=newline, quoting=quoting)
    for row in [[f"c{number}" for number in range(width)], *rows]:
        writer.writerow(row)
        text.write(newline * data.draw(st.integers(0, 1)))  # an empty line
    content = text.getvalue()
    if data.draw(st.booleans()):
        content = content.rstrip(newline)
    expected = [row for row in csv.reader(io.StringIO(content, newline=""), delimiter=delim) if row][1:]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "any.csv")
        place.write_bytes(content.encode("utf-8-sig" if data.draw(st.booleans()) else "utf-8"))
        found = kept(Path(folder, "work"), place, csv={"delim": delim, "header": True})
    assert found.column_names == [f"c{number}" for number in range(width)]
    read = [list(row.values()) for row in found.to_pylist()]
    assert len(read) == len(expected)
    for values, cells in zip(read, expected, strict=True):
        assert all(map(same, values, cells)), (values, cells)


@pytest.mark.parametrize("newlines", [("\r\n", "\n", "\r"), ("\n", "\r"), ("\r", "\r\n")])
@pytest.mark.parametrize("packed", [False, True])
def test_line_endings_may_be_mixed(tmp_path: Path, newlines: tuple[str, ...], packed: bool) -> None:
    import gzip

    rows = ['1,"a\r\nb"', "2,c", '3,"d\n\r""e"', "4,f", "5,g"]
    content = "".join(row + newlines[at % len(newlines)] for at, row in enumerate(["id,v", *rows])).encode()
    place = tmp_path / ("a.csv.gz" if packed else "a.csv")
    place.write_bytes(gzip.compress(content) if packed else content)
    assert kept(tmp_path / "work", place).to_pylist() == [
        {"id": number, "v": text} for number, text in [(1, "a\r\nb"), (2, "c"), (3, 'd\n\r"e'), (4, "f"), (5, "g")]
    ]


# -- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "arrow", "parquet"])
def test_names_that_differ_in_capitals_stay_apart(tmp_path: Path, suffix: str) -> None:
    rows = [{"V": 1, "v": 10, "v_1": "a"}, {"V": 2, "v": 20, "v_1": "b"}]
    place = tmp_path / f"a.{suffix}"
    table = pa.Table.from_pylist(rows)
    if suffix == "csv":
        place.write_text("V,v,v_1\n1,10,a\n2,20,b\n")
    elif suffix == "jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "arrow":
        with pa.ipc.new_file(place, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, place)
    assert kept(tmp_path / "work", place).to_pylist() == rows
    with pytest.raises(SpecError, match="columns 'V' and 'v' differ only in capitals; rename one of them"):
        kept(tmp_path / "work", place, by=["V"])


# -- tables with versions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "log"),
    [("Delta", "_delta_log/0.json"), ("Iceberg", "metadata/v1.metadata.json"), ("Hudi", ".hoodie/hoodie.properties")],
)
@pytest.mark.parametrize("given", ["", "lake", "lake/table/**/*.parquet"])
def test_the_loose_files_of_a_table_with_versions_are_not_its_rows(
    tmp_path: Path, kind: str, log: str, given: str
) -> None:
    table = tmp_path / "lake" / "table"
    (table / log).parent.mkdir(parents=True)
    (table / log).write_text("{}")
    for name in ("a", "b"):
        (table / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table({"x": [1, 2]}), table / "data" / f"{name}.parquet")
    with pytest.raises(SpecError, match=f"lake/table is a table of {kind}, which is not read") as refused:
        TableSource.describe([str(tmp_path / given)], features=["x"])
    assert "Write the rows that it holds now into a file" in str(refused.value.hint)
    named = TableSource.describe([str(table / "data" / "a.parquet")], features=["x"])
    assert sum(chunk.count for chunk in named.plan(None, 0, lambda: ChunkLimit(10, 1 << 30))) == 2


def test_so_are_those_of_iceberg_that_are_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "table" / "metadata").mkdir(parents=True)
    (tmp_path / "table" / "metadata" / "v1.metadata.json").write_text("{}")
    (tmp_path / "table" / "data").mkdir()
    orc.write_table(pa.table({"x": [1, 2]}), tmp_path / "table" / "data" / "a.orc")
    with pytest.raises(SpecError, match="table is a table of Iceberg, which is not read"):
        TableSource.describe([str(tmp_path / "table")], features=["x"])


# -- files of several types ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (pa.array([2**53 - 1]), pa.array([0.5]), [float(2**53 - 1), 0.5]),
        (pa.array([2**53 + 1]), pa.array([0.5]), "column 'v' is int64 in a.parquet and a float in other files"),
        (pa.array([2**63], pa.uint64()), pa.array([-1]), "column 'v' is uint64 in a.parquet and int64 in b.parquet"),
        (pa.array([2**64 - 1], pa.uint64()), pa.array([1], pa.uint8()), [2**64 - 1, 1]),
        (pa.array([Decimal("1.50")]), pa.array([Decimal("12345.678")]), [Decimal("1.500"), Decimal("12345.678")]),
    ],
)
@pytest.mark.parametrize("where", [None, "true"])
def test_numbers_of_several_files_keep_their_digits_or_are_refused(
    tmp_path: Path, first: Any, second: Any, outcome: Any, where: str | None
) -> None:
    for name, array in (("a", first), ("b", second)):
        pq.write_table(pa.table({"v": array}), tmp_path / f"{name}.parquet")
    if isinstance(outcome, str):
        with pytest.raises(SpecError, match=outcome):
            kept(tmp_path / "work", tmp_path / "*.parquet", "v", where=where)
    else:
        found = kept(tmp_path / "work", tmp_path / "*.parquet", "v", where=where)
        assert found["v"].to_pylist() == outcome


def test_nan_is_as_missing_in_windows_as_no_value_at_all(tmp_path: Path) -> None:
    lines = ["2026-01-01 00:00:00,1.0", "2026-01-01 00:01:00,NaN", "2026-01-01 00:02:00,3.0", "2026-01-01 01:00:00,NaN"]
    (tmp_path / "a.csv").write_text("t,v\n" + "\n".join(lines) + "\n")
    times = [datetime.fromisoformat(line.split(",")[0]) for line in lines]
    pq.write_table(pa.table({"t": times, "v": [1.0, float("nan"), 3.0, None]}), tmp_path / "b.parquet")
    halves = pa.array([1.0, float("nan"), 3.0, None], pa.float16())
    pq.write_table(pa.table({"t": times, "v": halves}), tmp_path / "c.parquet")
    for name in ("a.csv", "b.parquet", "c.parquet"):
        options = {"window": 3600, "time": "t", "aggregate": ["mean", "min", "max", "last", "count"]}
        source = TableSource.describe([str(tmp_path / name)], features=None, **options).located(
            str(tmp_path / f"w{name}")
        )
        source.prepare()
        [chunk] = source.plan(None, 0, lambda: ChunkLimit(10, 1 << 30))
        scorer = Scorer()
        scorer.input, scorer.batch_size = "table", 10
        [batch] = source.read(chunk, scorer, Timings())
        hour, empty = batch.values.to_pylist()
        assert hour == {"v_mean": 2.0, "v_min": 1.0, "v_max": 3.0, "v_last": 3.0, "count": 3}
        assert empty == {"v_mean": None, "v_min": None, "v_max": None, "v_last": None, "count": 1}


@pytest.mark.parametrize(
    ("value", "number"),
    [("1.234,5", 1234.5), ("-12.345.678", -12_345_678), ("12.34.567,5", 1_234_567.5), ("7,25", 7.25), ("7", 7),
     ("1.5", None), ("12.34,5", None), ("1234.567.8", None)],
)  # fmt: skip
def test_a_mark_of_thousands_stands_between_thousands(tmp_path: Path, value: str, number: float | None) -> None:
    (tmp_path / "a.csv").write_text(f"v;t\n1;n.a.\n{value};x\n")
    options = {"decimal_separator": ",", "thousands": "."}
    source = TableSource.describe([str(tmp_path / "a.csv")], features=["v"], csv=options)
    source = source.located(str(tmp_path / "work"))
    if number is None:
        with pytest.raises(StorageError, match="does not stand between thousands"):
            source.prepare()
        return
    source.prepare()
    [chunk] = source.plan(None, 0, lambda: ChunkLimit(10, 1 << 30))
    scorer = Scorer()
    scorer.input, scorer.batch_size = "table", 10
    [batch] = source.read(chunk, scorer, Timings())
    assert batch.values["v"].to_pylist() == [1, number]


@pytest.mark.parametrize("spread", [False, True])
def test_times_with_a_zone_are_not_mixed_with_times_without(tmp_path: Path, spread: bool) -> None:
    times = ["2026-03-31T01:30:00+01:00", "2026-03-31 03:30:00", "2026-03-31T00:30:00Z"]
    for number, some in enumerate([times[:1], times[1:2], times[2:]] if spread else [times]):
        (tmp_path / f"{number}.csv").write_text("t,v\n" + "".join(f"{each},1\n" for each in some))
    with pytest.raises(SpecError, match="some of its times have a zone, and others have none"):
        TableSource.describe([str(tmp_path / "*.csv")], features=None, window=3600, time="t")
    kept = TableSource.describe([str(tmp_path / "*.csv")], features=None, keep=["t"])
    assert kept.columns == {"t": "string"}


@pytest.mark.parametrize(
    ("value", "kind", "helps"),
    [
        ("NA", "DOUBLE", "csv nullstr=NA"),
        ("-", "TIMESTAMP", "csv nullstr=-"),
        ("1,5", "DOUBLE", "csv decimal_separator=,"),
        ("1,234.5", "DOUBLE", "csv thousands=,"),
        ("31.12.2025 14:00", "TIMESTAMP", "csv timestampformat='%d.%m.%Y %H:%M'"),
        ("12/31/2025", "DATE", "csv dateformat='%m/%d/%Y'"),
    ],
)
def test_the_option_that_is_proposed_works(tmp_path: Path, value: str, kind: str, helps: str) -> None:
    from tally.cli.console import literal_pairs
    from tally.jobs.spec import CSV_VALUES
    from tally.sources.tables.delimited import advice

    told = str(advice(value, kind))
    assert told.startswith(helps)
    option = helps.removeprefix("csv ").replace("'", "")
    place = tmp_path / "a.csv"
    place.write_text(f'v\n"{value}"\n' + ("1\n" if kind == "DOUBLE" else "") + "\n")
    found = kept(
        tmp_path / "work",
        place,
        csv={**literal_pairs("--csv", [option], CSV_VALUES), "types": {"v": kind}, "header": True},
    )
    assert found["v"].type == {"DOUBLE": pa.float64(), "DATE": pa.date32(), "TIMESTAMP": pa.timestamp("us")}[kind]


# -- Parquet and Arrow --------------------------------------------------------------------------------


def test_a_time_that_the_unit_of_other_files_does_not_hold_is_a_dead_item(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    far = [1, 32_503_680_000_000_000, 3, 4, 5]  # the second is of the year 3000
    pq.write_table(pa.table({"t": pa.array(far, pa.timestamp("us"))}), folder / "a.parquet")
    pq.write_table(pa.table({"t": pa.array([7], pa.timestamp("ns"))}), folder / "b.parquet")
    scorer = Scorer()
    scorer.input, scorer.batch_size = "table", 4
    source = TableSource.describe([str(folder)], features=[], keep=["t"])
    found, dead = [], {}
    for chunk in source.plan(None, 0, lambda: ChunkLimit(1 << 20, 1 << 40)):
        keys = source.keys(chunk)
        for batch in source.read(chunk, scorer, Timings()):
            found += batch.info["t"].cast(pa.int64()).to_pylist()
            dead |= {keys[at]: error.message for at, error in batch.dead}
    assert found == [1000, 3000, 4000, 5000, 7]
    [(key, message)] = dead.items()
    assert (key, message) == (
        "a.parquet#2",
        "a.parquet, column 't': a value of timestamp[us] does not fit timestamp[ns], which other files hold",
    )


@pytest.mark.parametrize("lines", ["1,2,3\n4,5\n7,8,9,10\n", "4,5\n7,8,9,10\n1,2,3\n"])
def test_lines_that_differ_each_in_its_way_do_not_make_the_header_wrong(tmp_path: Path, lines: str) -> None:
    """In a small file, they are more than those that are right."""
    (tmp_path / "a.csv").write_text(f"a,b,c\n{lines}")
    scorer = Scorer()
    scorer.input = "table"
    source = TableSource.describe([str(tmp_path / "a.csv")], features=[], keep=["a", "b", "c"])
    source = source.located(str(tmp_path / "work"))
    source.prepare()
    found, dead = [], []
    for chunk in source.plan(None, 0, lambda: ChunkLimit(1 << 20, 1 << 40)):
        for batch in source.read(chunk, scorer, Timings()):
            found += batch.info.to_pylist()
            dead += [error.message.partition(": ")[2] for _, error in batch.dead]
    assert found == [{"a": 1, "b": 2, "c": 3}]
    assert dead == ["the line has 2 columns, not 3", "the line has more than 3 columns"]
    (tmp_path / "b.csv").write_text("a,b\n1,2,3\n4,5,6\n")
    with pytest.raises(StorageError, match="the first line has 2 columns, and most of the others have 3"):
        TableSource.describe([str(tmp_path / "b.csv")], features=[], keep=["a"])


def test_text_that_is_not_utf_8_is_named_where_rows_are_sorted(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": ["x", "y"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": text}), tmp_path / "b.parquet")
    with pytest.raises(StorageError, match=r"b\.parquet, row 2, column 'a': its text is not valid UTF-8"):
        kept(tmp_path / "work", tmp_path, by=["a"])


def test_times_in_seconds_that_parquet_does_not_hold_are_named(tmp_path: Path) -> None:
    table = pa.table({"t": pa.array([2**60], pa.timestamp("s"))})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(StorageError, match=r"t\.arrow, column 't': "):
        kept(tmp_path / "work", tmp_path / "t.arrow")


def test_a_field_of_json_may_have_an_empty_name(tmp_path: Path) -> None:
    place = tmp_path / "t.jsonl"
    place.write_text('{"": 1, "a/b~": 2, "a.b\\"": 3}\n')
    assert kept(tmp_path / "work", place).to_pylist() == [{"": 1, "a/b~": 2, 'a.b"': 3}]
    with pytest.raises(SpecError, match="a column has no name"):
        kept(tmp_path / "work", place, by=["a/b~"])


def test_lines_of_remarks_are_told_with_the_option_that_passes_them_over(tmp_path: Path) -> None:
    place = tmp_path / "t.csv"
    place.write_text("# made today\na,b\n1,2\n# at noon\n3,4\n5,6\n")
    with pytest.raises(StorageError) as caught:
        kept(tmp_path / "work", place)
    assert "csv comment='#'" in (caught.value.hint or "")
    found = kept(tmp_path / "work", place, csv={"comment": "#"})
    assert found.to_pylist() == [{"a": 1, "b": 2}, {"a": 3, "b": 4}, {"a": 5, "b": 6}]
