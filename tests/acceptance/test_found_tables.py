"""Tables that went wrong somewhere: each is read as it should be, or refused in a sentence that says what to do."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tally.errors import TallyError
from tally.scorers.base import Scorer
from tally.sources.base import ChunkLimit, Timings
from tally.sources.tables.source import TableSource

SCORER = Scorer()
SCORER.input, SCORER.batch_size = "table", 65_536


@pytest.fixture
def found(data: Path) -> Path:
    place = data / "found"
    if not place.is_dir():
        pytest.skip("the tables that went wrong are not there")
    return place


def read(place: Path, work: Path, **options: Any) -> tuple[list[list[Any]], list[str], TableSource]:
    """The rows of all columns, the reasons of dead items, and the source."""
    options.setdefault("features", None)
    source = TableSource.describe([str(place)], keep=["*"], **options).located(str(work))
    source.prepare()
    rows: list[list[Any]] = []
    dead: list[str] = []
    for chunk in source.plan(None, 0, lambda: ChunkLimit(1 << 20, 1 << 40)):
        for batch in source.read(chunk, SCORER, Timings()):
            dead += [error.message for _, error in batch.dead]
            if len(batch.keys):
                rows += [list(row.values()) for row in batch.info.to_pylist()]
    return rows, dead, source


READ: dict[str, tuple[dict[str, Any], Any]] = {
    # file: options, and the rows; a number of rows where Python's own csv module says what they are
    "csv/bar.csv": (
        {"delim": "|", "nullstr": ["-", "null"]},
        [[1, "10"], [2, None], [3, None], [4, "999"], [5, "~"], [6, "yes"]],
    ),
    "csv/bigint.csv": ({}, [[9007199254740993], [9007199254740992]]),
    "csv/bomq.csv": ({}, [[1, 10]]),
    "csv/bool.csv": ({}, [[True], [False], [True]]),
    "csv/case.csv": ({}, [[1, 10, "a"], [2, 20, "b"]]),
    "csv/colon.csv": ({"delim": ":"}, [[1, 10], [2, 20]]),
    "csv/comment.csv": ({"comment": "#"}, [[1, 10], [2, 20]]),
    "csv/cr.csv": ({}, [[1, 10], [2, 20]]),
    "csv/gz_named.csv": ({}, [[1, 10], [2, 20]]),
    "csv/hash.csv": ({}, 3003),
    "csv/int_model.csv": ({}, [[1.0, 1], [2.5, 2], [3.0, 3]]),
    "csv/late_ids.csv": ({}, 30_000),
    "csv/late_quote.csv": ({}, 60_004),
    "csv/late_stamp.csv": ({}, 30_000),
    "csv/late_types.csv": ({}, 30_000),
    "csv/late_zero.csv": ({}, 30_000),
    "csv/long_ids_short.csv": ({}, 4999),
    "csv/members.csv.gz": ({}, [[1, 10], [2, 20]]),
    "csv/mixed.csv": ({}, [[1, 10], [2, 20], [3, 30], [4, 40]]),
    "csv/na.csv": ({"nullstr": ["NA", "-", "NULL", "#N/A"]}, 9),
    "csv/nlheader.csv": ({"skip": 2}, [[1, 2, 3], [4, 5, 6]]),
    "csv/nofinalnl.csv": ({}, [[1, 10], [2, 20]]),
    "csv/onecol.csv": ({}, [[1], [2]]),
    "csv/percent.csv": ({}, [["5%"], ["10%"]]),
    "csv/ps.csv": ({"skip": 1}, [[1, 10], [2, 20]]),
    "csv/quote_in_middle.csv": ({}, [[1, '5" pipe'], [2, "7"], [3, '6" pipe'], [4, 'a "b" c']]),
    "csv/r.csv.bz2": ({}, [[1, 10], [2, 20]]),
    "csv/r.csv.xz": ({}, [[1, 10], [2, 20]]),
    "csv/r.csv.zip": ({}, [[1, 10], [2, 20]]),
    "csv/semicolon_decimal.csv": ({"decimal_separator": ","}, [[1, 1.5], [2, 2.25], [3, 3.0]]),
    "csv/sep.csv": ({"decimal_separator": ","}, [[1, 2.5], [2, 3.5]]),
    "csv/single.csv": ({"quote": "'"}, [[1, "a,b"], [2, "c"]]),
    "csv/spaces.csv": ({}, [[1, 10], [2, 20]]),
    "csv/tab.txt": ({"delim": "\\t"}, [[1, 10], [2, 20]]),
    "csv/thousands.csv": ({"thousands": ","}, [[1, 1234.5], [2, 12000.0], [3, 7.0]]),
    "csv/three.csv": ({}, [["x0"], ["a;b"]]),
    "csv/trailing.csv": ({}, [[1, 10, None], [2, 20, None]]),
    "csv/uint64.csv": ({}, [["18446744073709551615"], ["1"]]),
    "csv/zero_id.csv": ({}, [["08123"], ["00456"], ["10000"]]),
    "csv/backslash.csv": ({"escape": "\\"}, [[1, 'say "hi", ok'], [2, "x"]]),
    "tables/comment.csv": ({"comment": "#"}, [[1, 2.0], [2, 3.0]]),
    "tables/duphead.csv": ({}, [[1, 2.0, 3.0], [2, 4.0, 5.0]]),
    "tables/nan.csv": ({}, 23),
    "tables/retry_fixed.csv": ({}, 5),
    "tables/skip.csv": ({"skip": 2}, [[1, "2.0"], [2, "bad"], [3, "4"]]),
    "tables/thousands.csv": ({"thousands": ","}, [[1, 1234.5], [2, 2000.0], [3, 7.0]]),
    "tables/nul.csv": ({}, [[1, "2.0"], [2, "\x003.0"], [3, "4"]]),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read_right(tmp_path: Path, found: Path, name: str) -> None:
    options, expected = READ[name]
    rows, dead, _ = read(found / name, tmp_path / "work", csv=options)
    assert dead == []
    if isinstance(expected, list):
        assert rows == expected
        return
    with (found / name).open(newline="") as file:
        cells = [row for row in csv.reader(file) if row][1:]
    nothing = {"", *options.get("nullstr", [])}
    told = [[None if cell in nothing else cell for cell in row] for row in cells]
    assert len(rows) == len(told) == expected
    assert [[None if each is None else str(each) for each in row] for row in rows] == told


SAID = {
    # file: what is told of it, with the option that helps
    "csv/colon.csv": "there is one column, 'id:v' (csv delim=... says what else lines are cut at)",
    "csv/na.csv": "v is text, as 'NA' is no number (csv nullstr=NA makes it a missing value)",
    "csv/semicolon_decimal.csv": "v is text, as '1,5' is no number (csv decimal_separator=, reads it as a number)",
    "csv/thousands.csv": "v is text, as '1,234.5' is no number (csv thousands=, reads it as a number)",
    "csv/late_stamp.csv": "v is text, as '2026-02-30' is no time (csv types={v: TIMESTAMP} makes such lines dead",
    "csv/late_zero.csv": "id is text, as '00725' is no number (csv types={id: DOUBLE} drops its zeros)",
    "csv/trailing.csv": "a column without a name is called 'column2'",
    "tables/deccomma.csv": "Value is text, as '1,5' is no number (csv decimal_separator=, reads it as a number)",
    "tables/duphead.csv": "another column 'Value' is called 'Value_1'",
}


@pytest.mark.parametrize("name", SAID)
def test_what_was_made_of_it_is_told(tmp_path: Path, found: Path, name: str) -> None:
    _, _, source = read(found / name, tmp_path / "work")
    assert SAID[name] in str(source.remark())


REFUSED = {
    "csv/book.xlsx": "book.xlsx",  # it is a ZIP archive, and no spreadsheet
    "csv/comment.csv": "say how many lines to pass over with csv skip=N",
    "csv/empty.csv": "nothing to score: empty.csv is empty",
    "csv/headeronly.csv": "headeronly.csv holds no rows",
    "csv/html.csv": "html.csv is a web page or XML by its content, not a table",
    "csv/nlheader.csv": "say how many lines to pass over with csv skip=N",
    "csv/ps.csv": "say how many lines to pass over with csv skip=N",
    "csv/short.csv.gz": "cannot read short.csv.gz: it is damaged (Compressed file ended before the end-of-stream",
    "csv/tab.txt": "with options for CSV, such as its delimiter, it is read as CSV",
    "csv/widens.csv": "the first line has 2 columns, and most of the others have 3",
    "csv/widths": "b.csv has column 'note', which a.csv lacks",
    "tables/comment.csv": "say how many lines to pass over with csv skip=N",
    "tables/skip.csv": "say how many lines to pass over with csv skip=N",
    "tables/utf16nobom.csv": "name its encoding, as in csv encoding=utf-16-le",
    "tables/delta_tbl": "delta_tbl is a table of Delta, which is not read",
    "parquet/empty.parquet": "empty.parquet holds no rows",
    "parquet/intfloat": "b.parquet has column 'more', which a.parquet lacks",
    "parquet/more1": "b.parquet lacks column 'more', which a.parquet has",
    "parquet/strfloat": "column 'v' is double in a.parquet and string in b.parquet",
    "parquet/twice.parquet": "twice.parquet has two columns of the name 'v'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_sentence(tmp_path: Path, found: Path, name: str) -> None:
    with pytest.raises(TallyError) as refused:
        read(found / name, tmp_path / "work")
    assert REFUSED[name] in str(refused.value)


def test_the_encoding_that_is_proposed_is_right(tmp_path: Path, found: Path) -> None:
    rows, dead, _ = read(
        found / "tables/utf16nobom.csv", tmp_path / "work", csv={"encoding": "utf-16-le"}, features=["Value"]
    )
    assert (len(rows), dead, rows[1][1:]) == (12, [], ["pump, 2", -2.25])


def test_a_line_of_blanks_is_dead_and_no_other(tmp_path: Path, found: Path) -> None:
    rows, dead, _ = read(found / "csv/blank.csv", tmp_path / "work")
    assert rows == [[1, 10], [2, 20], [3, 30]]
    assert dead == ["blank.csv, line 5, column 1 (id): could not convert '   ' to BIGINT"]


def test_files_of_which_one_has_nothing_in_a_column_are_one_table(tmp_path: Path, found: Path) -> None:
    rows, dead, _ = read(found / "parquet/mixed", tmp_path / "work")
    assert (rows, dead) == ([[None, 1], [None, 2], [1.5, 3], [2.5, 4]], [])


def test_columns_in_the_names_of_folders_are_columns(tmp_path: Path, found: Path) -> None:
    rows, dead, _ = read(found / "tables/hive", tmp_path / "work")
    assert [(row[1], row[2], str(row[3])) for row in rows] == [
        (value, device, day)
        for device, days in {"a": ((0.1, 5.0), (0.5, 0.7)), "b": ((-0.2, 0.4), (-0.6, 0.8))}.items()
        for day, values in zip(("2026-03-29", "2026-03-30"), days, strict=True)
        for value in values
    ]
    assert dead == []
    rows, dead, _ = read(found / "parquet/hive", tmp_path / "spaces")
    assert (rows, dead) == ([[1.0, "pump 1"], [2.0, "pump 1"], [1.0, "pump2"], [2.0, "pump2"]], [])


@pytest.mark.parametrize("place", ["csv/widths", "parquet/more1", "parquet/intfloat"])
def test_files_that_differ_in_what_is_not_needed_are_scored(tmp_path: Path, found: Path, place: str) -> None:
    source = TableSource.describe([str(found / place)], features=["v"], by=["v"]).located(str(tmp_path))
    source.prepare()
    assert sum(rows for _, _, rows in source.groups()) >= 2


def test_times_with_offsets_are_those_of_utc(tmp_path: Path, found: Path) -> None:
    rows, _, _ = read(found / "tables/t_off.csv", tmp_path / "work")
    assert [str(row[0]) for row in rows] == [
        "2026-03-01 08:00:00+00:00",
        "2026-03-01 08:00:30+00:00",
        "2026-03-01 09:05:00+00:00",
        "2026-03-02 05:00:00+00:00",
    ]


TYPED = ("decimal", "half", "types", "names", "case", "kind", "kind_a", "kind_int")
TYPED_TABLES = ("binary", "decimal", "half", "p_types")


@pytest.mark.parametrize(
    "name",
    [
        *(f"parquet/{name}.parquet" for name in TYPED),
        *(
            f"parquet/ab_{name}.parquet"
            for name in ("big", "bool", "decimal", "float_for_int", "half", "null", "text", "time")
        ),
        *(f"tables/{name}.parquet" for name in TYPED_TABLES),
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_parquet_is_read_as_pyarrow_reads_it(tmp_path: Path, found: Path, name: str, grouped: bool) -> None:
    table = pq.read_table(found / name)
    if grouped and len({each.lower() for each in table.column_names}) < table.num_columns:
        pytest.skip("what SQL does not tell apart is refused")
    options = {"where": "true"} if grouped else {}
    rows, dead, _ = read(found / name, tmp_path / "work", features=[], **options)
    expected = [list(row.values()) for row in table.to_pylist()]
    assert dead == []
    assert [[str(each) for each in row] for row in rows] == [[str(each) for each in row] for row in expected]


def test_every_table_that_went_wrong_has_its_outcome_here(found: Path) -> None:
    told = Path(__file__).read_text("utf-8")
    named = {*READ, *SAID, *REFUSED, "tables/t_off.csv", "tables/p_types.parquet"}
    there = {
        path.relative_to(found).as_posix()
        for folder in ("csv", "parquet", "tables")
        for path in (found / folder).iterdir()
        if path.suffix not in (".skops", ".joblib", ".onnx")
    }
    missing = {name for name in there - named if Path(name).stem.removeprefix("ab_") not in told}
    assert missing == set()
