"""The engines keep the contract; what only the local one promises is here too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tally.engines.base import Engine, Limits
from tally.engines.local import LocalEngine, _Slot
from tally.errors import StorageError, TallyError, WorkerCrashedError
from tally.testing import tasks
from tally.testing.engines import DEADLINE, EngineContract, Gate, ended


class TestLocalEngine(EngineContract):
    making = "from tally.engines.local import LocalEngine\nengine = LocalEngine()"

    @pytest.fixture
    def engine(self) -> Engine:
        return LocalEngine()

    def test_nothing_is_left_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine, gate: Gate
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        others = _children()
        for kill in (False, True):
            engine.start(tasks.setup, (), slots=2, limits=Limits())
            pids = [engine.submit(tasks.describe).result(DEADLINE).pid]
            for how in ("SIGSEGV", "0"):
                with pytest.raises(WorkerCrashedError):
                    engine.submit(tasks.die, how).result(DEADLINE)
            if kill:
                engine.submit(tasks.wait_at, gate.address)
                pids.append(gate.arrival())
            assert len(list(tmp_path.iterdir())) == 1
            engine.stop(kill=kill)
            assert list(tmp_path.iterdir()) == []
            assert all(ended(pid) for pid in pids)
            assert _children() == others

    def test_a_worker_that_just_starts_is_safe_from_interrupts(self, start: Callable[..., Engine]) -> None:
        assert start().submit(tasks.interrupts_blocked).result(DEADLINE) is True

    def test_no_room_for_temporary_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., Engine]
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
        with pytest.raises(StorageError, match="cannot make a temporary folder"):
            start()

    def test_when_no_process_can_be_started_tasks_fail(
        self, monkeypatch: pytest.MonkeyPatch, start: Callable[..., Engine]
    ) -> None:
        def refuse(*args: object) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(_Slot, "__init__", refuse)
        engine = start(2)
        for _ in range(3):
            with pytest.raises(TallyError, match=r"no workers can be started: .*temporarily unavailable"):
                engine.submit(tasks.echo, 1).result(DEADLINE)
        engine.stop()

    def test_slots_and_memory_are_shared(self) -> None:
        engine = LocalEngine()
        one, four = engine.default_memory(1), engine.default_memory(4)
        assert one is not None
        assert four is not None
        assert 0 < one < psutil.virtual_memory().total
        assert abs(4 * four - one) < 8
        assert 1 <= engine.default_slots() <= (psutil.cpu_count() or 1)


def _children() -> set[int]:
    """Processes that this one has started, except multiprocessing's own tracker."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if not any("resource_tracker" in word for word in child.cmdline())}
