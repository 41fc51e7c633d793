"""A job with a model for each key is killed at random moments; its rows equal those of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import duckdb
import pytest
from tests.extent import FULL
from tests.faults.storms import SCORERS, storm, tally

from tally.jobs.facade import Jobs

ROWS = 60_000 if FULL else 30_000
KILLS = 15 if FULL else 6


def score(source: Path, out: Path, *more: object) -> list[str]:
    by = ("--by", "Device,Tag", "--keep", "TS,Value", "--batch-size", 500)
    return tally("score", source, "--model", SCORERS / "slow_rows.py", *by, "--out", out, "--workers", 2, *more)


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = tmp_path / "readings.csv"
    duckdb.sql(
        f"COPY (SELECT TIMESTAMP '2026-01-01' + INTERVAL (i) SECOND AS TS, i % 40 AS Device, i % 3 AS Tag, "
        f"i * 0.5 AS Value FROM range({ROWS}) AS rows(i)) TO '{source}'"
    )
    calm = tmp_path / "calm" / name
    subprocess.run(score(source, calm, "-q"), check=True, timeout=120)

    monkeypatch.setenv("PACE", "0.15")
    out = tmp_path / "stormy" / name
    finished = out if out.suffix else out / "_SUCCESS"
    storm(score(source, out), finished, kills=KILLS, seed=1, log=tmp_path / "log")

    def rows(place: Path) -> list[tuple[object, ...]]:
        found = duckdb.sql(f"FROM read_parquet('{place if place.suffix else place / '*.parquet'}')").fetchall()
        return found if place.suffix else sorted(found)

    assert rows(out) == rows(calm)
    assert len(rows(out)) == ROWS
    if out.suffix:
        assert [row[0] for row in rows(out)] == [f"readings.csv#{n}" for n in range(1, ROWS + 1)]
    assert sorted(os.listdir(out.parent)) == sorted(os.listdir(calm.parent))  # no work files are left
    record = Jobs().store.newest(limit=1)[0]
    assert (record.state, record.items, record.done, record.dead) == ("finished", ROWS, ROWS, 0)
