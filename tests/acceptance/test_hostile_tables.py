"""Tables as they come: each is read as its description says, or it is told which file, line and column is at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tally.errors import SourceNotFoundError, SpecError, StorageError
from tally.scorers.base import Scorer
from tally.sources.base import ChunkLimit, Timings
from tally.sources.tables.source import TableSource

SCORER = Scorer()
SCORER.input, SCORER.batch_size = "table", 1024


def rows_of(tmp_path: Path, place: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, str], TableSource]:
    """The rows, the dead items' messages by key, and the source."""
    source = TableSource.describe([str(place)], features=None, **options).located(str(tmp_path / "work"))
    source.prepare()
    rows: list[dict[str, Any]] = []
    dead: dict[str, str] = {}
    for chunk in source.plan(None, 0, lambda: ChunkLimit(1 << 20, 1 << 30)):
        keys = source.keys(chunk)
        for batch in source.read(chunk, SCORER, Timings()):
            if len(batch.keys):
                rows += batch.values.to_pylist()
            dead |= {keys[position]: error.message for position, error in batch.dead}
    return rows, dead, source


SPECTRUM = ["comma_in_quotes", "empty", "escaped_quotes", "newlines", "quotes_and_newlines", "utf8"]


@pytest.mark.parametrize("name", SPECTRUM)
def test_a_csv_file_is_read_as_its_description_says(tmp_path: Path, data: Path, name: str) -> None:
    folder = data / "hostile" / "tables"
    rows, dead, _ = rows_of(tmp_path, folder / f"spectrum_{name}.csv")
    expected = json.loads((folder / f"spectrum_{name}.json").read_text("utf-8"))
    shown = [{column: "" if value is None else str(value) for column, value in row.items()} for row in rows]
    assert (shown, dead) == (expected, {})


WEATHER = [
    {"date": f"2011-01-0{day}", "temperature": temperature, "place": place}
    for place, temperatures in (("Galway", [1, -1, 0]), ("Berkeley", [6, 8, 5]))
    for day, temperature in enumerate(temperatures, 1)
]


@pytest.mark.parametrize(
    ("name", "count", "first", "remark"),
    [
        ("messy_simple.csv", 6, WEATHER[0], None),
        ("messy_simple.ssv", 6, WEATHER[0], "messy_simple.ssv: the delimiter is a semicolon"),
        ("messy_long.csv", 3999, {"foo": "foo"}, None),
        (
            "messy_null.csv",
            10,
            {"column0": 1, "column1": "null", "column2": 0, "column3": "0"},
            "messy_null.csv: there is no header (columns are called column0 to column3)",
        ),
        (
            "messy_simple.psv",
            28,
            {
                "Year": 1986,
                "New dwellings": 44000,
                "Other dwellings": 35000,
                "All dwellings": 36000,
                "First time buyers": 27000,
                "Former owner occupiers": 45000,
            },
            "messy_simple.psv: the delimiter is a vertical bar",
        ),
        ("messy_skip_initials.csv", 2, {"field1": "hello", "field2": "    goodbye"}, None),
    ],
)
def test_messy_files_of_csv(
    tmp_path: Path, data: Path, name: str, count: int, first: dict[str, Any], remark: str | None
) -> None:
    rows, dead, source = rows_of(tmp_path, data / "hostile" / "tables" / name)
    said = (source.remark() or "").split("; ")
    assert (len(rows), dead, said[0] or None) == (count, {}, remark)
    # Columns that are text for the sake of some values are told, too.
    assert all("is text, as 'null' is no number (csv nullstr=null" in each for each in said[1:])
    assert {key: str(value) if key == "date" else value for key, value in rows[0].items()} == first
    if name.startswith("messy_simple") and count == 6:
        assert [{**row, "date": str(row["date"])} for row in rows] == WEATHER


