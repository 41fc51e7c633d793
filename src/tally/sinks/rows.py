"""Rows into Parquet, CSV or JSON Lines: a folder of parts, or one merged file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from tally.errors import ItemError, SourceNotFoundError, SpecError
from tally.scorers.base import Result, Thumbnail
from tally.sinks.base import THUMBNAILS, Output, OutputDescription, Writer
from tally.sinks.layout import File, OutputLayout, staged_name
from tally.sinks.staging import StagedSink
from tally.sources.base import Chunk

if TYPE_CHECKING:
    import pyarrow as pa

_SPILL_BYTES = 32 * 1024**2
_DEAD_ROWS = 10_000
_DEAD_COLUMNS = {"stage": "string", "error": "string"}


class RowsSink(StagedSink):
    """Takes mappings, and sequences of them. They are staged as Parquet, whatever the final format.

    format: ``parquet``, ``csv`` or ``jsonl``.
    columns: column name to Arrow type name, as a scorer declares them; None infers the types.
    order: the column that a merged file is sorted by, and that is not written. See :class:`Source`.
    escape_formulas: of CSV, whether text that a spreadsheet would take for a formula gets an apostrophe before it.
    thumbnails: whether results come with small pictures of their items (see :class:`Thumbnailed`), which are kept.
    Raises SpecError if ``columns`` are wrong.
    """

    def __init__(
        self,
        layout: OutputLayout,
        format: str = "parquet",  # noqa: A002
        columns: Mapping[str, str] | None = None,
        order: str | None = None,
        *,
        escape_formulas: bool = False,
        thumbnails: bool = False,
    ) -> None:
        super().__init__(layout, format)
        self.order = order
        self.escape_formulas = escape_formulas
        self.thumbnails = thumbnails
        self.columns = None if columns is None else {n: kind for n, kind in columns.items() if n != order}
        if columns is not None:
            self._schema()

    def describe(self) -> OutputDescription:
        """See :meth:`Sink.describe`."""
        return OutputDescription(
            "rows", str(self.layout), bool(self.layout.merged), self.format, self.columns, self.order, self._options()
        )

    def _options(self) -> dict[str, bool]:
        """Those that are asked for."""
        return {name: True for name in ("escape_formulas", "thumbnails") if getattr(self, name)}

    def open(self, attempt: str, chunk: Chunk) -> Writer:
        """See :meth:`Sink.open`."""
        writer = self._writer(attempt)
        if not self.thumbnails:
            return writer
        from tally.sinks.thumbnails import ThumbnailWriter

        return ThumbnailWriter(self.layout, attempt, writer)

    def _writer(self, attempt: str) -> Writer:
        """The writer of one attempt's results, without thumbnails."""
        left_out = None if self._sorts else self.order
        return RowsWriter(self.layout, attempt, self._schema(), left_out, textual=self.format != "parquet")

    def staged_rows(self, output: Output) -> Iterator[pa.Table]:
        """See :meth:`Sink.staged_rows`."""
        for name in output.files:
            table = self.layout.table(self.layout.staging + name)
            yield table.drop_columns(self.order) if self._sorts and self.order in table.column_names else table

    def thumbnails_of(self, outputs: Iterable[Output], keys: Collection[str]) -> Mapping[str, Thumbnail]:
        """See :meth:`Sink.thumbnails_of`."""
        if not self.thumbnails:
            return {}
        from tally.sinks import thumbnails

        def names() -> list[str]:
            final = [file["path"] for file in (self.manifest() or {}).get("thumbnails", ())]
            if not self.claimed:
                return final
            return [
                *final,
                *self.still_staged(final, (name for each in outputs for name, *_ in each.facts.get(THUMBNAILS, ()))),
            ]

        outputs = list(outputs)
        try:
            return thumbnails.read(self.layout, names(), keys)
        except SourceNotFoundError:  # published between looking and reading: they lie elsewhere now
            return thumbnails.read(self.layout, names(), keys)

    @property
    def _sorts(self) -> bool:
        """Whether the final rows are sorted by ``order``: those of a merged file are."""
        return self.order is not None and self.layout.merged is not None

    def _schema(self) -> pa.Schema | None:
        from tally.sinks.columns import schema_of

        if self.columns is None or not self._sorts:
            return schema_of(self.columns)
        return schema_of({**self.columns, str(self.order): "int64"})

    def assemble(
        self, outputs: Sequence[Output], dead: Iterable[dict[str, Any]], earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        from tally.sinks import columns, merge

        layout = self.layout
        staged = [layout.staging + name for output in outputs for name in output.files]
        before = [] if earlier is None else [_schema_in(earlier)]
        declared = self._schema()
        if declared is None:
            unified = merge.schema(layout, staged, before)
        else:
            unified = columns.unify([*before, declared])
        kept: list[File] = [] if earlier is None else earlier["files"]
        if layout.merged and kept and self.format == "parquet":
            staged, kept = [layout.merged, *staged], []
        target = unified.schema
        moves: dict[str, str] = {}
        if layout.merged and kept:
            known = list((earlier or {})["schema"])
            batches, target = self._sorted(merge.stream(self._tables(staged, kept), target), target)
            files = [merge.extend(layout, kept[0], self._written(batches), target, known, self.format)]
        elif declared is None or layout.merged or self.format != "parquet" or type(self) is not RowsSink:
            batches, target = self._sorted(merge.stream(self._tables(staged, kept), target), target)
            written = self._written(batches)
            files = [*kept, *merge.write(layout, written, target, self.format, len(kept), empty=not kept)]
        else:
            files, moves = self._parts(outputs, kept, target)
        if self.thumbnails:
            from tally.sinks import thumbnails

            pictures, moved = thumbnails.assemble(layout, outputs, (earlier or {}).get("thumbnails", ()))
            moves |= moved
        dead_file = write_dead(layout, dead, self.format, self._written)
        notes = [f"column {name!r} held values of different types and was written as text" for name in unified.mixed]
        return {
            "output": "rows",
            "format": self.format,
            "schema": {field.name: columns.name_of(field.type) for field in target},
            "files": files,
            **({"thumbnails": pictures} if self.thumbnails else {}),
            "moves": moves,
            "dead_file": dead_file,
            "counts": {
                "files": len(files),
                "rows": sum(file["rows"] for file in files),
                "bytes": sum(file["bytes"] for file in files),
                "dead": dead_file["rows"] if dead_file else 0,
            },
            "notes": list(dict.fromkeys([*((earlier or {}).get("notes", [])), *notes])),
        }

    def _sorted(self, batches: Iterator[pa.RecordBatch], target: pa.Schema) -> tuple[Iterator[pa.RecordBatch], Any]:
        """The rows in the order of the source, and their new schema."""
        import pyarrow as pa

        from tally.sinks import merge

        if self.order is None or not self._sorts or target.get_field_index(self.order) < 0:
            return batches, target
        return merge.ordered(batches, target, self.order), pa.schema([f for f in target if f.name != self.order])

    def _written(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The rows as they are written."""
        from tally.sinks.columns import without_formulas

        return map(without_formulas, batches) if self.escape_formulas else iter(batches)

    def _parts(
        self, outputs: Sequence[Output], kept: list[File], target: pa.Schema
    ) -> tuple[list[File], dict[str, str]]:
        """Make parts of Parquet. See :func:`merge.parts`; there is one without rows if there are none."""
        from tally.sinks import merge

        def staged() -> Iterator[tuple[str, int, int]]:
            for output in outputs:
                sizes = output.facts.get("parts") or [[output.rows, output.bytes]] * len(output.files)
                for name, (rows, size) in zip(output.files, sizes, strict=True):
                    yield name, rows, size

        layout, first = self.layout, len(kept)
        files, moves = merge.parts(layout, staged(), first, target, lambda number: layout.part(number, self.format))
        if not kept and not files:
            files = merge.write(layout, (), target, self.format, 0, empty=True)
        return [*kept, *files], moves

    def _move_files(self, plan: dict[str, Any], outputs: Sequence[Output]) -> None:
        for part, name in plan.get("moves", {}).items():
            self.layout.move(self.layout.staging + name, part)
        super()._move_files(plan, outputs)

    def _tables(self, staged: Sequence[str], kept: Sequence[File]) -> Iterator[pa.Table]:
        """The rows of the staged files, in order. kept: files of earlier generations."""
        from tally.sinks import merge

        return merge.ahead(self.layout, self.layout.table, staged)


class RowsWriter(Writer):
    """Gathers rows in memory. Writes them as Parquet when it is closed, or when they are many."""

    def __init__(
        self,
        layout: OutputLayout,
        attempt: str,
        schema: pa.Schema | None,
        left_out: str | None = None,
        *,
        textual: bool = False,
    ) -> None:
        from tally.sinks import columns

        self._layout, self._attempt, self._schema, self._left_out = layout, attempt, schema, left_out
        self._textual = textual
        self._build = columns.build
        self._batches: list[pa.RecordBatch] = []
        self._held = 0
        self._files: list[str] = []
        self._sizes: list[tuple[int, int]] = []

    def add(
        self, keys: Sequence[str], results: Sequence[Result], info: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add`."""
        if info is not None:
            if self._left_out is not None:
                info = [{name: value for name, value in each.items() if name != self._left_out} for each in info]
            twice = [(at, _twice(each, result)) for at, (each, result) in enumerate(zip(info, results, strict=True))]
            refused = [(at, ItemError(error, stage="write")) for at, error in twice if error is not None]
            if refused:
                bad = {at for at, _ in refused}
                good = [at for at in range(len(keys)) if at not in bad]
                failed = self.add([keys[at] for at in good], [results[at] for at in good], [info[at] for at in good])
                return sorted([*refused, *((good[at], error) for at, error in failed)], key=lambda each: each[0])
            results = [_with(each, result) for each, result in zip(info, results, strict=True)]
        batch, failed = self._build(keys, results, self._schema)
        self._take(batch)
        return failed

    def add_table(self, keys: Any, rows: Any, info: Any | None = None) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add_table`. No value becomes Python's, but for those that do not fit."""
        from tally.sinks import columns

        if info is not None and self._left_out is not None:
            info = info.drop_columns(self._left_out)
        if info is not None and (error := _twice(dict.fromkeys(info.column_names), dict.fromkeys(rows.column_names))):
            return [(at, ItemError(error, stage="write")) for at in range(len(keys))]
        batch, failed = columns.assemble(keys, rows, info, self._schema, textual=self._textual)
        self._take(batch)
        return failed

    def add_rows(self, keys: Any, results: Sequence[Result], info: Any | None = None) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add_rows`. The columns of the source stay columns: no value of theirs becomes Python's."""
        import pyarrow as pa

        from tally.sinks import columns

        if info is not None and self._left_out is not None:
            info = info.drop_columns(self._left_out)
        if info is None or not info.num_columns:
            return self.add(keys.to_pylist(), results)
        given = dict.fromkeys(info.column_names)
        twice = {at: error for at, result in enumerate(results) if (error := _twice(given, result)) is not None}
        good = [at for at in range(len(results)) if at not in twice]
        own = None if self._schema is None else pa.schema([each for each in self._schema if each.name not in given])
        # Each row says by its key which item it is of: there may be several, or none.
        batch, failed = self._build([str(at) for at in good], [results[at] for at in good], own)
        at = batch.column(0).cast(pa.int64())
        rows = pa.Table.from_batches([batch.drop_columns([columns.KEY])])
        whole, unfit = columns.assemble(keys.take(at), rows, info.take(at), self._schema, textual=self._textual)
        self._take(whole)
        refused = {at: ItemError(error, stage="write") for at, error in twice.items()}
        refused |= {at[row].as_py(): error for row, error in reversed(unfit)}
        refused |= {good[index]: error for index, error in failed}
        return sorted(refused.items(), key=lambda each: each[0])

    def _take(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._batches.append(batch)
            self._held += batch.nbytes
            if self._held >= _SPILL_BYTES:
                self._flush()

    def close(self) -> Output:
        """See :meth:`Writer.close`."""
        if self._batches:
            self._flush()
        facts = {"parts": self._sizes} if len(self._files) > 1 else {}
        return Output(self._files, sum(rows for rows, _ in self._sizes), sum(size for _, size in self._sizes), facts)

    def abort(self) -> None:
        """See :meth:`Writer.abort`."""
        self._batches.clear()
        self._layout.store.delete([self._layout.staging + name for name in self._files])

    def _flush(self) -> None:
        import pyarrow as pa

        from tally.sinks import columns, merge

        table = columns.concat(self._batches, self._schema)
        buffer = pa.BufferOutputStream()
        with merge.parquet_writer(buffer, table.schema) as writer:
            writer.write_table(table)
        data = memoryview(buffer.getvalue())
        name = staged_name(self._attempt, len(self._files))
        self._files.append(name)
        self._layout.store.write(self._layout.staging + name, data)
        self._sizes.append((table.num_rows, len(data)))
        self._batches, self._held = [], 0


def _twice(info: Mapping[str, Any], result: Result) -> str | None:
    """Why the row cannot have both: the source gives a column of the same name as the model does. None if it can."""
    rows = [result] if isinstance(result, Mapping) else result if isinstance(result, list) else ()
    for row in rows:
        if isinstance(row, Mapping) and not info.keys().isdisjoint(row):
            name = next(name for name in row if name in info)
            return (
                f"the model's result has a column {name!r}, and so has the source: rename one of them, or leave it out "
                "of what is kept"
            )
    return None


def _with(info: Mapping[str, Any], result: Result) -> Result:
    if isinstance(result, Mapping):
        return {**info, **result}
    return [{**info, **row} for row in result] if isinstance(result, Sequence) else result


def _schema_in(manifest: dict[str, Any]) -> pa.Schema:
    import pyarrow as pa

    from tally.sinks.columns import type_named

    fields = []
    for name, kind in manifest["schema"].items():
        try:
            fields.append(pa.field(name, type_named(kind)))
        except SpecError:  # a struct with field names that read like syntax
            fields.append(pa.field(name, pa.string()))
    return pa.schema(fields)


def write_dead(
    layout: OutputLayout,
    dead: Iterable[dict[str, Any]],
    suffix: str,
    written: Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]] = iter,
) -> File | None:
    """Write the list of dead items, if there are any. written: makes of rows what is written."""
    import pyarrow as pa

    from tally.arrays import texts_of
    from tally.sinks.columns import printable, schema_of
    from tally.sinks.merge import write_file

    target = schema_of(_DEAD_COLUMNS)
    assert target is not None

    def batches() -> Iterator[pa.RecordBatch]:
        rows = iter(dead)
        while held := [row for _, row in zip(range(_DEAD_ROWS), rows, strict=False)]:
            texts = [[printable(str(row[name])) for row in held] for name in target.names]
            yield pa.RecordBatch.from_arrays([*map(texts_of, texts)], schema=target)

    stream = written(batches())
    first = next(stream, None)
    return None if first is None else write_file(layout, layout.dead(suffix), chain([first], stream), target, suffix)
