"""Pictures as files, under the names that their items have, and a list of them as rows."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import ItemError
from tally.scorers.base import Pictured, Result
from tally.sinks.base import Output, OutputDescription, Writer
from tally.sinks.formats import PICTURES
from tally.sinks.layout import File, OutputLayout, attempt_of
from tally.sinks.rows import RowsSink
from tally.storage import TEMPORARY

if TYPE_CHECKING:
    import pyarrow as pa

QUALITY = 92
"""The quality of JPEG and WebP."""

_COLUMNS = {"file": "string", "width": "int32", "height": "int32", "bytes": "int64"}
_PILLOW = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_SEGMENT_BYTES = 200  # file systems allow 255, or less if they encrypt names
_NAME_BYTES = 900  # object stores allow 1024 for the whole
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_OWN = re.compile(r"(?i)^(_tally|_success)$|\.(parquet|json)$")
_MOVES = 8


class FilesSink(RowsSink):
    """Takes arrays ``uint8[height, width, 3]`` (RGB) or ``uint8[height, width]`` (label maps, masks), also with rows.

    pictures: ``jpg``, ``png`` or ``webp`` for all pictures. None takes the format of the key's suffix, or PNG if it has
    none. Arrays of two dimensions are always PNG: labels do not survive a lossy format.
    columns: those of the source, as in ``Source.columns``, and those of rows. thumbnails: as for :class:`RowsSink`.
    The final folder holds the pictures and ``part-00000.parquet``, with ``key``, these columns, and
    ``file, width, height, bytes``: a row for each that came with a picture, one for a picture without any.
    """

    def __init__(
        self,
        layout: OutputLayout,
        pictures: str | None = None,
        columns: Mapping[str, str] | None = None,
        *,
        thumbnails: bool = False,
    ) -> None:
        super().__init__(layout, "parquet", {**(columns or {}), **_COLUMNS}, thumbnails=thumbnails)
        self.pictures = pictures

    def describe(self) -> OutputDescription:
        """See :meth:`Sink.describe`."""
        return OutputDescription(
            "images", str(self.layout), False, self.pictures, self.columns, options=self._options()
        )

    def _writer(self, attempt: str) -> Writer:
        return PictureWriter(self.layout, attempt, super()._writer(attempt), self.pictures, self.columns or {})

    def assemble(
        self, outputs: Sequence[Output], dead: Iterable[dict[str, Any]], earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {**super().assemble(outputs, dead, earlier), "output": "image"}

    def _tables(self, staged: Sequence[str], kept: Sequence[File]) -> Iterator[pa.Table]:
        import pyarrow as pa

        renamed = self._renamed(staged, [file["path"] for file in kept])
        for name, table in zip(staged, super()._tables(staged, kept), strict=True):
            if any(source == name for source, _ in renamed):
                files = [renamed.get((name, file), file) for file in table["file"].to_pylist()]
                yield table.set_column(table.column_names.index("file"), "file", pa.array(files, pa.string()))
            else:
                yield table

    def _move_files(self, plan: dict[str, Any], outputs: Sequence[Output]) -> None:
        layout = self.layout
        staged = [layout.staging + name for output in outputs for name in output.files]
        earlier = self.manifest()
        renamed = self._renamed(staged, [] if earlier is None else [file["path"] for file in earlier["files"]])

        def moves() -> Iterator[tuple[str, str]]:
            for name in staged:
                folder = layout.attempts + attempt_of(name.removeprefix(layout.staging))
                for file in _files(layout, name):
                    yield f"{folder}/{file}", renamed.get((name, file), file)

        todo = moves()
        with ThreadPoolExecutor(_MOVES, thread_name_prefix="tally-move") as pool:
            while some := list(islice(todo, 1000)):
                list(pool.map(lambda each: layout.move(*each), some))
        super()._move_files(plan, outputs)

    def _renamed(self, staged: Sequence[str], kept: Sequence[str]) -> dict[tuple[str, str], str]:
        """``(staged rows, file)`` to a new file name, for pictures whose name is taken.

        "a.tif" becomes "a.tif.png", which may be the name of another picture. Names are compared by their hashes first,
        so that millions of them fit into memory.
        """
        from tally.sinks import merge

        def files(name: str) -> list[str]:
            return _files(self.layout, name)

        def hashes(name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
            return np.fromiter((hash(anywhere(file)) for file in files(name)), np.int64)

        found = [*merge.ahead(self.layout, hashes, [*kept, *staged])]
        values, counts = np.unique(np.concatenate([np.empty(0, np.int64), *found]), return_counts=True)
        doubtful = set(values[counts > 1].tolist())
        if not doubtful:
            return {}
        taken = {each for name in kept for file in files(name) if hash(each := anywhere(file)) in doubtful}
        renamed: dict[tuple[str, str], str] = {}

        def is_taken(new: str) -> bool:
            place = int(np.searchsorted(values, hash(new)))
            return new in taken or (place < len(values) and bool(values[place] == hash(new)))

        for name in staged:
            rows = self.layout.table(name, ["key", "file"])
            pairs = dict.fromkeys(zip(rows["key"].to_pylist(), rows["file"].to_pylist(), strict=True))
            for key, file in pairs:
                if (plain := anywhere(file)) in taken:
                    renamed[name, file] = free(marked(file, key), key, is_taken)
                    taken.add(anywhere(renamed[name, file]))
                elif hash(plain) in doubtful:
                    taken.add(plain)
        return renamed

    def _retire(self, staged: Sequence[str]) -> None:
        super()._retire(staged)
        for attempt in dict.fromkeys(map(attempt_of, staged)):
            self.layout.store.delete_tree(self.layout.attempts + attempt)

    def listed(self, manifest: dict[str, Any]) -> Iterator[str]:
        layout = self.layout
        for file in manifest["files"]:
            for name in (file["path"], layout.final + file["path"]):
                if layout.store.exists(name):
                    yield from _files(layout, name)
                    break
        yield from super().listed(manifest)


def _files(layout: OutputLayout, name: str) -> list[str]:
    """The pictures that a part lists, each once."""
    return list(dict.fromkeys(layout.table(name, ["file"])["file"].to_pylist()))


class PictureWriter(Writer):
    """Encodes and writes each picture at once; only the list of pictures waits for the end."""

    def __init__(
        self, layout: OutputLayout, attempt: str, rows: Writer, pictures: str | None, columns: Mapping[str, str]
    ) -> None:
        self._store, self._folder = layout.store, layout.attempts + attempt
        self._rows, self._pictures = rows, pictures
        self._columns = columns.keys() - _COLUMNS.keys()
        self._names: set[str] = set()
        self._bytes = 0

    def add(
        self, keys: Sequence[str], results: Sequence[Result], info: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add`."""
        written: list[str] = []
        rows: list[Result] = []
        failed = []
        for index, (key, result) in enumerate(zip(keys, results, strict=True)):
            try:
                array = picture(result)
                name = file_for(key, self._pictures, labels=array.ndim == 2)
                data = encode(array, PICTURES[PurePosixPath(name).suffix.lower()])
            except ItemError as error:
                failed.append((index, error))
                continue
            name = free(name, key, self._names.__contains__)
            self._names.add(anywhere(name))
            self._store.write(f"{self._folder}/{name}", data)
            self._bytes += len(data)
            written.append(key)
            height, width = array.shape[:2]
            given = {} if info is None else info[index]
            listed = {**given, "file": name, "width": width, "height": height, "bytes": len(data)}
            told = result.rows if isinstance(result, Pictured) else ()
            kept = [{name: row[name] for name in self._columns & row.keys()} for row in told]
            rows.append([{**each, **listed} for each in kept if each] or listed)
        if written:
            self._rows.add(written, rows)
        return failed

    def close(self) -> Output:
        """See :meth:`Writer.close`."""
        output = self._rows.close()
        return Output(output.files, output.rows, output.bytes + self._bytes)

    def abort(self) -> None:
        """See :meth:`Writer.abort`."""
        self._rows.abort()
        self._store.delete_tree(self._folder)


