"""Starts a command and ends all that it has started, once it has ended or our parent has: ``keeper.py COMMAND ...``.

A program of its own that imports nothing of Tally. Its standard input comes from who started it, and ends with that,
however it dies: a process that is killed with ``kill -9`` can clean up no more. It ends as the command did.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

_PDEATHSIG, _SUBREAPER = 1, 36
"""Of Linux's prctl: which signal a process gets when its parent ends; orphans become children of this one."""
_END_SECONDS = 5.0
"""How long processes that were killed may take to be gone."""
_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that are meant for the command."""


def main(words: list[str]) -> None:
    _prctl(_SUBREAPER, 1)
    me = os.getpid()
    for each in _OF_THE_GROUP:
        signal.signal(each, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        _become(words, me)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            break
    _end_all()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with suppress(OSError, ValueError):  # that of SIGKILL cannot be set, and need not be
            signal.signal(-code, signal.SIG_DFL)
        os.kill(me, -code)
        time.sleep(_END_SECONDS)
    os._exit(code if code >= 0 else 128 - code)


def _become(words: list[str], parent: int) -> None:
    try:
        for each in _OF_THE_GROUP:
            signal.signal(each, signal.SIG_DFL)
        _prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.execv(words[0], words)  # noqa: S606
    finally:
        os._exit(127)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    _end_all()
    os.killpg(0, signal.SIGKILL)


def _end_all() -> None:
    """Kill all processes that were started, and those that these started."""
    until = time.monotonic() + _END_SECONDS
    while (found := _descendants()) and time.monotonic() < until:
        for each in found:
            with suppress(OSError):
                os.kill(each, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)


def _descendants() -> list[int]:
    found, pending = [], [os.getpid()]
    while pending:
        each = pending.pop()
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                with suppress(OSError), open(f"/proc/{each}/task/{thread}/children") as file:
                    children = [int(child) for child in file.read().split()]
                    found += children
                    pending += children
    return found


def _prctl(*what: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(*what)


if __name__ == "__main__":
    main(sys.argv[1:])
