"""How worker processes are spawned: once for each slot, and without the caller's main script.

A script or notebook therefore needs no ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import signal
import sys
import threading
import types
from multiprocessing import popen_spawn_posix
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

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


class Process(SpawnProcess):
    """A worker process."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - multiprocessing's name
        return _Popen(process_obj)


class Context(SpawnContext):
    """A spawn context for one process, a slot's worker.

    When the worker is lost, pebble would start another, which would overwrite what the lost one left behind.
    That is refused, and pebble calls the pool broken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.worker: Process | None = None

    def Process(self, *args: Any, **kwargs: Any) -> Process:  # type: ignore[override]  # noqa: N802
        if self.worker is not None:
            raise ChildProcessError("a slot has one worker")
        self.worker = Process(*args, **kwargs)
        return self.worker
