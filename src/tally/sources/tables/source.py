"""Items that are rows of tables: Parquet, CSV, JSON, Excel, Arrow, ORC and Avro, in one file or many.

Parquet is read in place. Other formats, and rows that are selected, grouped by key or aggregated over windows, are
first converted to work files (:mod:`tally.sources.tables.ingest`) and read from there, by any process that sees them.

Chunks are lists of row ranges: see :mod:`tally.sources.tables.row_ranges`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

from tally.errors import SourceNotFoundError, SpecError
from tally.scorers.base import Input, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.sources.listing import Listing, nothing
from tally.sources.tables import delimited, paths, versioned
from tally.sources.tables.batches import READY, Ahead, Reader, plain
from tally.sources.tables.damage import NO_ROWS
from tally.sources.tables.formats import TEXT, known_format, open_parquet
from tally.sources.tables.ingest import BAD, COUNT, FIRST, KEYS, ROWS, Made, Query, TableFile, make
from tally.sources.tables.mending import Positions, found_again, kept
from tally.sources.tables.packed import plain_text
from tally.sources.tables.parquet import DECODED, Footer, Stream, footer_of
from tally.sources.tables.row_ranges import MOST, Packer, RowRange, append, file_of, length, part
from tally.sources.tables.schema import inspect
from tally.sources.tables.select import ORDER, TableRequest, select
from tally.sources.tables.work_files import WorkFiles, WorkFolder
from tally.sql import distinct_names
from tally.storage import Store, changed, key_of, name_from_json, name_to_json, open_store, temporary

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tally.sources.tables.keys import Rows

_COMBINE = 65_536
_KEYS_AT_ONCE = 4096

_UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}

_OF_WINDOWS = "windows are not retried: mend the line and score again with --overwrite"
_LOOKED_UP = ("_work", "_index", "_rows", "_called", "_positions")

MissingReason = Callable[[Mapping[str, Any]], "str | None"]


@dataclass(frozen=True)
class TableSource(Source):
    """Rows of tables. Make it with :meth:`describe`; small, immutable, picklable.

    features: the columns that a scorer is given after those of ``by``, in order. columns: those that results carry: key
    columns, then kept columns. order: see :class:`Source`; set if rows are grouped by key.
    scratch: place of the work files.
    """

    accepts: ClassVar = frozenset[Input]({"table"})
    unit: ClassVar = "rows"
    media: ClassVar = "table"
    chunk_items: ClassVar[int] = 4_194_304

    listing: Listing
    query: Query
    assumed: tuple[str, ...] = ()
    in_place: bool = True
    scratch: str | None = None
    missing_reason: MissingReason | None = field(default=None, compare=False, repr=False)
    footers: Mapping[tuple[int, str], tuple[str, Footer]] = field(default_factory=dict, compare=False, repr=False)
    """Mark and footer of each Parquet file that was inspected, by location and name."""

    @classmethod
    def describe(
        cls,
        uris: Sequence[str],
        *,
        features: Sequence[str] | int | None,
        by: Sequence[str] = (),
        keep: Sequence[str] = (),
        where: str | None = None,
        time: str | None = None,
        window: float | None = None,
        aggregate: Sequence[str] = ("mean",),
        time_unit: str | None = None,
        timezone: str | None = None,
        path_columns: str | None = None,
        csv: Mapping[str, Any] | None = None,
        missing_reason: MissingReason | None = None,
        without: str | None = None,
        exact: bool = False,
    ) -> TableSource:
        """The source of all rows of the tables at ``uris``: folders, files and globs, paths or URLs.

        features: the columns that the model takes: names; n: the only n numeric columns besides key, time and (if
        there are too many) kept ones; None: all columns. With a window, features are called by column and aggregate,
        such as ``Value_mean``; ``count`` counts the window's rows.
        by: columns whose values make a key. Rows of one key follow each other, in input order.
        keep: columns that results carry besides the key; ``*`` stands for all.
        where: a condition in DuckDB's SQL. time: the column of timestamps.
        window: seconds; readings are aggregated over windows of this length, which begin at multiples of it from
        Monday, 2000-01-03 00:00 (UTC, or the time zone of the column). Nulls are ignored. A window without readings
        gives no row, and a row without a time is in no window.
        time_unit: of times that are numbers since 1970: s, ms, us or ns; by default the one that all values fit.
        timezone: whose days the windows are, if they are days. path_columns: a pattern of columns at the end of paths,
        such as ``{Device}_{Tag}.csv``; folders such as ``Device=7`` give columns by themselves.
        csv: see :data:`tally.sources.tables.delimited.OPTIONS`.
        missing_reason: tells why there is no model for a key, if there is none. All its rows are then one dead item.
        without: the job's own output, as for files. exact: features of text files are read as they are written,
        zeros in front and all digits.

        Raises SpecError with every problem, SourceNotFoundError if one of the locations is missing or gives no table,
        StorageError if a file cannot be read.
        """
        listing = Listing.of(uris, "table", without=without)
        options = delimited.complete(csv or {})
        request = TableRequest.of(features, by, keep, where, time, window, aggregate, time_unit, timezone)
        request = replace(request, exact=exact)
        problems = delimited.check_options(options) + ([] if path_columns is None else paths.check(path_columns))
        inputs = list(_inputs(listing, options, problems))
        if problems:
            raise SpecError(problems)
        if not inputs:
            raise nothing(listing.locations[0], listing.passed, listing.kind)
        versioned.check(listing, inputs)
        in_place = all(each.format == "parquet" for each in inputs) and not (by or where or window)
        found = inspect(inputs, request, options)
        if found.problems:
            raise SpecError(found.problems)
        in_paths, problems, partitions = paths.columns([each.url for each in inputs], path_columns)
        in_paths = {name: kind for name, kind in in_paths.items() if name not in found.schema.names}
        found = found.with_paths(in_paths)
        selection, more = select(found.schema, request, paths=in_paths)
        problems += more
        needed = {name: kind for name, kind in in_paths.items() if where is not None or name in selection.inputs}
        in_place = in_place and not needed
        if by or where or window or needed:
            problems += found.alike()
        if where is not None:
            problems += found.check_where(where)
        told = [*found.odd.values(), *partitions]
        if problems:
            raise SpecError(problems, hint="; ".join(told) or None)
        types = {name: kind for name, kind in found.types.items() if name in found.schema.names}
        query = Query(request, selection, options, types, needed, path_columns if needed else None)
        source = cls(listing, query, (*found.assumed, *told), in_place, None, missing_reason)
        marks = {(each.location, each.name): each.mark for each in inputs}
        read = source._needed()
        footers = {file: (marks[file], footer_of(meta, read)) for file, meta in found.metadata.items()}
        return replace(source, footers=footers)

    def located(self, work: str | None) -> TableSource:
        """See :meth:`Source.located`."""
        if work is None and not self.in_place:
            raise SpecError(
                "these rows have to be prepared before they are scored, and the output has no room for that",
                hint="Write to a folder, or give Parquet files, without by, where and window.",
            )
        return replace(self, scratch=work)

    def indivisible(self) -> str | None:
        """See :meth:`Source.indivisible`."""
        gathered = self.by or self.query.request.window is not None
        return "its rows are gathered by key or window first, all of them by one coordinator" if gathered else None

    @property
    def features(self) -> tuple[str, ...]:
        return self.query.selection.features

    @property
    def by(self) -> tuple[str, ...]:
        return self.query.request.by

    @property
    def columns(self) -> Mapping[str, str]:
        return {**self.query.selection.info, ORDER: "int64"} if self.order else self.query.selection.info

    @property
    def order(self) -> str | None:
        return ORDER if self.by and self.query.request.window is None else None

    def __getstate__(self) -> dict[str, Any]:
        # What only planning needs stays in the coordinator. What was looked up is looked up again.
        kept = {name: value for name, value in self.__dict__.items() if name not in _LOOKED_UP}
        return {**kept, "missing_reason": None, "footers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # -- work files --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the work files, if they are needed and missing.

        Raises StorageError if that fails, or if the source has changed since they were made.
        """
        if self.in_place:
            return
        self.listing.passed.clear()
        inputs = [self._known(each) for each in _inputs(self.listing, self.query.csv, [])]
        WorkFolder(self._scratch()).ensure(fingerprint(inputs, self.query), lambda folder: self._make(inputs, folder))
        self._look_again()

    def renew(self) -> None:
        """See :meth:`Source.renew`."""
        if not self.in_place:
            WorkFolder(self._scratch()).forget()
            self._look_again()

    def _look_again(self) -> None:
        for name in _LOOKED_UP:
            self.__dict__.pop(name, None)

    def _known(self, file: TableFile) -> TableFile:
        """The file with its number of rows, if its footer was read."""
        mark, footer = self.footers.get((file.location, file.name), (None, None))
        return replace(file, rows=footer.rows) if footer is not None and mark == file.mark else file

    def _make(self, inputs: Sequence[TableFile], folder: Path) -> Made:
        made = replace(make(inputs, self.query, folder), versions=[each.mark for each in inputs])
        for each in inputs:  # was it one and the same all the time?
            each.store.check_mark(each.name, each.mark)
        return made

    def _scratch(self) -> str:
        if self.scratch is None:
            raise TypeError("a place for the work files is needed: source.at(place)")
        return self.scratch

    @cached_property
    def _work(self) -> WorkFiles:
        return WorkFolder(self._scratch()).open()

    @cached_property
    def _index(self) -> pa.Table:
        """The keys, in the order of their rows: the columns of ``by``, the first row, and the number of rows."""
        return self._work.parquet(KEYS).read()

    def _store(self, location: int) -> Store:
        return open_store(self.listing.locations[location].root)

    @property
    def unread(self) -> int:
        """The number of lines that could not be read. Known after :meth:`prepare`."""
        return 0 if self.in_place else self._work.made.bad

    # -- groups ------------------------------------------------------------------------------------

    def groups(self) -> list[tuple[dict[str, Any], int, int]]:
        """Each key of a source that is grouped by ``by``: its values by column, its first row, and its number of rows.

        Known after :meth:`prepare`. Lines that could not be read belong to none.
        """
        if not self._work.made.keys:
            return []
        values = self._index.to_pylist()
        return [({name: row[name] for name in self.by}, row[FIRST], row[COUNT]) for row in values]

    def group_table(self, first: int, rows: int) -> pa.Table:
        """Consecutive rows of a grouped source, such as those of one key: the columns of ``by``, then the features."""
        import pyarrow as pa

        names = list(dict.fromkeys([*self.by, *self.features]))
        stream = Stream(self._work.parquet(ROWS), names, DECODED)
        try:
            batches = list(stream.read(first, first + rows))
        finally:
            stream.close()
        return plain(pa.Table.from_batches(batches), self.query.selection.inputs)

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        if self.in_place:
            self.listing.passed.clear()
        packer = Packer(first, limit)
        cursor = None if after is None else json.loads(after)
        if self.in_place:
            yield from self._plan_files(packer, cursor)
        elif self._work.made.keys:
            yield from self._plan_keys(packer, cursor)
            yield from self._plan_bad(packer, cursor)
        else:
            yield from self._plan_work(packer, cursor)
            yield from self._plan_bad(packer, cursor)
        yield from packer.flush()
        if after is None and not packer.any:
            raise self._nothing()

    def _nothing(self) -> SourceNotFoundError:
        location = self.listing.locations[0]
        shown = ", ".join(map(key_of, self.listing.uris[:3]))
        if self.query.request.where is not None:
            return SourceNotFoundError(
                f"nothing to score: no row of {shown} meets the condition {self.query.request.where!r}",
                hint="Compare its values with those of the table.",
            )
        if self.query.request.window is not None and not self.in_place and self._work.made.timeless:
            return SourceNotFoundError(
                f"nothing to score: no row of {shown} has a time",
                hint="--time names the column of timestamps; --time-unit says what its numbers are.",
            )
        if next(iter(self.listing.entries(0)), None) is None and len(self.listing.locations) == 1:
            return nothing(location, self.listing.passed, self.listing.kind)
        return SourceNotFoundError(f"nothing to score: {shown} holds no rows", hint=NO_ROWS)

    def _plan_files(self, packer: Packer, cursor: Any) -> Iterator[Chunk]:
        began, last, row, *planned = (0, None, 0) if cursor is None else cursor
        name = None if last is None else name_from_json(last)
        needed = self._needed()
        for index in range(began, len(self.listing.locations)):
            if index == began and name is not None:
                rows, mark = planned or (None, self._store(index).marked(name)[1])
                if row != rows:  # it is not planned to its end
                    yield from self._plan_file(packer, index, name, row, needed, mark)
            for entry in self.listing.entries(index, name if index == began else None):
                yield from self._plan_file(packer, index, entry.name, 0, needed, entry.mark)

    def _plan_file(
        self, packer: Packer, location: int, name: str, start: int, needed: set[str], mark: str
    ) -> Iterator[Chunk]:
        """The chunks of a file from a row on. mark: what it was when it was listed, or its first rows were planned.

        Raises SourceChangedError if it is another one now.
        """
        seen, footer = self.footers.get((location, name), (None, None))
        if footer is None or seen != mark:  # added or changed since the inspection
            with open_parquet(self._store(location), name, mark=mark) as file:
                footer = footer_of(file.metadata, needed)
        packed = name_to_json(name)
        yield from packer.cut(
            ["rows", location, packed], start, *footer, lambda stop: [location, packed, stop, footer.rows, mark], mark
        )

    def _plan_work(self, packer: Packer, cursor: Any) -> Iterator[Chunk]:
        """The chunks of work files whose rows are items in their order."""
        if cursor is not None and cursor[0] != "rows":
            return
        began, row = (0, 0) if cursor is None else cursor[1:]
        needed = self._needed()
        for number, (name, rows) in enumerate(self._work.made.tables[began:], began):
            if not rows:
                continue
            with self._work.parquet(name) as file:
                footer = footer_of(file.metadata, needed)
            start = row if number == began else 0
            yield from packer.cut(["rows", -1, name], start, *footer, partial(_after_rows, number))

    def _plan_keys(self, packer: Packer, cursor: Any) -> Iterator[Chunk]:
        """Chunks of whole keys, as far as they fit."""
        if cursor is not None and cursor[0] != "keys":
            return
        began, inside = (0, 0) if cursor is None else cursor[1:]
        rows = self._work.made.tables[0][1]
        with self._work.parquet(ROWS) as file:
            weight = footer_of(file.metadata, self._needed()).weight
        for ordinal, key in enumerate(self._keys_from(began), began):
            first, count = key.pop(FIRST), key.pop(COUNT)
            reason = self._reason(key, count) if not inside else None
            if reason is not None:
                yield from packer.make_room(1, 0)
                packer.add(["key", ordinal, reason], 1, 0, ["keys", ordinal + 1, 0])
            else:
                yield from packer.make_room(count - inside, weight)
                while inside < count:
                    taken = min(packer.room(weight), count - inside)
                    if not taken:
                        yield from packer.flush()
                        continue
                    start = first + inside
                    inside += taken
                    after = ["keys", ordinal, inside] if inside < count else ["keys", ordinal + 1, 0]
                    packer.add(["rows", -1, ROWS, start, start + taken, rows], taken, weight, after)
            inside = 0

    def _keys_from(self, ordinal: int) -> Iterator[dict[str, Any]]:
        """The keys from one on: each one's values by column, with its first row and its number of rows."""
        for batch in self._index.slice(ordinal).to_batches(max_chunksize=_KEYS_AT_ONCE):
            yield from batch.to_pylist()

    def _plan_bad(self, packer: Packer, cursor: Any) -> Iterator[Chunk]:
        at = cursor[1] if cursor is not None and cursor[0] == "bad" else 0
        while at < self._work.made.bad:
            taken = min(packer.room(0), self._work.made.bad - at)
            if not taken:
                yield from packer.flush()
                continue
            packer.add(["bad", at, at + taken], taken, 0, ["bad", at + taken])
            at += taken

    def _reason(self, key: Mapping[str, Any], rows: int) -> str | None:
        """Why the key has no model, and how many rows that concerns; None if it has one, or needs none."""
        reason = None if self.missing_reason is None else self.missing_reason(key)
        return None if reason is None else f"{reason} ({'1 row' if rows == 1 else f'{rows:,} rows'})"

    def _needed(self) -> set[str]:
        origin = self.query.selection.origin
        return {*self.by, *self.features, *(origin.get(name, name) for name in self.columns)}

    def remark(self) -> str | None:
        said = [self.listing.remark(), *self.assumed]
        if not self.in_place and self._work.made.unit and self.query.request.unit is None:
            said.append(f"{self.query.request.time} is taken for {_UNITS[self._work.made.unit]} since 1970, UTC")
        if not self.in_place and self._work.made.timeless:
            lost = self._work.made.timeless
            said.append(f"{'1 row is' if lost == 1 else f'{lost:,} rows are'} in no window: without a time")
        return "; ".join(each for each in said if each) or None

    # -- chunks ------------------------------------------------------------------------------------

    def keys(self, chunk: Chunk) -> Sequence[str]:
        return _Keys(self, chunk.payload["pieces"])

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        row_ranges: list[RowRange] = []
        at = 0
        for row_range in chunk.payload["pieces"]:
            count = length(row_range)
            low, high = max(start - at, 0), min(stop - at, count)
            if low < high:
                row_ranges.append(part(row_range, low, high))
            at += count
        return Chunk(chunk.first + start, stop - start, {"pieces": row_ranges}, chunk.cursor)

    def choose(self, chunk: Chunk, positions: Sequence[int]) -> list[Chunk]:
        """See :meth:`Source.choose`."""
        chosen: list[Chunk] = []
        runs = super().choose(chunk, positions)
        for start in range(0, len(runs), MOST):
            group = runs[start : start + MOST]
            pieces = [row_range for run in group for row_range in run.payload["pieces"]]
            chosen.append(Chunk(group[0].first, sum(run.count for run in group), {"pieces": pieces}, chunk.cursor))
        return chosen

    def alone(self, chunk: Chunk, position: int, key: str) -> Chunk:
        """See :meth:`Source.alone`."""
        item = self.slice(chunk, position, position + 1)
        [row_range] = item.payload["pieces"]
        if row_range[0] == "rows" and row_range[1] >= 0:
            return item
        by = self.key_values(row_range[1]) if row_range[0] == "key" else {}
        return replace(item, payload={**item.payload, "item": kept(row_range, key, self._positions, by)})

    @cached_property
    def _positions(self) -> Positions:
        return Positions(self._work)

    def _digest(self, number: int, lines: Collection[int]) -> str:
        """Of the lines of a file that is text, but for some; empty for another."""
        for file, each in enumerate(_inputs(self.listing, self.query.csv, [])):
            if file == number and each.format in TEXT:
                with temporary.folder("text") as folder:
                    path = each.store.local_path(each.name)
                    return delimited.digest_without(plain_text(path, each.key, each.format, folder, file), lines)
        return ""

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See :meth:`Source.combine`. A key that has a model by now becomes its rows."""
        if not self.in_place:
            keys = self._index.select(list(self.by)).to_pylist() if self._work.made.keys else []
            chunks = found_again(chunks, self._positions, keys, self._digest)
        return self._combined(chunks)

    def _combined(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Dead items, where they are now, in few chunks."""
        combined: list[Chunk] = []
        row_ranges: list[RowRange] = []
        count = first = 0
        for chunk, revived in self._each_once(chunks):
            for row_range in _bounded(revived):
                items = length(row_range)
                if row_ranges and (count + items > _COMBINE or len(row_ranges) >= MOST):
                    combined.append(Chunk(first, count, {"pieces": row_ranges}, chunk.cursor))
                    row_ranges, count = [], 0
                if not row_ranges:
                    first = chunk.first
                append(row_ranges, row_range)
                count += items
        if row_ranges:
            combined.append(Chunk(first, count, {"pieces": row_ranges}, chunks[-1].cursor))
        return combined

    def _each_once(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, RowRange]]:
        """The row ranges of the chunks. A mended line may belong to a key that has a model by now, and came with it."""
        found = [(chunk, given, self._revived(given)) for chunk in chunks for given in chunk.payload["pieces"]]
        keys = sorted(made[3:5] for _, given, made in found if given[0] == "key" and made[0] == "rows")
        for chunk, given, made in found:
            if given[0] == "rows" and made[1] < 0 and keys:
                at = bisect.bisect_right(keys, [made[3], float("inf")]) - 1
                if at >= 0 and made[4] <= keys[at][1]:
                    continue
            yield chunk, made

    def _revived(self, row_range: RowRange) -> RowRange:
        if row_range[0] != "key" or self.missing_reason is None:
            return row_range
        row = self._index.slice(row_range[1], 1).to_pylist()[0]
        reason = self._reason({name: row[name] for name in self.by}, row[COUNT])
        if reason is not None:
            return ["key", row_range[1], reason]
        return ["rows", -1, ROWS, row[FIRST], row[FIRST] + row[COUNT], self._work.made.tables[0][1]]

    # -- reading -----------------------------------------------------------------------------------

    def ahead(self, batch_size: int) -> int:
        return (READY + 1) * batch_size + max(DECODED, batch_size)

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        ahead = Ahead(Reader(self, chunk.payload["pieces"], scorer.batch_size).batches())
        told = 0.0
        try:
            while (batch := ahead.next()) is not None:
                timings.decode += ahead.seconds - told
                told = ahead.seconds
                yield batch
        finally:
            ahead.stop()

    # Of row ranges -------------------------------------------------------------------------------

    def open_rows(self, row_range: RowRange) -> pq.ParquetFile:
        """The file of a range of rows. Raises SourceChangedError if it has changed."""
        location, name, rows, *mark = file_of(row_range)
        name = name_from_json(name)
        if location < 0:
            return self._work.parquet(name)
        file = open_parquet(self._store(location), name, mark="".join(mark))
        if file.metadata.num_rows != rows or not set(self._needed()) <= set(file.schema_arrow.names):
            file.close()
            raise changed(self.listing.locations[location].within + name)
        return file

    def check_rows(self, row_range: RowRange) -> None:
        """Raises SourceChangedError if the file of a range of rows has changed since it was planned."""
        location, name, _, *mark = file_of(row_range)
        # Each answer about an object in a bucket has told its mark.
        if location >= 0 and mark and (store := self._store(location)).is_local:
            store.check_mark(name_from_json(name), mark[0])

    def called(self, row_range: RowRange) -> Mapping[str, str]:
        """The columns that have another name in the file of a range than in the source: see :func:`distinct_names`."""
        return {} if row_range[1] >= 0 else self._called

    @cached_property
    def _called(self) -> Mapping[str, str]:
        called = distinct_names(list(self.query.selection.inputs))
        return {name: other for name, other in called.items() if name != other}

    def key_values(self, ordinal: int) -> dict[str, Any]:
        """The values of a key by column."""
        row = self._index.slice(ordinal, 1).to_pylist()[0]
        return {name: row[name] for name in self.by}

    def bad_lines(self, start: int, stop: int) -> list[dict[str, Any]]:
        """``key`` and ``error`` of lines that could not be read."""
        stream = Stream(self._work.parquet(BAD), ["key", "error"], DECODED)
        try:
            rows = [row for batch in stream.read(start, stop) for row in batch.to_pylist()]
            if self._work.made.kind == "windows":
                return [row | {"error": f"{row['error']}; {_OF_WINDOWS}"} for row in rows]
            return rows
        finally:
            stream.close()

    def key_columns(self, row_range: RowRange) -> list[str]:
        """The columns that a range's keys are made of."""
        if row_range[1] >= 0 or self._work.made.kind == "files":
            return []
        return [ORDER] if self._work.made.kind == "rows" else [*self.by, self.query.request.time or ""]

    def keys_of(self, row_range: RowRange, start: int, rows: Any, count: int) -> pa.StringArray:
        """The keys of ``count`` rows of a range's file from row ``start`` on. rows: their :meth:`key_columns`."""
        from tally.arrays import numbers_of
        from tally.sources.tables.keys import joined, numbered, times

        location, name = row_range[1], name_from_json(row_range[2])
        if location >= 0:
            return numbered(self.listing.locations[location].prefix + key_of(name), start, count)
        made = self._work.made
        if made.kind == "files":
            return self._rows.of_file(int(name.removesuffix(".parquet")), start, count)
        if made.kind == "rows":
            return self._rows.at(numbers_of(rows[ORDER]))
        time = self.query.request.time or ""
        return joined([*(rows[each] for each in self.by), times(rows[time], self.query.request.window or 0)])

    @cached_property
    def _rows(self) -> Rows:
        from tally.sources.tables.keys import Rows

        return Rows(self._work)


