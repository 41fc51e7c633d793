"""What engines have in common: one thread that gives waiting tasks to slots, and learns how they ended.

Only that thread touches slots and waiting tasks. The engine's methods, and whatever runs the tasks, put events
into a queue that it reads; so nothing here needs a lock.
"""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tally.engines.base import Engine, Reports
from tally.engines.mailbox import Inbox
from tally.errors import TallyError, WorkerStoppedError

WATCH_SECONDS = 0.2

Deliver = Callable[[Future[Any], bool, bytes, str], None]
"""Gives a future what a worker answered: whether it went well, the pickled result or exception, its traceback."""


def resolve(future: Future[Any], ok: bool, data: bytes, text: str) -> None:
    """Give the future what the bytes say; if they cannot be read here, it fails with an error that says so."""
    try:
        value = pickle.loads(data)  # noqa: S301 - from our own worker
    except Exception as error:
        value = TallyError(f"what a worker gave back cannot be read here: {text.strip() or error}")
        ok = False
    if ok:
        future.set_result(value)
    elif isinstance(value, BaseException):
        value.add_note(f"in a worker process:\n{text}")
        future.set_exception(value)


@dataclass(slots=True, eq=False)
class Task:
    """A task that waits or runs. packed: ``(function, arguments)``, pickled."""

    future: Future[Any]
    packed: bytes
    reports: Reports | None = None
    deliver: Deliver = resolve

    def collect(self, inbox: Inbox) -> None:
        """Receive what is in the inbox."""
        self.receive(inbox.read())
        inbox.release()

    def receive(self, reports: Sequence[bytes]) -> None:
        """Hand pickled reports to the caller that asked for them."""
        if self.reports is None:
            return
        for data in reports:
            try:
                self.reports.receive(pickle.loads(data))  # noqa: S301 - from our own worker
            except Exception:
                logging.getLogger(__name__).exception("a report of a task could not be received")


class Slot:
    """One worker, and the task that it runs.

    stop_by: when the worker is killed, if it still runs the task, which is asked to stop (``time.monotonic()``).
    stop_seconds: how long the task was given for that.
    """

    task: Task | None = None
    stop_by: float | None = None
    stop_seconds = 0.0

    @property
    def ready(self) -> bool:
        """Whether it could be given a task, if it has none."""
        return True

    def vacate(self) -> Task | None:
        """Take the task from it, for which it has ended."""
        task, self.task, self.stop_by = self.task, None, None
        return task

    def stopped(self) -> WorkerStoppedError:
        """The error of a task that outlasted ``stop_seconds``."""
        return WorkerStoppedError(
            f"the task did not end within {self.stop_seconds:g} s of being asked to stop; its worker was killed"
        )


S = TypeVar("S", bound=Slot)


class SupervisedEngine(Engine, Generic[S]):
    """Override what is abstract here; all of that, and whatever calls it, runs in the supervisor's thread."""

    def __init__(self, **reservation: Any) -> None:
        super().__init__(**reservation)
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wanted = 0
        self._slots: list[S] = []
        self._waiting: deque[Task] = deque()

    @abstractmethod
    def _fit(self) -> None:
        """Start or end slots until there are as many as wanted; surplus busy ones end later."""

    @abstractmethod
    def _give(self, slot: S, task: Task) -> None:
        """Have the slot run the task; an event tells how it ended."""

    @abstractmethod
    def _ask_to_stop(self, slot: S) -> None:
        """Tell the slot's task that it should stop, by :attr:`Slot.stop_by` at the latest."""

    def _grace(self) -> float:
        """Seconds after :attr:`Slot.stop_by` until :meth:`_kill` is called."""
        return 0.0

    @abstractmethod
    def _kill(self, slot: S) -> None:
        """The slot's task did not stop in time: end its worker."""

    @abstractmethod
    def _handle(self, event: tuple[Any, ...]) -> None:
        """An event of the engine's own."""

    @abstractmethod
    def _watch(self) -> None:
        """Called every :data:`WATCH_SECONDS` or so."""

    @abstractmethod
    def _end(self, *, kill: bool) -> None:
        """End all slots, and wait until they have ended."""

    def _launch(self, slots: int) -> None:
        self._wanted = slots
        self._slots, self._waiting = [], deque()
        self._thread = threading.Thread(target=self._run, name="tally-engine", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any, reports: Reports | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            packed = pickle.dumps((function, arguments))
        except Exception as error:
            future.set_exception(error)
        else:
            self._events.put(("submit", Task(future, packed, reports)))
        return future

    def stop_task(self, future: Future[Any], *, seconds: float) -> None:
        self._events.put(("stop task", future, seconds))

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

    def _run(self) -> None:
        kill = True
        try:
            kill = self._supervise()
        except TallyError as error:
            self._abandon(error)
        except Exception as error:  # no process or file can be had: nothing can be run any more
            self._abandon(TallyError(f"no workers can be started: {error.__cause__ or error}"))
        self._end(kill=kill)

    def _supervise(self) -> bool:
        """Runs until the engine is stopped; returns whether workers are to be killed."""
        stopping = False
        watched = 0.0
        self._fit()
        while not (stopping and not any(slot.task for slot in self._slots)):
            if (now := time.monotonic()) - watched >= WATCH_SECONDS:
                self._kill_overdue(now - self._grace())
                self._watch()
                watched = time.monotonic()
            try:
                event = self._events.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                event = ()
            match event:
                case ():
                    pass
                case ("submit", task):
                    self._waiting.append(task)
                case ("stop task", future, seconds):
                    self._stop_task(future, seconds)
                case ("resize",):
                    pass
                case ("stop", kill):
                    stopping = True
                    self._drop_waiting()
                    if kill:
                        return True
                case _:
                    self._handle(event)
            if not stopping:
                self._fit()
                self._assign()
        return False

    def _assign(self) -> None:
        for slot in self._slots:
            if slot.task is not None or not slot.ready:
                continue
            while self._waiting:
                task = self._waiting.popleft()
                if task.future.set_running_or_notify_cancel():
                    slot.task = task
                    self._give(slot, task)
                    break

    def _stop_task(self, future: Future[Any], seconds: float) -> None:
        for task in [task for task in self._waiting if task.future is future]:
            self._waiting.remove(task)
            _cancel(task)
        for slot in [slot for slot in self._slots if slot.task is not None and slot.task.future is future]:
            stop_by = time.monotonic() + seconds
            if slot.stop_by is None or stop_by < slot.stop_by:
                slot.stop_by, slot.stop_seconds = stop_by, seconds
                self._ask_to_stop(slot)

    def _kill_overdue(self, now: float) -> None:
        for slot in [slot for slot in self._slots if slot.stop_by is not None and now >= slot.stop_by]:
            slot.stop_by = None
            self._kill(slot)

    def _drop_waiting(self) -> None:
        for task in self._waiting:
            _cancel(task)
        self._waiting.clear()

    def _abandon(self, error: TallyError) -> None:
        """Fail every task that was or will be submitted, until the engine is stopped."""
        futures = [task.future for slot in self._slots if (task := slot.vacate()) is not None]
        futures += [task.future for task in self._waiting if task.future.set_running_or_notify_cancel()]
        self._waiting.clear()
        while True:
            for future in futures:
                future.set_exception(error)
            match self._events.get():
                case ("submit", task):
                    futures = [task.future] if task.future.set_running_or_notify_cancel() else []
                case ("stop", _):
                    return
                case ("rest", resting):
                    futures = []
                    resting.set()
                case _:
                    futures = []


def _cancel(task: Task) -> None:
    task.future.cancel()
    task.future.set_running_or_notify_cancel()  # wakes who waits for several
