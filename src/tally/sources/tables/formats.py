"""Files of rows: the format that a name means, column types, and opening Parquet and Arrow files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from tally.errors import SourceNotFoundError, SpecError, StorageError
from tally.sources.tables.damage import damaged
from tally.sources.tables.packed import PACKED
from tally.storage import Store, key_of
from tally.storage.ranges import Seekable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Format = Literal["parquet", "csv", "jsonl", "json", "excel", "arrow", "orc", "avro"]

SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".psv": "csv",
    ".ssv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".orc": "orc",
    ".avro": "avro",
}
SUFFIXES |= {
    f"{suffix}{packed}": kind for suffix, kind in SUFFIXES.items() if kind in ("csv", "jsonl") for packed in PACKED
}
"""Format by a file name's suffix, lower case, with the dot: what folders give."""

_NAMED: dict[str, Format] = {".json": "json", ".xlsx": "excel", ".xlsm": "excel"}
_NAMED |= {f".json{packed}": "json" for packed in PACKED}
"""As :data:`SUFFIXES`, of files that folders have for other things, too: they have to be named."""

TEXT: frozenset[Format] = frozenset({"csv", "jsonl", "json", "excel"})
"""Formats whose columns' types are found out from their values."""

_SPREADSHEETS = frozenset({".xls", ".xlsb", ".ods", ".numbers"})
_ARCHIVES = frozenset({".gz", ".zip", ".7z", ".tar", ".rar", ".tgz", ".bz2", ".xz", ".zst"})


def format_of(name: str) -> Format | None:
    """The format of a file by its name (``.csv.gz`` and ``.jsonl.zst`` too), or None."""
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122
    if suffix in PACKED:
        suffix = os.path.splitext(stem)[1] + suffix  # noqa: PTH122
    return SUFFIXES.get(suffix) or _NAMED.get(suffix)


def known_format(name: str, *, csv: bool) -> Format:
    """As :func:`format_of`. csv: options for CSV are given, so that any other name means CSV.

    Raises SpecError if the name is not that of a table.
    """
    found = format_of(name)
    if found is not None:
        return found
    suffix = os.path.splitext(name.lower())[1]  # noqa: PTH122
    shown = key_of(name)
    if suffix in _SPREADSHEETS:
        raise SpecError(f"{shown} is a spreadsheet, which is not read; save its sheet as CSV")
    if suffix in _ARCHIVES:
        raise SpecError(
            f"{shown} is packed, and its name does not tell what it holds; call it so (readings.csv.zip), or unpack it"
        )
    if csv:
        return "csv"
    raise SpecError(
        f"{shown} is not a table by its name (.parquet, .csv, .tsv, .jsonl, .arrow ...); "
        "with options for CSV, such as its delimiter, it is read as CSV"
    )


# -- types --------------------------------------------------------------------------------------------


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without its storage: no dictionaries, no large or view variants."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def in_parquet(kind: pa.DataType) -> pa.DataType:
    """The type that Parquet has for values of a type: it has no times in whole seconds."""
    import pyarrow as pa

    return pa.timestamp("ms", kind.tz) if pa.types.is_timestamp(kind) and kind.unit == "s" else kind


def is_numeric(kind: pa.DataType) -> bool:
    """Whether it is a type of integers, floats or decimals. Booleans are not numbers."""
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both (float64 for integers and floats), or None."""
    import pyarrow as pa

    if first == second:
        return first
    if is_numeric(first) and is_numeric(second):
        if pa.types.is_integer(first) and pa.types.is_integer(second):
            if not pa.types.is_uint64(first) and not pa.types.is_uint64(second):
                return pa.int64()
            unsigned = pa.types.is_unsigned_integer(first) and pa.types.is_unsigned_integer(second)
            return pa.uint64() if unsigned else None
        if pa.types.is_decimal(first) and pa.types.is_decimal(second):
            return _decimal(first, second)
        return pa.float64()
    try:
        schemas = [pa.schema([("column", kind)]) for kind in (first, second)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None


def _decimal(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The decimal type that holds the digits of both before and after the point."""
    import pyarrow as pa

    scale = max(first.scale, second.scale)
    digits = max(first.precision - first.scale, second.precision - second.scale) + scale
    return pa.decimal128(digits, scale) if digits <= 38 else None