def _after_rows(number: int, stop: int) -> list[Any]:
    """The cursor after ``stop`` rows of a work file."""
    return ["rows", number, stop]


def _bounded(row_range: RowRange) -> Iterator[RowRange]:
    """The range in parts that fit into one chunk."""
    for start in range(0, length(row_range), _COMBINE):
        yield part(row_range, start, min(start + _COMBINE, length(row_range)))


def _inputs(listing: Listing, csv: Mapping[str, Any], problems: list[str]) -> Iterator[TableFile]:
    """The files, in order. Names that are not those of tables are problems."""
    for index, location in enumerate(listing.locations):
        store = open_store(location.root)
        for entry in listing.entries(index):
            key = location.prefix + key_of(entry.name)
            try:
                yield TableFile(key, store, entry.name, known_format(entry.name, csv=bool(csv)), index, entry.mark)
            except SpecError as error:
                problems += error.problems


def fingerprint(inputs: Sequence[TableFile], query: Query) -> str:
    """Identifies the files' contents and what is made of them."""
    # With the names of earlier versions, whose jobs may still be resumed.
    described = query.described().replace("request=TableRequest(", "wanted=Wanted(", 1)
    digest = hashlib.sha256(described.encode())
    for each in inputs:
        digest.update(json.dumps([each.key, each.store.version(each.name)]).encode())
    return digest.hexdigest()


