"""A job over pictures in Parquet, or of COCO JSON, is killed at random moments; its rows are as if undisturbed."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.extent import FULL
from tests.faults.storms import SCORERS, rows, storm, tally
from tests.forms import coco
from tests.integration.test_forms import written

KILLS = 20 if FULL else 3
ROWS = 70


def in_parquet(folder: Path) -> tuple[list[object], int]:
    """Named and nameless pictures, some of them missing, one file that is cut off, and a column that is kept: the
    source, what is asked of it, and how many of its items can be scored."""
    for file in range(4):
        some = random.Random(file)
        contents = [some.randbytes(100 + number) for number in range(ROWS)]
        pictures = [
            {"bytes": None if number == 13 else content, "path": None if number % 5 == 0 else f"{number}.png"}
            for number, content in enumerate(contents)
        ]
        path = folder / f"{file}.parquet"
        pq.write_table(pa.table({"image": pictures, "label": list(range(ROWS))}), path, row_group_size=16)
        if file == 3:
            path.write_bytes(path.read_bytes()[:2000])
    return [folder, "--item-column", "image", "--keep", "label"], 3 * (ROWS - 1)


def in_coco(folder: Path) -> tuple[list[object], int]:
    """Pictures with what is annotated in them; one of them is not there."""
    written(str(folder), coco(200))
    (folder / "images" / "13.png").unlink()
    return ["--items", folder / "instances.json"], 199


@pytest.mark.parametrize(
    "make", [in_parquet, pytest.param(in_coco, marks=pytest.mark.skipif(not FULL, reason="TALLY_TEST_FULL=1"))]
)
def test_kills_change_nothing(tmp_path: Path, make: Callable[[Path], tuple[list[object], int]]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    given, count = make(folder)
    command = tally("score", *given, "--workers", 2, "--model", SCORERS / "steady.py")
    calm = tmp_path / "calm"
    subprocess.run([*command, "--out", str(calm), "-q"], check=False, timeout=300)
    expected = rows(calm)
    assert len(expected) == count
    assert len({row["key"] for row in expected}) == len(expected)

    out = tmp_path / "stormy"
    storm([*command, "--out", str(out)], out / "_SUCCESS", kills=KILLS, seed=1, log=tmp_path / "log")
    assert rows(out) == expected
