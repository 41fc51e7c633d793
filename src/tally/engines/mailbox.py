"""Reports of one task on their way from its worker to its engine.

Each report is a file, renamed into place when it is written whole, so a worker may be killed at any moment and
what it reported before is there. A pair of sockets, the bell, only wakes the other side; how often it rang means
nothing, and when its buffer is full, nobody has to wait.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from socket import MSG_DONTWAIT, socket

from tally.engines import watchdog

RING_BYTES = 4096
"""How many rings are taken at once."""
_LATEST = "latest"


class Outbox:
    """The worker's side. path: what the names of its files begin with. backlog: see ``Reports``. Any thread."""

    def __init__(self, path: str, backlog: int | None, bell: socket) -> None:
        self._path, self._backlog, self._bell = path, backlog, bell
        self._sent = 0
        self._lock = threading.Lock()

    def put(self, data: bytes) -> None:
        """Send one report. Waits while the backlog is full, which is never where the latest wins."""
        with self._lock:
            if self._backlog is not None and self._sent >= self._backlog:
                self._wait_for(f"{self._path}{self._sent - self._backlog}")
            written = f"{self._path}new"
            Path(written).write_bytes(data)
            Path(written).replace(f"{self._path}{_LATEST if self._backlog is None else self._sent}")
            self._sent += 1
            ring(self._bell)

    def _wait_for(self, unreceived: str) -> None:
        while os.path.exists(unreceived):  # noqa: PTH110
            watchdog.reset()  # the time limit is for the task's own work
            if connection.wait([self._bell], 1.0) and not self._bell.recv(RING_BYTES):
                return  # the engine has gone


class Inbox:
    """The engine's side. One thread at a time."""

    def __init__(self, path: str, backlog: int | None, bell: socket) -> None:
        self.path, self.backlog = path, backlog
        self._bell = bell
        self._read = self._released = 0

    def read(self) -> list[bytes]:
        """The reports that were not read yet, oldest first. They count as unreceived until :meth:`release`."""
        found: list[bytes] = []
        with suppress(FileNotFoundError):
            if self.backlog is None:
                taken = Path(f"{self.path}taken")
                Path(f"{self.path}{_LATEST}").replace(taken)  # a newer one may come at any moment
                return [taken.read_bytes()]
            while len(found) < self.backlog:
                found.append(Path(f"{self.path}{self._read}").read_bytes())
                self._read += 1
        return found

    def release(self) -> None:
        """What was read is received: the task may send as many more."""
        if self._released == self._read:
            return
        for number in range(self._released, self._read):
            Path(f"{self.path}{number}").unlink(missing_ok=True)
        self._released = self._read
        ring(self._bell)


def ring(bell: socket) -> None:
    """Wake the other side, if it is there."""
    with suppress(OSError):
        bell.send(b"\0", MSG_DONTWAIT)
