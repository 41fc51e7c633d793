"""Workers as processes on this machine, kept by pebble.

Each slot is a pebble pool of one process, replaced as a whole when its process is lost: nothing of a
worker that was killed in the middle of a message, or while it held a lock, is ever used again.

Worker processes are spawned without running the caller's main script again, so a script or notebook
needs no ``if __name__ == "__main__":``. They stop by themselves when the process that started them is gone.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import connection, popen_spawn_posix
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import psutil
from pebble import ProcessPool

from tally.engines import progress
from tally.engines.base import Limits
from tally.engines.supervised import Slot, SupervisedEngine
from tally.errors import (
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
    WorkerTimeoutError,
)
from tally.storage import temporary

ENDING_SECONDS = 3.0
"""How long a worker that is asked to end may take to clean up."""
LAST_WORDS_SECONDS = 1.0
"""How long the result of a worker that has ended may still be on its way."""
MEMORY_SHARE = 0.8
"""Share of the machine's memory that all workers together may hold."""

_main_swap = threading.Lock()


class _Popen(popen_spawn_posix.Popen):
    def _launch(self, process_obj: Any) -> None:
        # multiprocessing would import the caller's main script into the worker: a script without a
        # __main__ guard would start the job again from there. Ctrl-C is for the coordinator to handle; the
        # signal mask is inherited, so that a worker that is just starting is safe from it too.
        with _main_swap:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                super()._launch(process_obj)  # type: ignore[misc]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                sys.modules["__main__"] = main


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - multiprocessing's name
        return _Popen(process_obj)


class _Context(SpawnContext):
    """A spawn context for one process, the slot's worker. When that is lost, pebble would start another,
    which would overwrite what the lost one left behind: it is refused, and pebble calls the pool broken."""

    def __init__(self) -> None:
        super().__init__()
        self.worker: _Process | None = None

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # type: ignore[override]  # noqa: N802
        if self.worker is not None:
            raise ChildProcessError("a slot has one worker")
        self.worker = _Process(*args, **kwargs)
        return self.worker


# -- in the worker ---------------------------------------------------------------------------------

# Tasks and results travel as bytes that pebble has not to understand: what cannot be pickled, or not be read at the
# other end, fails its task, and does not stop the threads that pebble moves messages with.

_setup = b""
_state: Any = None
_ready = False


def _begin(setup: bytes, board: str, trace: str, log: str | None, threads: int) -> None:
    global _setup
    # Numeric libraries take every core for themselves unless told otherwise, in each worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if log is not None:
        # Below Python, so that native libraries write there too, and not over the progress bar.
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        # What was printed last matters most when the worker dies.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
    progress.attach(Path(board), Path(trace))
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent, Path(board).parent), daemon=True).start()
    _setup = setup


def _leave_with(parent: Any, folder: Path) -> None:
    """An orphan must not go on writing: end as soon as the parent does, and tidy up after it."""
    connection.wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _call(task: bytes) -> tuple[bool, bytes, str]:
    """Whether it went well, the pickled result or exception, and for the latter its traceback as text."""
    global _state, _ready
    try:
        if not _ready:
            setup, args = pickle.loads(_setup)  # noqa: S301 - from our own parent
            _state = setup(*args)
            _ready = True
        function, arguments = pickle.loads(task)  # noqa: S301
        return True, pickle.dumps(function(_state, *arguments)), ""
    except BaseException as error:
        text = traceback.format_exc()
        try:
            return False, pickle.dumps(error), text
        except Exception:
            return False, b"", text
    finally:
        progress.idle()


# -- in the coordinator ----------------------------------------------------------------------------


class _Slot(Slot):
    """One worker process."""

    def __init__(self, folder: Path, number: int, setup: bytes, log: Path | None, threads: int) -> None:
        self.board = folder / f"{number}.board"
        self.trace = folder / f"{number}.trace"
        progress.create(self.board)
        self.context = _Context()
        self.pool = ProcessPool(
            max_workers=1,
            initializer=_begin,
            initargs=(setup, str(self.board), str(self.trace), None if log is None else str(log), threads),
            context=self.context,
        )
        self.over_memory: int | None = None
        self.gone_since: float | None = None

    @property
    def gone(self) -> bool:
        process = self.context.worker
        if process is None or process.pid is None or process.exitcode is not None:
            return True
        # While another thread reaps it, the exit code is not known yet.
        return bool(connection.wait([process.sentinel], 0))

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

    def _ask_to_end(self) -> None:
        # Not by way of pebble: it closes the worker's pipes first, whereupon the worker begins to clean up, and
        # is then cut short by the signal.
        process = self.context.worker
        if process is not None and not self.gone:
            process.terminate()
            process.join(ENDING_SECONDS)

    def discard(self, *, kill: bool) -> threading.Thread:
        """End the pool in a thread of its own: that takes up to a few tenths of a second.

        kill: at once; otherwise the worker may clean up first.
        """

        def end() -> None:
            if not kill:
                self._ask_to_end()
            self.kill()
            with suppress(Exception):  # a pool that broke may fail to stop; its process is dead already
                self.pool.stop()  # type: ignore[no-untyped-call]
                self.pool.join()

        thread = threading.Thread(target=end, daemon=True, name="tally-slot-end")
        thread.start()
        return thread


