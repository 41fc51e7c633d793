"""The file that workers' output goes to keeps its head and its tail: nobody reads gigabytes, and disks are finite."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

HEAD_BYTES = 4 * 2**20
"""What is kept of the beginning, where a model says what it loads."""
TAIL_BYTES = 4 * 2**20
"""What is kept of the end, at least."""
MOST_BYTES = 16 * 2**20
"""Above this size the middle is left out."""


def bound(log: Path) -> None:
    """Leave out the middle of a log that has grown too large.

    Workers append to it meanwhile; what they write while its tail is copied may be left out too.
    """
    with suppress(OSError):
        if log.stat().st_size <= MOST_BYTES:
            return
        file = os.open(log, os.O_RDWR | os.O_APPEND)
        try:
            end = os.fstat(file).st_size
            tail = os.pread(file, TAIL_BYTES, end - TAIL_BYTES)
            tail = tail[tail.find(b"\n") + 1 :]
            os.ftruncate(file, HEAD_BYTES)
            left_out = end - HEAD_BYTES - len(tail)
            os.write(file, b"\n[about %d MiB left out]\n" % (left_out >> 20) + tail)
        finally:
            os.close(file)
