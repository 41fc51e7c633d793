"""Workers that a server keeps for the next job of the same model: who gets them, and that nobody else does."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests import colours, waiting
from tests.server import PATIENCE, Server, running, until

MANY = 25_000
"""More pictures than are scored before a test has looked."""
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
SAYS_GOODBYE = """
from pathlib import Path

def init():
    pass

def run(mini_batch):
    return [{"n": 1} for _ in mini_batch]

def shutdown():
    Path(__file__).with_name("goodbye").touch()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of one colour each, and a model that tells which."""
    (tmp_path / "in").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), COLOURS[number % 3]).save(tmp_path / "in" / f"{number:02}.png")
    colours.model(tmp_path / "colours.onnx")
    return tmp_path


def asked(folder: Path, out: str, **fields: Any) -> dict[str, Any]:
    found = {"source": [str(folder / "in")], "model": str(folder / "colours.onnx"), "task": "classify", "workers": 2}
    return {**found, "out": str(folder / out), **fields}


class Used:
    """A server, its client, and the processes that it has."""

    def __init__(self, server: Server, client: httpx2.Client) -> None:
        self.server, self.client = server, client

    def processes(self) -> dict[int, set[int]]:
        """Each coordinator and its workers."""
        return {each.pid: self._workers(each) for each in self._children(psutil.Process(self.server.process.pid))}

    def _children(self, process: psutil.Process) -> Iterator[psutil.Process]:
        for each in process.children():
            try:
                if each.status() != psutil.STATUS_ZOMBIE and "multiprocessing.resource_tracker" not in str(
                    each.cmdline()
                ):
                    yield each
            except psutil.Error:
                continue

    def _workers(self, coordinator: psutil.Process) -> set[int]:
        try:
            return {each.pid for each in self._children(coordinator)}
        except psutil.Error:
            return set()

    def start(self, **fields: Any) -> str:
        return str(self.client.post("/jobs", json=fields).raise_for_status().json()["id"])

    def job(self, **fields: Any) -> dict[str, Any]:
        """Have a job run; returns it, once its coordinator rests or has ended."""
        view = until(self.client, self.start(**fields), lambda view: view["state"] in ("finished", "failed"))
        assert view["state"] == "finished", view["error"]
        eventually(lambda: self._count("tally_coordinators") == 0, "its coordinator's rest or end")
        return view

    @property
    def resting(self) -> int:
        return self._count("tally_coordinators_resting")

    def _count(self, name: str) -> int:
        text = httpx2.get(f"{self.server.url}/metrics", timeout=60).text
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return int(float(found[1]))


@contextmanager
def using(*options: object) -> Iterator[Used]:
    with running("--root", "/", *options) as server, server.client() as client:
        yield Used(server, client)


def eventually(condition: Callable[[], object], what: str) -> None:
    # Seldom: the server that is asked shares the processors with what is waited for.
    waiting.eventually(condition, PATIENCE, lambda: what, every=0.1)


def gone(pids: set[int]) -> Callable[[], bool]:
    def gone() -> bool:
        for pid in pids:
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    return False
            except psutil.NoSuchProcess:
                continue
        return True

    return gone


def of(processes: dict[int, set[int]]) -> set[int]:
    """All of them."""
    return {*processes, *(pid for workers in processes.values() for pid in workers)}


def labels(out: Path) -> list[int]:
    return [int(each) for each in pq.read_table(out).sort_by("key").column("index").to_pylist()]


def test_the_next_job_of_the_same_model_and_no_other_gets_the_workers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    monkeypatch.setenv("TALLY_SECRETS", str(secrets))
    with using() as used:
        used.job(**asked(folder, "one"))
        first = used.processes()
        [(coordinator, workers)] = first.items()
        assert (used.resting, len(workers)) == (1, 2)

        (folder / "in" / "12.png").write_bytes((folder / "in" / "01.png").read_bytes())
        second = used.job(**asked(folder, "two", timeout=50))
        assert used.processes() == first
        assert labels(folder / "one") == [0, 1, 2] * 4
        assert labels(folder / "two") == [0, 1, 2] * 4 + [1]
        log = used.client.get(f"/jobs/{second['id']}/log").json()
        assert "Traceback" not in str(log)

        # Other content under the same name: the same coordinator, other workers.
        colours.model(folder / "colours.onnx", times=-1)
        used.job(**asked(folder, "other-content"))
        assert list(used.processes()) == [coordinator]
        assert 0 not in labels(folder / "other-content")[:1], "what was most is least"
        eventually(gone(workers), "the end of those that had loaded what is no more")
        changed = used.processes()

        # Other credentials: nobody of those that were given the earlier ones.
        (secrets / "AWS_SECRET_ACCESS_KEY").write_text("rotated")
        used.job(**asked(folder, "other-credentials"))
        assert not of(used.processes()) & of(changed)
        eventually(gone(of(changed)), "the end of those that had other credentials")
        everybody = of(used.processes())
    eventually(gone(everybody), "their end with the server's")


def test_they_make_room_for_another_model_and_end_in_time(folder: Path) -> None:
    with using("--keep-warm", 2) as used:
        used.job(**asked(folder, "one"))
        first = used.processes()
        used.job(**asked(folder, "another", batch_size=3))
        eventually(gone(of(first)), "room for another")
        second = used.processes()
        assert not of(first) & of(second)
        eventually(gone(of(second)), "the end of who has rested for long enough")
        assert used.processes() == {}
        assert used.resting == 0


def test_code_of_a_model_is_not_kept_and_is_told_that_its_job_ends(folder: Path) -> None:
    (folder / "score.py").write_text(SAYS_GOODBYE)
    with using() as used:
        job = used.start(**asked(folder, "one", model=str(folder / "score.py"), task=None))
        until(used.client, job, lambda view: view["state"] == "finished")
        assert (folder / "goodbye").exists(), "before the job is finished"
        eventually(lambda: used.processes() == {}, "the end of its processes")


def test_whoever_is_killed_nothing_is_left_and_the_job_is_done(folder: Path) -> None:
    with using() as used:
        used.job(**asked(folder, "one"))
        [(coordinator, workers)] = used.processes().items()
        os.kill(min(workers), signal.SIGKILL)
        eventually(gone({min(workers)}), "the worker's end")
        used.job(**asked(folder, "worker-killed"))
        assert labels(folder / "worker-killed") == [0, 1, 2] * 4
        assert max(workers) in used.processes()[coordinator]

        resting = used.processes()
        os.kill(coordinator, signal.SIGKILL)
        eventually(gone(of(resting)), "the end of its workers")
        used.job(**asked(folder, "coordinator-killed"))
        assert labels(folder / "coordinator-killed") == [0, 1, 2] * 4

        # In the middle of a job that it was given while it rested.
        [(coordinator, workers)] = used.processes().items()
        for number in range(12, MANY):
            (folder / "in" / f"{number:02}.png").symlink_to(folder / "in" / "00.png")
        job = used.start(**asked(folder, "interrupted"))
        until(used.client, job, lambda view: view["done"] > 0)
        assert coordinator in used.processes()
        os.kill(coordinator, signal.SIGKILL)
        eventually(gone({coordinator, *workers}), "the end of its workers")
        view = until(used.client, job, lambda view: view["state"] == "finished")
        assert (view["done"], view["dead"]) == (MANY, 0)
        eventually(lambda: used.resting == 1, "rest")

        resting = used.processes()
        used.server.kill()
        eventually(gone(of(resting)), "the end of who rests, with the server's")


def test_a_job_that_is_cancelled_takes_its_processes_with_it(folder: Path) -> None:
    for number in range(12, MANY):
        (folder / "in" / f"{number:02}.png").symlink_to(folder / "in" / "00.png")
    with using() as used:
        used.job(**asked(folder, "one", limit=10))
        [(coordinator, workers)] = used.processes().items()
        job = used.start(**asked(folder, "cancelled"))
        until(used.client, job, lambda view: view["done"] > 0)
        assert used.processes() == {coordinator: workers}
        used.client.post(f"/jobs/{job}/cancel").raise_for_status()
        assert until(used.client, job, lambda view: not view["alive"])["state"] == "cancelled"
        eventually(gone({coordinator, *workers}), "their end")
