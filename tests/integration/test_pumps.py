"""The example of the pumps: simulate, train, score, and three hours by the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pumps" / "run.sh"


def test_the_example_runs_from_readings_to_scored_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "pumps"
    ran = subprocess.run(["sh", str(EXAMPLE), str(out)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (out / "models" / "pumps" / "models.parquet").is_file()
    hours = sorted(path.name for path in (out / "predictions").iterdir())
    assert hours == ["2026-01-02T0000", "2026-01-02T0100", "2026-01-02T0200"]
    assert all((out / "predictions" / hour / "_SUCCESS").is_file() for hour in hours)
    columns = "key, Device, Tag, TS, Value, anomaly, score"
    day = f"SELECT {columns} FROM read_parquet('{out}/day/*.parquet') WHERE TS < '2026-01-02 03:00'"
    scored = f"SELECT {columns} FROM read_parquet('{out}/predictions/*/*.parquet')"
    assert duckdb.sql(f"({day}) EXCEPT ({scored})").fetchall() == []
    counts = [duckdb.sql(f"SELECT count(*) FROM ({query})").fetchall() for query in (day, scored)]
    assert counts[0] == counts[1]
