"""Every form of a table gives the same rows, in whatever chunks, and what is damaged is no shorter table."""

from __future__ import annotations

import bz2
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import orc
from tests.services import require
from tests.tables import COLUMNS, FORMS, ROWS, excel, zipped
from tests.unit.test_tables import Outcome, outcome, plan, prepared, problems

from tally.errors import SpecError, StorageError
from tally.sources.base import ChunkLimit
from tally.sources.tables.source import TableSource


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows_in_whatever_chunks(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.write_bytes(FORMS[name]())
    source = prepared(tmp_path, str(place), features=["v"], keep=["id"])
    whole = Outcome(source)
    assert [row["id"] for row in whole.info.values()] == COLUMNS["id"]
    assert [row["v"] for row in whole.rows.values()] == COLUMNS["v"]
    assert (list(whole.rows), whole.dead) == ([f"{name}#{row + 1}" for row in range(ROWS)], {})

    chunks = plan(source, items=700)
    assert len(chunks) > 4
    for done in range(len(chunks)):  # whoever goes on after so many chunks, in another process
        again: TableSource = pickle.loads(pickle.dumps(source))
        again.prepare()
        left = list(
            again.plan(chunks[done].cursor, chunks[done].first + chunks[done].count, lambda: ChunkLimit(700, 1 << 40))
        )
        assert [each.payload for each in left] == [each.payload for each in chunks[done + 1 :]]
    parts = Outcome(pickle.loads(pickle.dumps(source)), chunks)
    assert (parts.rows, parts.info) == (whole.rows, whole.info)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "r.feather"])
