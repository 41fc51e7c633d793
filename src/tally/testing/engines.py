"""What every engine must do. Inherit the class, override its fixture ``engine``, and name it ``Test...``.

Nothing here waits for a fixed time: tasks meet the test at a :class:`Gate`, and what has to happen
in bounded time is awaited until :data:`DEADLINE`.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from tally.engines.base import Engine, Limits
from tally.errors import (
    ItemError,
    ModelLoadError,
    TallyError,
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
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
        ) -> Engine:
            engine.start(setup, args, slots=slots, limits=Limits(memory=memory))
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

    def test_one_worker_runs_tasks_in_order_on_one_state(self, start: Callable[..., Engine]) -> None:
        engine = start(args=("a", {"b": [1.5, None]}))
        states = [each.result(DEADLINE) for each in [engine.submit(tasks.describe) for _ in range(20)]]
        assert [state.tasks for state in states] == list(range(1, 21))
        assert {state.args for state in states if state.args[0] == "a"} if False else states[0].args == (
            "a",
            {"b": [1.5, None]},
        )
        assert len({state.pid for state in states}) == 1