def picture(result: object) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The result's picture, ``uint8[h, w, 3]`` or ``uint8[h, w]``. Raises ItemError if there is none."""
    if isinstance(result, Pictured):
        result = result.picture
    if not isinstance(result, np.ndarray):
        raise ItemError(
            f"the scorer returned {type(result).__name__}, and this output holds pictures",
            stage="write",
            hint='Return an array uint8[height, width, 3], or declare output = "rows".',
        )
    shape = "x".join(map(str, result.shape))
    if result.dtype != np.uint8:
        raise ItemError(
            f"the scorer returned an array of {result.dtype} ({shape}); pictures are uint8",
            stage="write",
            hint="Scale to 0..255, and convert with .astype(numpy.uint8).",
        )
    if not (result.ndim == 2 or (result.ndim == 3 and result.shape[2] == 3)) or 0 in result.shape:
        raise ItemError(
            f"the scorer returned an array of shape {shape}; pictures are height x width x 3, or height x width",
            stage="write",
            hint="Channels come last: numpy.moveaxis(array, 0, -1) turns 3 x height x width round.",
        )
    return result


def encode(array: np.ndarray[Any, np.dtype[np.uint8]], kind: str) -> bytes:
    """The picture as the content of a file. kind: ``jpg``, ``png`` or ``webp``. Raises ItemError."""
    from PIL import Image

    buffer = io.BytesIO()
    options = {} if kind == "png" else {"quality": QUALITY}
    try:
        Image.fromarray(np.ascontiguousarray(array)).save(buffer, _PILLOW[kind], **options)
    except (OSError, ValueError) as error:
        height, width = array.shape[:2]
        raise ItemError(f"a picture of {width}x{height} cannot be written as {kind}: {error}", stage="write") from None
    return buffer.getvalue()


