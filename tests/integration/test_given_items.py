"""Items that a Python program has in hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tests.integration.test_parts import Doubled, Length

import tally
from tally.errors import JobError, JobExistsError, SpecError
from tally.scorers.base import Scorer


class Mean(Scorer):
    def score(self, batch: list[Any]) -> list[dict[str, float]]:
        return [{"mean": float(each.mean())} for each in batch]


class Corners(Scorer):
    def score(self, batch: list[Any]) -> list[dict[str, Any]]:
        return [
            {"shape": "x".join(map(str, each.shape)), "first": int(each[0, 0, 0]), "last": int(each[-1, -1, 0])}
            for each in batch
        ]


def test_pictures_bytes_and_paths(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (3, 2), (40, 40, 40)).save("a.png")
    array = np.full((2, 3, 3), 20, np.uint8)
    items = [Path("a.png"), Image.new("L", (3, 2), 30), array, Path("a.png").read_bytes(), "none.png"]
    job = tally.score(iter(items), Mean, tmp_path / "out", quiet=True, workers=1)
    assert job.results().to_pylist() == [
        {"key": "a.png", "mean": 40.0},
        {"key": "000001", "mean": 30.0},
        {"key": "000002", "mean": 20.0},
        {"key": "000003", "mean": 40.0},
    ]
    assert job.dead().to_pydict()["key"] == ["none.png"]
    with pytest.raises(JobExistsError):
        tally.score(iter(items), Mean, tmp_path / "out", quiet=True)
    [kept] = (home / "given").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    job.delete()
    assert not kept.exists()
    for wrong in ([np.zeros((2, 2))], [3], [], 7):
        with pytest.raises(SpecError):
            tally.score(wrong, Mean, tmp_path / "wrong", quiet=True)  # type: ignore[arg-type]


def test_pictures_of_pillow_are_what_their_files_are(tmp_path: Path) -> None:
    halves = np.zeros((4, 8, 3), np.uint8)
    halves[:, 4:] = 200
    turned = Image.Exif()
    turned[0x0112] = 6
    names = [str(tmp_path / name) for name in ("1.png", "2.tif", "3.tif")]
    Image.fromarray(halves).save(names[0], exif=turned)
    Image.fromarray(np.array([[0, 40_000]], np.int32)).save(names[1])
    Image.fromarray(np.array([[0.0, 0.5]], np.float32)).save(names[2])
    files = tally.score(names, Corners, tmp_path / "files", quiet=True, workers=1)
    opened = tally.score([Image.open(name) for name in names], Corners, tmp_path / "opened", quiet=True, workers=1)
    for job in files, opened:
        rows = sorted(job.results().to_pylist(), key=lambda row: str(row["key"]))
        assert [(row["shape"], row["first"], row["last"]) for row in rows] == [
            ("8x4x3", 0, 200),
            ("1x2x3", 0, 156),
            ("1x2x3", 0, 128),
        ]


def test_urls_that_differ_in_what_is_not_shown_have_keys_of_their_own(tmp_path: Path) -> None:
    urls = [f"http://127.0.0.1:9/get?id={number}" for number in range(3)]  # nobody listens there
    with pytest.raises(JobError, match="all 3 items failed"):
        tally.score(urls, Mean, tmp_path / "out", quiet=True, workers=1)
    [job] = tally.jobs(place=str(tmp_path / "out"))
    shown = "http://127.0.0.1:9/get?id=***"
    assert sorted(job.dead().to_pydict()["key"]) == [shown, f"{shown}#2", f"{shown}#3"]
    (tmp_path / "urls.txt").write_text("\n".join(urls))
    with pytest.raises(SpecError, match="What follows \\? in a URL may be a secret, and is not in its key"):
        tally.score(None, Mean, tmp_path / "listed", items=tmp_path / "urls.txt", quiet=True)


@pytest.mark.parametrize("one", [b"content", np.zeros((6, 4, 3), np.uint8), np.zeros((6, 4), np.uint8), {"a.png": b""}])
def test_one_item_is_not_taken_apart(tmp_path: Path, one: Any) -> None:
    with pytest.raises(SpecError, match=r"is one item, and not several|its keys are not taken"):
        tally.score(one, Mean, tmp_path / "out", quiet=True)


def test_a_relation_of_duckdb_is_a_table(tmp_path: Path) -> None:
    rows = duckdb.sql("select unnest([1, 2]) as n")
    job = tally.score(rows, Doubled, tmp_path / "out", quiet=True, workers=1)
    assert job.results().to_pydict()["twice"] == [2, 4]


def test_tables(tmp_path: Path) -> None:
    rows = tally.score(pa.table({"n": [1, 2]}), Doubled, tmp_path / "rows", quiet=True, workers=1)
    assert rows.results().to_pydict()["twice"] == [2, 4]
    (tmp_path / "a").write_bytes(b"123")
    table = pa.table({"where": [str(tmp_path / "a")], "split": ["x"]})
    job = tally.score(table, Length, tmp_path / "named", item_column="where", keep="split", quiet=True, workers=1)
    assert job.results().to_pylist() == [{"key": str(tmp_path / "a"), "split": "x", "length": 3}]
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"n": [5]})
    assert tally.score(frame, Doubled, tmp_path / "pandas", quiet=True).results().to_pydict()["twice"] == [10]
