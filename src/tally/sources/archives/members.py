"""What an archive holds, told by its headers or its directory: nothing is unpacked.

Of a tar, each header says where its content lies; a compressed tar is read from its beginning to its end; a ZIP has a
directory at its end. What an archive is, its content says, not its name.
"""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tally.errors import ItemError, StorageError
from tally.storage import Store, key_of
from tally.storage.ranges import RangeFile

Form: TypeAlias = Literal["tar", "gzip", "zstd", "zip"]

MAX_MEMBER = 2 * 2**30
"""Bytes of one member. A larger one is refused."""
MAX_RATIO = 200
"""So many times its packed size, a member or a compressed tar may have; beyond, it is taken for a bomb."""
_RATIO_FROM = 64 * 2**20
"""Bytes from which on the ratio counts: a blank page compresses well."""
_REST = 2**20
"""Bytes that are looked at behind the end of a tar. Writers fill up a few kilobytes with zeros."""
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_LOCAL_HEADER = 30 + 2 * 65_535
"""The most bytes that stand before a member's content in a ZIP."""


@dataclass(frozen=True, slots=True)
class Member:
    """name: as the archive has it, without ``./``. size: bytes of its content. refused: why it cannot be scored.

    span: where it is, for :mod:`reading <tally.sources.archives.reading>`: of a tar, (start, size) of the content; of
    a ZIP, (start, length) of all that belongs to it, (size, packed size, method, checksum) of the content.
    """

    name: str
    size: int
    span: tuple[int, ...]
    refused: str = ""


def members(store: Store, name: str, size: int, mark: str) -> tuple[Form, Iterator[Member]]:
    """What an archive is, and its members, in the order in which they lie there; folders are left out.

    size, mark: as they were listed. After the members that are whole, the iterator raises ItemError if the archive
    is damaged; SourceChangedError if it was written meanwhile.
    """
    head = store.read_range(name, 0, 512, mark=mark)
    if head[:2] == b"\x1f\x8b":
        return "gzip", _members(store, name, size, mark, "gzip")
    if head[:4] == b"\x28\xb5\x2f\xfd":
        return "zstd", _members(store, name, size, mark, "zstd")
    if head[:2] == b"PK":
        return "zip", _members(store, name, size, mark, "zip")
    return "tar", _members(store, name, size, mark, "tar")


def _members(store: Store, name: str, size: int, mark: str, form: Form) -> Iterator[Member]:
    with closing(opened(store, name, size, mark)) as file:
        if form == "zip":
            yield from _of_zip(file)
        elif form == "tar":
            yield from _of_tar(file)
        else:
            with closing(Unpacked(file, form)) as unpacked:
                yield from _of_tar(unpacked)
    store.check_mark(name, mark)


def opened(store: Store, name: str, size: int, mark: str) -> Any:
    """The archive as a seekable file, whose content is the expected one."""
    if not store.is_local:
        return _Whole(store, name, (size, mark))
    store.check_mark(name, mark)
    return open(store.local_path(name), "rb")  # the caller closes it


