"""Text tables that are packed, or lists in JSON, as files that DuckDB reads line by line.

How a file is packed, its content says: ``.csv`` may be gzip. A packed file that ends too early, or is damaged, is an
error: it never passes for a shorter table.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tally.errors import StorageError
from tally.sources.tables.damage import DAMAGED

if TYPE_CHECKING:
    from tally.sources.tables.formats import Format

_PACKINGS = {
    "gz": (b"\x1f\x8b", "gzip"),
    "bz2": (b"BZh", "bzip2"),
    "xz": (b"\xfd7zXZ\x00", "xz"),
    "zst": (b"\x28\xb5\x2f\xfd", "zstd"),
    "zip": (b"PK\x03\x04", "zip"),
}
"""By the suffix: how the content begins, and the packing's name."""

PACKED = tuple(f".{suffix}" for suffix in _PACKINGS)
"""The suffixes of packed files."""

_BLOCK = 1 << 20
_OBJECT_BYTES = 16 << 20


def plain_text(path: Path, name: str, kind: Format, folder: Path, number: int) -> Path:
    """A file for DuckDB: a link, whose name it does not take for a pattern, or a copy that is made in the folder.

    path: the file. name: what to call it in messages, and how it is packed, if it ends so. number: of the file; no
    other of the folder has it. The result is text, or gzip if its name ends in ``.gz``; of a list in JSON, JSON Lines
    with a line for each of its elements, and of a spreadsheet one for each row. Raises StorageError.
    """
    if kind == "excel":
        from tally.sources.tables.excel import lines_of

        target = folder / f"{number:06d}.text"
        lines_of(path, name, target)
        return target
    packing = _packing(path, name)
    if packing in (None, "gz") and kind != "json":
        target = folder / f"{number:06d}.text{'.gz' if packing == 'gz' else ''}"
        target.symlink_to(path)
        return target
    target = folder / f"{number:06d}.text"
    with _unpacked(path, name, packing) as file, target.open("wb") as out:
        if kind == "json":
            _write_lines(file, name, out)
        else:
            shutil.copyfileobj(file, out, _BLOCK)
    return target


def _packing(path: Path, name: str) -> str | None:
    with path.open("rb") as file:
        head = file.read(6)
    found = next((suffix for suffix, (mark, _) in _PACKINGS.items() if head.startswith(mark)), None)
    suffix = name.lower().rpartition(".")[2]
    if found is None and suffix in _PACKINGS and suffix != "gz":
        what = f"cannot read {name}: it is not packed with {_PACKINGS[suffix][1]}, by its content"
        raise StorageError(what, hint=f"If it is not packed, call it {name.rpartition('.')[0]}.")
    return "gz" if found is None and suffix == "gz" and head else found


@contextmanager
def _unpacked(path: Path, name: str, packing: str | None) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. Raises StorageError if it is damaged, or was cut off."""
    try:
        if packing is None:
            with path.open("rb") as plain:
                yield plain
        elif packing == "zip":
            with zipfile.ZipFile(path) as archive, archive.open(_member(archive, name)) as member:
                yield cast("BinaryIO", member)
        elif packing == "zst":
            import pyarrow as pa

            with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
                yield cast("BinaryIO", stream)
        else:
            opening: dict[str, Callable[[Path], Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
            with opening[packing](path) as file:
                yield file
    except (OSError, EOFError, ValueError, RuntimeError, lzma.LZMAError, zipfile.BadZipFile) as error:
        if isinstance(error, StorageError):
            raise
        how = "" if packing is None else f" (packed with {_PACKINGS[packing][1]})"
        raise StorageError(f"cannot read {name}{how}: {error or type(error).__name__}", hint=DAMAGED) from None


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The only file of an archive."""
    files = [each for each in archive.infolist() if not each.is_dir() and not each.filename.startswith("__MACOSX/")]
    if any(each.filename.startswith("xl/") for each in files):
        raise StorageError(f"{name} is a spreadsheet by its content, not text", hint="give it the suffix .xlsx")
    if len(files) != 1:
        shown = ", ".join(each.filename for each in files[:3]) + (" ..." if len(files) > 3 else "")
        raise StorageError(
            f"{name} holds {len(files)} files{f' ({shown})' if files else ''}, and one table is read",
            hint="Unpack it, and score the folder.",
        )
    return files[0]


