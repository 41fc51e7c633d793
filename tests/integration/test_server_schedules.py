"""Servers run schedules: each interval once, however many of them there are."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.server import lengths, running, until

INTERVALS = 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "home"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "item.txt").write_text("an item")
    (tmp_path / "scorer.py").write_text(lengths())
    return tmp_path


def add(client: httpx2.Client, folder: Path) -> None:
    """A schedule whose last three intervals were missed, and are run one after another."""
    job = {
        "source": [str(folder / "in")], "model": str(folder / "scorer.py"), "workers": 1,
        "out": str(folder / "out" / "{interval_start_utc:%Y%m%dT%H}"),
    }  # fmt: skip
    since = time.strftime("%Y-%m-%dT%H:00", time.gmtime(time.time() - INTERVALS * 3600))
    added = client.post("/schedules", json={"name": "hourly", "job": job, "cron": "0 * * * *", "since": since})
    assert added.status_code == 201, added.text


def runs(client: httpx2.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/schedules/hourly").raise_for_status().json()["runs"]
    return found


def test_several_servers_and_a_loop_beside_them_run_each_interval_once(folder: Path) -> None:
    with running("--root", folder) as one, running("--root", folder) as other, one.client() as client:
        add(client, folder)
        loop = [sys.executable, "-m", "tally", "schedule", "run"]  # ends once all that was due has ended
        assert subprocess.run(loop, timeout=300, capture_output=True).returncode == 0
        done = runs(client)
        jobs = client.get("/jobs").json()["jobs"]
        assert other.process.poll() is None
    assert [run["state"] for run in done] == ["finished"] * len(done)
    assert len({run["interval_start"] for run in done}) == len(done) >= INTERVALS
    assert sorted(run["job_id"] for run in done) == sorted(job["id"] for job in jobs)
    assert {run["attempts"] for run in done} == {1}


def test_a_server_without_schedules_leaves_them_to_others(folder: Path) -> None:
    def score(client: httpx2.Client, out: str) -> None:
        fields = {"source": [str(folder / "in")], "model": str(folder / "scorer.py"), "out": str(folder / out)}
        until(client, client.post("/jobs", json=fields).json()["id"], lambda view: view["state"] == "finished")

    with running("--root", folder, "--no-schedules") as server, server.client() as client:
        add(client, folder)
        score(client, "by hand")
        assert runs(client) == []
        with running("--root", folder), server.client() as same:
            ended = until(same, "", lambda page: len(page["jobs"]) > INTERVALS, params={"state": "finished"})
            assert len(ended["jobs"]) > INTERVALS
