"""The engines keep the contract; what only the local one promises is here too."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tally.engines import spawn, task
from tally.engines.base import Engine, Limits, Reports
from tally.engines.local import LocalEngine, _Slot
from tally.engines.ray.engine import RayEngine
from tally.errors import StorageError, TallyError, WorkerCrashedError, WorkerStoppedError
from tally.testing import tasks
from tally.testing.engines import DEADLINE, EngineContract, Gate, ended, until


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

    def test_what_prepared_workers_import_and_print_early_is_in_the_log(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine, start: Callable[..., Engine]
    ) -> None:
        (tmp_path / "talkative.py").write_text(
            "import os\nprint('imported', flush=True)\nos.write(2, b'natively\\n')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        log = tmp_path / "workers.log"
        engine.prepare(slots=1, modules=("no.such.module", "talkative"))
        start(log=log)
        engine.submit(tasks.say, "later").result(DEADLINE)
        lines = log.read_text().splitlines()
        assert sorted(lines[:2]) == ["imported", "natively"]
        assert sorted(lines[2:]) == ["later printed", "later written"]

    def test_a_prepared_worker_that_dies_is_replaced_once_it_is_needed(
        self, engine: Engine, start: Callable[..., Engine]
    ) -> None:
        others = _children()
        engine.prepare(slots=1)
        until(lambda: bool(_children() - others), "a prepared worker")
        [pid] = _children() - others
        os.kill(pid, signal.SIGKILL)
        until(lambda: ended(pid), "its end")
        start(1, args=("a",))
        assert engine.submit(tasks.describe).result(DEADLINE).args == ("a",)

    def test_a_worker_that_is_not_killed_ends_in_order(
        self, tmp_path: Path, start: Callable[..., Engine], engine: Engine
    ) -> None:
        farewell = tmp_path / "farewell"
        for kill in (True, False):
            start(setup=tasks.setup_with_farewell, args=(str(farewell),))
            engine.submit(tasks.echo, 1).result(DEADLINE)
            engine.stop(kill=kill)
            assert farewell.exists() == (not kill)

    def test_a_killed_parent_leaves_no_files(self, tmp_path: Path, gate: Gate) -> None:
        script, temporary = tmp_path / "script.py", tmp_path / "temporary"
        temporary.mkdir()
        script.write_text(
            "from tally.engines.base import Limits\n"
            "from tally.testing import tasks\n"
            f"{self.making}\n"
            "engine.start(tasks.setup, (), slots=1, limits=Limits())\n"
            f"engine.submit(tasks.wait_at, {gate.address!r}).result()\n"
        )
        parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "TMPDIR": str(temporary)})
        try:
            pid = gate.arrival()
            assert [each.name.startswith("tally-scratch-workers-") for each in temporary.iterdir()] == [True]
        finally:
            parent.kill()
            parent.wait()
        until(lambda: ended(pid), "the end of an orphan")
        assert list(temporary.iterdir()) == []

    def test_workers_that_just_start_when_their_parent_is_killed_do_not_miss_their_files(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import os, signal, psutil\n"
            "from tally.engines.base import Limits\n"
            "from tally.testing import tasks\n"
            f"{self.making}\n"
            "engine.start(tasks.setup, (), slots=4, limits=Limits())\n"
            "while len(psutil.Process().children()) < 4:\n"
            "    pass\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        ran = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        assert ran.returncode == -signal.SIGKILL
        # One that was not told yet what it is for is multiprocessing's own, which does complain.
        assert "FileNotFoundError" not in ran.stderr
        assert list(tmp_path.iterdir()) == [script]

    def test_an_idle_worker_leaves_nothing_behind_when_its_parent_is_killed(self, tmp_path: Path) -> None:
        script, temporary = tmp_path / "script.py", tmp_path / "temporary"
        temporary.mkdir()
        script.write_text(
            "import sys\n"
            "from tally.engines.base import Limits\n"
            "from tally.testing import tasks\n"
            f"{self.making}\n"
            "engine.start(tasks.setup, (), slots=1, limits=Limits())\n"
            "print(engine.submit(tasks.leave_a_child).result(), flush=True)\n"
            "sys.stdin.read()\n"
        )
        parent = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "TMPDIR": str(temporary)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with parent:
            try:
                assert parent.stdout is not None
                worker, child = map(int, parent.stdout.readline().split())
            finally:
                parent.kill()
        until(lambda: ended(worker), "the end of an orphan")
        until(lambda: ended(child), "the end of what it has started")
        assert list(temporary.iterdir()) == []

    def test_a_worker_that_just_starts_is_safe_from_interrupts(self, start: Callable[..., Engine]) -> None:
        assert start().submit(tasks.interrupts_blocked).result(DEADLINE) is True

    def test_no_room_for_temporary_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., Engine]
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
        with pytest.raises(StorageError, match="cannot make a folder for temporary files"):
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

    def test_of_processes_that_could_not_be_started_nothing_is_left(
        self, monkeypatch: pytest.MonkeyPatch, start: Callable[..., Engine]
    ) -> None:
        def refuse(*args: object) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        threads_that_failed: list[object] = []
        monkeypatch.setattr(threading, "excepthook", threads_that_failed.append)
        monkeypatch.setattr(spawn.Process, "_Popen", staticmethod(refuse))
        made: list[_Slot] = []
        begin = _Slot.start

        def noted(slot: _Slot) -> None:
            made.append(slot)
            begin(slot)

        monkeypatch.setattr(_Slot, "start", noted)
        engine = start(2)
        with pytest.raises(TallyError, match=r"no workers can be started: .*temporarily unavailable"):
            engine.submit(tasks.echo, 1).result(DEADLINE)
        engine.stop()
        assert threads_that_failed == []
        assert made
        assert [slot.bell.fileno() for slot in made] == [-1] * len(made)
        assert threads_that_failed == []

    def test_slots_and_memory_are_shared(self) -> None:
        engine = LocalEngine()
        one, four = engine.default_memory(1), engine.default_memory(4)
        assert one is not None
        assert four is not None
        assert 0 < one < psutil.virtual_memory().total
        assert abs(4 * four - one) < 8
        assert 1 <= engine.default_slots() <= (psutil.cpu_count() or 1)

    def test_reports_leave_no_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Any) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        engine = start()
        for backlog in (None, 1, 5, 100):
            received: list[int] = []
            future = engine.submit(tasks.report, [*range(20)], reports=Reports(received.append, backlog))
            assert future.result(DEADLINE) == "reported"
            assert received[-1] == 19
        (folder,) = tmp_path.iterdir()
        assert [path.name for path in folder.iterdir() if ".report." in path.name and path.suffix.isdigit()] == []


def test_without_an_engine_reports_go_nowhere_and_nothing_stops() -> None:
    task.report("nobody is there")
    assert task.stopping() is False


def test_a_backlog_has_room_for_one() -> None:
    with pytest.raises(ValueError, match="backlog: at least 1, not 0"):
        Reports(print, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray that the tests of this module share; one process of xdist has one."""
    ray = pytest.importorskip("ray")
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray makes its workers give way to other processes: with several tests at once they would hardly be served.
        "RAY_worker_niceness": "0",
    }
    terminated = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        for left in (2, 1, 0):
            try:
                context = ray.init(
                    "local",
                    num_cpus=4,
                    object_store_memory=80 * 2**20,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                )
                break
            except Exception as error:  # Ray waits for itself for 30 s, which a busy machine may exceed
                ray.shutdown()
                if not left or "timed out during startup" not in str(error):
                    raise
            with warnings.catch_warnings():  # of the processes that it had started, which end with this one
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()
        yield context.address_info["gcs_address"]
        ray.shutdown()
    signal.signal(signal.SIGTERM, terminated)


@pytest.mark.ray
class TestRayEngine(EngineContract):
    making = "from tally.engines.ray.engine import RayEngine\nengine = RayEngine()"

    @pytest.fixture(autouse=True)
    def address(self, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the scripts."""
        monkeypatch.setenv("RAY_ADDRESS", cluster)

    @pytest.fixture
    def engine(self, cluster: str) -> Engine:
        return RayEngine()

    def test_a_node_that_does_not_answer_is_given_up(
        self, start: Callable[..., Engine], gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tally.engines.ray.engine.ENDING_SECONDS", 1.0)
        engine = start()
        future = engine.submit(tasks.run_until_stopped, gate.address)
        pid = gate.arrival()
        gate.release(pid)
        host = psutil.Process(pid).parent()
        assert host is not None
        host.suspend()  # as a node that hangs
        engine.stop_task(future, seconds=0)
        assert isinstance(future.exception(DEADLINE), WorkerStoppedError)
        until(lambda: ended(pid), "the end of the worker")
        assert engine.submit(tasks.is_stopping).result(DEADLINE) is False


def _children() -> set[int]:
    """Processes that this one has started, except multiprocessing's own tracker."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if not any("resource_tracker" in word for word in child.cmdline())}
