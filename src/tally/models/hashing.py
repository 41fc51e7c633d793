"""A model's content and the hash that names it."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
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
        if not counts(path.name):
            continue
        if path.is_dir():
            yield from _walk(path, (*above, real))
        elif path.is_file():
            yield path


def counts(name: str) -> bool:
    """Whether a file found in a folder belongs to the content. name: relative to that folder."""
    return not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def content_hash(location: Path, files: Sequence[str] = (".",)) -> str:
    """``sha256:...`` over every file's name and content (see :func:`content_files`), read in blocks."""
    return combined((name, file_hash(path)) for name, path in content_files(location, files))


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


def external_names(path: Path) -> list[str]:
    """Names of the files that an ONNX model says hold its large weights.

    Each tensor names its file in a protobuf entry ``{key: "location", value: name}``. Searching for that
    entry's bytes finds them without reading gigabytes of protobuf into memory.
    """
    names: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in re.finditer(rb"\x0a\x08location\x12([\x80-\xff]?[\x00-\x7f])", content):
            low, *high = match[1]
            length = (low & 0x7F) | (high[0] << 7 if high else 0)
            names.add(os.fsdecode(content[match.end() : match.end() + length]))
    return sorted(name for name in names if not os.path.isabs(name))  # noqa: PTH117


def external_data(path: Path) -> list[str]:
    """Files beside an ONNX model that hold its large weights."""
    return [name for name in external_names(path) if (path.parent / name).is_file()]
