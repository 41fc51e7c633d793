"""The engine whose workers stay for the next job."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tally.engines.base import Limits
from tally.engines.kept import KeptEngine
from tally.engines.local import _Slot
from tally.errors import TallyError, WorkerCrashedError
from tally.testing import tasks
from tally.testing.engines import DEADLINE, Gate, ended, until


@pytest.fixture
def engine() -> Iterator[KeptEngine]:
    engine = KeptEngine()
    engine.keeps = True
    yield engine
    engine.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.close()


@pytest.fixture
def start(engine: KeptEngine) -> Callable[..., None]:
    def start(*args: Any, slots: int = 1, memory: int | None = None, log: Path | None = None) -> None:
        engine.start(tasks.setup_anew, args, slots=slots, limits=Limits(memory=memory), log=log)

    return start


def described(engine: KeptEngine) -> tasks.State:
    state: tasks.State = engine.submit(tasks.describe).result(DEADLINE)
    return state


def both(engine: KeptEngine, gate: Gate) -> set[int]:
    """The workers of two slots."""
    futures = [engine.submit(tasks.wait_at, gate.address) for _ in range(2)]
    pids = {gate.arrival(), gate.arrival()}
    for pid in pids:
        gate.release(pid)
    for future in futures:
        future.result(DEADLINE)
    return pids


def test_who_starts_it_again_gets_the_same_workers_set_up_anew(
    engine: KeptEngine, start: Callable[..., None], gate: Gate, tmp_path: Path
) -> None:
    engine.prepare(slots=2)
    start("first", slots=2, log=tmp_path / "first.log")
    pids = both(engine, gate)
    engine.submit(tasks.say, "one").result(DEADLINE)
    engine.stop(kill=True)
    engine.stop()
    assert not any(map(ended, pids))
    engine.prepare(slots=2)
    start("second", slots=2, log=tmp_path / "second.log")
    assert both(engine, gate) == pids
    state = described(engine)
    assert state.args == (("second",), ("first",))
    assert state.tasks == 1, "what it counted for the first job is gone"
    engine.submit(tasks.say, "two").result(DEADLINE)
    assert "one" in (tmp_path / "first.log").read_text()
    assert "two" not in (tmp_path / "first.log").read_text()
    assert "two" in (tmp_path / "second.log").read_text()
    engine.close()
    assert all(map(ended, pids))


def test_a_worker_that_cannot_be_set_up_anew_is_replaced(engine: KeptEngine, start: Callable[..., None]) -> None:
    start("first")
    before = described(engine)
    engine.stop()
    start("refuse")
    after = described(engine)
    assert after.args == (("refuse",),)
    assert after.pid != before.pid
    until(lambda: ended(before.pid), "the end of who could not")


def test_one_that_holds_more_than_is_now_allowed_is_replaced(engine: KeptEngine, start: Callable[..., None]) -> None:
    start()
    before = engine.submit(tasks.hold, 300).result(DEADLINE)
    engine.stop()
    start(memory=200 << 20)
    assert described(engine).pid != before
    until(lambda: ended(before), "the end of who holds too much")


def test_other_shares_of_the_cores_need_other_workers(
    engine: KeptEngine, start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "default_slots", lambda: 8)
    start(slots=1)
    before = described(engine).pid
    engine.stop()
    start(slots=2)
    assert described(engine).pid != before
    assert ended(before)


def test_what_is_busy_when_it_is_stopped_is_ended(engine: KeptEngine, start: Callable[..., None], gate: Gate) -> None:
    start(slots=2)
    busy = engine.submit(tasks.wait_at, gate.address)
    pid, idle = gate.arrival(), described(engine).pid
    engine.stop(kill=True)
    with pytest.raises(WorkerCrashedError):
        busy.result(DEADLINE)
    assert ended(pid)
    start(slots=2)
    assert idle in both(engine, gate)


def test_who_dies_while_resting_costs_nothing(engine: KeptEngine, start: Callable[..., None]) -> None:
    start("first")
    before = described(engine).pid
    engine.stop()
    os.kill(before, signal.SIGKILL)
    until(lambda: ended(before), "its end")
    start("second")
    assert described(engine).args == (("second",),)


def test_without_keeping_it_is_like_any_other(engine: KeptEngine, start: Callable[..., None]) -> None:
    engine.keeps = False
    start()
    pid = described(engine).pid
    engine.stop()
    assert ended(pid)


def test_where_no_worker_can_be_started_it_can_be_stopped(
    engine: KeptEngine, start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(_Slot, "__init__", refuse)
    start()
    with pytest.raises(TallyError, match="no workers can be started"):
        engine.submit(tasks.echo, 1).result(DEADLINE)
    engine.stop(kill=True)
