"""The line between a process that drives jobs and the one that started it: a pair of sockets.

When its job has ended, the process may say that it rests, with all that it has loaded. It is then given another job, or
ends: when it has rested for long enough, when it is told to, and when the other side is gone.
"""

from __future__ import annotations

import json
import select
import socket

_RESTING = b"."


# -- who started it ------------------------------------------------------------------------------------


def is_resting(end: socket.socket) -> bool:
    """Wait until the process rests once more; False once it has ended, or is told to."""
    try:
        return bool(end.recv(1))
    except OSError:
        return False


def send(end: socket.socket, *arguments: str) -> bool:
    """Give it more to do. Returns whether it could be told; it may end all the same."""
    try:
        end.sendall(json.dumps(arguments).encode() + b"\n")
    except OSError:
        return False
    return True


# -- the process ---------------------------------------------------------------------------------------


class Line:
    """The process's own end. number: of the descriptor, as the process is told it."""

    def __init__(self, number: int) -> None:
        self._end = socket.socket(fileno=number)
        self._end.set_inheritable(False)
        self._lines = self._end.makefile("rb")

    def rest(self, seconds: float) -> list[str] | None:
        """Say that this process rests, and wait for that long at most; returns what it is given to do, if anything."""
        try:
            self._end.sendall(_RESTING)
            if not select.select([self._end], [], [], seconds)[0] or not (told := self._lines.readline()):
                return None
        except OSError:
            return None
        found: list[str] = json.loads(told)
        return found
