"""Rows into Parquet, CSV or JSON Lines: a folder of parts, or one merged file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from tally.errors import ItemError, SpecError
from tally.scorers.base import Result
from tally.sinks.base import Output, Writer
from tally.sinks.staging import File, Place, StagedSink, staged_name
from tally.sources.base import Chunk

if TYPE_CHECKING:
    import pyarrow as pa

_SPILL_BYTES = 32 * 1024**2
_DEAD_ROWS = 10_000
_DEAD_COLUMNS = {"stage": "string", "error": "string"}


class RowsSink(StagedSink):
    """Takes mappings, and sequences of them. Staged as Parquet, whatever the final format is.

    format: ``parquet``, ``csv`` or ``jsonl``.
    columns: column name to Arrow type name, as a scorer declares them; None infers the types.
    Raises SpecError where ``columns`` cannot be.
    """

    def __init__(
        self,
        place: Place,
        format: str = "parquet",  # noqa: A002
        columns: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(place, format)
        self.columns = None if columns is None else dict(columns)
        if columns is not None:
            self._schema()

    def open(self, attempt: str, chunk: Chunk) -> Writer:
        """See :meth:`Sink.open`."""
        return RowsWriter(self.place, attempt, self._schema())

    def _schema(self) -> pa.Schema | None:
        from tally.sinks.columns import schema_of

        return schema_of(self.columns)

    def _assemble(
        self, outputs: Sequence[Output], dead: Iterable[dict[str, Any]], earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        from tally.sinks import columns, merge

        place = self.place
        staged = [place.staging + name for output in outputs for name in output.files]
        before = [] if earlier is None else [_schema_in(earlier)]
        declared = self._schema()
        if declared is None:
            unified = merge.schema(place, staged, before)
        else:
            unified = columns.unify([*before, declared])
        kept: list[File] = [] if earlier is None else earlier["files"]
        if place.merged and kept and self.format == "parquet":
            staged, kept = [place.merged, *staged], []
        batches = merge.stream(self._tables(staged, kept), unified.schema)
        if place.merged and kept:
            known = list((earlier or {})["schema"])
            files = [merge.extend(place, kept[0], batches, unified.schema, known, self.format)]
        else:
            new = merge.write(place, batches, unified.schema, self.format, len(kept), empty=not kept)
            files = [*kept, *new]
        dead_file = write_dead(place, dead, self.format)
        notes = [f"column {name!r} held values of different types and was written as text" for name in unified.mixed]
        return {
            "output": "rows",
            "format": self.format,
            "schema": {field.name: columns.name_of(field.type) for field in unified.schema},
            "files": files,
            "dead_file": dead_file,
            "counts": {
                "files": len(files),
                "rows": sum(file["rows"] for file in files),
                "bytes": sum(file["bytes"] for file in files),
                "dead": dead_file["rows"] if dead_file else 0,
            },
            "notes": list(dict.fromkeys([*((earlier or {}).get("notes", [])), *notes])),
        }

    def _tables(self, staged: Sequence[str], kept: Sequence[File]) -> Iterator[pa.Table]:
        """The rows of the staged files, in order. kept: files of earlier generations."""
        from tally.sinks import merge

        return merge.ahead(self.place.table, staged)


class RowsWriter(Writer):
    """Gathers rows in memory; writes them as Parquet when it is closed, or has gathered much."""

    def __init__(self, place: Place, attempt: str, schema: pa.Schema | None) -> None:
        from tally.sinks import columns

        self._place, self._attempt, self._schema = place, attempt, schema
        self._build = columns.build
        self._batches: list[pa.RecordBatch] = []
        self._held = 0
        self._files: list[str] = []
        self._rows = self._bytes = 0

    def add(
        self, keys: Sequence[str], results: Sequence[Result], info: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add`."""
        if info is not None:
            results = [_with(each, result) for each, result in zip(info, results, strict=True)]
        batch, failed = self._build(keys, results, self._schema)
        if batch.num_rows:
            self._batches.append(batch)
            self._held += batch.nbytes
            if self._held >= _SPILL_BYTES:
                self._flush()
        return failed

    def close(self) -> Output:
        """See :meth:`Writer.close`."""
        if self._batches:
            self._flush()
        return Output(self._files, self._rows, self._bytes)

    def abort(self) -> None:
        """See :meth:`Writer.abort`."""
        self._batches.clear()
        self._place.store.delete([self._place.staging + name for name in self._files])

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
        self._place.store.write(self._place.staging + name, data)
        self._rows += table.num_rows
        self._bytes += len(data)
        self._batches, self._held = [], 0


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
        except SpecError:  # a struct with names that cannot be told from the syntax
            fields.append(pa.field(name, pa.string()))
    return pa.schema(fields)


def write_dead(place: Place, dead: Iterable[dict[str, Any]], suffix: str) -> File | None:
    """Write the list of dead items, if there are any."""
    import pyarrow as pa

    from tally.sinks.columns import printable, schema_of
    from tally.sinks.merge import write_file

    target = schema_of(_DEAD_COLUMNS)
    assert target is not None

    def batches() -> Iterator[pa.RecordBatch]:
        rows = iter(dead)
        while held := [row for _, row in zip(range(_DEAD_ROWS), rows, strict=False)]:
            texts = [[printable(str(row[name])) for row in held] for name in target.names]
            yield pa.RecordBatch.from_arrays([pa.array(column, pa.string()) for column in texts], schema=target)

    stream = batches()
    first = next(stream, None)
    return None if first is None else write_file(place, place.dead(suffix), chain([first], stream), target, suffix)