class LocalEngine(SupervisedEngine[_Slot]):
    """See :mod:`tally.engines.local`."""

    def start(
        self,
        setup: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        slots: int,
        limits: Limits,
        log: Path | None = None,
    ) -> None:
        threads = max(1, self.default_slots() // max(1, slots))
        self.start_packed(pickle.dumps((setup, args)), new_folder(), threads, slots=slots, limits=limits, log=log)

    def start_packed(
        self, setup: bytes, folder: Path, threads: int, *, slots: int, limits: Limits, log: Path | None = None
    ) -> None:
        """Start with ``(setup, args)`` pickled elsewhere, for an engine that has this one do the work on its nodes.

        folder: for the files of the workers; it is removed with the engine, by the workers if they outlive it.
        threads: how many a numeric library in one worker may use, where the environment does not say.
        """
        self._setup, self._folder, self._threads = setup, folder, threads
        self._limits, self._log = limits, log
        self._made = 0
        self._ending: list[threading.Thread] = []
        self._launch(slots)

    def submit_packed(self, task: bytes) -> Future[tuple[bool, bytes, str]]:
        """Run ``(function, arguments)`` pickled elsewhere, and give back the bytes that :func:`_call` made of it."""
        future: Future[tuple[bool, bytes, str]] = Future()
        self._events.put(("submit", future, task, _hand_on))
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

    def stop(self, *, kill: bool = False) -> None:
        running = self._thread is not None
        super().stop(kill=kill)
        if running:
            temporary.remove(self._folder)

    # In the supervisor's thread.

    def _fit(self) -> None:
        for slot in [slot for slot in self._slots if slot.future is None and slot.gone]:
            self._remove(slot, kill=True)  # died while idle: no task's fault
        for slot in [slot for slot in self._slots if slot.future is None][: max(0, len(self._slots) - self._wanted)]:
            self._remove(slot, kill=False)
        while len(self._slots) < self._wanted:
            self._made += 1
            slot = _Slot(self._folder, self._made, self._setup, self._log, self._threads)
            self._slots.append(slot)
            _ = slot.pool.active  # starts the pool: the worker imports and loads while work is being planned

    def _remove(self, slot: _Slot, *, kill: bool = True) -> None:
        self._slots.remove(slot)
        self._ending = [thread for thread in self._ending if thread.is_alive()]
        self._ending.append(slot.discard(kill=kill))

    def _give(self, slot: _Slot, task: bytes) -> None:
        outcome: Future[Any]
        try:
            outcome = slot.pool.schedule(_call, args=(task,))
        except RuntimeError as error:  # its worker has just died
            outcome = Future()
            outcome.set_exception(BrokenProcessPool(str(error)))
        outcome.add_done_callback(partial(self._report, slot))

    def _report(self, slot: _Slot, outcome: Future[Any]) -> None:
        self._events.put(("done", slot, outcome))

    def _handle(self, event: tuple[Any, ...]) -> None:
        _, slot, outcome = event
        self._settle(slot, outcome)

    def _settle(self, slot: _Slot, outcome: Future[Any]) -> None:
        future, slot.future = slot.future, None
        if future is None:
            return
        error = outcome.exception()
        if error is not None:
            future.set_exception(self._explain(slot))
        else:
            slot.deliver(future, *outcome.result())
        if error is not None or slot.over_memory is not None:
            self._remove(slot, kill=True)

    def _explain(self, slot: _Slot) -> WorkerError:
        trace, timed_out = progress.stack(slot.trace)
        suspects = progress.read(slot.board, timed_out=timed_out)
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

    def _watch(self) -> None:
        """Find workers that are too large, and tasks that pebble forgot in a worker that has ended."""
        allowed = self._limits.memory
        for slot in [slot for slot in self._slots if slot.future is not None]:
            if slot.gone:
                slot.gone_since = slot.gone_since or time.monotonic()
                if time.monotonic() - slot.gone_since > LAST_WORDS_SECONDS:
                    lost: Future[Any] = Future()
                    lost.set_exception(BrokenProcessPool())
                    self._settle(slot, lost)
            elif allowed is not None and slot.over_memory is None and (resident := slot.resident()) > allowed:
                slot.over_memory = resident
                slot.kill()

    def _end(self, *, kill: bool) -> None:
        for slot in list(self._slots):
            if slot.future is not None:
                slot.future.set_exception(WorkerCrashedError("the engine was stopped"))
            self._remove(slot, kill=kill)
        for thread in self._ending:
            thread.join()


def new_folder() -> Path:
    """A temporary folder for the files of one engine's workers."""
    return temporary.make("workers")


def _hand_on(future: Future[Any], ok: bool, data: bytes, text: str) -> None:
    future.set_result((ok, data, text))