def unify(
    schemas: Sequence[tuple[str, pa.Schema]], needs: Callable[[str], bool] = lambda _: True
) -> tuple[pa.Schema, list[str]]:
    """One schema for files that must have the same columns by name, and the problems found.

    schemas: name of each file, and its schema with plain types. needs: whether a column is needed; files may differ in
    the others, and of these only those are in the schema that all files have.
    """
    import pyarrow as pa

    reference, first = schemas[0]
    kinds = dict(zip(first.names, first.types, strict=True))
    origin = dict.fromkeys(kinds, reference)
    problems: list[str] = []
    clashing: set[str] = set()
    for name, schema in schemas[1:]:
        if missing := [each for each in first.names if each not in schema.names and needs(each)]:
            problems.append(f"{name} lacks {_listed(missing)}, which {reference} has")
        if extra := [each for each in schema.names if each not in first.names and needs(each)]:
            problems.append(f"{name} has {_listed(extra)}, which {reference} lacks")
        for column, kind in zip(schema.names, schema.types, strict=True):
            if column not in kinds or column in clashing:
                continue
            common = common_type(kinds[column], kind)
            if common is None:
                clashing.add(column)
                if not needs(column):
                    continue
                problems.append(f"column {column!r} is {kinds[column]} in {origin[column]} and {kind} in {name}")
            elif common != kinds[column]:
                kinds[column], origin[column] = common, name
    lacking = {each for each in kinds if not needs(each) and any(each not in schema.names for _, schema in schemas)}
    lacking |= {each for each in clashing if not needs(each)}
    return pa.schema([(name, kind) for name, kind in kinds.items() if name not in lacking]), problems


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"column{'s' if len(names) > 1 else ''} {shown}{more}"


# -- opening ------------------------------------------------------------------------------------------


class _Ranges(Seekable):
    """A remote object as a file, for one thread. Each read is a request: Parquet is read in few and large pieces."""

    def __init__(self, store: Store, name: str, mark: str) -> None:
        size, self._mark = store.marked(name)
        if mark:
            store.check_mark(name, mark)
        super().__init__(size)
        self._store, self._name = store, name

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.at)
        length = left if size is None or size < 0 else min(size, left)
        data = self._store.read_range(self._name, self.at, length, mark=self._mark) if length else b""
        self.at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()


def open_parquet(store: Store, name: str, *, mark: str = "") -> pq.ParquetFile:
    """Open a Parquet file. From a bucket, only the parts that are read are fetched.

    mark: of the expected content, see :meth:`Store.marked`. A local file may still change while it is read: check it
    again in the end.
    Raises SourceNotFoundError, SourceChangedError or StorageError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if store.is_local:
            return pq.ParquetFile(store.local_path(name, mark=mark))
        return pq.ParquetFile(pa.PythonFile(_Ranges(store, name, mark), mode="r"), pre_buffer=True)
    except SourceNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise damaged(f"{store.url}/{name}", error, "it is no Parquet file") from None


def open_arrow(store: Store, name: str) -> pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader:
    """Open an Arrow IPC file or stream. Raises StorageError."""
    import pyarrow as pa

    path = store.local_path(name)
    try:
        with path.open("rb") as file:
            seekable = file.read(6) == b"ARROW1"
        # Not mapped into memory: a file that is cut short meanwhile would kill this process.
        opened = pa.OSFile(os.fspath(path)) if path.stat().st_size else pa.BufferReader(b"")
        return pa.ipc.open_file(opened) if seekable else pa.ipc.open_stream(opened)
    except (pa.ArrowException, OSError) as error:
        raise damaged(f"{store.url}/{name}", error, "it is no Arrow file") from None
