"""Processes that drive jobs, as seen by the one that starts them: a server, or a loop of schedules.

They have the leases of what they drive, and sessions of their own: they continue if their parent is killed, and Ctrl-C
goes to the parent only, which stops them cleanly.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tally import processes
from tally.config import append_private
from tally.engines import logs

STOP_SECONDS = 40.0
"""How long they may take to save what they have, once they are told to stop."""

Work = TypeVar("Work")


@dataclass(frozen=True, slots=True)
class _Child(Generic[Work]):
    work: Work
    process: subprocess.Popen[bytes]
    log: Path


class Children(Generic[Work]):
    """The processes, each with what it works at. Used by one thread, but for ``len()``.

    wake: is set whenever one has ended.
    """

    def __init__(self, wake: threading.Event) -> None:
        self._wake = wake
        self._found: list[_Child[Work]] = []

    def __len__(self) -> int:
        """How many there are that are not forgotten."""
        return len(self._found)

    @property
    def work(self) -> list[Work]:
        """What they work at."""
        return [each.work for each in self._found]

    def start(self, work: Work, module: str, *arguments: str, log: Path) -> None:
        """Start a process that runs one of Tally's modules; what it prints is appended to ``log``. Raises OSError."""
        with append_private(log) as output:
            process = subprocess.Popen(
                processes.command(module, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._found.append(_Child(work, process, log))
        threading.Thread(target=self._wake_when_ended, args=(process,), daemon=True).start()

    def ended(self) -> list[Work]:
        """What those worked at whose process has ended. To be asked now and then: their logs are kept bounded by it."""
        for each in self._found:
            logs.bound(each.log)
        return [each.work for each in self._found if each.process.poll() is not None]

    def forget(self, work: Work) -> None:
        """It is settled what became of this."""
        self._found = [each for each in self._found if each.work is not work]

    def stop(self, settle: Callable[[], None], *, at_once: Callable[[], bool] = lambda: False) -> None:
        """Have them save what they have and end, and wait for that.

        settle: is called while they end; it forgets those that have. at_once: whether to kill them now, rather than
        after :data:`STOP_SECONDS`.
        """
        deadline = time.monotonic() + STOP_SECONDS
        for each in self._found:
            each.process.terminate()
        while self._found:
            settle()
            if at_once() or time.monotonic() > deadline:
                for each in self._found:
                    with suppress(ProcessLookupError):
                        os.killpg(each.process.pid, signal.SIGKILL)
            if self._found:
                self._wake.wait(0.5)
                self._wake.clear()

    def _wake_when_ended(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._wake.set()
