"""Items that are values of one column of Parquet files: the content of pictures, each in a row.

The column holds bytes, text in base64, or what Hugging Face writes: a struct of ``bytes`` and ``path``. A chunk is a
run of rows of one file. It is read a few rows at a time, so that a row group of any size takes little memory.
"""

from __future__ import annotations

import base64
import binascii
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tally.errors import ItemError, SourceChangedError, SpecError, StorageAwayError, StorageError, TallyError
from tally.scorers.base import Input, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Media, Timings
from tally.sources.listing import ListedSource, Listing, nothing
from tally.sources.locations import Location
from tally.sources.reading import AHEAD, LOCAL_THREADS, FileReader, read_ahead
from tally.sources.tables.damage import DAMAGED
from tally.sources.tables.formats import format_of, open_parquet, plain_type
from tally.sources.tables.parquet import Stream, footer_of
from tally.storage import Entry, Store, key_of, name_from_json, name_to_json, open_store, temporary
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ALIKE = "All files have the columns of the first one: write this one anew, or move it to another folder."
_DECODED = 32
"""Rows that are decoded at once: pictures are large."""
_PATHS = 65_536
"""Rows whose names are read at once."""
_COMBINE = 4096


@dataclass(frozen=True)
class PictureColumnSource(ListedSource):
    """Values of a column as images, bytes or paths. Make it with :meth:`describe`; small, immutable, picklable.

    column: of the pictures. named: whether it has a name beside each picture. keep: what rows carry: the name that it
    gets, the column, and its Arrow type.
    """

    accepts: ClassVar = frozenset[Input]({"image", "bytes", "path"})
    media: ClassVar[Media | None] = "table"
    unit: ClassVar = "rows"

    listing: Listing
    input: Input
    column: str = ""
    named: bool = False
    keep: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def describe(
        cls,
        uris: Sequence[str],
        input: Input,  # noqa: A002  # the scorer's word
        *,
        item_column: str | None = None,
        keep: Sequence[str] = (),
        without: str | None = None,
    ) -> PictureColumnSource:
        """The source of a column of the Parquet files at ``uris``: folders, files and globs, paths or URLs.

        item_column: the column; by default the only one that holds bytes, alone or as Hugging Face writes them. keep:
        other columns that rows carry, ``NEW=COLUMN`` under another name, ``*`` for all.
        A key is the file's key, then the name that is beside the picture, or the row's number: ``a.parquet/cat.jpg``,
        ``a.parquet#1``. The number is taken where a name is missing, there for a second time, or leads out.

        Raises SourceNotFoundError, StorageError, SpecError for a column that cannot be taken.
        """
        listing = Listing.of(uris, "table", without=without)
        entry = next(listing.entries(0))
        location = listing.locations[0]
        shown = key_of(location.within + entry.name)
        if format_of(entry.name) != "parquet":
            raise SpecError(
                f"{shown} is no Parquet file by its name, and the model is given pictures",
                hint="Pictures are read out of Parquet files, from a column that holds their bytes.",
            )
        with open_parquet(open_store(location.root), entry.name, mark=entry.mark) as file:
            schema = file.schema_arrow
            column = _chosen(schema, item_column, shown)
            kind = plain_type(schema.field(column).type)
            if _is_text(kind):
                _check_base64(file, column, shown)
        named = _is_struct(kind) and kind.get_field_index("path") >= 0
        return cls(listing, input, column, named, _kept(schema, tuple(keep), column, shown))

    @property
    def columns(self) -> Mapping[str, str]:
        return {name: kind for name, _, kind in self.keep}

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        found = after is not None
        for index, entry, skip in self.listing.remaining(after):
            for chunk in self._chunks(index, entry, skip, first, limit):
                yield chunk
                first += chunk.count
                found = True
        if not (found or self.listing.is_part):
            raise nothing(self.listing.locations[0], self.listing.passed, "table")

    def _chunks(
        self, index: int, entry: Entry, skip: int, first: int, limit: Callable[[], ChunkLimit]
    ) -> Iterator[Chunk]:
        store = open_store(self.listing.locations[index].root)
        base = {"place": index, "file": name_to_json(entry.name), "mark": entry.mark}

        def chunk(start: int, stop: int, **more: Any) -> Chunk:
            cursor = self.listing.cursor(index, entry, stop)
            return Chunk(first, stop - start, {**base, "start": start, "stop": stop, **more}, cursor)

        try:
            file = self._opened(store, entry)
        except (SourceChangedError, StorageAwayError):
            raise
        except (StorageError, ItemError) as error:
            if not skip:
                yield chunk(0, 1, error=" ".join(filter(None, (error.message, error.hint))))
            return
        with file:
            footer = footer_of(file.metadata, [self.column])
            names = self._names(file) if self.named else None
            for _ in range(skip if names is not None else 0):
                next(names)  # type: ignore[arg-type]
            while skip < footer.rows:
                bound = limit()
                stop = min(skip + max(1, min(bound.items, bound.bytes // footer.weight)), footer.rows)
                more = {} if names is None else {"names": [next(names) for _ in range(skip, stop)]}
                made = chunk(skip, stop, **more)
                yield made
                first, skip = first + made.count, stop

    def _opened(self, store: Store, entry: Entry) -> pq.ParquetFile:
        """A file whose columns are those of the first one. Raises StorageError, ItemError."""
        if format_of(entry.name) != "parquet":
            raise ItemError("it is no Parquet file by its name", stage="read", hint=_ALIKE)
        file = open_parquet(store, entry.name, mark=entry.mark)
        schema = file.schema_arrow
        for name in (self.column, *(column for _, column, _ in self.keep)):
            if name not in schema.names:
                file.close()
                raise ItemError(f"the file has no column {name!r}, which others have", stage="read", hint=_ALIKE)
        if self.named and schema.field(self.column).type.get_field_index("path") < 0:
            file.close()
            raise ItemError(f"column {self.column!r} is another one than in other files", stage="read", hint=_ALIKE)
        return file

    def _names(self, file: pq.ParquetFile) -> Iterator[str | None]:
        """The name of each row that has one of its own."""
        seen: set[str] = set()
        for batch in file.iter_batches(_PATHS, columns=[f"{self.column}.path"], use_threads=False):
            values = batch.column(0)
            for name in values.field("path").to_pylist():
                if not name or name in seen or name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
                    yield None
                else:
                    seen.add(name)
                    yield name

    # -- chunks ------------------------------------------------------------------------------------

    def keys(self, chunk: Chunk) -> list[str]:
        payload = chunk.payload
        file = self.listing.locations[payload["place"]].prefix + key_of(name_from_json(payload["file"]))
        if "error" in payload:
            return [file]
        start, stop = payload["start"], payload["stop"]
        names = payload.get("names") or [None] * (stop - start)
        return [f"{file}#{row}" if name is None else f"{file}/{name}" for row, name in enumerate(names, start + 1)]

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        payload = dict(chunk.payload)
        stop = min(stop, chunk.count)
        payload["start"], payload["stop"] = payload["start"] + start, payload["start"] + stop
        if "names" in payload:
            payload["names"] = payload["names"][start:stop]
        return Chunk(chunk.first + start, stop - start, payload, chunk.cursor)

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See :meth:`Source.combine`. Neighbouring rows are read together."""
        combined: list[Chunk] = []
        for chunk in chunks:
            last = combined[-1] if combined else None
            if last is not None and _goes_on(last.payload, chunk.payload) and last.count + chunk.count <= _COMBINE:
                payload = {**last.payload, "stop": chunk.payload["stop"]}
                if "names" in payload:
                    payload["names"] = last.payload["names"] + chunk.payload["names"]
                combined[-1] = Chunk(last.first, last.count + chunk.count, payload, chunk.cursor)
            else:
                combined.append(chunk)
        return combined

    def remark(self) -> str | None:
        return self.listing.remark()

    def ahead(self, batch_size: int) -> int:
        return AHEAD * max(batch_size, LOCAL_THREADS)

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        payload = chunk.payload
        location = self.listing.locations[payload["place"]]
        reader = _CellReader(self, location, open_store(location.root), payload, self.keys(chunk), scorer)
        batches: Any = read_ahead(reader, scorer.batch_size, LOCAL_THREADS, timings)
        with closing(batches):
            for batch in batches:
                if self.keep:
                    batch.info = [reader.info.pop(int(position)) for position in batch.positions]
                yield batch


class _CellReader(FileReader):
    """The reader of one chunk's rows, which are decoded in order, whichever thread wants them."""

    def __init__(
        self,
        source: PictureColumnSource,
        location: Location,
        store: Store,
        payload: Mapping[str, Any],
        keys: Sequence[str],
        scorer: Scorer,
    ) -> None:
        name, mark = name_from_json(payload["file"]), payload["mark"]
        super().__init__(location, store, [name] * len(keys), keys, [mark] * len(keys), source.input, scorer)
        self.info: dict[int, dict[str, Any]] = {}
        """The columns of each row that was read."""
        self._source, self._payload, self._mark = source, payload, mark
        self._lock = threading.Lock()
        self._next = 0
        self._stream: Stream | None = None
        self._read: dict[int, bytes | ItemError] = {}
        self._failure: ItemError | None = None

    def open(self) -> None:
        """Make the folder of pictures that are given as paths. :meth:`close` removes it."""
        if self._input == "path":
            self._folder = temporary.make("items")

    def close(self) -> None:
        super().close()
        if self._stream is not None:
            self._stream.close()

    def run(self, start: int, stop: int) -> tuple[list[Any], float, float, int]:
        began = time.perf_counter()
        with self._lock:
            if self._failure is None and self._next < stop and not self.closed:
                try:
                    self._decode(stop)
                except StorageAwayError:
                    raise
                except TallyError as error:
                    self._location.check_root()
                    self._failure = ItemError(error.message, stage="read", hint=error.hint)
                except Exception as error:
                    said = str(error).split("\n", 1)[0]
                    what = f"the file cannot be read beyond here: {said}"
                    self._failure = ItemError(what, stage="read", hint=DAMAGED)
        waited = time.perf_counter() - began
        values, reading, decoding, held = super().run(start, stop)
        return values, reading + waited, decoding, held

    def _decode(self, stop: int) -> None:
        """Decode the rows up to a position. Those that other threads want are kept for them."""
        if "error" in self._payload:
            raise ItemError(self._payload["error"], stage="read")
        columns = [self._source.column, *(column for _, column, _ in self._source.keep)]
        if self._stream is None:
            file = open_parquet(self._store, self._names[0], mark=self._mark)
            self._stream = Stream(file, list(dict.fromkeys(columns)), _DECODED)
        first = self._payload["start"]
        read: dict[int, bytes | ItemError] = {}
        info: dict[int, dict[str, Any]] = {}
        at = self._next
        failure: Exception | None = None
        try:
            for batch in self._stream.read(first + at, first + stop):
                values, *kept = (batch.column(batch.schema.get_field_index(name)).to_pylist() for name in columns)
                for row, value in enumerate(values):
                    read[at] = _content(value)
                    info[at] = {name: kept[each][row] for each, (name, _, _) in enumerate(self._source.keep)}
                    at += 1
        except Exception as error:
            failure = error
        self._store.check_mark(self._names[0], self._mark)  # it was the same while it was read
        self._next = at
        self._read |= read
        self.info |= info
        if failure is not None:
            raise failure

    def fetch(self, position: int) -> Any:
        content = self._read.pop(position, self._failure)
        assert content is not None
        if isinstance(content, ItemError):
            raise ItemError(content.message, stage="read", hint=content.hint)
        return self.handed(position, content)


def _goes_on(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    same = ("place", "file", "mark")
    return (
        "error" not in one
        and "error" not in other
        and one["stop"] == other["start"]
        and all(one[name] == other[name] for name in same)
    )


# -- columns ------------------------------------------------------------------------------------------


def _is_struct(kind: pa.DataType) -> bool:
    """Whether it is what Hugging Face writes."""
    import pyarrow as pa

    return bool(
        pa.types.is_struct(kind)
        and (index := kind.get_field_index("bytes")) >= 0
        and _is_binary(plain_type(kind.field(index).type))
    )


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind))


def _chosen(schema: pa.Schema, asked: str | None, shown: str) -> str:
    """The column that holds pictures. Raises SpecError."""
    kinds: dict[str, pa.DataType] = {field.name: plain_type(field.type) for field in schema}
    listed = ", ".join(f"{name} ({_short(kind)})" for name, kind in list(kinds.items())[:12])
    if asked is not None:
        if asked not in kinds:
            raise SpecError(
                f"item_column: {shown} has no column {asked!r}{did_you_mean(asked, kinds)}", hint=f"There are {listed}."
            )
        if not (_is_struct(kinds[asked]) or _is_binary(kinds[asked]) or _is_text(kinds[asked])):
            raise SpecError(
                f"item_column: {asked!r} of {shown} is {_short(kinds[asked])}: no bytes, and no text in base64",
                hint="Pictures are bytes, text in base64, or a struct of 'bytes' and 'path' as Hugging Face writes it.",
            )
        return asked
    found = [name for name, kind in kinds.items() if _is_struct(kind)] or [
        name for name, kind in kinds.items() if _is_binary(kind)
    ]
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} columns of bytes ({', '.join(found)})" if found else "no column of bytes"
    raise SpecError(
        f"the model is given pictures, and {shown} has {problem} (there are {listed})",
        hint="--item-column says which holds the pictures: their bytes, or text in base64. A file that lists "
        "paths or URLs is given with --items; of a table in memory, --item-column names such a column, too. "
        "If its rows are to be scored, choose a model of tables.",
    )


def _short(kind: pa.DataType) -> str:
    text: str = str(kind)
    return text if len(text) <= 40 else text[:40] + " ..."


def _check_base64(file: pq.ParquetFile, column: str, shown: str) -> None:
    """Raises SpecError if the first text of a column is no base64."""
    for batch in file.iter_batches(_DECODED, columns=[column], use_threads=False):
        for value in batch.column(0).to_pylist():
            if value is None:
                continue
            if isinstance(found := _content(value), ItemError):
                begin = value if len(value) <= 40 else value[:40] + "..."
                what = f"item_column: {column!r} of {shown} is text, and no base64: {begin!r}"
                raise SpecError(what, hint="A table of paths or URLs is given with --items.") from found
            return


def _content(value: Any) -> bytes | ItemError:
    """The content of a picture, as its cell has it."""
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            return ItemError(
                f"it has no bytes, only the path {path!r}, and paths in tables are not followed",
                stage="read",
                hint="A table of paths is given with --items.",
            )
    if value is None:
        return ItemError("its cell is empty", stage="read")
    if isinstance(value, bytes):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return ItemError(f"its text is no base64: {error}", stage="read")


def _kept(schema: pa.Schema, asked: tuple[str, ...], column: str, shown: str) -> tuple[tuple[str, str, str], ...]:
    """The columns that rows carry. Raises SpecError."""
    from tally.sinks.columns import name_of, stored_type

    others = [name for name in schema.names if name != column]
    if asked == ("*",):
        asked = tuple(others)
    kept: list[tuple[str, str, str]] = []
    problems: list[str] = []
    for each in asked:
        new, equals, old = each.partition("=")
        new, old = (new.strip(), old.strip()) if equals and each not in others else (each, each)
        if old not in others:
            listed = ", ".join(others[:12]) or "none"
            problems.append(
                f"keep: {shown} has no column {old!r}{did_you_mean(old, others)} (beside {column} there are {listed})"
            )
        elif new == "key" or new in (name for name, _, _ in kept):
            problems.append(f"keep: {new!r} is the name of another column; --keep NEW={old} renames it")
        else:
            kept.append((new, old, name_of(stored_type(plain_type(schema.field(old).type)))))
    if problems:
        raise SpecError(problems)
    return tuple(kept)
