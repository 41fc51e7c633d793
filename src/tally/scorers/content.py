"""A model's content and the hash that names it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

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
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _walk(path, (*above, real))
        elif path.is_file():
            yield path


def content_hash(location: Path, files: Sequence[str] = (".",)) -> str:
    """``sha256:...`` over every file's name and content (see :func:`content_files`), read in blocks."""
    digest = hashlib.sha256()
    for name, path in content_files(location, files):
        digest.update(os.fsencode(name) + b"\0" + file_hash(path))
    return f"sha256:{digest.hexdigest()}"


def file_hash(path: Path) -> bytes:
    """SHA-256 of one file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check_content(
    name: str,
    location: Path,
    files: Sequence[str],
    wanted: str,
    *,
    what: str = "it changed since the job began",
    hint: str = "Bring the old content back, or start a new job with the content that is there now.",
) -> None:
    """Raises ModelChangedError, saying ``what`` happened, unless the content has the hash ``wanted``."""
    try:
        found = content_hash(location, files)
    except OSError as error:
        raise ModelChangedError(
            f"model {name}: {what}: {error.filename} cannot be read ({error.strerror})", hint=hint
        ) from None
    if found != wanted:
        raise ModelChangedError(
            f"model {name}: {what}: {location} has the content {found[:19]}..., not {wanted[:19]}...", hint=hint
        )
