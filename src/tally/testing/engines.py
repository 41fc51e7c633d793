"""What every engine must do. Inherit the class, override its fixture ``engine``, and name it ``Test...``.

Nothing here waits for a fixed time: tasks meet the test at a :class:`Gate`, and what has to happen
in bounded time is awaited until :data:`DEADLINE`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from tally.engines.base import Engine, Limits, Reports
from tally.errors import (
    ClusterLostError,
    ItemError,
    ModelLoadError,
    TallyError,
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
    WorkerStoppedError,
    WorkerTimeoutError,
)
from tally.testing import tasks

DEADLINE = 60.0
"""Seconds after which something that should have happened will not."""

SHORT = 0.3
"""Seconds of a time limit that a task is meant to outlast."""


class Gate:
    """Where tasks (``tasks.wait_at``) stop until the test lets them go. Closing it lets all of them go."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(DEADLINE)
        self._held: dict[int, socket.socket] = {}

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()
        return host, port

    def arrival(self) -> int:
        """Wait until one more task is there; returns the process id of its worker."""
        held, _ = self._listener.accept()
        held.settimeout(DEADLINE)
        with held.makefile("rb") as lines:
            pid = int(lines.readline())
        self._held[pid] = held
        return pid

    def someone(self) -> bool:
        """Whether one more task is there already."""
        return bool(select.select([self._listener], [], [], 0)[0])

    def release(self, pid: int) -> None:
        """Let the task of this worker go on."""
        self._held.pop(pid).close()

    def close(self) -> None:
        for held in self._held.values():
            held.close()
        self._listener.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds; fails when it does not by the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE:g} s"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """Whether the process is gone; one that only waits to be reaped counts as gone."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class EngineContract:
    """Override ``engine`` (one that is not started yet), and ``making``: the lines of a script that
    leave such an engine in the variable ``engine``. The tests start and stop it.
    """

    making: ClassVar[str]

    @pytest.fixture
    def engine(self) -> Engine:
        raise NotImplementedError("override the fixture engine")

    @pytest.fixture
    def start(self, engine: Engine) -> Iterator[Callable[..., Engine]]:
        """Starts the engine; kills its workers after the test."""

        def start(
            slots: int = 1,
            *,
            setup: Callable[..., Any] = tasks.setup,
            args: tuple[Any, ...] = (),
            memory: int | None = None,
            log: Path | None = None,
        ) -> Engine:
            engine.start(setup, args, slots=slots, limits=Limits(memory=memory), log=log)
            return engine

        yield start
        engine.stop(kill=True)

    @pytest.fixture
    def gate(self) -> Iterator[Gate]:
        gate = Gate()
        yield gate
        gate.close()

    # Tasks and their results ----------------------------------------------------------------------

    def test_results_belong_to_their_tasks(self, start: Callable[..., Engine]) -> None:
        engine = start(2)
        futures = [engine.submit(tasks.echo, {"number": number, "text": "ä" * number}) for number in range(100)]
        assert [future.result(DEADLINE)["number"] for future in futures] == list(range(100))

    def test_a_worker_is_set_up_once_and_runs_tasks_in_order(self, start: Callable[..., Engine]) -> None:
        engine = start(args=("a", {"b": [1.5, None]}))
        states = [each.result(DEADLINE) for each in [engine.submit(tasks.describe) for _ in range(20)]]
        assert [state.tasks for state in states] == list(range(1, 21))
        assert states[0].args == ("a", {"b": [1.5, None]})
        assert len({state.pid for state in states}) == 1

    def test_prepared_workers_are_set_up_as_others(self, engine: Engine, start: Callable[..., Engine]) -> None:
        engine.prepare(slots=2, modules=("colorsys", "no.such.module"))
        start(2, args=("a",))
        states = [each.result(DEADLINE) for each in [engine.submit(tasks.describe) for _ in range(20)]]
        assert {state.args for state in states} == {("a",)}
        assert len({state.pid for state in states}) <= 2
        assert engine.slots == 2

    def test_prepared_workers_that_die_are_replaced(self, engine: Engine, start: Callable[..., Engine]) -> None:
        engine.prepare(slots=1, modules=("colorsys",))
        start(1, args=("a",))
        with pytest.raises(WorkerCrashedError):
            engine.submit(tasks.die, "3").result(DEADLINE)
        assert engine.submit(tasks.describe).result(DEADLINE).args == ("a",)

    def test_what_is_prepared_can_be_stopped(self, engine: Engine) -> None:
        engine.prepare(slots=2)
        engine.stop(kill=True)
        engine.stop()

    def test_slots_work_at_the_same_time(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(2)
        futures = [engine.submit(tasks.wait_at, gate.address) for _ in range(3)]
        first, second = gate.arrival(), gate.arrival()
        assert first != second
        assert not any(future.done() for future in futures)
        gate.release(second)
        assert gate.arrival() == second
        gate.release(first)
        gate.release(second)
        assert sorted(future.result(DEADLINE) for future in futures) == sorted([first, second, second])

    def test_waiting_tasks_start_in_the_order_given(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(2)
        held = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        started = [each.result(DEADLINE) for each in [engine.submit(tasks.describe) for _ in range(30)]]
        assert [state.tasks for state in started] == list(range(1, 31))  # by the worker that is left
        gate.release(pid)
        held.result(DEADLINE)

    def test_tasks_wait_for_a_slot_and_cost_no_worker(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(2)
        futures = [engine.submit(tasks.wait_at, gate.address) for _ in range(200)]
        pids = [gate.arrival(), gate.arrival()]
        for _ in range(20):  # whoever is let go makes room for one
            gate.release(pids.pop(0))
            pids.append(gate.arrival())
            assert not gate.someone()
        assert sum(future.running() for future in futures) == 2
        assert sum(future.done() for future in futures) == 20
        assert all(future.cancel() for future in futures[22:])
        workers = {future.result(DEADLINE) for future in futures[:20]}
        assert workers == set(pids)
        for pid in pids:
            gate.release(pid)

    def test_arguments_and_results_may_be_large(self, start: Callable[..., Engine]) -> None:
        engine = start()
        data = bytes(range(256)) * 2**15
        assert engine.submit(tasks.checksum, data).result(DEADLINE) == (len(data), zlib.crc32(data))
        assert engine.submit(tasks.make, 8 * 2**20).result(DEADLINE) == b"\x5a" * (8 * 2**20)

    def test_a_waiting_task_can_be_cancelled(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        running = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        cancelled = [engine.submit(tasks.echo, number) for number in range(3)]
        behind = engine.submit(tasks.echo, "behind them")
        assert all(future.cancel() for future in cancelled)
        assert not running.cancel()
        gate.release(pid)
        assert running.result(DEADLINE) == pid
        assert behind.result(DEADLINE) == "behind them"
        assert all(future.cancelled() for future in cancelled)

    def test_what_workers_print_can_go_to_a_file(
        self, start: Callable[..., Engine], tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        log = tmp_path / "workers.log"
        log.write_text("before\n")
        engine = start(2, log=log)
        words = ["one", "two", "three"]
        for future in [engine.submit(tasks.say, word) for word in words]:
            future.result(DEADLINE)
        engine.stop(kill=True)  # what a worker said last is there all the same
        lines = log.read_text().splitlines()
        assert lines[0] == "before"
        assert sorted(lines[1:]) == sorted(f"{word} {how}" for word in words for how in ("printed", "written"))
        assert capfd.readouterr() == ("", "")

    def test_there_are_defaults(self, engine: Engine) -> None:
        assert engine.default_slots() >= 1
        one, four = engine.default_memory(1), engine.default_memory(4)
        assert (one is None) == (four is None)
        assert one is None or four is None or one > four > 0

    # Exceptions -----------------------------------------------------------------------------------

    def test_exceptions_come_back_as_raised(self, start: Callable[..., Engine]) -> None:
        engine = start()
        raised = [
            ValueError("no", 3),
            KeyError("a key"),
            OSError(28, "No space left on device", "out.csv"),
            MemoryError(),
            SystemExit(3),
            ItemError("cannot be decoded", stage="decode", hint="look at it"),
            ModelLoadError("it is damaged", hint="download it again"),
            WorkerCrashedError("of somebody else", suspects=(1, 2), trace="a stack"),
            WorkerMemoryError("too large", suspects=(1, 2)),
            WorkerTimeoutError("too slow", suspects=(1, 2)),
            WorkerStoppedError("not in time"),
            ClusterLostError("no head"),
        ]
        for error in raised:
            back = engine.submit(tasks.fail, error).exception(DEADLINE)
            assert type(back) is type(error)
            assert back.args == error.args
            assert str(back) == str(error)
            told = {name: value for name, value in vars(back).items() if name != "__notes__"}
            assert told == vars(error)
        assert engine.submit(tasks.describe).result(DEADLINE).tasks == 1

    def test_an_exception_tells_where_it_was_raised(self, start: Callable[..., Engine]) -> None:
        error = start().submit(tasks.fail, ValueError("no")).exception(DEADLINE)
        assert error is not None
        assert "tasks.py" in "".join(error.__notes__)

    @pytest.mark.parametrize("kind", ["lambda", "local", "lock", "iterator", "deep", "unreadable"])
    def test_a_result_that_cannot_travel_fails_its_task_only(self, start: Callable[..., Engine], kind: str) -> None:
        engine = start()
        before = engine.submit(tasks.describe).result(DEADLINE)
        error = engine.submit(tasks.unpicklable, kind).exception(DEADLINE)
        assert isinstance(error, Exception)
        assert not isinstance(error, WorkerError)
        assert engine.submit(tasks.describe).result(DEADLINE).pid == before.pid

    def test_an_exception_that_cannot_travel_is_told_in_words(self, start: Callable[..., Engine]) -> None:
        engine = start()
        failing: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
            (tasks.fail_in_two_parts, ("a hole", "the bucket")),
            (tasks.fail_with_a_stranger, ("a hole in the bucket",)),
        ]
        for function, arguments in failing:
            error = engine.submit(function, *arguments).exception(DEADLINE)
            assert isinstance(error, TallyError)
            assert not isinstance(error, WorkerError)
            assert "a hole in the bucket" in str(error)
        assert engine.submit(tasks.describe).result(DEADLINE).tasks == 1

    def test_an_argument_that_cannot_travel_fails_its_task_only(self, start: Callable[..., Engine]) -> None:
        engine = start()
        with pytest.raises((TypeError, AttributeError, ValueError)):
            engine.submit(tasks.echo, threading.Lock()).result(DEADLINE)
        with pytest.raises(LookupError, match="cannot be read elsewhere"):
            engine.submit(tasks.echo, tasks.Unreadable()).result(DEADLINE)
        assert engine.submit(tasks.echo, "fine").result(DEADLINE) == "fine"

    # Setting up -----------------------------------------------------------------------------------

    def test_a_failure_of_setup_is_that_of_its_tasks(self, start: Callable[..., Engine]) -> None:
        engine = start(2, setup=tasks.setup_that_fails, args=("the model is damaged",))
        for future in [engine.submit(tasks.echo, number) for number in range(4)]:
            with pytest.raises(ValueError, match="the model is damaged"):
                future.result(DEADLINE)

    def test_setup_whose_arguments_cannot_be_read_fails_its_tasks(self, start: Callable[..., Engine]) -> None:
        engine = start(args=(tasks.Unreadable(),))
        with pytest.raises(LookupError, match="cannot be read elsewhere"):
            engine.submit(tasks.echo, 1).result(DEADLINE)

    @pytest.mark.parametrize("code", [0, 7])
    def test_setup_that_ends_the_worker(self, start: Callable[..., Engine], code: int) -> None:
        engine = start(setup=tasks.setup_that_dies, args=(code,))
        for future in [engine.submit(tasks.echo, number) for number in range(2)]:
            with pytest.raises(WorkerCrashedError, match=rf"exit code {code}\b"):
                future.result(DEADLINE)

    # Lost workers ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL", "SIGABRT", "0", "1", "42"])
    def test_a_crash_costs_its_own_task(self, start: Callable[..., Engine], how: str) -> None:
        engine = start()
        before = engine.submit(tasks.describe).result(DEADLINE)
        error = engine.submit(tasks.die, how, 3, 7).exception(DEADLINE)
        assert type(error) is WorkerCrashedError
        assert error.message.endswith(f"exit code {how}" if how.isdigit() else how)
        assert error.suspects == (3, 7)
        if how in ("SIGSEGV", "SIGABRT"):
            assert error.trace is not None
            assert "in die" in error.trace
        after = engine.submit(tasks.describe).result(DEADLINE)
        assert after.tasks == 1
        assert after.pid != before.pid

    def test_without_a_word_there_are_no_suspects(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        engine.submit(tasks.hurry, [None, DEADLINE]).result(DEADLINE)
        future = engine.submit(tasks.wait_at, gate.address)
        psutil.Process(gate.arrival()).kill()
        error = future.exception(DEADLINE)
        assert isinstance(error, WorkerCrashedError)
        assert error.suspects is None

    @pytest.mark.parametrize("how", ["wait", "python", "native", "regex"])
    def test_a_hang_ends_at_its_time_limit(self, start: Callable[..., Engine], how: str) -> None:
        engine = start()
        error = engine.submit(tasks.hang, how, SHORT, 2, 3).exception(DEADLINE)
        assert type(error) is WorkerTimeoutError
        assert isinstance(error, TimeoutError)
        assert error.suspects == (2, 3)
        assert error.trace is not None
        assert "in hang" in error.trace
        assert engine.submit(tasks.echo, "on").result(DEADLINE) == "on"

    def test_the_next_batch_has_its_own_time_limit(self, start: Callable[..., Engine]) -> None:
        engine = start()
        assert engine.submit(tasks.hurry, [SHORT, DEADLINE]).result(DEADLINE) == "in time"
        assert engine.submit(tasks.hurry, [SHORT, None]).result(DEADLINE) == "in time"
        with pytest.raises(WorkerTimeoutError) as lost:
            engine.submit(tasks.hurry, [DEADLINE, DEADLINE, SHORT]).result(DEADLINE)
        assert lost.value.suspects == (2, 3)

    def test_memory_over_the_limit_ends_the_worker(self, start: Callable[..., Engine]) -> None:
        engine = start(memory=300 * 2**20)
        error = engine.submit(tasks.grow, 400 * 2**20, 5, 6).exception(DEADLINE)
        assert type(error) is WorkerMemoryError
        assert isinstance(error, MemoryError)
        assert error.suspects == (5, 6)
        assert "300 MiB" in error.message
        assert engine.submit(tasks.make, 2**20).result(DEADLINE) == b"\x5a" * 2**20

    @pytest.mark.parametrize("how", ["stopped", "asked to stop", "killed"])
    def test_what_a_task_started_ends_with_its_worker(self, start: Callable[..., Engine], gate: Gate, how: str) -> None:
        engine = start()
        worker = engine.submit(tasks.describe).result(DEADLINE).pid
        held = engine.submit(tasks.start_children, gate.address)
        pids = [gate.arrival() for _ in range(3)]
        if how == "stopped":
            engine.stop(kill=True)
        elif how == "asked to stop":
            engine.stop_task(held, seconds=0.0)
        else:
            # Who has left the session is ended if the engine has seen it before.
            pids = [pid for pid in pids if os.getsid(pid) == worker]
            assert len(pids) == 2
            psutil.Process(worker).kill()
        for pid in pids:
            until(lambda pid=pid: ended(pid), f"the end of {pid}")  # type: ignore[misc]

    def test_memory_of_what_a_task_started_counts(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(memory=400 * 2**20)
        error = engine.submit(tasks.start_children, gate.address, 500).exception(DEADLINE)
        assert type(error) is WorkerMemoryError
        assert error.suspects == (3, 4)
        assert "the processes it started" in error.message

    def test_a_lost_worker_leaves_the_others_alone(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(2)
        held = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        for how in ("SIGKILL", "0"):
            with pytest.raises(WorkerCrashedError):
                engine.submit(tasks.die, how).result(DEADLINE)
        assert engine.submit(tasks.echo, "on").result(DEADLINE) == "on"
        assert not held.done()
        gate.release(pid)
        assert held.result(DEADLINE) == pid

    def test_what_is_read_ahead_is_suspect_of_a_crash_only(self, start: Callable[..., Engine]) -> None:
        engine = start()
        crashed = engine.submit(tasks.die, "SIGKILL", 3, 7, 5).exception(DEADLINE)
        hung = engine.submit(tasks.hang, "wait", SHORT, 3, 7, 5).exception(DEADLINE)
        assert isinstance(crashed, WorkerCrashedError)
        assert crashed.suspects == (3, 12)
        assert isinstance(hung, WorkerTimeoutError)
        assert hung.suspects == (3, 7)

    def test_a_worker_lost_while_idle_costs_nothing(self, start: Callable[..., Engine]) -> None:
        engine = start()
        pid = engine.submit(tasks.describe).result(DEADLINE).pid
        psutil.Process(pid).kill()
        until(lambda: not psutil.pid_exists(pid), "the worker's end")
        assert engine.submit(tasks.echo, "on").result(DEADLINE) == "on"

    def test_many_lost_workers_among_many_tasks(self, start: Callable[..., Engine]) -> None:
        engine = start(2)
        futures: list[Future[Any]] = []
        for number in range(40):
            if number % 8 == 3:
                futures.append(engine.submit(tasks.die, ("SIGKILL", "SIGSEGV", "3")[number % 3], number, number + 1))
            else:
                futures.append(engine.submit(tasks.checksum, b"%d" % number * 100_000))
        for number, future in enumerate(futures):
            if number % 8 == 3:
                error = future.exception(DEADLINE)
                assert isinstance(error, WorkerCrashedError)
                assert error.suspects == (number, number + 1)
            else:
                data = b"%d" % number * 100_000
                assert future.result(DEADLINE) == (len(data), zlib.crc32(data))

    # Reports --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("backlog", [1, 3, 1000])
    def test_all_reports_arrive_in_order_and_before_the_result(
        self, start: Callable[..., Engine], backlog: int
    ) -> None:
        engine = start(2)
        received: dict[str, list[Any]] = {"a": [], "b": []}
        futures = [
            engine.submit(tasks.report, [*range(50), {"ä": b"\0" * 100_000}], reports=Reports(each.append, backlog))
            for each in received.values()
        ]
        for future, each in zip(futures, received.values(), strict=True):
            complete: list[int] = []
            future.add_done_callback(lambda _, each=each, complete=complete: complete.append(len(each)))  # type: ignore[misc]
            assert future.result(DEADLINE) == "reported"
            until(lambda complete=complete: bool(complete), "the callback")  # type: ignore[misc]
            assert complete == [51]
            assert each == [*range(50), {"ä": b"\0" * 100_000}]

    def test_reports_arrive_while_the_task_runs(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        for backlog in (None, 2):
            received: list[int] = []
            future = engine.submit(tasks.report, [7], gate.address, reports=Reports(received.append, backlog))
            pid = gate.arrival()
            until(lambda received=received: received == [7], "a report")  # type: ignore[misc]
            assert not future.done()
            gate.release(pid)
            assert future.result(DEADLINE) == "reported"
            assert received == [7]

    def test_the_latest_report_wins_and_its_task_never_waits(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        received: list[int] = []
        pids: list[int] = []

        def receive(value: int) -> None:
            received.append(value)
            if not pids:
                pids.append(gate.arrival())  # while it waits here, the task reports all the others

        future = engine.submit(tasks.report, [*range(2000)], gate.address, reports=Reports(receive))
        until(lambda: bool(pids) and received[-1] == 1999, "the latest report")
        assert not future.done()
        gate.release(pids[0])
        assert future.result(DEADLINE) == "reported"
        assert len(received) <= 2

    def test_a_full_backlog_holds_the_task_back(self, start: Callable[..., Engine], tmp_path: Path) -> None:
        engine = start()
        backlog, counter = 4, tmp_path / "counter"
        received: list[int] = []
        ahead: list[int] = []

        def reported() -> int:
            return counter.stat().st_size if counter.exists() else 0

        def receive(value: int) -> None:
            if not received:
                until(lambda: reported() == backlog, "a full backlog")
            ahead.append(reported() - len(received))
            received.append(value)

        engine.submit(tasks.report_and_count, 300, str(counter), reports=Reports(receive, backlog)).result(DEADLINE)
        assert received == list(range(300))
        assert max(ahead) == backlog

    def test_reports_go_to_who_asked_for_them(self, start: Callable[..., Engine]) -> None:
        engine = start()
        received: list[list[int]] = [[] for _ in range(40)]
        futures: list[Future[str]] = []
        for number, each in enumerate(received):
            futures.append(engine.submit(tasks.report, ["nobody", "asked"]))
            reports = Reports(each.append, 100) if number % 2 else Reports(each.append)
            futures.append(engine.submit(tasks.report, [number] * 5, reports=reports))
        assert {future.result(DEADLINE) for future in futures} == {"reported"}
        for number, each in enumerate(received):
            assert set(each) == {number}
            assert len(each) == 5 if number % 2 else 1 <= len(each) <= 5

    def test_a_thread_that_a_task_left_behind_reports_to_nobody(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        received: list[Any] = []
        engine.submit(tasks.report_too_late, gate.address, reports=Reports(received.append, 9)).result(DEADLINE)
        gate.release(gate.arrival())
        pid = gate.arrival()  # it has reported
        engine.submit(tasks.report, ["mine"], reports=Reports(received.append, 9)).result(DEADLINE)
        assert received == ["mine"]
        gate.release(pid)

    @pytest.mark.parametrize("backlog", [None, 2])
    def test_what_a_task_reported_before_it_was_lost_arrives(
        self, start: Callable[..., Engine], backlog: int | None
    ) -> None:
        engine = start()
        for how in ("SIGKILL", "SIGSEGV", "3"):
            received: list[int] = []
            future = engine.submit(tasks.report, [*range(20)], None, how, reports=Reports(received.append, backlog))
            error = future.exception(DEADLINE)
            assert isinstance(error, WorkerCrashedError)
            assert error.suspects == (3, 7)
            assert received[-1] == 19
            assert backlog is None or received == list(range(20))

    def test_kills_among_reports(self, start: Callable[..., Engine]) -> None:
        engine = start(2)
        received: list[list[int]] = [[] for _ in range(24)]
        futures = [
            engine.submit(
                tasks.report,
                [*range(10)],
                None,
                "SIGKILL" if number % 4 == 1 else None,
                reports=Reports(each.append, 2),
            )
            for number, each in enumerate(received)
        ]
        for number, future in enumerate(futures):
            assert isinstance(future.exception(DEADLINE), WorkerCrashedError if number % 4 == 1 else type(None))
        assert received == [list(range(10))] * 24

    def test_a_report_that_cannot_travel_fails_in_its_task(self, start: Callable[..., Engine]) -> None:
        engine = start()
        received: list[Any] = []
        with pytest.raises(TypeError, match="pickle"):
            engine.submit(tasks.report_unpicklable, reports=Reports(received.append)).result(DEADLINE)
        assert received == []

    def test_a_report_that_cannot_be_received_is_logged(
        self, start: Callable[..., Engine], caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = start()
        received: list[Any] = []

        def receive(value: Any) -> None:
            if value == "before":
                raise ValueError("not that one")
            received.append(value)

        future = engine.submit(tasks.report_unreadable, reports=Reports(receive, 9))
        assert future.result(DEADLINE) == "reported"
        assert received == ["after"]
        assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == [
            "not that one",
            "this cannot be read elsewhere",
        ]

    # Stopping one task ----------------------------------------------------------------------------

    def test_a_task_that_obeys_ends_with_what_it_returns(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        for _ in range(3):
            future = engine.submit(tasks.run_until_stopped, gate.address)
            behind = engine.submit(tasks.is_stopping)
            pid = gate.arrival()
            gate.release(pid)
            engine.stop_task(future, seconds=DEADLINE)
            assert future.result(DEADLINE) == pid
            assert behind.result(DEADLINE) is False
        failing = engine.submit(tasks.run_until_stopped, gate.address, "pruned")
        gate.release(gate.arrival())
        engine.stop_task(failing, seconds=DEADLINE)
        with pytest.raises(ValueError, match="pruned"):
            failing.result(DEADLINE)
        assert engine.submit(tasks.describe).result(DEADLINE).pid == pid

    @pytest.mark.parametrize("how", ["wait", "python", "native"])
    def test_a_task_that_does_not_stop_loses_its_worker_only(
        self, start: Callable[..., Engine], gate: Gate, how: str
    ) -> None:
        engine = start(2)
        held = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        received: list[str] = []
        future = engine.submit(tasks.pass_gate_and_hang, gate.address, how, reports=Reports(received.append))
        stubborn = gate.arrival()
        gate.release(stubborn)
        engine.stop_task(future, seconds=SHORT)
        error = future.exception(DEADLINE)
        assert type(error) is WorkerStoppedError
        assert error.suspects is None
        assert f"within {SHORT:g} s" in error.message
        assert received == ["begun"]
        until(lambda: ended(stubborn), "the end of the worker")
        assert engine.submit(tasks.is_stopping).result(DEADLINE) is False
        assert not held.done()
        gate.release(pid)
        assert held.result(DEADLINE) == pid

    def test_the_earlier_deadline_holds(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        future = engine.submit(tasks.pass_gate_and_hang, gate.address, "wait")
        gate.release(gate.arrival())
        for seconds in (10 * DEADLINE, 0.0, 10 * DEADLINE):
            engine.stop_task(future, seconds=seconds)
        error = future.exception(DEADLINE)
        assert isinstance(error, WorkerStoppedError)
        assert "within 0 s" in error.message

    def test_a_worker_that_still_sets_itself_up_can_be_stopped(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(setup=tasks.setup_that_waits, args=(gate.address,))
        future = engine.submit(tasks.describe)
        pid = gate.arrival()
        engine.stop_task(future, seconds=0)
        assert isinstance(future.exception(DEADLINE), WorkerStoppedError)
        until(lambda: ended(pid), "the end of the worker")
        after = engine.submit(tasks.describe)
        gate.release(gate.arrival())
        assert after.result(DEADLINE).tasks == 1

    def test_a_waiting_task_that_is_stopped_is_cancelled(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        running = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        waiting = [engine.submit(tasks.echo, number) for number in range(3)]
        engine.stop_task(waiting[1], seconds=0)
        done, _ = wait(waiting, DEADLINE, return_when="FIRST_COMPLETED")
        assert done == {waiting[1]}
        assert waiting[1].cancelled()
        gate.release(pid)
        assert running.result(DEADLINE) == pid
        assert [waiting[0].result(DEADLINE), waiting[2].result(DEADLINE)] == [0, 2]

    def test_to_stop_a_task_that_has_ended_does_nothing(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        before = [engine.submit(tasks.describe), engine.submit(tasks.fail, ValueError("no"))]
        wait(before, DEADLINE)
        running = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        for future in (*before, Future[Any]()):
            engine.stop_task(future, seconds=0)
        answers = [engine.submit(tasks.is_stopping), engine.submit(tasks.describe)]
        gate.release(pid)
        assert running.result(DEADLINE) == pid
        assert answers[0].result(DEADLINE) is False
        assert answers[1].result(DEADLINE).pid == before[0].result(0).pid

    def test_a_worker_lost_by_itself_is_not_called_stopped(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        future = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        engine.stop_task(future, seconds=10 * DEADLINE)
        psutil.Process(pid).kill()
        error = future.exception(DEADLINE)
        assert type(error) is WorkerCrashedError

    def test_many_stops_among_many_tasks(self, start: Callable[..., Engine]) -> None:
        engine = start(2)
        futures: list[Future[Any]] = []
        for number in range(60):
            if number % 3:
                futures.append(engine.submit(tasks.echo, number))
            elif number % 2:
                futures.append(engine.submit(tasks.run_until_stopped))
            else:
                futures.append(engine.submit(tasks.hang, "wait", None))
        for number, future in enumerate(futures):
            if number % 3 == 0:
                until(lambda future=future: future.running() or future.done(), "its turn")  # type: ignore[misc]
                engine.stop_task(future, seconds=DEADLINE if number % 2 else 0)
        for number, future in enumerate(futures):
            if number % 3:
                assert future.result(DEADLINE) == number
            elif number % 2:
                assert future.result(DEADLINE) > 0
            else:
                assert isinstance(future.exception(DEADLINE), WorkerStoppedError)

    # Resizing and stopping ------------------------------------------------------------------------

    def test_more_slots_take_waiting_tasks(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        futures = [engine.submit(tasks.wait_at, gate.address) for _ in range(3)]
        pids = {gate.arrival()}
        engine.resize(3)
        assert engine.slots == 3
        pids |= {gate.arrival(), gate.arrival()}
        assert len(pids) == 3
        for pid in pids:
            gate.release(pid)
        assert {future.result(DEADLINE) for future in futures} == pids

    def test_fewer_slots_finish_what_they_have(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(3)
        futures = [engine.submit(tasks.wait_at, gate.address) for _ in range(3)]
        pids = {gate.arrival() for _ in range(3)}
        engine.resize(1)
        assert engine.slots == 1
        for pid in pids:
            gate.release(pid)
        assert {future.result(DEADLINE) for future in futures} == pids
        until(lambda: sum(ended(pid) for pid in pids) == 2, "the end of two workers")
        states = [each.result(DEADLINE) for each in [engine.submit(tasks.describe) for _ in range(5)]]
        assert len({state.pid for state in states}) == 1

    def test_without_slots_tasks_wait(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start(2)
        running = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        idle = engine.submit(tasks.describe).result(DEADLINE).pid
        engine.resize(0)
        assert engine.slots == 0
        waiting = [engine.submit(tasks.describe) for _ in range(3)]
        until(lambda: ended(idle), "the end of an idle worker")
        gate.release(pid)
        assert running.result(DEADLINE) == pid
        until(lambda: ended(pid), "the end of a worker that was busy")
        assert not any(future.running() or future.done() for future in waiting)
        assert waiting[0].cancel()
        engine.resize(1)
        states = [future.result(DEADLINE) for future in waiting[1:]]
        assert [state.tasks for state in states] == [1, 2]
        assert states[0].pid not in (pid, idle)

    def test_it_may_start_without_workers(self, start: Callable[..., Engine]) -> None:
        engine = start(0)
        future = engine.submit(tasks.echo, 1)
        assert not future.done()
        engine.resize(1)
        assert future.result(DEADLINE) == 1

    def test_stop_without_workers_cancels_what_waits(self, start: Callable[..., Engine]) -> None:
        engine = start(0)
        future = engine.submit(tasks.echo, 1)
        engine.stop()
        assert future.cancelled()

    def test_stop_finishes_what_runs_and_cancels_what_waits(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        running = engine.submit(tasks.wait_at, gate.address)
        pid = gate.arrival()
        waiting = [engine.submit(tasks.echo, number) for number in range(3)]
        # Only once stop() has cancelled what waits, what runs is let go.
        waiting[-1].add_done_callback(lambda future: gate.release(pid))
        engine.stop()
        assert running.result(0) == pid
        for future in waiting:
            with pytest.raises(CancelledError):
                future.result(0)
        assert ended(pid)

    def test_stop_can_kill(self, start: Callable[..., Engine], gate: Gate) -> None:
        engine = start()
        running = engine.submit(tasks.wait_at, gate.address)
        waiting = engine.submit(tasks.echo, 1)
        pid = gate.arrival()
        engine.stop(kill=True)
        assert isinstance(running.exception(0), WorkerError)
        assert waiting.cancelled()
        assert ended(pid)

    def test_stop_may_be_repeated(self, engine: Engine, start: Callable[..., Engine]) -> None:
        engine.stop()
        start(2)
        engine.submit(tasks.echo, 1).result(DEADLINE)
        for kill in (False, False, True):
            engine.stop(kill=kill)

    def test_stop_before_the_workers_are_there(self, start: Callable[..., Engine]) -> None:
        engine = start(2)
        futures = [engine.submit(tasks.echo, number) for number in range(8)]
        engine.stop(kill=True)
        done, undone = wait(futures, 0)
        assert not undone
        assert len(done) == len(futures)

    # The process that has the engine --------------------------------------------------------------

    def test_a_script_needs_no_main_guard(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "from tally.engines.base import Limits\n"
            "from tally.testing import tasks\n"
            "print('once')\n"
            f"{self.making}\n"
            "engine.start(tasks.setup, ('x',), slots=2, limits=Limits())\n"
            "print([engine.submit(tasks.echo, n).result() for n in range(3)])\n"
            "engine.stop()\n"
            "print('end')\n"
        )
        run = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=DEADLINE, check=False
        )
        assert run.stdout == "once\n[0, 1, 2]\nend\n", run.stderr
        assert "Traceback" not in run.stderr, run.stderr  # what an engine is made of may have warnings of its own
        assert run.returncode == 0

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
    def test_workers_end_with_their_parent(self, tmp_path: Path, gate: Gate, name: str) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "from tally.engines.base import Limits\n"
            "from tally.testing import tasks\n"
            f"{self.making}\n"
            "engine.start(tasks.setup, (), slots=2, limits=Limits())\n"
            f"held = [engine.submit(tasks.wait_at, {gate.address!r}) for _ in range(2)]\n"
            "held[0].result()\n"
        )
        parent = subprocess.Popen([sys.executable, str(script)])
        try:
            pids = [gate.arrival(), gate.arrival()]
            parent.send_signal(signal.Signals[name])
            assert parent.wait(DEADLINE) == -signal.Signals[name]
            for pid in pids:
                until(lambda pid=pid: ended(pid), "the end of an orphan")  # type: ignore[misc]
        finally:
            parent.kill()
            parent.wait()
