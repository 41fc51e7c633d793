"""A job that keeps thumbnails is killed at random moments: each item that was scored has one, and just one."""

from __future__ import annotations

import io
import random
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.archives import tar
from tests.extent import FULL
from tests.faults.storms import SCORERS, rows, storm, tally

KILLS = 20 if FULL else 3


def thumbnails(out: Path) -> list[dict[str, object]]:
    return sorted(pq.read_table(out / "_thumbnails").to_pylist(), key=lambda row: str(row["key"]))


def test_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in two shards, some of them damaged, and others that are made of them."""
    monkeypatch.setenv("PACE", "0.03")
    for shard in range(2):
        files = {}
        for number in range(100):
            content = io.BytesIO()
            dice = random.Random(1000 * shard + number)
            Image.new("RGB", (20 + number, 60), tuple(dice.randbytes(3))).save(content, "PNG")
            files[f"{number:03}.png"] = content.getvalue()[: 40 if number % 17 == 5 else None]
        (tmp_path / f"{shard}.tar").write_bytes(tar(files))
    command = tally("score", tmp_path / "0.tar", tmp_path / "1.tar", "--thumbnails", 32, "--workers", 2)
    command += ["--model", str(SCORERS / "slow_pictures.py")]
    calm = tmp_path / "calm"
    subprocess.run([*command, "--out", str(calm), "-q"], check=False, timeout=300)
    expected, pictures = rows(calm), thumbnails(calm)
    assert len(expected) == len(pictures) == 200 - 12
    assert [row["key"] for row in pictures] == [row["key"] for row in expected]

    out = tmp_path / "stormy"
    storm([*command, "--out", str(out)], out / "_SUCCESS", kills=KILLS, seed=1, log=tmp_path / "log")
    assert rows(out) == expected
    assert thumbnails(out) == pictures
    assert not (out / "_tally").exists()
