"""Workers as processes on this machine, kept by pebble.

Each slot is a pebble pool of one process, replaced as a whole when its process is lost: nothing of a
worker that was killed in the middle of a message, or while it held a lock, is ever used again.

Workers end by themselves when the process that started them is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
from pebble import ProcessPool

from tally.engines import family, logs, watchdog, worker
from tally.engines.base import Limits
from tally.engines.mailbox import RING_BYTES, Inbox
from tally.engines.spawn import Context
from tally.engines.supervised import Slot, SupervisedEngine, Task
from tally.errors import (
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
    WorkerSpentError,
    WorkerTimeoutError,
)
from tally.storage import temporary
from tally.storage.publish import write_whole

ENDING_SECONDS = 3.0
"""How long a worker that is asked to end may take to clean up."""
LAST_RESULT_SECONDS = 1.0
"""How long the result of a worker that has ended may still be on its way."""
CHILDREN_SECONDS = 0.5
"""How long processes that a worker started may outlive it, where it ended in good order."""
LAST_WORDS_SECONDS = 5.0
"""How long a worker that has exceeded its time limit may take to write its stack."""
_SETUP = "setup"
"""In the engine's folder, the file that tells workers how they are set up."""
MEMORY_SHARE = 0.8
"""Share of the machine's memory that all workers together may hold."""


