"""Workers from none and back to none: a queue, the engine, and Ray's autoscaler with its stand-in for a cloud.

Long: nodes start and end. What the autoscaler reads of an overlay is in ``tests/unit/test_overlays.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import pytest
from tests.clusters import Cluster, Growth
from tests.extent import FULL
from tests.queues import new_queue

from tally.engines.base import Limits
from tally.engines.ray.engine import RayEngine
from tally.errors import WorkerTimeoutError
from tally.jobs import scaling
from tally.jobs.events import Events
from tally.jobs.facade import Jobs
from tally.jobs.spec import make
from tally.jobs.stop import Stop
from tally.sources.queues.base import Message, Queue
from tally.sources.queues.factory import open_queue
from tally.testing import tasks

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not FULL, reason="nodes come and go, for two minutes: TALLY_TEST_FULL=1"),
]
PATIENCE = 180.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(0, cpus=1, grows=Growth(most=2, idle_seconds=2)) as cluster:
        yield cluster


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**cluster.client_env, "RAY_ADDRESS": cluster.address}.items():
        monkeypatch.setenv(name, value)


def nodes() -> int:
    """Nodes beside the head, as Ray sees them."""
    import ray

    if not ray.is_initialized():
        return -1
    return sum(each["Alive"] and each["Resources"].get("CPU", 0) > 0 for each in ray.nodes())


def until(true: Callable[[], object], what: str) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < PATIENCE, f"{what} has not come"
        time.sleep(0.1)
    return time.monotonic() - began


def test_a_queue_brings_workers_and_they_go_when_it_is_empty(
    here: None, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "IDLE_SECONDS", 1.0)
    (tmp_path / "length.py").write_text(
        "from tally import Scorer\n\nclass Length(Scorer):\n    input = 'bytes'\n\n"
        "    def score(self, batch):\n        return [{'n': len(each)} for each in batch]\n"
    )
    with new_queue("redis-list", request) as url:
        spec = make(
            source=url, model=f"{tmp_path / 'length.py'}:Length", out=str(tmp_path / "out"), engine="ray",
            workers="0..2", queue={"body": "content"},
        )  # fmt: skip
        jobs, engine, stop = Jobs(), RayEngine(cpus=1), Stop()
        job = jobs.submit(spec).id
        driving = Thread(
            target=jobs.run,
            args=(job,),
            kwargs={"engine": engine, "stop": stop, "events": Events(), "in_this_process": True},
        )
        driving.start()
        queue = open_queue(url)
        try:
            until(lambda: engine.slots == 0 and nodes() == 0, "a job without workers")
            for number in range(2):  # and again, from nothing
                _send_and_wait(queue, lambda: jobs.store.get(job).done, number)
            assert engine.slots == 0
        finally:
            stop()
            driving.join(PATIENCE)
            queue.close()
        assert jobs.store.get(job).dead == 0


def _send_and_wait(queue: Queue, done: Callable[[], int], number: int) -> None:
    before = done()
    queue.send([Message(f"{number} {each}".encode()) for each in range(20)])
    first = until(lambda: done() > before, "the first commit")
    until(lambda: done() == before + 20, "the last commit")
    zero = until(lambda: nodes() == 0, "a cluster without nodes")
    print(f"first committed after {first:.1f} s, no node {zero:.1f} s after the last")


def test_a_last_worker_that_hangs_does_not_keep_its_node(here: None) -> None:
    engine = RayEngine(cpus=1)
    try:
        engine.start(tasks.setup, (), slots=0, limits=Limits())
        engine.resize(1)
        stuck: Future[object] = engine.submit(tasks.hang, "wait", 2.0)
        with pytest.raises(WorkerTimeoutError):
            stuck.result(PATIENCE)
        engine.resize(0)
        until(lambda: nodes() == 0, "a cluster without nodes")
        assert engine.remark() is None
    finally:
        engine.stop(kill=True)
