"""A local engine whose workers stay when a job has ended, for the next one that can use them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from tally.engines import worker
from tally.engines.base import Limits
from tally.engines.local import LocalEngine, _Slot
from tally.engines.supervised import Task
from tally.errors import WorkerCrashedError

_NOTHING = pickle.dumps((worker.nothing, ()))


class KeptEngine(LocalEngine):
    """Where ``keeps`` is set, to :meth:`stop` it is to have its workers rest, until it is started again or closed.

    Started again, it has each of them call ``setup`` once more. What that raises says that the worker cannot be had for
    it: a fresh one takes its place, as for one that holds more memory than is now allowed, and nobody is told. What is
    still busy when the engine is stopped is ended.
    """

    def __init__(self, **reservation: Any) -> None:
        super().__init__(**reservation)
        self.keeps = self._resting = False

    def prepare(self, *, slots: int, modules: Sequence[str] = ()) -> None:
        if self._thread is None:
            super().prepare(slots=slots, modules=modules)

    def start(
        self,
        setup: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        slots: int,
        limits: Limits,
        log: Path | None = None,
    ) -> None:
        if self._resting and self._threads != self._share(slots):
            self.close()
        rested, self._resting = self._resting, False
        super().start(setup, args, slots=slots, limits=limits, log=log)
        if rested:
            self._events.put(("renew",))

    def stop(self, *, kill: bool = False) -> None:
        if not self.keeps:
            super().stop(kill=kill)
        elif self._thread is not None and not self._resting:
            resting = threading.Event()
            self._events.put(("rest", resting))
            resting.wait()
            self._resting = True  # also where no worker could be started at all

    def close(self) -> None:
        """End all workers. Idempotent."""
        super().stop(kill=True)
        self._resting = False

    # In the supervisor's thread.

    def _fit(self) -> None:
        if not self._resting:
            super()._fit()

    def _handle(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("rest", resting):
                try:
                    self._rest()
                finally:
                    resting.set()
            case ("renew",):
                for slot in [slot for slot in self._slots if slot.task is None and slot.told]:
                    self._renew(slot)
            case _:
                super()._handle(event)

    def _rest(self) -> None:
        self._resting = True
        self._drop_waiting()
        for slot in list(self._slots):
            if (task := slot.vacate()) is not None:
                task.future.set_exception(WorkerCrashedError("the engine was stopped"))
                self._remove(slot, kill=True)
        self._wait_for_ends()

    def _renew(self, slot: _Slot) -> None:
        allowed = self._limits.memory
        if allowed is not None and slot.resident(allowed) > allowed:
            self._remove(slot)
            return
        slot.task = Task(Future(), _NOTHING, deliver=partial(_renewed, slot))
        self._give(slot, slot.task)


def _renewed(slot: _Slot, future: Future[Any], ok: bool, data: bytes, text: str) -> None:
    slot.unfit = not ok
    future.set_result(None)