class _Whole(RangeFile):
    """Gives as many bytes as are asked for, as the readers of archives expect."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        parts = []
        while size and (part := super().read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def readall(self) -> bytes:
        return self.read(self.size - self.at) if self.at < self.size else b""


class Unpacked:
    """The content of a compressed file, read forwards. Raises ItemError where it is damaged, or a bomb."""

    def __init__(self, file: Any, form: Form) -> None:
        import pyarrow as pa

        self.at = 0
        self._file = file
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), form)

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        """So many bytes; fewer at the end."""
        try:
            data: bytes = self._stream.read(size)
        except StorageError:
            raise
        except OSError as error:
            raise ItemError(f"its compressed content is damaged: {error}", stage="read") from None
        self.at += len(data)
        if self.at > _RATIO_FROM and self.at > MAX_RATIO * self._file.tell():
            raise ItemError(f"it expands to more than {MAX_RATIO} times its size, as bombs do", stage="read")
        return data

    def seek(self, to: int) -> int:
        """Forwards only."""
        if to < self.at:
            raise io.UnsupportedOperation("a compressed file is read forwards")
        while self.at < to and self.read(min(to - self.at, 2**20)):
            pass
        return self.at

    def close(self) -> None:
        self._stream.close()


class _Remembering:
    """A file whose last block can be looked at again: the reader of tars takes any that is no header for the end."""

    def __init__(self, file: Any) -> None:
        self.last = b""
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.last = self._file.read(size)
        return self.last


def _of_tar(file: Any) -> Iterator[Member]:
    tape: Any = _Remembering(file)
    held: Member | None = None  # until all of its content has been passed
    try:
        tar: Any = tarfile.TarFile(fileobj=tape, mode="r", encoding="utf-8", errors="surrogateescape")
        while (info := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if held is not None:
                yield held
            span = (info.offset_data, info.size)
            held = None if info.isdir() else _member(info.name, info.size, span, _refusal(info))
    except (tarfile.TarError, ItemError, ValueError, EOFError) as error:
        if held is not None:
            yield Member(held.name, held.size, held.span, "the archive is cut off within it, or behind it")
        if isinstance(error, ItemError):
            raise
        raise ItemError(_said(str(error)), stage="read") from None
    if held is not None:
        yield held
    if len(tape.last) < tarfile.BLOCKSIZE:
        raise ItemError(f"it ends at byte {file.tell():,} without a tar's end: it is cut off", stage="read")
    if any(tape.last):
        raise ItemError(f"at byte {tar.offset:,} there is no header of a tar: it is damaged", stage="read")
    if any(file.read(_REST)):
        raise ItemError(
            f"it goes on behind its end at byte {tar.offset:,}",
            stage="read",
            hint="Several tars that were put together with 'cat' are put together rightly by 'tar --concatenate'.",
        )


def _said(text: str) -> str:
    words = {"empty file": "it is empty", "unexpected end of data": "it is cut off within a member"}
    return words.get(text, f"it is no whole tar: {text}")


def _refusal(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"it is a link to {key_of(info.linkname)!r}, and links in archives are not followed"
    if info.ischr() or info.isblk() or info.isfifo():
        return "it is a device or a pipe"
    if not info.isreg():
        return f"it is of a kind that is not known ({info.type!r})"
    if info.issparse():
        return "it is stored with holes (GNU sparse)"
    return ""


def _of_zip(file: Any) -> Iterator[Member]:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, MemoryError) as error:
        raise ItemError(f"it has no directory of a ZIP: it is cut off or damaged ({error})", stage="read") from None
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    stops = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    for info, stop in zip(infos, stops, strict=False):
        if info.header_offset < 0 or info.header_offset + 30 + info.compress_size > stop:
            raise ItemError(f"its members overlap ({info.orig_filename!r}), as those of bombs do", stage="read")
    for info, stop in zip(infos, stops, strict=False):
        if info.is_dir():
            continue
        length = min(stop - info.header_offset, _LOCAL_HEADER + info.compress_size)
        span = (info.header_offset, length, info.file_size, info.compress_size, info.compress_type, info.CRC)
        yield _member(info.orig_filename, info.file_size, span, _zip_refusal(info))


def _zip_refusal(info: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
    if info.flag_bits & 0x1:
        return "it is encrypted"
    if kind == stat.S_IFLNK:
        return "it is a link, and links in archives are not followed"
    if kind not in (0, stat.S_IFREG):
        return "it is a device or a pipe"
    if info.compress_type not in _METHODS:
        return f"it is compressed in a way that is not read (method {info.compress_type}): only deflated ones are"
    if info.file_size > _RATIO_FROM and info.file_size > MAX_RATIO * info.compress_size:
        return f"it expands to {info.file_size:,} bytes, more than {MAX_RATIO} times its size, as bombs do"
    return ""


def _member(name: str, size: int, span: tuple[int, ...], refused: str) -> Member:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or (len(parts[0]) == 2 and parts[0][1] == ":"):
        refused = refused or "its name leads out of the archive"
    else:
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
    if size > MAX_MEMBER:
        refused = refused or f"it has {size:,} bytes, and {MAX_MEMBER:,} are the most"
    return Member(name, size, span, refused)


def stem_and_kind(name: str) -> tuple[str, str]:
    """What the members of one sample share, and what tells them apart: ``a/000001`` and ``json`` of ``a/000001.json``.

    As WebDataset has it: the name of a member ends at its first dot.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind


def hidden(name: str) -> bool:
    """Whether it is one of the files that systems leave behind, such as ``__MACOSX/._a.jpg``."""
    return name.startswith("__MACOSX/") or any(part[:1] == "." != part[1:2] for part in name.split("/"))
