"""Folders for temporary files that do not outlive their process for long.

A process that is killed cannot tidy up. So each of these folders is locked by the process that made it: the lock ends
with the process, however that ends, and the next process that makes a folder removes those that none holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tally.errors import StorageError

PREFIX = "tally-scratch-"

_held: dict[Path, int] = {}
_lock = threading.Lock()


@contextmanager
def folder(purpose: str, *, within: Path | None = None) -> Iterator[Path]:
    """A new, empty folder, removed at the end. purpose, within: see :func:`make`."""
    made = make(purpose, within=within)
    try:
        yield made
    finally:
        remove(made)


def make(purpose: str, *, within: Path | None = None) -> Path:
    """A new, empty folder, until :func:`remove` or the end of this process. Raises StorageError.

    purpose: a word in its name, for people who find it. within: where to make it; by default, where the system keeps
    temporary files.
    """
    sweep(within)
    while True:
        try:
            made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-", dir=within))
        except OSError as error:
            raise StorageError(
                f"cannot make a folder for temporary files in {within or tempfile.gettempdir()}: {error.strerror}",
                hint="Make room there, or name another place: TMPDIR=/a/folder",
            ) from None
        try:
            descriptor = os.open(made, os.O_RDONLY)
        except FileNotFoundError:
            continue  # swept away before it was locked
        with suppress(OSError):  # a file system without locks: then the folder is never swept
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if made.exists():
            with _lock:
                _held[made] = descriptor
            return made
        os.close(descriptor)


def remove(made: Path) -> None:
    """Remove a folder of :func:`make`, with all that is in it. Idempotent."""
    shutil.rmtree(made, ignore_errors=True)
    with _lock:
        descriptor = _held.pop(made, None)
    if descriptor is not None:
        os.close(descriptor)


def sweep(within: Path | None = None) -> None:
    """Remove the folders that this user's killed processes left behind."""
    for place in Path(within or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or gone by now
            if place.stat().st_uid == os.geteuid():
                _remove_left(place)


def _remove_left(place: Path) -> None:
    """Remove it, unless a process holds it. Raises OSError if one does, or it cannot be locked."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(descriptor)
