from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tally.errors import SourceChangedError, SpecError
from tally.sources.base import Timings
from tally.sources.tables.pictures import PictureColumnSource
from tally.testing.sources import Recorder, chunks_of


def write(path: Path, columns: dict[str, Any], group: int = 4) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def read(source: PictureColumnSource, items: int = 1000) -> tuple[dict[str, bytes], dict[str, str]]:
    """Content and error by key."""
    scorer = Recorder()
    scorer.input, scorer.batch_size = "bytes", 2
    values: dict[str, bytes] = {}
    dead: dict[str, str] = {}
    for chunk in chunks_of(source, items):
        keys = source.keys(chunk)
        for batch in source.read(chunk, scorer, Timings()):
            values |= dict(zip(batch.keys, batch.values, strict=True))
            dead |= {keys[position]: error.message for position, error in batch.dead}
    return values, dead


CONTENTS = [b"%d" % number * 50 for number in range(100)]
EXPECTED = {f"a.parquet#{row}": content for row, content in enumerate(CONTENTS, 1)}


@pytest.mark.parametrize("items", [7, 1000])
@pytest.mark.parametrize("group", [5, 40, 1000])
@pytest.mark.parametrize(
    "column",
    [
        pa.array(CONTENTS),
        pa.array(CONTENTS, pa.large_binary()),
        pa.array(CONTENTS).dictionary_encode(),
        pa.array([base64.b64encode(content).decode() for content in CONTENTS]),
        pa.array(["data:image/png;base64," + base64.b64encode(content).decode() for content in CONTENTS]),
        pa.array([{"bytes": content} for content in CONTENTS]),
    ],
    ids=["binary", "large", "dictionary", "base64", "data-url", "struct"],
)
def test_each_form_gives_its_content(tmp_path: Path, column: pa.Array, group: int, items: int) -> None:
    path = write(tmp_path / "a.parquet", {"picture": column}, group)
    source = PictureColumnSource.describe([str(path)], "bytes", item_column="picture")
    assert read(source, items) == (EXPECTED, {})


def test_cells_without_a_picture_are_dead(tmp_path: Path) -> None:
    column = pa.array([{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "/etc/passwd"}, None, {"bytes": None}])
    values, dead = read(PictureColumnSource.describe([str(write(tmp_path / "a.parquet", {"image": column}))], "bytes"))
    assert values == {"a.parquet/a": b"1"}
    assert dead == {
        "a.parquet#2": "it has no bytes, only the path '/etc/passwd', and paths in tables are not followed",
        "a.parquet#3": "its cell is empty",
        "a.parquet#4": "its cell is empty",
    }


def test_text_that_is_no_base64_is_dead(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"b": [base64.b64encode(b"good").decode(), "no base64!"]})
    values, dead = read(PictureColumnSource.describe([str(path)], "bytes", item_column="b"))
    assert values == {"a.parquet#1": b"good"}
    assert "its text is no base64" in dead["a.parquet#2"]


@pytest.mark.parametrize(
    ("columns", "asked", "said"),
    [
        ({"a": [b"1"], "b": [b"2"]}, None, r"has 2 columns of bytes \(a, b\)"),
        ({"a": ["x"], "b": [1]}, None, r"has no column of bytes \(there are a \(string\), b \(int64\)\)"),
        ({"image": [b"1"]}, "imag", "has no column 'imag'; did you mean 'image'"),
        ({"a": [1]}, "a", "'a' of .* is int64: no bytes, and no text in base64"),
        ({"a": ["cats/1.jpg"]}, "a", r"is text, and no base64: 'cats/1\.jpg'"),
    ],
)
def test_a_column_that_cannot_be_taken(tmp_path: Path, columns: dict[str, Any], asked: str | None, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        PictureColumnSource.describe([str(write(tmp_path / "a.parquet", columns))], "image", item_column=asked)


def test_where_paths_stand_instead_of_pictures_the_next_step_is_said(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as refused:
        PictureColumnSource.describe([str(write(tmp_path / "a.parquet", {"url": ["cats/1.jpg"]}))], "image")
    assert "given with --items; of a table in memory, --item-column names such a column, too" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (["lable"], "has no column 'lable'; did you mean 'label'"),
        (["key=label"], "'key' is the name of another column"),
        (["label", "label=x"], "'label' is the name of another column"),
    ],
)
def test_what_cannot_be_kept(tmp_path: Path, keep: Sequence[str], said: str) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"1"], "label": [1], "x": [2]})
    with pytest.raises(SpecError, match=said):
        PictureColumnSource.describe([str(path)], "image", keep=keep)


def test_files_that_cannot_be_read_are_dead(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet", {"image": CONTENTS[:3]}).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "c.parquet", {"other": [b"1"]})
    write(tmp_path / "d.parquet", {"image": [b"1"]})
    values, dead = read(PictureColumnSource.describe([str(tmp_path)], "bytes"), 2)
    assert list(values) == ["a.parquet#1", "a.parquet#2", "a.parquet#3", "d.parquet#1"]
    assert list(dead) == ["b.parquet", "c.parquet"]
    assert "it is no Parquet file" in dead["b.parquet"]
    assert "no column 'image'" in dead["c.parquet"]


def test_damage_within_a_file_costs_what_lies_behind_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [bytes([n]) * 3000 for n in range(8)]}, 2)
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = min(filter(None, [column.dictionary_page_offset, column.data_page_offset]))
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    values, dead = read(PictureColumnSource.describe([str(path)], "bytes"))
    assert list(values) == ["a.parquet#1", "a.parquet#2", "a.parquet#3", "a.parquet#4"]
    assert list(dead) == ["a.parquet#5", "a.parquet#6", "a.parquet#7", "a.parquet#8"]
    assert "the file cannot be read beyond here" in dead["a.parquet#5"]


def test_a_file_that_has_changed_is_not_scored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": CONTENTS})
    source = PictureColumnSource.describe([str(path)], "bytes")
    first = chunks_of(source, 10)[0]
    write(path, {"image": CONTENTS[1:]})
    scorer = Recorder()
    scorer.input, scorer.batch_size = "bytes", 10
    [batch] = source.read(first, scorer, Timings())
    assert (batch.values, len(batch.dead)) == ([], 10)
    assert "has changed" in batch.dead[0][1].message
    with pytest.raises(SourceChangedError):
        chunks_of(source, 10, after=first.cursor, first=10)
