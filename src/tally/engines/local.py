"""Workers as processes on this machine, kept by pebble.

Each slot is a pebble pool of one process, replaced as a whole when its process is lost: nothing of a
worker that was killed in the middle of a message, or while it held a lock, is ever used again.

Worker processes are spawned without running the caller's main script again, so a script or notebook
needs no ``if __name__ == "__main__":``. They stop by themselves when the process that started them is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import connection, popen_spawn_posix
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import psutil
from pebble import ProcessExpired, ProcessPool

from tally.engines import progress
from tally.engines.base import Engine, Limits
from tally.errors import WorkerCrashedError, WorkerError, WorkerMemoryError, WorkerTimeoutError

MEMORY_WATCH_SECONDS = 0.2
MEMORY_SHARE = 0.8
"""Share of the machine's memory that all workers together may hold."""

_main_swap = threading.Lock()


class _Popen(popen_spawn_posix.Popen):
    def _launch(self, process_obj: Any) -> None:
        # multiprocessing would import the caller's main script into the worker: a script without a
        # __main__ guard would start the job again from there.
        with _main_swap:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                super()._launch(process_obj)
            finally:
                sys.modules["__main__"] = main


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - multiprocessing's name
        return _Popen(process_obj)


class _Context(SpawnContext):
    """A spawn context that remembers the first process it made: the slot's worker. (When that is lost,
    pebble may start another before the slot is replaced; it is never given anything.)"""

    def __init__(self) -> None:
        super().__init__()
        self.worker: _Process | None = None

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # type: ignore[override]  # noqa: N802
        process = _Process(*args, **kwargs)
        if self.worker is None:
            self.worker = process
        return process


# -- in the worker ---------------------------------------------------------------------------------

_setup: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
_state: Any = None
_ready = False


def _begin(setup: Callable[..., Any], args: tuple[Any, ...], board: str, trace: str) -> None:
    global _setup
    progress.attach(Path(board), Path(trace))
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _setup = (setup, args)


def _leave_with(parent: Any) -> None:
    """An orphan must not go on writing: end as soon as the parent does."""
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    global _state, _ready
    if not _ready:
        assert _setup is not None
        _state = _setup[0](*_setup[1])
        _ready = True
    try:
        return function(_state, *arguments)
    finally:
        progress.idle()


# -- in the coordinator ----------------------------------------------------------------------------


