"""A job over archives is killed at random moments; its rows equal those of an undisturbed run."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.archives import PACKERS
from tests.extent import FULL
from tests.faults.storms import SCORERS, rows, storm, tally

KILLS = 20 if FULL else 3


def test_kills_change_nothing(tmp_path: Path) -> None:
    """A tar, compressed ones, a ZIP and one that is cut off, with what is kept of each."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard, suffix in enumerate(["tar", "tar.gz", "tar.zst", "zip", "tar"]):
        files = {}
        for number in range(45):
            files[f"{number:04}.bin"] = random.Random(1000 * shard + number).randbytes(100 + number)
            files[f"{number:04}.cls"] = b"%d" % (number % 7)
        content = PACKERS[suffix](files)
        (shards / f"{shard}.{suffix}").write_bytes(content if shard < 4 else content[: len(content) // 2])
    sources = sorted(shards.iterdir())
    command = tally("score", *sources, "--keep", "cls", "--model", SCORERS / "steady.py", "--workers", 2)
    calm = tmp_path / "calm"
    subprocess.run([*command, "--out", str(calm), "-q"], check=False, timeout=300)
    expected = rows(calm)
    assert {row["cls"] for row in expected} == set("0123456")
    assert 180 < len(expected) < 240

    out = tmp_path / "stormy"
    storm([*command, "--out", str(out)], out / "_SUCCESS", kills=KILLS, seed=1, log=tmp_path / "log")
    assert rows(out) == expected