def test_a_file_that_was_cut_off_is_no_shorter_table(tmp_path: Path, name: str) -> None:
    content = FORMS[name]()
    for left in (len(content) // 2, len(content) - 3):
        place = tmp_path / f"{left}-{name}"
        place.write_bytes(content[:left])
        with pytest.raises(StorageError, match=f"cannot read .*{name}"):
            outcome(tmp_path, str(place), features=["v"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv.zst", b"a,b\n1,2\n", "it is not packed with zstd, by its content"),
        ("a.csv.xz", b"", "it is not packed with xz, by its content"),
        ("a.csv.zip", zipped(b"a\n1\n", "a.csv", "b.csv"), r"holds 2 files \(a.csv, b.csv\), and one table is read"),
        ("a.csv", zipped(b"", "xl/workbook.xml"), "is a spreadsheet by its content"),
        ("a.json", b'{"data": [{"a": 1}]}', "neither a list of objects nor JSON Lines\n.*orient='records'"),
        ("a.json", b'[{"a": 1},]', "a comma after its last object, number 1"),
        ("a.json", b'[{"a": 1}] [', "something follows after its list of 1 objects"),
        ("a.json", b'[{"a": "\xff"}]', "it is not valid UTF-8"),
        ("a.xlsx", b"PK", "it is no Excel file, or damaged"),
        ("a.avro", b"Obj", "it is no Avro file, or damaged"),
    ],
)
def test_what_is_something_else_is_said(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    if name.endswith("xlsx"):
        require("openpyxl", find_spec("openpyxl") is not None)
    if name.endswith("avro"):
        require("fastavro", find_spec("fastavro") is not None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StorageError, match=said):
        outcome(tmp_path, str(tmp_path / name))


def test_numbers_in_a_list_of_json_keep_their_digits_and_faults_are_told_by_object(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    place.write_bytes(
        b'\xef\xbb\xbf[{"id": 12345678901234567890123, "v": 1},\n 7, {"v": "x", "id": 2}, {"v": 2.5}, {"v": 3}]\n'
    )
    found = outcome(tmp_path, str(place), features=["v"], keep=["id"])
    assert [row["id"] for row in found.info.values()] == ["12345678901234567890123", None, None]
    assert found.messages == {
        "a.json object 2": "a.json, object 2, column 1: not a JSON object",
        "a.json object 3": "a.json, object 3, column v: could not convert 'x' to DOUBLE",
    }


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"v": 1}\n{"v": 2}\n')
    assert outcome(tmp_path, str(tmp_path / "a.json")).rows == {"a.json#1": {"v": 1}, "a.json#2": {"v": 2}}


def test_folders_give_no_json_and_no_spreadsheets(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv.bz2").write_bytes(bz2.compress(b"v\n1\n"))
    (tmp_path / "in" / "about.json").write_text("{}")
    (tmp_path / "in" / "notes.xlsx").write_text("")
    source = prepared(tmp_path, str(tmp_path / "in"), features=1)
    assert list(Outcome(source).rows) == ["a.csv.bz2#1"]
    assert "2 files passed over, not tables by their name: .json 1, .xlsx 1" in str(source.remark())


def test_cells_of_a_spreadsheet_that_are_no_values_are_told_by_row(tmp_path: Path) -> None:
    cells = [
        [None, None],
        ["id", "v"],
        *([row, row + 0.5] for row in range(6)),
        [6, "#DIV/0!"],
        [7, "=A3+1"],
        [8, "text"],
    ]
    (tmp_path / "a.xlsx").write_bytes(excel(cells))
    found = outcome(tmp_path, str(tmp_path / "a.xlsx"), features=["v"], keep=["id"])
    assert [row["v"] for row in found.rows.values()] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert found.messages == {
        "a.xlsx row 9": "a.xlsx, row 9, column v: could not convert '#DIV/0!' to DOUBLE",
        "a.xlsx row 10": "a.xlsx, row 10, column v: could not convert '=A3+1' to DOUBLE",
        "a.xlsx row 11": "a.xlsx, row 11, column v: could not convert 'text' to DOUBLE",
    }
    source = prepared(tmp_path / "kept", str(tmp_path / "a.xlsx"), features=["id"], keep=["v"])
    assert "a.xlsx: v is text, as '#DIV/0!' is no number" in str(source.remark())


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([["a", "a"], [1, 2]], "has two columns of the name 'a'"),
        ([["a"], [1, 2]], "cell B2 holds 2, and its column has no name"),
        ([[1, 2], [3, 4]], "its first row names the columns, and holds the number 1"),
    ],
)
def test_a_sheet_that_is_no_table_is_refused(tmp_path: Path, cells: list[list[Any]], said: str) -> None:
    (tmp_path / "a.xlsx").write_bytes(excel(cells))
    with pytest.raises(StorageError, match=said):
        outcome(tmp_path, str(tmp_path / "a.xlsx"))


def test_several_sheets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(excel(more="notes"))
    with pytest.raises(StorageError, match=r"has 2 sheets \(Sheet, notes\), and one table is read"):
        outcome(tmp_path, str(tmp_path / "a.xlsx"))


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, library in (("a.xlsx", "openpyxl"), ("a.avro", "fastavro")):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        monkeypatch.setitem(__import__("sys").modules, library, None)
        with pytest.raises(SpecError, match=rf"{name} is .*read with {library}.*\n.*pip install 'tally-scoring\["):
            outcome(tmp_path, str(tmp_path / name))


def test_types_of_avro_and_orc_come_through(tmp_path: Path) -> None:
    require("fastavro", find_spec("fastavro") is not None)
    from datetime import UTC, datetime
    from decimal import Decimal

    import fastavro

    kinds = {
        "t": {"type": "long", "logicalType": "timestamp-millis"},
        "m": {"type": "map", "values": "int"},
        "e": {"type": "enum", "name": "E", "symbols": ["A", "B"]},
        "d": {"type": "bytes", "logicalType": "decimal", "precision": 5, "scale": 2},
        "f": {"type": "fixed", "name": "F", "size": 2},
        "l": {"type": "array", "items": "string"},
        "b": ["null", "bytes"],
    }
    row = {"t": datetime(2026, 1, 1, tzinfo=UTC), "m": {"a": 1}, "e": "B", "d": Decimal("1.25"), "f": b"xy"}
    row |= {"l": ["x"], "b": None}
    schema = {"type": "record", "name": "r", "fields": [{"name": name, "type": kind} for name, kind in kinds.items()]}
    with (tmp_path / "a.avro").open("wb") as file:
        fastavro.writer(file, schema, [row])
    [found] = outcome(tmp_path / "avro", str(tmp_path / "a.avro"), keep=["*"]).info.values()
    assert found == {**row, "m": [("a", 1)]}
    held = {"d": [Decimal("1.50")], "m": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "b": [b"x"]}
    orc.write_table(pa.table(held), tmp_path / "a.orc")
    [found] = outcome(tmp_path / "orc", str(tmp_path / "a.orc"), keep=["*"]).info.values()
    assert found == {"d": Decimal("1.50"), "m": [("a", 1)], "b": b"x"}


def test_a_name_that_does_not_tell_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(b"a\n1\n"))
    assert problems([str(tmp_path / "a.zip")]) == [
        "a.zip is packed, and its name does not tell what it holds; call it so (readings.csv.zip), or unpack it"
    ]
