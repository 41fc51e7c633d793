"""A worker and the processes that code of a model started in it: their memory counts, and they end with it.

A worker leads a session of its own, so that one signal reaches whoever did not leave it; and on Linux, processes that
lose their parent become the worker's own children, so that those that left it are found too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process has started, and those that these started."""
    found = []
    if Path(f"/proc/{pid}/task/{pid}/children").exists():
        pending = [*_children(pid)]
        while pending:
            each = pending.pop()
            with suppress(psutil.Error):
                found.append(psutil.Process(each))
                pending += _children(each)
        return found
    with suppress(psutil.Error):  # slow: it looks at every process of the machine
        found = psutil.Process(pid).children(recursive=True)
    return found


def _children(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                yield from map(int, file.read().split())


def resident(pid: int, others: list[psutil.Process], allowed: int | None) -> int:
    """Bytes of memory that a process and others hold. What they share counts once, where it matters: above
    ``allowed``."""
    with suppress(psutil.Error):
        main = psutil.Process(pid)
        total = int(main.memory_info().rss)
        for each in others:
            with suppress(psutil.Error):
                total += each.memory_info().rss
        if others and allowed is not None and total > allowed:
            return sum(map(_share, [main, *others]))
        return total
    return 0


def _share(process: psutil.Process) -> int:
    """The process's own memory, and its part of what it shares."""
    with suppress(psutil.Error):
        found = process.memory_full_info()
        return int(getattr(found, "pss", 0) or found.uss)
    return 0


def kill_descendants(pid: int, seconds: float = 0.5) -> None:
    """End the processes that a process has started. One look at them is not enough: who loses its parent meanwhile
    has left one list, and is not in the other yet."""
    deadline = time.monotonic() + seconds
    while left := [each for each in descendants(pid) if _lives(each)]:
        for each in left:
            with suppress(psutil.Error):
                each.kill()
        if time.monotonic() > deadline:
            return
        time.sleep(0.002)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def kill(pid: int, others: list[psutil.Process]) -> None:
    """End whoever is left of a worker's session, and others that were seen before."""
    for each in others:
        with suppress(psutil.Error):  # its number may be another process's by now: psutil knows
            each.kill()
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def is_left(pid: int) -> bool:
    """Whether anybody is left of a worker's session."""
    try:
        os.killpg(pid, 0)
    except OSError:
        return False
    return True
