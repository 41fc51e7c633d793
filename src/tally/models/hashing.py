"""A model's content and the hash that names it.

A process reads a file's content once: :func:`known_hash` remembers it for as long as the file system says that the
file has not changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tally.errors import ModelChangedError


def content_files(location: Path, files: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Name and path of every file that counts, folders walked, in the order of the names.

    Names are relative to ``location``; what lies elsewhere is named from its own last part on. Hidden
    files and ``__pycache__`` do not count.
    """
    found: dict[str, Path] = {}
    for each in files:
        path = location / each
        base = location if path.is_relative_to(location) else path.parent
        for file in _walk(path, ()) if path.is_dir() else [path]:
            found[file.relative_to(base).as_posix()] = file
    yield from sorted(found.items(), key=lambda item: os.fsencode(item[0]))


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link back up
        return
    for path in folder.iterdir():
        if not counts(path.name):
            continue
        if path.is_dir():
            yield from _walk(path, (*above, real))
        elif path.is_file():
            yield path


def counts(name: str) -> bool:
    """Whether a file found in a folder belongs to the content. name: relative to that folder."""
    return not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def content_hash(location: Path, files: Sequence[str] = (".",), *, reread: bool = False) -> str:
    """``sha256:...`` over every file's name and content (see :func:`content_files`).

    reread: read also what this process has read before, to find damage that the file system knows nothing of.
    """
    hashed = file_hash if reread else known_hash
    return combined((name, hashed(path)) for name, path in content_files(location, files))


def combined(files: Iterable[tuple[str, bytes]]) -> str:
    """The hash of content whose files have these names and SHA-256, in any order."""
    digest = hashlib.sha256()
    for name, each in sorted((os.fsencode(name), each) for name, each in files):
        digest.update(name + b"\0" + each)
    return f"sha256:{digest.hexdigest()}"


def file_hash(path: Path) -> bytes:
    """SHA-256 of one file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def known_hash(path: Path) -> bytes:
    """SHA-256 of one file, read only if this process has not read the same content of it before."""
    identity = _identity(path)
    remembered = _known.get(identity)
    if remembered is not None:
        return remembered
    digest = file_hash(path)
    # A change within the clock's tick leaves the times as they were, so a file that young is read again next time.
    if time.time_ns() - identity.changed > 2 * _TICK and _identity(path) == identity:
        if len(_known) >= _KNOWN_LIMIT:
            _known.clear()
        _known[identity] = digest
    return digest


class _Identity(NamedTuple):
    """A file as it is now, under any name. Writing changes ``changed`` (nanoseconds), which no program can set back."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def _identity(path: Path) -> _Identity:
    found = path.stat()
    return _Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


_known: dict[_Identity, bytes] = {}
_KNOWN_LIMIT = 100_000

# Linux stamps files with its coarse clock, which ticks every 1 to 10 ms.
_COARSE: int | None = getattr(time, "CLOCK_REALTIME_COARSE", None)
_TICK = 10_000_000 if _COARSE is None else round(time.clock_getres(_COARSE) * 1e9)


def check_content(
    name: str,
    location: Path,
    files: Sequence[str],
    wanted: str,
    *,
    reread: bool = False,
    what: str = "it changed since the job began",
    hint: str = "Bring the old content back, or start a new job with the content that is there now.",
) -> None:
    """Raises ModelChangedError, saying ``what`` happened, unless the content has the hash ``wanted``.

    reread: as of :func:`content_hash`.
    """
    try:
        found = content_hash(location, files, reread=reread)
    except OSError as error:
        raise ModelChangedError(
            f"model {name}: {what}: {error.filename} cannot be read ({error.strerror})", hint=hint
        ) from None
    if found != wanted:
        raise ModelChangedError(
            f"model {name}: {what}: {location} has the content {found[:19]}..., not {wanted[:19]}...", hint=hint
        )
