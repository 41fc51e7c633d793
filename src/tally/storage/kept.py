"""Objects of other machines as files of this one: fetched once, and kept in the cache for all of its processes."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tally.config import make_private
from tally.errors import StorageError
from tally.storage.base import TEMPORARY, cache_folder, failure, file_name
from tally.storage.publish import whole

_LOCK = ".lock"
"""Beside a kept object; held while it is fetched."""


def kept(content: Sequence[str], name: str, size: int, fetch: Callable[[Path], None]) -> Path:
    """The file with this content, which ``fetch`` writes where it is not there yet.

    content: what tells it from any other. name: of the object; its last part is the file's. size: in bytes.
    Raises StorageError, and what ``fetch`` raises.
    """
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:32]
    target = cache_folder() / "objects" / digest / file_name(name)
    if _holds(target, size):
        return target
    try:
        make_private(target.parent)
        _sweep(target.parent.parent)
        with _locked(target.parent / _LOCK):
            # Another process may have been faster.
            if not _holds(target, size):
                with whole(target) as part:
                    fetch(Path(part))
    except OSError as error:
        raise error if isinstance(error, StorageError) else failure("write", str(target), error) from None
    return target


def _holds(path: Path, size: int) -> bool:
    """Whether a file is complete."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one thread of one process of this machine."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(objects: Path) -> None:
    """Remove what killed processes had fetched a part of."""
    for part in objects.glob(f"*/{TEMPORARY}*"):
        with suppress(OSError), (part.parent / _LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another process may be fetching it
            part.unlink()
