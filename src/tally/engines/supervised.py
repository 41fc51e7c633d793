"""What engines have in common: one thread that hands waiting tasks to slots, and hears what became of them.

Only that thread touches slots and waiting tasks. The engine's methods, and whatever runs the tasks, put events
into a queue that it reads; so nothing here needs a lock.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from tally.engines.base import Engine
from tally.errors import TallyError

WATCH_SECONDS = 0.2

Deliver = Callable[[Future[Any], bool, bytes, str], None]
"""Gives a future what a worker answered: whether it went well, the pickled result or exception, its traceback."""


def resolve(future: Future[Any], ok: bool, data: bytes, text: str) -> None:
    """Give the future what the bytes say; what cannot be read here fails it, in words."""
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


class Slot:
    """One worker, and the task that it has."""

    future: Future[Any] | None = None
    deliver: Deliver = staticmethod(resolve)

    @property
    def ready(self) -> bool:
        """Whether it could be given a task, if it has none."""
        return True


S = TypeVar("S", bound=Slot)


class SupervisedEngine(Engine, Generic[S]):
    """Override what is abstract here; all of that, and whatever calls it, runs in the supervisor's thread."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wanted = 0
        self._slots: list[S] = []
        self._waiting: deque[tuple[Future[Any], bytes, Deliver]] = deque()

    @abstractmethod
    def _fit(self) -> None:
        """Make the number of slots what it should be; busy ones that are too many end later."""

    @abstractmethod
    def _give(self, slot: S, task: bytes) -> None:
        """Have the slot run the task; what becomes of it is told by an event."""

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

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            task = pickle.dumps((function, arguments))
        except Exception as error:
            future.set_exception(error)
        else:
            self._events.put(("submit", future, task, resolve))
        return future

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
        while not (stopping and not any(slot.future for slot in self._slots)):
            if time.monotonic() - watched >= WATCH_SECONDS:
                self._watch()
                watched = time.monotonic()
            try:
                event = self._events.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                event = ()
            match event:
                case ():
                    pass
                case ("submit", future, task, deliver):
                    self._waiting.append((future, task, deliver))
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
            if slot.future is not None or not slot.ready:
                continue
            while self._waiting:
                future, task, deliver = self._waiting.popleft()
                if future.set_running_or_notify_cancel():
                    slot.future, slot.deliver = future, deliver
                    self._give(slot, task)
                    break

    def _drop_waiting(self) -> None:
        for future, *_ in self._waiting:
            future.cancel()
            future.set_running_or_notify_cancel()  # wakes who waits for several
        self._waiting.clear()

    def _abandon(self, error: TallyError) -> None:
        """Fail everything that has been or is going to be submitted, until the engine is stopped."""
        futures = [slot.future for slot in self._slots if slot.future is not None]
        futures += [future for future, *_ in self._waiting if future.set_running_or_notify_cancel()]
        self._waiting.clear()
        for slot in self._slots:
            slot.future = None
        while True:
            for future in futures:
                future.set_exception(error)
            match self._events.get():
                case ("submit", future, *_):
                    futures = [future] if future.set_running_or_notify_cancel() else []
                case ("stop", _):
                    return
                case _:
                    futures = []