def test_a_spreadsheet_is_its_rows(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("openpyxl")
    rows, dead, _ = rows_of(tmp_path, data / "hostile" / "tables" / "messy_simple.xlsx")
    assert ([{**row, "date": str(row["date"])[:10]} for row in rows], dead) == (WEATHER, {})


def test_what_stands_for_nothing_can_be_told(tmp_path: Path, data: Path) -> None:
    place = data / "hostile" / "tables" / "messy_null.csv"
    rows, dead, _ = rows_of(tmp_path, place, csv={"nullstr": "null"})
    assert dead == {}
    assert rows[:3] == [
        {"column0": 1, "column1": None, "column2": 0, "column3": 0},
        {"column0": 2, "column1": 0, "column2": 0, "column3": None},
        {"column0": 3, "column1": None, "column2": None, "column3": None},
    ]


def test_utf_16_is_known_by_its_mark(tmp_path: Path, data: Path) -> None:
    rows, dead, _ = rows_of(tmp_path, data / "hostile" / "tables" / "messy_utf-16le_encoded.csv")
    assert (len(rows), dead) == (327, {})
    assert (rows[0]["Organisation_code"], rows[0]["Organisation_name"]) == ("5C1", "Enfield PCT")
    assert sum(row["Total_number_of_SCTs"] is not None for row in rows) == 327


def test_another_encoding_is_asked_for(tmp_path: Path, data: Path) -> None:
    place = data / "hostile" / "tables" / "messy_spanish_chars.csv"
    with pytest.raises(
        StorageError,
        match=r"messy_spanish_chars\.csv, line 1, column 8: byte 0xf3 is not valid UTF-8\n.*encoding=latin-1",
    ):
        rows_of(tmp_path, place)
    rows, dead, source = rows_of(tmp_path, place, csv={"encoding": "latin-1"})
    assert dead == {}
    assert len(rows) == len([line for line in place.read_bytes().split(b"\r\n")[1:] if line])
    assert source.features[7] == "Descripción"
    assert rows[0]["Gasto total 2011"] == "229,932.50"


def test_lines_in_another_encoding_are_dead_and_no_others(tmp_path: Path, data: Path) -> None:
    place = data / "hostile" / "tables" / "messy_sparse_with_column_errors.csv"
    rows, dead, _ = rows_of(tmp_path, place)
    lines = place.read_bytes().split(b"\r\n")
    good = {number for number, line in enumerate(lines, 1) if line.decode("utf-8", "ignore").encode() == line}
    faulty = [number for number in range(1, len(lines) + 1) if number not in good]
    assert list(dead) == [f"{place.name} line {number}" for number in faulty]
    assert dead[f"{place.name} line 2"] == (
        f"{place.name}, line 2, column 2 (Bezeichnung): not valid UTF-8; "
        "name the file's encoding, as in csv encoding=latin-1"
    )
    assert len(rows) == len([line for line in lines if line]) - 1 - len(faulty)
    every, none, _ = rows_of(tmp_path / "latin", place, csv={"encoding": "latin-1"})
    assert (len(every), none) == (len(rows) + len(faulty), {})


@pytest.mark.parametrize("name", ["messy_small.csv", "messy_utf8bom.csv"])
def test_a_header_alone_is_nothing_to_score(tmp_path: Path, data: Path, name: str) -> None:
    with pytest.raises(SourceNotFoundError, match=f"nothing to score: .*{name} holds no rows"):
        rows_of(tmp_path, data / "hostile" / "tables" / name)


def test_the_mark_of_utf_8_is_no_part_of_a_name(data: Path) -> None:
    source = TableSource.describe([str(data / "hostile" / "tables" / "messy_utf8bom.csv")], features=None)
    assert source.features == ("kitten", "win")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("messy_blank_line.ods", "is a spreadsheet"),
        ("messy_encrypted_no_password.xls", "is a spreadsheet"),
        ("messy_simple.zip", "is packed, and its name does not tell what it holds"),
    ],
)
def test_what_is_no_table_is_refused_by_its_name(data: Path, name: str, what: str) -> None:
    with pytest.raises(SpecError, match=f"{name} {what}"):
        TableSource.describe([str(data / "hostile" / "tables" / name)], features=None)


def test_every_hostile_table_has_its_outcome_here(data: Path) -> None:
    told = Path(__file__).read_text("utf-8")
    there = {path.name for path in (data / "hostile" / "tables").iterdir() if path.suffix != ".json"}
    named = {name for name in there if name in told} | {f"spectrum_{name}.csv" for name in SPECTRUM}
    assert there == named


# -- series of sensors --------------------------------------------------------------------------------


def test_readings_of_pumps_are_grouped_by_device_and_tag(tmp_path: Path, data: Path) -> None:
    place = data / "sensors" / "azure_iot" / "sensor_data.csv"
    options: dict[str, Any] = {"by": ["Device", "Tag"], "keep": ["TS"]}
    source = TableSource.describe([str(place)], features=["Value"], **options).located(str(tmp_path / "work"))
    source.prepare()
    groups = source.groups()
    assert [tuple(key.values()) for key, _, _ in groups] == [
        (device, tag) for device in (1, 2, 3) for tag in range(1, 6)
    ]
    assert sum(rows for _, _, rows in groups) == len(place.read_text().splitlines()) - 1 == 17768
    _, first, rows = groups[7]
    values = [line.split(",") for line in place.read_text().splitlines()[1:]]
    assert source.group_table(first, rows)["Value"].to_pylist() == [
        float(value) for _, device, tag, value in values if (device, tag) == ("2", "3")
    ]


@pytest.mark.parametrize(
    ("place", "options", "count", "features"),
    [
        ("nab/realKnownCause/nyc_taxi.csv", {"time": "timestamp"}, 10320, 1),
        ("skab/valve1/0.csv", {"time": "datetime", "keep": ["anomaly", "changepoint"]}, 1147, 8),
        ("cmapss/train_FD001.txt", {"csv": {"delim": " ", "header": False}}, 20631, 26),
    ],
)
def test_series_of_sensors_are_read(
    tmp_path: Path, data: Path, place: str, options: dict[str, Any], count: int, features: int
) -> None:
    source = TableSource.describe([str(data / "sensors" / place)], features=features, **options)
    source = source.located(str(tmp_path / "work"))
    source.prepare()
    [chunk] = source.plan(None, 0, lambda: ChunkLimit(1 << 20, 1 << 30))
    batches = list(source.read(chunk, SCORER, Timings()))
    assert sum(len(batch.keys) for batch in batches) == chunk.count == count
    assert not any(batch.dead for batch in batches)
    assert all(column.null_count == 0 for batch in batches for column in batch.values.columns)