def file_for(key: str, pictures: str | None, *, labels: bool) -> str:
    """The file name of an item's picture; see :func:`named`."""
    return named(key, "png" if labels else pictures, PICTURES)


def named(key: str, kind: str | None, kinds: Mapping[str, str]) -> str:
    """The file name of an item's result: always inside the output folder, and never too long.

    kinds: suffixes, and the kind of file that each means. kind: of the file; None takes that of the key's suffix, or
    PNG if it has none.
    A name that had to be altered gets a mark made from the key, so that two keys never share a name.
    """
    plain = _inside(key, kinds)
    found = kinds.get(PurePosixPath(plain).suffix.lower())
    whole = plain if found and kind in (None, found) else f"{plain}.{kind or 'png'}"
    name = whole if len(whole.encode()) <= _NAME_BYTES else whole.rpartition("/")[2]
    name = "/".join(_cut(segment) for segment in name.split("/"))
    return name if plain == key and name == whole else marked(name, key)


def marked(name: str, key: str) -> str:
    """The file name with a mark made from the key."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{digest}{dot}{suffix}"


def anywhere(name: str) -> str:
    """The same for names that some file system takes for one: those that differ in capitals, or in how they compose
    their letters."""
    return name if name.isascii() and name.islower() else unicodedata.normalize("NFC", name).casefold()


def free(name: str, key: str, is_taken: Callable[[str], bool]) -> str:
    """The file name, with as many marks made from the key as it takes until it is free.

    is_taken: told a name as :func:`anywhere` gives it.
    """
    while is_taken(anywhere(name)):
        name = marked(name, key)
    return name


def _inside(key: str, kinds: Mapping[str, str]) -> str:
    """The key as a relative path that stays inside a folder and away from the output's own files."""
    segments = [_UNSAFE.sub("_", part) for part in _valid(key).split("/") if part not in ("", ".", "..")] or ["_"]
    *folders, last = segments
    taken = [bool(_OWN.search(folder)) or PurePosixPath(folder).suffix.lower() in kinds for folder in folders]
    folders = [f"{folder}_" if own else folder for folder, own in zip(folders, taken, strict=True)]
    return "/".join([*folders, f"_{last}" if last.startswith(TEMPORARY) else last])


def _valid(key: str) -> str:
    from tally.sinks.columns import printable

    return printable(key)


def _cut(segment: str) -> str:
    raw = segment.encode()
    if len(raw) <= _SEGMENT_BYTES:
        return segment
    stem, dot, suffix = raw.rpartition(b".")
    if not dot or len(suffix) > 8:
        stem, dot, suffix = raw, b"", b""
    return (stem[: _SEGMENT_BYTES - 9] + dot + suffix).decode(errors="ignore")
