"""The engine contract: who runs tasks.

An engine keeps ``slots`` workers. Each worker is a process of its own, sets itself up once by calling
``setup(*args)``, and then runs one task at a time: ``function(state, *arguments)``, where ``state`` is what
``setup`` returned. Placing, watching and scaling workers is the engine's job; counting attempts,
retrying and bisecting is its caller's.

While it runs, a task may report to its caller and be asked to stop: see :mod:`tally.engines.task`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker may take.

    memory: resident bytes, with those of the processes that it started; above it the worker is killed. None: no limit.
    items: after so many it is replaced by a fresh one, between two tasks (see :func:`tally.engines.watchdog.begin`).
    """

    memory: int | None = None
    items: int | None = None


@dataclass(frozen=True, slots=True)
class Reports:
    """Who receives what a task reports, and which reports arrive.

    receive: called with one report at a time, in order, and never after the task's future is done. It runs in a
        thread of the engine, as callbacks of futures do: it should return soon, and must not wait for the engine.
        What it raises is logged.
    backlog: None: the latest report wins. One that was not received yet is replaced by the next, and the task never
        waits. A number: all reports arrive; when so many have not been received, the task waits in ``report()``.
    """

    receive: Callable[[Any], None]
    backlog: int | None = None

    def __post_init__(self) -> None:
        if self.backlog is not None and self.backlog < 1:
            raise ValueError(f"backlog: at least 1, not {self.backlog}")


class Engine(ABC):
    """Runs tasks on workers. Methods are called by one thread; futures are resolved by the engine's own.

    cpus, gpus, memory (bytes), resources (amounts by name): what each worker reserves, for engines that place workers
    on machines by that; others take no notice. None: as the engine sees fit.

    A future of a task fails with whatever the task raised, or, when its worker was lost, with a
    :class:`~tally.errors.WorkerError` that says why and with which items it was busy
    (see :func:`tally.engines.watchdog.busy`). A lost worker is replaced and costs only its own task.
    """

    def __init__(  # noqa: B027 - an engine need not reserve anything
        self,
        *,
        cpus: float | None = None,
        gpus: float | None = None,
        memory: int | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        pass

    def prepare(self, *, slots: int, modules: Sequence[str] = ()) -> None:  # noqa: B027 - an engine need not
        """Start workers early, before it is known how they are set up; :meth:`start` follows, or :meth:`stop`.

        modules: imported by them meanwhile, where they can be.
        """

    @abstractmethod
    def start(
        self,
        setup: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        slots: int,
        limits: Limits,
        log: Path | None = None,
    ) -> None:
        """Start the workers; returns at once.

        slots: how many; 0 starts none until :meth:`resize` asks for some.
        log: a file that what workers print is appended to; None leaves it where the engine's own goes.
        """

    @abstractmethod
    def submit(self, function: Callable[..., Any], *arguments: Any, reports: Reports | None = None) -> Future[Any]:
        """Run a task on an idle worker, or the next that is idle. ``function`` is importable by name.

        A failure of ``setup`` is the failure of every task given to that worker.
        reports: who receives what the task reports; None: nobody, and reporting does nothing.
        """

    @abstractmethod
    def stop_task(self, future: Future[Any], *, seconds: float) -> None:
        """Stop the one task of this future, whether it runs, waits or has ended; returns at once.

        A waiting task is cancelled. A running one is asked to stop (:func:`tally.engines.task.stopping`), and its
        future gets what it returns. If it still runs after ``seconds``, its worker is killed and replaced, and the
        future fails with :class:`~tally.errors.WorkerStoppedError`. Asked again, the earlier deadline holds.
        """

    def remark(self) -> str | None:
        """What the user should know while nothing happens: that there is no room for a worker, say."""
        return None

    @property
    def host(self) -> str | None:
        """The address at which workers reach this machine, once they were started; None: they are on it."""
        return None

    @abstractmethod
    def default_slots(self) -> int:
        """How many workers this engine starts when nobody says."""

    @abstractmethod
    def default_memory(self, slots: int) -> int | None:
        """Resident bytes that each of ``slots`` workers may hold when nobody says."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many workers are wanted now: that many tasks run at once when all of them have started."""

    @abstractmethod
    def resize(self, slots: int) -> None:
        """Change the number of workers; busy ones finish their task first. With 0, tasks wait."""

    @abstractmethod
    def stop(self, *, kill: bool = False) -> None:
        """Stop all workers: after the tasks that run now, or, with ``kill``, at once. Idempotent."""
