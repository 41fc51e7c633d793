"""Files of rows that carry their types, other than Parquet: Arrow, ORC and Avro. They are read batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from tally.errors import SpecError, StorageError, TallyError
from tally.sources.tables.damage import damaged
from tally.sources.tables.formats import open_arrow
from tally.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa

    from tally.sources.tables.formats import Format

_BATCH_ROWS = 65_536
_RECORDS = "Write it as Parquet, or as records of plain values."


@dataclass(frozen=True)
class Stored:
    """An open file. batches: its rows; can be read once."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


@contextmanager
def open_stored(kind: Format, store: Store, name: str) -> Iterator[Stored]:
    """Open an Arrow, ORC or Avro file. Raises StorageError; SpecError if a library is missing."""
    opening = {"arrow": _arrow, "orc": _orc, "avro": _avro}[kind]
    with ExitStack() as stack:
        with _told(kind, store, name):
            opened = stack.enter_context(opening(store, name))
        yield Stored(opened.schema, _read(opened.batches, kind, store, name))


@contextmanager
def _told(kind: Format, store: Store, name: str) -> Iterator[None]:
    """What the libraries say of damage as StorageError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, TallyError):
            raise
        what = f"it is no {'ORC' if kind == 'orc' else kind.title()} file, or damaged"
        raise damaged(f"{store.url}/{name}", error, what) from None


def _read(batches: Iterator[pa.RecordBatch], kind: Format, store: Store, name: str) -> Iterator[pa.RecordBatch]:
    while True:
        with _told(kind, store, name):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _arrow(store: Store, name: str) -> Iterator[Stored]:
    with open_arrow(store, name) as reader:
        yield Stored(reader.schema, _of_arrow(reader))


def _of_arrow(reader: Any) -> Iterator[pa.RecordBatch]:
    if hasattr(reader, "num_record_batches"):
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from reader


@contextmanager
def _orc(store: Store, name: str) -> Iterator[Stored]:
    from pyarrow import orc

    file = orc.ORCFile(os.fspath(store.local_path(name)))
    yield Stored(file.schema, (file.read_stripe(index) for index in range(file.nstripes)))


# -- Avro ---------------------------------------------------------------------------------------------


@contextmanager
def _avro(store: Store, name: str) -> Iterator[Stored]:
    try:
        import fastavro
    except ModuleNotFoundError:
        raise SpecError(
            f"{name} is read with fastavro, which is not installed",
            hint="pip install 'tally-scoring[avro]', or write it as Parquet",
        ) from None
    with store.local_path(name).open("rb") as file:
        reader = fastavro.reader(file)
        schema = _avro_schema(reader.writer_schema, name)
        yield Stored(schema, _of_records(reader, schema))


def _of_records(reader: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    while rows := list(islice(reader, _BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist(rows, schema)


def _avro_schema(written: Any, name: str) -> pa.Schema:
    import pyarrow as pa

    if not isinstance(written, Mapping) or written.get("type") != "record":
        raise StorageError(f"{name} does not hold records, but {written!r:.100}", hint=_RECORDS)
    known: dict[str, Any] = {}
    return pa.schema([(field["name"], _avro_type(field["type"], field["name"], name, known)) for field in _of(written)])


def _of(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    fields: Sequence[Mapping[str, Any]] = record["fields"]
    return fields


def _avro_type(kind: Any, column: str, name: str, known: dict[str, Any]) -> pa.DataType:
    """The Arrow type of values of an Avro type. known: the named types that were met, by name."""
    import pyarrow as pa

    if isinstance(kind, list):
        others = [each for each in kind if each != "null"]
        if len(others) > 1:
            raise StorageError(
                f"{name}: column {column!r} holds values of several types ({others!r:.100})",
                hint="Write the file with one type for each column.",
            )
        return _avro_type(others[0], column, name, known) if others else pa.null()
    if isinstance(kind, str):
        found = known.get(kind) or _plain().get(kind)
        if found is None:
            raise StorageError(f"{name}: column {column!r} is of the type {kind!r}, which is not read", hint=_RECORDS)
        return found
    logical, base = _logical(kind), kind["type"]
    if logical is not None:
        made = logical
    elif base == "record":
        made = pa.struct([(each["name"], _avro_type(each["type"], column, name, known)) for each in _of(kind)])
    elif base == "enum":
        made = pa.string()
    elif base == "fixed":
        made = pa.binary(kind["size"])
    elif base == "array":
        made = pa.list_(_avro_type(kind["items"], column, name, known))
    elif base == "map":
        made = pa.map_(pa.string(), _avro_type(kind["values"], column, name, known))
    else:
        made = _avro_type(base, column, name, known)
    if "name" in kind:
        known[kind["name"]] = made
    return made


def _plain() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {
        "null": pa.null(),
        "boolean": pa.bool_(),
        "int": pa.int32(),
        "long": pa.int64(),
        "float": pa.float32(),
        "double": pa.float64(),
        "bytes": pa.binary(),
        "string": pa.string(),
    }


def _logical(kind: Mapping[str, Any]) -> pa.DataType | None:
    """The type that fastavro reads a logical type as; None if it has none."""
    import pyarrow as pa

    logical = kind.get("logicalType")
    if logical == "decimal":
        return pa.decimal128(kind["precision"], kind.get("scale", 0))
    return {
        "date": pa.date32(),
        "time-millis": pa.time32("ms"),
        "time-micros": pa.time64("us"),
        "timestamp-millis": pa.timestamp("ms", "UTC"),
        "timestamp-micros": pa.timestamp("us", "UTC"),
        "local-timestamp-millis": pa.timestamp("ms"),
        "local-timestamp-micros": pa.timestamp("us"),
        "uuid": pa.string(),
    }.get(str(logical))
