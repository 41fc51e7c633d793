"""Processes that drive jobs, as seen by the one that starts them: a server, or a loop of schedules.

They have the leases of what they drive, and sessions of their own: they continue if their parent is killed, and Ctrl-C
goes to the parent only, which stops them cleanly. Some rest when their job has ended, and can be given another one: see
:mod:`tally.jobs.line`.
"""

from __future__ import annotations

import os
import signal
import socket
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
from tally.jobs import line

STOP_SECONDS = 40.0
"""How long they may take to save what they have, once they are told to stop."""

Work = TypeVar("Work")


@dataclass(slots=True, eq=False)
class _Child(Generic[Work]):
    """work: None of one that rests. line: to one that may be given more work, where that is ``like`` what it had.
    rests: it has said so."""

    work: Work | None
    process: subprocess.Popen[bytes]
    log: Path
    like: str | None = None
    line: socket.socket | None = None
    rests: bool = False


class Children(Generic[Work]):
    """The processes, each with what it works at. Used by one thread, but for ``len()``.

    wake: is set whenever one has ended.
    """

    def __init__(self, wake: threading.Event) -> None:
        self._wake = wake
        self._found: list[_Child[Work]] = []

    def __len__(self) -> int:
        """How many there are that work, or are not forgotten."""
        return len(self.work)

    @property
    def resting(self) -> int:
        """How many there are that wait for more work."""
        return sum(each.work is None and each.line is not None for each in self._found)

    @property
    def work(self) -> list[Work]:
        """What they work at."""
        return [each.work for each in self._found if each.work is not None]

    def start(self, work: Work, module: str, *arguments: str, log: Path, like: str | None = None) -> None:
        """Start a process that runs one of Tally's modules; what it prints is appended to ``log``. Raises OSError.

        like: it may stay for more work of this kind; it then gets its end of the line as one more argument.
        """
        ours, theirs = (None, None) if like is None else socket.socketpair()
        more = () if theirs is None else (str(theirs.fileno()),)
        try:
            with append_private(log) as output:
                process = subprocess.Popen(
                    processes.command(module, *arguments, *more),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=() if theirs is None else (theirs.fileno(),),
                )
        except BaseException:
            if ours is not None:
                ours.close()
            raise
        finally:
            if theirs is not None:
                theirs.close()
        child = _Child(work, process, log, like, ours)
        self._found.append(child)
        threading.Thread(target=self._wake_when_ended, args=(process,), daemon=True).start()
        if ours is not None:
            threading.Thread(target=self._wake_when_resting, args=(child, ours), daemon=True).start()

    def hand(self, work: Work, like: str, *arguments: str, log: Path) -> bool:
        """Give the work to a process that rests from such work; whether there was one. What it prints goes to ``log``
        from then on. It may end all the same, without having begun."""
        for each in self._resting():
            if each.like == like and each.line is not None and line.send(each.line, *arguments):
                each.work, each.log, each.rests = work, log, False
                return True
        return False

    def working(self, like: str) -> list[Work]:
        """What those work at that may be given more of such work."""
        return [each.work for each in self._found if each.like == like and each.work is not None and not each.rests]

    def make_room(self) -> None:
        """Have those end that rest: what they hold may be needed."""
        for each in self._resting():
            assert each.line is not None
            with suppress(OSError):
                each.line.shutdown(socket.SHUT_RDWR)
            each.line = None

    def _resting(self) -> list[_Child[Work]]:
        """Those that rest."""
        for each in self._found:
            if each.rests:
                each.work = None
        return [each for each in self._found if each.rests and each.line is not None]

    def ended(self) -> list[Work]:
        """What those worked at whose process has ended. To be asked now and then: their logs are kept bounded by it."""
        self._resting()
        for each in self._found:
            logs.bound(each.log)
        over = [each for each in self._found if each.process.poll() is not None]
        self._found = [each for each in self._found if each not in over or each.work is not None]
        return [each.work for each in over if each.work is not None]

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
            self.ended()
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

    def _wake_when_resting(self, child: _Child[Work], ours: socket.socket) -> None:
        with ours:
            while line.is_resting(ours):
                child.rests = True
                self._wake.set()
