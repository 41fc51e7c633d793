"""The Ray engine on a cluster of several nodes: where workers are placed, and what the loss of a node or head costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.clusters import Cluster
from tests.extent import FULL

from tally.engines.base import Limits
from tally.engines.ray import engine as engine_file
from tally.engines.ray.engine import RayEngine
from tally.errors import ClusterLostError, TallyError, WorkerCrashedError
from tally.testing import tasks
from tally.testing.engines import DEADLINE, Gate, until

pytestmark = pytest.mark.ray

GIB = 2**30
Reach = Callable[[Cluster], None]


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Reach:
    """Let this process find a cluster, as it would from inside."""

    def reach(cluster: Cluster) -> None:
        for name, value in {**cluster.client_env, "RAY_ADDRESS": cluster.address}.items():
            monkeypatch.setenv(name, value)

    return reach


@contextmanager
def engine(slots: int, **needs: Any) -> Iterator[RayEngine]:
    one = RayEngine(**needs)
    try:
        one.start(tasks.setup, (), slots=slots, limits=Limits())
        yield one
    finally:
        one.stop(kill=True)


@contextmanager
def gate() -> Iterator[Gate]:
    one = Gate()
    try:
        yield one
    finally:
        one.close()


def where(cluster: Cluster, pid: int) -> int:
    """The node that the process runs on."""
    (found,) = (number for number in cluster.nodes if pid in {each.pid for each in cluster.processes(number)})
    return found


def test_workers_are_placed_by_what_they_reserve(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = [{}, {"left": 1.0}, {"right": 1.0}]
    with Cluster(2, cpus=1, resources=resources, memory=GIB) as cluster:
        reach(cluster)
        with engine(1, cpus=0, resources={"right": 1}) as one:
            assert one.default_slots() == 1
            assert where(cluster, one.submit(tasks.describe).result(DEADLINE).pid) == 2
        with engine(4, cpus=0.5) as one, gate() as held:
            assert one.default_slots() == 4
            assert one.default_memory(4) == int(GIB * 0.8 / 2)
            for _ in range(4):
                one.submit(tasks.wait_at, held.address)
            nodes = [where(cluster, held.arrival()) for _ in range(4)]
            assert sorted(nodes) == [1, 1, 2, 2]
        with engine(3, cpus=0.25, memory=GIB * 3 // 4) as one, gate() as held:
            assert one.default_slots() == 2
            for _ in range(3):
                one.submit(tasks.wait_at, held.address)
            nodes = [where(cluster, held.arrival()) for _ in range(2)]
            assert sorted(nodes) == [1, 2]
            wanted = "1 of 3 workers have not started: each needs 0.25 CPU, 0.75 GiB memory; the cluster has 2 CPU, "
            until(lambda: str(one.remark()).startswith(wanted), "a remark")
            assert not held.someone()

        here = engine_file.versions()
        monkeypatch.setattr(engine_file, "versions", lambda: {**here, "Tally": "9.9.9"})
        with engine(1) as one:
            with pytest.raises(TallyError, match=rf"Tally {here['Tally']} there, 9\.9\.9 here") as refused:
                one.submit(tasks.echo, 1).result(DEADLINE)
            assert refused.value.hint is not None


@pytest.mark.skipif(not FULL, reason="a small storm kills nodes and a head, too: TALLY_TEST_FULL=1")
def test_what_is_lost_with_a_node_and_with_the_head(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(2, cpus=1) as cluster:
        reach(cluster)
        with engine(2) as one, gate() as held:
            futures = {}
            for _ in range(2):
                future = one.submit(tasks.wait_at, held.address)
                futures[held.arrival()] = future
            lost, kept = futures
            cluster.kill_node(where(cluster, lost))
            error = futures[lost].exception(DEADLINE)
            assert type(error) is WorkerCrashedError
            assert error.suspects is None
            assert "node" in error.message
            assert not futures[kept].done()

            waiting = one.submit(tasks.wait_at, held.address)
            until(lambda: "1 of 2 workers have not started: each needs 1 CPU; " in str(one.remark()), "a remark")
            new = cluster.add_node()
            pid = held.arrival()
            assert where(cluster, pid) == new
            until(lambda: one.remark() is None, "the end of the remark")
            held.release(pid)
            assert waiting.result(DEADLINE) == pid

        with engine(1) as one, gate() as held:
            running = one.submit(tasks.wait_at, held.address)
            held.arrival()
            monkeypatch.setattr(engine_file, "LOST_SECONDS", 1.0)
            cluster.kill_head()
            for future in (running, one.submit(tasks.echo, 1)):
                with pytest.raises(ClusterLostError, match="the head of the Ray cluster"):
                    future.result(DEADLINE)
    assert cluster.processes() == []
    assert not cluster.folder.exists()