# -- lists in JSON ------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")


def _write_lines(file: BinaryIO, name: str, out: BinaryIO) -> None:
    """A list in JSON as JSON Lines, element by element. A file of JSON Lines that is called ``.json`` stays as it is.

    Each element stays as it is written, to the last digit. Raises StorageError if the list is damaged or cut off.
    """
    text = _Text(file, name)
    first = text.next()
    if not first:
        return
    if first != "[":
        _copy_lines(text, name, out)
        return
    text.skip(1)
    count, first = 0, text.next()
    while first != "]":
        count += 1
        element = text.element(count)
        # Outside of strings, which cannot hold them, these are only spaces.
        out.write(element.replace("\r", " ").replace("\n", " ").encode("utf-8") + b"\n")
        following = text.next()
        if following not in (",", "]"):
            raise text.cut(count)
        if following == ",":
            text.skip(1)
            if text.next() == "]":
                what = f"cannot read {name}: a comma after its last object, number {count:,}"
                raise StorageError(what, hint="Take the comma out, or write the file anew.")
        first = text.next()
    text.skip(1)
    if text.next():
        what = f"cannot read {name}: something follows after its list of {count:,} objects"
        raise StorageError(what, hint="Write one list, or one object on each line (.jsonl).")


def _copy_lines(text: _Text, name: str, out: BinaryIO) -> None:
    """JSON Lines as they are. Raises StorageError for one object alone that holds other things than a row."""
    line = text.line()
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or (row and all(isinstance(value, (dict, list)) for value in row.values())):
        raise StorageError(
            f"cannot read {name}: it is neither a list of objects nor JSON Lines",
            hint="Write a list with an object for each row, as pandas' to_json(orient='records') does.",
        )
    out.writelines(block.encode("utf-8") for block in text.rest())


class _Text:
    """Text that is read as it is needed."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._json = json.JSONDecoder()
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def _more(self) -> bool:
        if self._ended:
            return False
        block = self._file.read(_BLOCK)
        try:
            read = self._decode.decode(block, final=not block)
        except UnicodeDecodeError as error:
            what = f"cannot read {self._name}: it is not valid UTF-8 ({error.reason})"
            raise StorageError(what, hint="Write it anew as UTF-8: iconv -f latin-1 -t utf-8, say.") from None
        self._text, self._at = self._text[self._at :] + read, 0
        self._ended = not block
        return bool(block)

    def next(self) -> str:
        """The next character that is no space, or none at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        self._at += count

    def element(self, number: int) -> str:
        """The next value, as it is written. number: of it, for messages."""
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                end = -1
            # A number may go on after what is read.
            if 0 <= end < len(self._text) or (end >= 0 and self._ended):
                found, self._at = self._text[self._at : end], end
                return found
            if len(self._text) - self._at > _OBJECT_BYTES or not self._more():
                raise self.cut(number)

    def cut(self, number: int) -> StorageError:
        what = f"its list is cut off, or damaged, in object {number:,}"
        if not self._ended:
            what = f"object {number:,} of its list is no JSON"
        return StorageError(f"cannot read {self._name}: {what}", hint=DAMAGED)

    def line(self) -> str:
        """The line that begins here, which stays to be read."""
        while (end := self._text.find("\n", self._at)) < 0 and len(self._text) - self._at <= _OBJECT_BYTES:
            if not self._more():
                break
        return self._text[self._at : end if end >= 0 else len(self._text)]

    def rest(self) -> Iterator[str]:
        yield self._text[self._at :]
        self._at = len(self._text)
        while self._more():
            yield self._text
            self._at = len(self._text)
