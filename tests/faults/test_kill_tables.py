"""A job with a model for each key is killed at random moments; its rows equal those of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import duckdb
import pytest
from tests.extent import FULL, first
from tests.faults.storms import SCORERS, storm, tally
from tests.forms import FORMS
from tests.integration.test_forms import written

from tally.jobs.facade import Jobs

ROWS = 60_000 if FULL else 20_000
KILLS = 15 if FULL else 3


def score(source: Path, out: Path, *more: object) -> list[str]:
    by = ("--by", "Device,Tag", "--keep", "TS,Value", "--batch-size", 500)
    return tally("score", source, "--model", SCORERS / "slow_rows.py", *by, "--out", out, "--workers", 2, *more)


@pytest.mark.parametrize("name", first(1, ["out", "out.parquet"]))
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


@pytest.mark.skipif(not FULL, reason="large: TALLY_TEST_FULL=1")
@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.input == "table"])
def test_kills_change_nothing_whatever_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    form = FORMS[name]
    place = written(str(tmp_path / "in"), form.files())
    source, *asked = form.words(place)[:-2]
    model = ("--model", SCORERS / "slow_rows.py", "--set", "feature=v", "--workers", 2)
    command = tally("score", source, *asked, *model, "--batch-size", form.count // 120)
    calm, stormy = tmp_path / "calm" / "out.parquet", tmp_path / "stormy" / "out.parquet"
    subprocess.run([*command, "--out", str(calm), "-q"], check=True, timeout=120)
    monkeypatch.setenv("PACE", "0.3")
    storm([*command, "--out", str(stormy)], stormy, kills=20, seed=2, log=tmp_path / "log")
    rows = duckdb.sql(f"FROM read_parquet('{stormy}')").fetchall()
    assert rows == duckdb.sql(f"FROM read_parquet('{calm}')").fetchall()
    assert len(rows) == form.count