class _Slot:
    """One worker process, and the task that it has."""

    def __init__(self, folder: Path, number: int, setup: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.board = folder / f"{number}.board"
        self.trace = folder / f"{number}.trace"
        progress.create(self.board)
        self.context = _Context()
        self.pool = ProcessPool(
            max_workers=1,
            initializer=_begin,
            initargs=(setup, args, str(self.board), str(self.trace)),
            context=self.context,
        )
        self.future: Future[Any] | None = None
        self.over_memory: int | None = None

    @property
    def gone(self) -> bool:
        process = self.context.worker
        return process is None or process.exitcode is not None

    def resident(self) -> int:
        """Bytes of memory that the worker holds; 0 if it is gone."""
        process = self.context.worker
        if process is None or process.pid is None:
            return 0
        with suppress(psutil.Error):
            return int(psutil.Process(process.pid).memory_info().rss)
        return 0

    def kill(self) -> None:
        process = self.context.worker
        if process is not None and not self.gone:
            process.kill()

    def discard(self) -> None:
        """End the pool, waiting for nothing; its threads end in the background."""

        def end() -> None:
            self.kill()
            with suppress(Exception):  # a pool that broke may fail to stop; its process is dead already
                self.pool.stop()  # type: ignore[no-untyped-call]
                self.pool.join()

        threading.Thread(target=end, daemon=True, name="tally-slot-end").start()


class LocalEngine(Engine):
    """See :mod:`tally.engines.local`."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wanted = 0

    def start(self, setup: Callable[..., Any], args: tuple[Any, ...], *, slots: int, limits: Limits) -> None:
        self._setup, self._args, self._limits = setup, args, limits
        self._wanted = slots
        self._folder = Path(tempfile.mkdtemp(prefix="tally-workers-"))
        self._made = 0
        self._slots: list[_Slot] = []
        self._waiting: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._thread = threading.Thread(target=self._run, name="tally-engine", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._events.put(("submit", future, function, arguments))
        return future

    def default_slots(self) -> int:
        """One for each core that this process may use, by its affinity and its container's quota."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with suppress(OSError, ValueError):
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
            if quota != "max":
                cores = min(cores, max(1, round(int(quota) / int(period))))
        return cores

    def default_memory(self, slots: int) -> int | None:
        """An equal part of :data:`MEMORY_SHARE` of the machine's (or the container's) memory."""
        total = int(psutil.virtual_memory().total)
        with suppress(OSError, ValueError):
            total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return int(total * MEMORY_SHARE / slots)

    @property
    def slots(self) -> int:
        return self._wanted

    def resize(self, slots: int) -> None:
        self._wanted = slots
        self._events.put(("resize",))

    def stop(self, *, kill: bool = False) -> None:
        if self._thread is not None:
            self._events.put(("stop", kill))
            self._thread.join()
            self._thread = None
            shutil.rmtree(self._folder, ignore_errors=True)

    # The supervisor's thread: the only one that touches slots.

    def _run(self) -> None:
        stopping = False
        watched = 0.0
        self._fit()
        while not (stopping and not any(slot.future for slot in self._slots)):
            if self._limits.memory is not None and time.monotonic() - watched >= MEMORY_WATCH_SECONDS:
                self._watch_memory(self._limits.memory)
                watched = time.monotonic()
            try:
                event = self._events.get(timeout=MEMORY_WATCH_SECONDS)
            except queue.Empty:
                continue
            match event:
                case ("submit", future, function, arguments):
                    self._waiting.append((future, function, arguments))
                case ("done", slot, outcome):
                    self._settle(slot, outcome)
                case ("stop", kill):
                    stopping = True
                    for future, _, _ in self._waiting:
                        future.cancel()
                    self._waiting.clear()
                    if kill:
                        break
            if not stopping:
                self._fit()
                self._assign()
        self._end()

    def _fit(self) -> None:
        """Make the number of slots what it should be; busy ones that are too many end later."""
        while len(self._slots) < self._wanted:
            self._slots.append(self._new())
        for slot in [slot for slot in self._slots if slot.future is None][: len(self._slots) - self._wanted]:
            self._slots.remove(slot)
            slot.discard()

    def _new(self) -> _Slot:
        self._made += 1
        slot = _Slot(self._folder, self._made, self._setup, self._args)
        _ = slot.pool.active  # starts the pool: the worker imports and loads while work is being planned
        return slot

    def _assign(self) -> None:
        for index, slot in enumerate(self._slots):
            if slot.future is not None or not self._waiting:
                continue
            if slot.gone:  # died while idle: no task's fault
                slot.discard()
                slot = self._slots[index] = self._new()
            future, function, arguments = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            slot.future = future
            outcome: Future[Any]
            try:
                outcome = slot.pool.schedule(_call, args=(function, arguments))
            except (RuntimeError, BrokenProcessPool) as error:
                outcome = Future()
                outcome.set_exception(error if isinstance(error, BrokenProcessPool) else BrokenProcessPool(str(error)))
            outcome.add_done_callback(partial(self._report, slot))

    def _report(self, slot: _Slot, outcome: Future[Any]) -> None:
        self._events.put(("done", slot, outcome))

    def _settle(self, slot: _Slot, outcome: Future[Any]) -> None:
        future, slot.future = slot.future, None
        error = CancelledError() if outcome.cancelled() else outcome.exception()
        if future is None:
            return
        if isinstance(error, (ProcessExpired, BrokenProcessPool)):
            lost = self._explain(slot)
            self._slots[self._slots.index(slot)] = self._new()
            slot.discard()
            future.set_exception(lost)
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(outcome.result())

    def _explain(self, slot: _Slot) -> WorkerError:
        suspects = progress.read(slot.board)
        trace, timed_out = progress.stack(slot.trace)
        if slot.over_memory is not None:
            allowed = self._limits.memory or 0
            return WorkerMemoryError(
                f"the worker held {slot.over_memory / 2**20:,.0f} MiB, over its limit of {allowed / 2**20:,.0f} MiB",
                suspects=suspects,
                trace=trace,
            )
        if timed_out:
            return WorkerTimeoutError("took longer than its time limit", suspects=suspects, trace=trace)
        process = slot.context.worker
        if process is not None:
            process.join(1)  # it is gone, or about to be
        code = process.exitcode if process is not None else None
        if code is not None and code < 0:
            with suppress(ValueError):
                name = signal.Signals(-code).name
                return WorkerCrashedError(f"the worker was killed by {name}", suspects=suspects, trace=trace)
        return WorkerCrashedError(f"the worker ended with exit code {code}", suspects=suspects, trace=trace)

    def _watch_memory(self, allowed: int) -> None:
        for slot in self._slots:
            if slot.future is not None and slot.over_memory is None:
                resident = slot.resident()
                if resident > allowed:
                    slot.over_memory = resident
                    slot.kill()

    def _end(self) -> None:
        for slot in self._slots:
            slot.kill()
            with suppress(Exception):
                slot.pool.stop()
                slot.pool.join()
            if slot.future is not None:
                slot.future.set_exception(WorkerCrashedError("the engine was stopped"))
        self._slots.clear()