class _Keys(Sequence[str]):
    """The keys of a chunk's items, made when they are asked for."""

    def __init__(self, source: TableSource, row_ranges: Sequence[RowRange]) -> None:
        self._source, self._row_ranges = source, row_ranges
        self._ends = list(accumulate(map(length, row_ranges)))
        self._streams: dict[str, Stream] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[at] for at in range(start, stop, step)]
            return [key for keys in self._between(start, stop) for key in keys]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        return next(iter(self._between(at, at + 1)))[0]

    def __iter__(self) -> Iterator[str]:
        for keys in self._between(0, len(self)):
            yield from keys

    def _between(self, start: int, stop: int) -> Iterator[list[str]]:
        while start < stop:
            at = bisect.bisect_right(self._ends, start)
            row_range = self._row_ranges[at]
            began = self._ends[at] - length(row_range)
            taken = min(stop, self._ends[at], start + DECODED)
            yield self._of(part(row_range, start - began, taken - began))
            start = taken

    def _of(self, row_range: RowRange) -> list[str]:
        if row_range[0] == "key":
            values = self._source.key_values(row_range[1]).items()
            return [",".join(f"{name}={'null' if value is None else value}" for name, value in values)]
        if row_range[0] == "bad":
            return [str(row["key"]) for row in self._source.bad_lines(row_range[1], row_range[2])]
        needed = self._source.key_columns(row_range)
        found: list[str] = []
        start = row_range[3]
        for batch in self._batches(row_range, needed):
            found += self._source.keys_of(row_range, start, batch, batch.num_rows).to_pylist()
            start += batch.num_rows
        return found or self._source.keys_of(row_range, start, None, row_range[4] - start).to_pylist()

    def _batches(self, row_range: RowRange, needed: Sequence[str]) -> Iterator[Any]:
        if not needed:
            return
        if row_range[2] not in self._streams:
            self._streams = {row_range[2]: Stream(self._source.open_rows(row_range), needed, DECODED)}
        yield from self._streams[row_range[2]].read(row_range[3], row_range[4])