class _Slot(Slot):
    """One worker process.

    inbox: for the task's reports, if its caller wants them.
    over_memory: the resident bytes for which the worker was killed.
    exceeded: the time limit that it exceeded, see :meth:`tally.engines.watchdog.Clock.exceeded`; it is being ended, and
        what it may still give back does not count: the signal may have cut short what it did. exceeded_at: what it had
        noted then. kill_at: when it is killed even if it has not written its stack.
    overdue: the worker was killed because its task did not stop in time.
    gone_since: when it was noticed that the process has ended.
    told: which setup it was told to use last; 0 before its first task. unfit: it could not be set up anew.
    children: the processes that it had started when it was last looked at.
    """

    def __init__(self, folder: Path, number: int, setup: Path, threads: int, modules: Sequence[str]) -> None:
        self.files = worker.Files(*(folder / f"{number}.{name}" for name in worker.Files._fields))
        watchdog.create(self.files.note)
        self.files.stop_flag.write_bytes(b"\0")
        self._mailbox = str(folder / f"{number}.report.")
        self.bell, self._workers_bell = socket.socketpair()
        self.context = Context()
        self.pool = ProcessPool(
            max_workers=1,
            initializer=worker.begin,
            initargs=(setup, self.files, self._workers_bell, threads, tuple(modules)),
            context=self.context,
        )
        self.inbox: Inbox | None = None
        self.over_memory: int | None = None
        self.exceeded: str | None = None
        self.exceeded_at = watchdog.Note()
        self.kill_at = 0.0
        self.clock = watchdog.Clock()
        self.overdue = False
        self.gone_since: float | None = None
        self.told, self.unfit = 0, False
        self.children: list[psutil.Process] = []
        self._tasks = 0
        self._listener: threading.Thread | None = None
        self._rung = self._flagged = False

    def start(self) -> None:
        """Start the worker: it imports and loads while work is being planned."""
        _ = self.pool.active
        self._workers_bell.close()

    def schedule(self, task: Task, told: int, rung: Callable[[], None]) -> Future[Any]:
        """Have the worker run the task. told: the number of the setup that it is for. rung: called by a thread of the
        slot's when there may be reports."""
        self._tasks += 1
        self.told = told
        self.flag_stop(False)
        self.inbox = None
        mailbox = backlog = None
        if task.reports is not None:
            mailbox, backlog = f"{self._mailbox}{self._tasks}.", task.reports.backlog
            self.inbox = Inbox(mailbox, backlog, self.bell)
            if self._listener is None:
                self._listener = threading.Thread(target=self._listen, args=(rung,), name="tally-bell", daemon=True)
                self._listener.start()
        outcome: Future[Any]
        try:
            outcome = self.pool.schedule(worker.call, args=(task.packed, mailbox, backlog, told))
        except RuntimeError as error:  # its worker has just died
            outcome = Future()
            outcome.set_exception(BrokenProcessPool(str(error)))
        return outcome

    def _listen(self, rung: Callable[[], None]) -> None:
        with suppress(OSError):
            while self.bell.recv(RING_BYTES):
                if not self._rung:  # one event at a time, however often it rings
                    self._rung = True
                    rung()

    def unread(self) -> Inbox | None:
        """The task's inbox, to be read now; the next ring is a new event."""
        self._rung = False
        return self.inbox

    def flag_stop(self, stop: bool) -> None:
        """Have :func:`tally.engines.task.stopping` return this in the worker."""
        if stop or self._flagged:
            self._flagged = stop
            with self.files.stop_flag.open("r+b") as file:
                file.write(bytes([stop]))

    @property
    def gone(self) -> bool:
        process = self.context.worker
        if process is None or process.pid is None or process.exitcode is not None:
            return True
        # While another thread reaps it, the exit code is not known yet.
        return bool(connection.wait([process.sentinel], 0))

    def resident(self, allowed: int | None) -> int:
        """Bytes of memory that the worker and the processes that it started hold; 0 if it is gone."""
        process = self.context.worker
        if process is None or process.pid is None:
            return 0
        self.children = family.descendants(process.pid)
        return family.resident(process.pid, self.children, allowed)

    def look_at_the_clock(self) -> None:
        """End the worker if its time is over: first it is to write its stack, then it is killed."""
        process = self.context.worker
        if process is None or process.pid is None:
            return
        if self.exceeded is not None:
            if self._has_last_words() or time.monotonic() >= self.kill_at:
                self.kill()
            return
        stopped = False
        with suppress(psutil.Error):
            stopped = psutil.Process(process.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        note = watchdog.read(self.files.note)
        self.exceeded, self.exceeded_at = self.clock.exceeded(note, time.monotonic(), stopped=stopped), note
        if self.exceeded is not None:
            self.kill_at = time.monotonic() + LAST_WORDS_SECONDS
            with suppress(OSError):
                os.kill(process.pid, watchdog.DUMP_SIGNAL)

    def _has_last_words(self) -> bool:
        try:
            return self.files.trace.stat().st_size > 0
        except OSError:
            return True

    def kill(self) -> None:
        process = self.context.worker
        if process is not None and process.pid is not None and not self.gone:
            self.children = family.descendants(process.pid)
            with suppress(OSError):
                os.kill(process.pid, signal.SIGSTOP)  # so that it starts no others, and orphans still come to it
            family.kill_descendants(process.pid)
            process.kill()

    def _end_children(self, *, at_once: bool) -> None:
        """End the processes that the worker, which has ended, has left behind; those that tidy up get a moment."""
        process = self.context.worker
        if process is None or process.pid is None:
            return
        deadline = time.monotonic() + (0.0 if at_once else CHILDREN_SECONDS)
        while family.is_left(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        family.kill(process.pid, self.children)

    def _ask_to_end(self) -> None:
        # Not by way of pebble: it closes the worker's pipes first, whereupon the worker begins to clean up, and
        # is then cut short by the signal.
        process = self.context.worker
        if process is not None and not self.gone:
            process.terminate()
            process.join(ENDING_SECONDS)

    def discard(self, *, kill: bool) -> threading.Event:
        """End the worker, in a thread of its own. The event is set when it and its children have ended.

        kill: at once; otherwise the worker may clean up first.
        """
        ended = threading.Event()

        def end() -> None:
            try:
                if not kill:
                    self._ask_to_end()
                self.kill()
                process = self.context.worker
                if process is not None and process.pid is not None:  # else it could not be started
                    process.join(ENDING_SECONDS)
                self._end_children(at_once=kill)
                with suppress(OSError):
                    self.bell.shutdown(socket.SHUT_RDWR)  # ends the listener
                if self._listener is not None:
                    self._listener.join()
                self.bell.close()
                self._workers_bell.close()
            finally:
                ended.set()
            with suppress(Exception):  # a pool that broke may fail to stop; its process is dead already
                self.pool.stop()  # type: ignore[no-untyped-call]
                self.pool.join()  # its threads look around ten times a second

        threading.Thread(target=end, daemon=True, name="tally-slot-end").start()
        return ended


@dataclass(slots=True, eq=False)
class PackedTask(Task):
    """A task of another engine, which has this one do the work.

    on_reports: called with the inbox when there may be reports, and once more before the future is done.
    """

    on_reports: Callable[[Inbox], None] = lambda inbox: None

    def collect(self, inbox: Inbox) -> None:
        self.on_reports(inbox)


class LocalEngine(SupervisedEngine[_Slot]):
    """See :mod:`tally.engines.local`."""

    def __init__(self, **reservation: Any) -> None:
        super().__init__(**reservation)
        self._limits = Limits()
        self._log: Path | None = None
        self._modules: Sequence[str] = ()
        self._made = self._told = 0
        self._ending: list[threading.Event] = []

    def start(
        self,
        setup: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        slots: int,
        limits: Limits,
        log: Path | None = None,
    ) -> None:
        packed = pickle.dumps((setup, args))
        if self._thread is None:
            self.start_packed(packed, new_folder(), self._share(slots), slots=slots, limits=limits, log=log)
        else:
            self._tell(packed, limits, log)
            self.resize(slots)

    def prepare(self, *, slots: int, modules: Sequence[str] = ()) -> None:
        self._folder, self._threads, self._modules, self._made = new_folder(), self._share(slots), modules, 0
        self._launch(slots)

    def _share(self, slots: int) -> int:
        """Threads per worker."""
        return max(1, self.default_slots() // max(1, slots))

    def _tell(self, setup: bytes, limits: Limits, log: Path | None) -> None:
        """Give the setup to all workers, present and future."""
        self._limits, self._log = limits, log
        self._told += 1
        given = worker.Setup(setup, None if log is None else str(log))
        write_whole(self._folder / _SETUP, pickle.dumps(given), private=True)

    def start_packed(
        self, setup: bytes, folder: Path, threads: int, *, slots: int, limits: Limits, log: Path | None = None
    ) -> None:
        """Start with ``(setup, args)`` pickled elsewhere, for an engine that has this one do the work on its nodes.

        folder: for the files of the workers; it is removed with the engine, by the workers if they outlive it.
        threads: how many a numeric library in one worker may use, where the environment does not say.
        """
        self._folder, self._threads, self._made = folder, threads, 0
        self._tell(setup, limits, log)
        self._launch(slots)

    def submit_packed(self, task: PackedTask) -> None:
        """Run a task that was pickled elsewhere; its future gets what :func:`worker.call` returns."""
        task.deliver = _hand_on
        self._events.put(("submit", task))

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
        for slot in [slot for slot in self._slots if slot.task is None and slot.gone]:
            self._remove(slot, kill=True)  # died while idle: no task's fault
        for slot in [slot for slot in self._slots if slot.task is None][: max(0, len(self._slots) - self._wanted)]:
            self._remove(slot, kill=False)
        setup = self._folder / _SETUP
        while len(self._slots) < self._wanted:
            if self._made >= self._wanted and not setup.exists():
                return  # what died while it was prepared is replaced when it is needed
            self._made += 1
            slot = _Slot(self._folder, self._made, setup, self._threads, self._modules)
            self._slots.append(slot)
            slot.start()

    def _remove(self, slot: _Slot, *, kill: bool = True) -> None:
        self._slots.remove(slot)
        self._ending = [ended for ended in self._ending if not ended.is_set()]
        self._ending.append(slot.discard(kill=kill))

    def _give(self, slot: _Slot, task: Task) -> None:
        outcome = slot.schedule(task, self._told, partial(self._events.put, ("reports", slot)))
        outcome.add_done_callback(partial(self._report, slot))

    def _report(self, slot: _Slot, outcome: Future[Any]) -> None:
        self._events.put(("done", slot, outcome))

    def _handle(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("reports", slot):
                self._receive(slot)
            case ("done", slot, outcome):
                self._settle(slot, outcome)

    def _receive(self, slot: _Slot) -> None:
        inbox, task = slot.unread(), slot.task
        if inbox is not None and task is not None:
            task.collect(inbox)

    def _settle(self, slot: _Slot, outcome: Future[Any]) -> None:
        self._receive(slot)  # what the worker sent before it answered or died
        task = slot.vacate()
        if task is None:
            return
        error = outcome.exception()
        if error is not None or slot.exceeded is not None:
            task.future.set_exception(self._explain(slot))
        else:
            task.deliver(task.future, *outcome.result())
        lost = error is not None or slot.over_memory is not None or slot.exceeded is not None
        if lost or slot.overdue or slot.unfit:
            self._remove(slot, kill=True)
        elif self._limits.items is not None and watchdog.read(slot.files.note).items >= self._limits.items:
            self._remove(slot, kill=False)

    def _explain(self, slot: _Slot) -> WorkerError:
        if slot.overdue:
            return slot.stopped()
        trace, spent = watchdog.last_words(slot.files.trace)
        note = slot.exceeded_at if slot.exceeded is not None else watchdog.read(slot.files.note)
        suspects, fresh = watchdog.suspects(note, timed_out=slot.exceeded is not None), note.earlier == 0
        if slot.over_memory is not None:
            allowed = self._limits.memory or 0
            alone = not slot.children
            holders, whose = ("the worker", "its") if alone else ("the worker and the processes it started", "their")
            return WorkerMemoryError(
                f"{holders} held {slot.over_memory / 2**20:,.0f} MiB, over {whose} limit of {allowed / 2**20:,.0f} MiB",
                suspects=suspects,
                fresh=fresh,
                trace=trace,
            )
        if slot.exceeded is not None:
            what = "took longer than its time limit"
            if slot.exceeded == "stopped":
                what = f"was stopped, by a signal or a debugger, for {watchdog.STOPPED_LIMITS} times its time limit"
            return WorkerTimeoutError(what, suspects=suspects, trace=trace)
        if spent is not None:
            return WorkerSpentError(spent, suspects=suspects, fresh=fresh)
        process = slot.context.worker
        if process is not None:
            process.join(1)  # it is gone, or about to be
        code = process.exitcode if process is not None else None
        if code is not None and code < 0:
            with suppress(ValueError):
                name = signal.Signals(-code).name
                return WorkerCrashedError(f"the worker was killed by {name}", suspects=suspects, trace=trace)
        return WorkerCrashedError(f"the worker ended with exit code {code}", suspects=suspects, trace=trace)

    def _ask_to_stop(self, slot: _Slot) -> None:
        slot.flag_stop(True)

    def _kill(self, slot: _Slot) -> None:
        slot.overdue = slot.overdue or not slot.gone
        slot.kill()

    def _watch(self) -> None:
        """Find workers that are too large or too slow, and tasks that pebble forgot in a worker that has ended."""
        allowed = self._limits.memory
        if self._log is not None:
            logs.bound(self._log)
        for slot in [slot for slot in self._slots if slot.task is not None]:
            if slot.gone:
                slot.gone_since = slot.gone_since or time.monotonic()
                if time.monotonic() - slot.gone_since > LAST_RESULT_SECONDS:
                    lost: Future[Any] = Future()
                    lost.set_exception(BrokenProcessPool())
                    self._settle(slot, lost)
            elif (resident := slot.resident(allowed)) > (allowed or resident) and slot.over_memory is None:
                slot.over_memory = resident
                slot.kill()
            else:
                slot.look_at_the_clock()

    def _end(self, *, kill: bool) -> None:
        for slot in list(self._slots):
            if (task := slot.vacate()) is not None:
                task.future.set_exception(WorkerCrashedError("the engine was stopped"))
            self._remove(slot, kill=kill)
        self._wait_for_ends()

    def _wait_for_ends(self) -> None:
        """Until all that was removed has ended, and has written its last to the log."""
        for ended in self._ending:
            ended.wait()
        if self._log is not None:
            logs.bound(self._log)


def new_folder() -> Path:
    """A temporary folder for the files of one engine's workers."""
    return temporary.make("workers")


def _hand_on(future: Future[Any], ok: bool, data: bytes, text: str) -> None:
    future.set_result((ok, data, text))
