"""Files that requests bring along: kept for some days in a folder of their own, which a job may name as its source.

Their names are made harmless, and an archive is unpacked only as far as its bounds go, whatever it says of itself.
"""

from __future__ import annotations

import errno
import lzma
import re
import secrets
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tally.config import make_private, settings
from tally.errors import SpecError, StorageError
from tally.storage import failure

DAYS = 7.0
"""For which an upload is kept."""
MAX_FILES = 10_000
_BLOCK = 1 << 20
_ODD = re.compile(r"[^\w.@+=, -]")
_LONGEST = 150
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file of an upload. name: relative to the upload's folder."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Upload:
    """Files that a request brought along. place: the folder, for a job's ``source``. expires_at: kept until then."""

    id: str
    place: str
    files: list[UploadedFile]
    expires_at: float


def uploads_folder() -> Path:
    """Where the uploads of this server are."""
    return settings().home / "uploads"


class Uploads:
    """Keeps uploads. most: bytes of one upload, also when it is unpacked. Safe to use from several threads."""

    def __init__(self, *, most: int) -> None:
        self.most = most

    def add(self, files: Iterable[tuple[str, BinaryIO]], *, unpack: bool = False) -> Upload:
        """Keep these files, each with its name. unpack: they are zip archives, whose files are kept instead.

        Raises SpecError for names, archives or sizes that are not taken, StorageError.
        """
        upload_id = secrets.token_hex(8)
        folder = uploads_folder() / upload_id
        try:
            make_private(folder)
            writer = _Writer(folder, self.most)
            for name, content in files:
                if unpack:
                    _unpack(name, content, writer)
                else:
                    writer.write(plain_name(name), content.read)
            if not writer.written:
                raise SpecError("the upload holds no file")
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise failure("write", str(folder), error) from None
            raise
        return Upload(upload_id, str(folder), writer.written, time.time() + DAYS * 86_400)

    def sweep(self, needed: Callable[[str], bool]) -> None:
        """Remove what has expired, unless it is ``needed``: told an upload's id."""
        with suppress(FileNotFoundError):
            for folder in uploads_folder().iterdir():
                with suppress(FileNotFoundError):
                    if folder.stat().st_mtime + DAYS * 86_400 < time.time() and not needed(folder.name):
                        shutil.rmtree(folder, ignore_errors=True)


class _Writer:
    """Writes files below a folder, bounded in number and bytes."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most, self._left = folder, most, most
        self.written: list[UploadedFile] = []
        self._names: set[str] = set()

    def write(self, name: str, read: Callable[[int], bytes]) -> None:
        if name.lower() in self._names:
            raise SpecError(f"two files of the upload are called {name!r}")
        if len(self.written) >= MAX_FILES:
            raise SpecError(f"the upload has more than {MAX_FILES:,} files")
        self._names.add(name.lower())
        path = self._folder / name
        size = 0
        with _created(path) as file:
            while block := read(_BLOCK):
                size += len(block)
                self._left -= len(block)
                if self._left < 0:
                    raise SpecError(f"the upload has more than {self._most:,} bytes")
                file.write(block)
        self.written.append(UploadedFile(name, size))


def _created(path: Path) -> BinaryIO:
    """The new file, opened. Raises SpecError where it cannot have that name."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path.open("xb")
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            raise SpecError(f"{path.name[:80]!r} is no name that a file is kept by: {error.strerror}") from None
        raise


def plain_name(name: str) -> str:
    """A file's name as it is kept: without folders, hidden by nothing, of characters that no program trips over."""
    last = re.split(r"[/\\]", name)[-1]
    kept = _ODD.sub("_", last).strip(". ")
    if not kept:
        raise SpecError(f"{name!r} is no name that a file is kept by")
    stem, dot, suffix = kept.rpartition(".")
    if len(kept.encode()) <= _LONGEST:
        return kept
    return kept[:40] if not dot or len(suffix) > 16 else f"{stem[:40]}.{suffix}"


def _unpack(name: str, content: BinaryIO, writer: _Writer) -> None:
    try:
        with zipfile.ZipFile(content) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES:
                raise SpecError(f"{name!r} has more than {MAX_FILES:,} entries")
            for entry in entries:
                _check_entry(name, entry)
                if not entry.is_dir():
                    with archive.open(entry) as file:
                        writer.write(entry.filename, partial(_unpacked, file.read))
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{name!r} cannot be unpacked: {error}") from None
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        raise SpecError(f"{name!r} has a file and a folder of the same name") from None


def _unpacked(read: Callable[[int], bytes], size: int) -> bytes:
    """The next bytes of a file in an archive. Raises BadZipFile."""
    try:
        return read(size)
    except OSError as error:  # what bzip2 raises for damaged data
        if error.errno is not None:
            raise
        raise zipfile.BadZipFile(str(error)) from None


def _check_entry(archive: str, entry: zipfile.ZipInfo) -> None:
    """Refuse what would be written anywhere but below the folder, or is no plain file."""
    name = entry.filename
    parts = PurePosixPath(name).parts
    outside = not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]
    if outside or not name.isprintable() or len(name.encode(errors="replace")) > 1000:
        raise SpecError(f"{archive!r} holds {name[:200]!r}, which is no name inside of a folder")
    kind = (entry.external_attr >> 16) & 0o170000
    if kind not in (0, 0o100000, 0o040000):
        raise SpecError(f"{archive!r} holds {name[:200]!r}, which is no file (a link, say)")
