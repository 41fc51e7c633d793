"""Results as Arrow columns: types by name, building columns, and unifying schemas.

A batch is built column by column, which costs less than a microsecond a row. It is built value by value only if it
does not fit as a whole.
"""

from __future__ import annotations

import base64
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from tally.arrays import plain_array
from tally.errors import ItemError, SpecError, error_line
from tally.scorers.base import Result
from tally.storage import key_of

KEY = "key"
"""Name of the first column of every row: the item's key."""

_MIXED = b"tally.mixed"
_UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError, KeyError, AttributeError)


# -- types by name ------------------------------------------------------------------------------------


def type_named(name: str) -> pa.DataType:
    """The Arrow type of a name: ``string``, ``int64``, ``float32``, ``timestamp[us]``, ``list<float32>``,
    ``struct<a: int64, b: string>`` ... SpecError for anything else."""
    text = name.strip()
    inner = text[text.find("<") + 1 : -1] if text.endswith(">") else ""
    if text.startswith("list<"):
        return pa.list_(type_named(inner))
    if text.startswith("struct<"):
        fields = [part.partition(":") for part in _split(inner)]
        return pa.struct([(field.strip(), type_named(kind)) for field, _, kind in fields])
    if text.startswith("map<") and len(parts := _split(inner)) == 2:
        return pa.map_(type_named(parts[0]), type_named(parts[1]))
    if (match := _DECIMAL.fullmatch(text)) and 1 <= int(match[1]) <= 38:
        return pa.decimal128(int(match[1]), int(match[2]))
    try:
        return pa.type_for_alias(text)
    except ValueError:
        pass
    if text.startswith("timestamp[") and text.endswith("]"):
        unit, _, zone = text[10:-1].partition(",")
        if unit in ("s", "ms", "us", "ns"):
            return pa.timestamp(unit, zone.strip().removeprefix("tz=") or None)
    raise SpecError(
        f"no column type is named {name!r}",
        hint="Use an Arrow type such as string, int64, float32, bool, timestamp[us] or list<float32>.",
    )


_DECIMAL = re.compile(r"decimal128\((\d+), *(-?\d+)\)")


def _split(text: str) -> list[str]:
    """Split at the commas that are outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "<[(") - (character in ">])")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def name_of(kind: pa.DataType) -> str:
    """The name of an Arrow type, as :func:`type_named` reads it."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list<{name_of(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {name_of(field.type)}' for field in kind)}>"
    if pa.types.is_map(kind):
        return f"map<{name_of(kind.key_type)}, {name_of(kind.item_type)}>"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))


def stored_type(kind: pa.DataType) -> pa.DataType:
    """The type by which results hold values of a type: one that each format knows, and that loses nothing."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return stored_type(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return stored_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return pa.binary()
    if types.is_decimal(kind):
        return pa.decimal128(kind.precision, kind.scale) if kind.precision <= 38 else pa.string()
    if types.is_struct(kind):
        return pa.struct([(field.name, stored_type(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(stored_type(kind.key_type), stored_type(kind.item_type))
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        return pa.list_(stored_type(kind.value_type))
    if types.is_float16(kind):
        return pa.float32()
    if types.is_date64(kind):
        return pa.date32()
    # Parquet has no whole seconds.
    return pa.timestamp("ms", kind.tz) if types.is_timestamp(kind) and kind.unit == "s" else kind


def replaced(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with others in place of those that hold values, at any depth."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, replaced(field.type, leaf)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(replaced(kind.key_type, leaf), replaced(kind.item_type, leaf))
    if pa.types.is_list(kind):
        return pa.list_(replaced(kind.value_type, leaf))
    return leaf(kind)


def is_fine_interval(kind: pa.DataType) -> bool:
    """Whether it is the type of intervals in nanoseconds: integers where there is none such, in text and SQL."""
    return bool(pa.types.is_duration(kind) and kind.unit == "ns")


def schema_of(columns: Mapping[str, str] | None) -> pa.Schema | None:
    """The schema of declared columns, with the key first; None if nothing is declared."""
    if columns is None:
        return None
    problems, fields = [], [pa.field(KEY, pa.string())]
    for name, kind in columns.items():
        if name == KEY:
            problems.append(f"the column name {KEY!r} is reserved: Tally writes the item's key there")
            continue
        try:
            fields.append(pa.field(name, type_named(kind)))
        except SpecError as error:
            problems.append(f"column {name!r}: {error.message}")
    if problems:
        raise SpecError(problems, hint="Correct the scorer's columns.")
    return pa.schema(fields)


# -- building -----------------------------------------------------------------------------------------


def build(
    keys: Sequence[str], results: Sequence[Result], schema: pa.Schema | None
) -> tuple[pa.RecordBatch, list[tuple[int, ItemError]]]:
    """One record batch of the results, and the index and error of each item that does not fit.

    keys, results: of equal length. schema: from :func:`schema_of`; None infers the types.
    """
    if set(map(type, results)) == {dict}:
        try:
            return _uniform(keys, results, schema), []
        except Exception:  # noqa: S110 - what does not fit is found value by value
            pass
    return _Careful(keys, results, schema).build()


def _uniform(keys: Sequence[str], rows: Sequence[Any], schema: pa.Schema | None) -> pa.RecordBatch:
    """The batch of rows that all have the same columns, with values that fit. Raises one of _UNFIT otherwise."""
    names = list(rows[0]) if schema is None else schema.names[1:]
    if set(map(len, rows)) != {len(names)} or KEY in names:
        raise ValueError("not uniform")
    values = [list(map(itemgetter(name), rows)) for name in names]
    if schema is None:
        arrays = [_infer(column) for column in values]
        schema = pa.schema([(KEY, pa.string()), *((n, a.type) for n, a in zip(names, arrays, strict=True))])
    else:
        arrays = [_fit(column, kind) for column, kind in zip(values, schema.types[1:], strict=True)]
    return pa.RecordBatch.from_arrays([_keys(keys), *arrays], schema=schema)


def _keys(keys: Sequence[str]) -> pa.Array:
    try:
        return _fit(list(keys), pa.string())
    except UnicodeEncodeError:
        return pa.array([printable(key) for key in keys], pa.string())


def printable(text: str) -> str:
    r"""The text as valid Unicode; a byte of a file name that is not UTF-8 is written ``\xff``."""
    try:
        return key_of(text)
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def _fit(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An array of a declared type. Arrow by itself would cut 1.5 to 1 for an integer column."""
    if (plain := plain_array(values, kind)) is not None:
        return plain
    inner = kind
    while pa.types.is_list(inner):
        inner = inner.value_type
    array = pa.array(values, kind)
    if pa.types.is_integer(inner):
        found = pa.array(values)
        return array if found.type == kind else found.cast(kind)
    return array


_INFERRED = {str: pa.string(), int: pa.int64(), float: pa.float64()}


def _infer(values: list[Any]) -> pa.Array:
    expected = _INFERRED.get(type(values[0]))
    if expected is not None and (plain := plain_array(values, expected)) is not None:
        return plain
    try:
        array = pa.array(values)
    except OverflowError:  # an integer beyond int64; with others, it is text however items are cut
        if len(values) > 1:
            raise
        array = pa.array(values, pa.uint64())
    kind = array.type
    if pa.types.is_float16(kind):
        return array.cast(pa.float32())
    if pa.types.is_nested(kind):
        if pa.types.is_list(kind) and pa.types.is_float16(kind.value_type):
            return array.cast(pa.list_(pa.float32()))
        if pa.types.is_struct(kind) and not all(values):
            # Null for an empty mapping: Parquet has no struct without fields.
            array = pa.array([value or None for value in values])
        if _has_empty_struct(array.type):
            return as_text(array)
    return array


def _has_empty_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_nested(kind):
        return False
    return kind.num_fields == 0 or any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))


def assemble(
    keys: Any, rows: Any, info: Any | None, schema: pa.Schema | None, *, textual: bool = False
) -> tuple[pa.RecordBatch, list[tuple[int, ItemError]]]:
    """One record batch of results that are columns already, and the index and error of each row that does not fit.

    keys: an array of strings. rows, info: tables of the same length; info's columns come first, and none of them is
    among those of rows. textual: rows are refused that hold times or intervals of which a text tells nothing.
    """
    given = {name: column for table in (info, rows) if table is not None for name, column in _named(table)}
    if (problem := name_problem(rows.column_names, schema)) is not None:
        empty = schema or pa.schema([(KEY, pa.string())])
        return pa.RecordBatch.from_pylist([], schema=empty), [(at, problem) for at in range(len(keys))]
    names = list(given) if schema is None else schema.names[1:]
    misfits: dict[int, ItemError] = {}
    arrays = []
    for name in names:
        kind = None if schema is None else schema.field(name).type
        if name not in given:
            arrays.append(pa.nulls(len(keys), kind))
            continue
        column = _whole(given[name])
        kind = kind or stored_type(column.type)
        arrays.append(_concat(_pieces(name, column, kind, 0, misfits, textual), kind))
    fields = [(name, array.type) for name, array in zip(names, arrays, strict=True)]
    batch = pa.RecordBatch.from_arrays(
        [_whole(keys), *arrays], schema=schema or pa.schema([(KEY, pa.string()), *fields])
    )
    if misfits:
        batch = batch.take(pa.array([at for at in range(len(keys)) if at not in misfits], pa.int64()))
    return batch, sorted(misfits.items(), key=itemgetter(0))


def _named(table: Any) -> Iterable[tuple[str, Any]]:
    return zip(table.column_names, table.columns, strict=True)


def _whole(column: Any) -> Any:
    """A column as one array, of a type that holds its values themselves."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of more bytes than one array may hold
        raise ValueError("too large for one array")
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _pieces(
    name: str, array: Any, kind: pa.DataType, start: int, misfits: dict[int, ItemError], textual: bool
) -> Iterator[pa.Array]:
    """The column as pieces of its stored type, with nulls for values that do not fit, which are noted in ``misfits``.

    start: the row of the first value.
    """
    try:
        yield _held(array, kind, textual=textual)
    except _UNFIT as error:
        if len(array) == 1:
            yield _alone(name, array, kind, start, misfits, error, textual=textual)
            return
        half = len(array) // 2
        for first, stop in ((0, half), (half, len(array))):
            part = array.take(pa.array(range(first, stop), pa.int64()))  # a slice would know the other values, too
            yield from _pieces(name, part, kind, start + first, misfits, textual)


def _alone(
    name: str,
    array: Any,
    kind: pa.DataType,
    row: int,
    misfits: dict[int, ItemError],
    error: Exception,
    *,
    textual: bool,
) -> pa.Array:
    """The piece of one value: null, unless it is a mapping, say, with its fields in another order."""
    value: Any = None
    try:
        value = array[0].as_py()
        if pa.types.is_nested(kind):
            return _held(_single(value, kind), kind, textual=textual)
    except UnicodeDecodeError:
        error = UnicodeError()
    except _UNFIT:  # Python's times end in 9999, and have microseconds
        pass
    if isinstance(error, _NoTextError):
        problem = _error(f"column {name!r}: {error}", _FAR)
    elif isinstance(error, UnicodeError):
        problem = _error(f"column {name!r}: its text is not valid UTF-8{_bytes(array)}", _UTF_8)
    else:
        problem = _misfit(name, value if value is not None else getattr(array[0], "value", None), kind)
    misfits.setdefault(row, problem)
    return pa.nulls(1, kind)


_UTF_8 = "Write it as UTF-8, keep it as bytes, or leave the column out of what is kept."
_FAR = "Parquet holds it: --out results.parquet, or a folder."


def _bytes(array: Any) -> str:
    kind = array.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return ""
    plain = array.view(pa.binary() if pa.types.is_string(kind) else pa.large_binary())
    return f": {reprlib.repr(plain[0].as_py())}"


def _held(array: Any, kind: pa.DataType, *, textual: bool) -> Any:
    """The array as one of its stored type. Raises one of _UNFIT if that does not hold a value of it."""
    if array.type != kind:
        array = array.cast(kind)
    if _has(kind, pa.types.is_string):
        array.validate(full=True)  # Parquet's readers take any bytes for text
    if textual and _has(kind, pa.types.is_temporal):
        for leaf in _leaves(array):
            _check_told(leaf)
    return array


class _NoTextError(ValueError):
    """A value of which a text tells nothing."""


_DAYS = 11_248_737
"""The most days before and after 1970 that Arrow and DuckDB both write: up to the year 32767."""
_A_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000}
_ENDLESS = 2**63 - 1
"""DuckDB's infinity, in nanoseconds; an interval of more microseconds has no text."""
_PER_MICRO = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 1}


def _check_told(array: Any) -> None:
    """Raises _NoTextError if there is a time or an interval of which a text tells nothing."""
    import pyarrow.compute as pc  # slow to import, and workers can do without it

    kind = array.type
    if pa.types.is_timestamp(kind):
        most = _DAYS * _A_DAY[kind.unit] if kind.unit != "ns" else _ENDLESS - 1
    elif pa.types.is_duration(kind):
        most = _ENDLESS // _PER_MICRO[kind.unit]
    elif pa.types.is_date32(kind):
        most = _DAYS
    else:
        return
    ends = pc.min_max(array.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64())).as_py()
    for value in (ends["min"], ends["max"]):
        if value is not None and abs(value) > most:
            raise _NoTextError(f"{kind} {value} is too far away to be written as text")


def _leaves(array: Any) -> Iterator[Any]:
    """The arrays that hold a nested array's values."""
    if pa.types.is_struct(array.type):
        for field in array.flatten():
            yield from _leaves(field)
    elif pa.types.is_map(array.type):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif pa.types.is_list(array.type):
        yield from _leaves(array.flatten())
    else:
        yield array


def _concat(pieces: Iterable[pa.Array], kind: pa.DataType) -> pa.Array:
    found = list(pieces)
    return found[0] if len(found) == 1 else pa.concat_arrays(found) if found else pa.nulls(0, kind)


def name_problem(names: Iterable[object], schema: pa.Schema | None) -> ItemError | None:
    """What is wrong with the names of a scorer's columns; None if they can be had."""
    for name in names:
        if not isinstance(name, str):
            return _error(f"the column name {_show(name)} is no text", "Name columns with strings.")
        if name == KEY:
            return _error(
                f"the column name {KEY!r} is reserved: Tally writes the item's key there",
                "Return that value under another name.",
            )
        if schema is not None and schema.get_field_index(name) < 0:
            return _error(
                f"the scorer returned the column {printable(name)!r}, which its columns do not declare",
                f"Declared are {', '.join(schema.names[1:])}.",
            )
        if not _encodable(name):
            return _error(f"the column name {printable(name)!r} is not valid Unicode", None)
    return None


class _Careful:
    """Builds a batch value by value: finds the items that do not fit, and keeps the others."""

    def __init__(self, keys: Sequence[str], results: Sequence[Result], schema: pa.Schema | None) -> None:
        self.keys, self.results, self.schema = keys, results, schema
        self.failed: dict[int, ItemError] = {}

    def build(self) -> tuple[pa.RecordBatch, list[tuple[int, ItemError]]]:
        owned = [(index, row) for index, result in enumerate(self.results) for row in self._rows(index, result)]
        if self.schema is None:
            names = list(dict.fromkeys(name for index, row in owned if index not in self.failed for name in row))
            kinds: list[pa.DataType | None] = [None] * len(names)
        else:
            names, kinds = self.schema.names[1:], self.schema.types[1:]
        columns = [self._column(name, kind, owned) for name, kind in zip(names, kinds, strict=True)]
        kept = [position for position, (index, _) in enumerate(owned) if index not in self.failed]
        arrays, fields, mixed = [], [], []
        for name, kind, column in zip(names, kinds, columns, strict=True):
            array, conflict = _join([column[position] for position in kept], kind)
            arrays.append(array)
            fields.append(pa.field(name, array.type))
            mixed += [name] * conflict
        schema = self.schema or _mark(pa.schema([pa.field(KEY, pa.string()), *fields]), mixed)
        keys = _keys([self.keys[owned[position][0]] for position in kept])
        failed = sorted(self.failed.items(), key=itemgetter(0))
        return pa.RecordBatch.from_arrays([keys, *arrays], schema=schema), failed

    def _rows(self, index: int, result: Any) -> list[Mapping[str, Any]]:
        try:
            several = isinstance(result, Sequence) and not isinstance(result, str | bytes)
            rows: list[Any] = list(result) if several else [result]
            problem = next(filter(None, map(self._problem, rows)), None)
        except BaseException as error:  # of somebody's own class
            problem = _error(f"reading the scorer's result raised {error_line(error)}", None)
        if problem is not None:
            self.failed[index] = problem
            return []
        return rows

    def _problem(self, row: object) -> ItemError | None:
        if isinstance(row, np.ndarray):
            what = "x".join(map(str, row.shape)) or "0-dimensional"
            return _error(
                f"the scorer returned an array ({what} {row.dtype}), and this output holds rows",
                'Return a mapping of column names to values, or declare output = "image".',
            )
        if not isinstance(row, Mapping):
            return _error(
                f"the scorer returned {_show(row)}, which is no row",
                "Return a mapping of column names to values, or a list of them.",
            )
        return name_problem(row, self.schema)

    def _column(
        self, name: str, kind: pa.DataType | None, owned: Sequence[tuple[int, Mapping[str, Any]]]
    ) -> list[pa.Array | None]:
        """One array of length 1 per row; None for values that do not fit."""
        column: list[pa.Array | None] = []
        for index, row in owned:
            value = None
            try:
                value = row.get(name)
                column.append(_single(value, kind))
            except _UNFIT:
                self.failed.setdefault(index, _misfit(name, value, kind))
                column.append(None)
            except BaseException as error:  # of somebody's own class, or nested too deeply
                self.failed.setdefault(index, _error(f"column {name!r}: reading it raised {error_line(error)}", None))
                column.append(None)
        return column


def _single(value: Any, kind: pa.DataType | None) -> pa.Array:
    try:
        return _infer([value]) if kind is None else _fit([value], kind)
    except _UNFIT:
        if not isinstance(value, np.ndarray):
            raise
        value = value.tolist()  # Arrow takes one-dimensional arrays only
        return _infer([value]) if kind is None else _fit([value], kind)


def _join(arrays: list[Any], kind: pa.DataType | None) -> tuple[pa.Array, bool]:
    """Arrays of length 1 as one array, and whether their types had only text in common."""
    conflict = False
    if kind is None:
        kind = pa.null()
        for found in dict.fromkeys(array.type for array in arrays):
            kind, clash = merged(kind, found)
            conflict |= clash
    if not arrays:
        return pa.nulls(0, kind), conflict
    return pa.concat_arrays([cast(array, kind) for array in arrays]), conflict


def _misfit(name: str, value: object, kind: pa.DataType | None) -> ItemError:
    wanted = "any column type" if kind is None else name_of(kind)
    hint = "Return numbers, text, lists or mappings." if kind is None else "Correct the scorer, or its columns."
    return _error(f"column {name!r}: the value {_show(value)} does not fit {wanted}", hint)


def _error(message: str, hint: str | None) -> ItemError:
    return ItemError(message, stage="write", hint=hint)


def _show(value: object) -> str:
    return printable(f"{reprlib.repr(value)} ({type(value).__name__})")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- unifying schemas -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unified:
    """One schema for all parts. mixed: columns whose types had only text in common."""

    schema: pa.Schema
    mixed: list[str]


def unify(schemas: Iterable[pa.Schema]) -> Unified:
    """The schema that can hold all of them, columns in order of first appearance.

    int and float become float, null and another type become that type, structs gain fields. Types with nothing in
    common become text.
    """
    kinds: dict[str, pa.DataType] = {KEY: pa.string()}
    mixed: dict[str, None] = {}
    previous: pa.Schema | None = None
    for schema in schemas:
        if previous is not None and schema.equals(previous, check_metadata=True):
            continue
        previous = schema
        mixed.update(dict.fromkeys(json.loads((schema.metadata or {}).get(_MIXED, b"[]"))))
        for field in schema:
            kind, conflict = merged(kinds.get(field.name, pa.null()), field.type)
            kinds[field.name] = kind
            if conflict:
                mixed[field.name] = None
    return Unified(pa.schema(list(kinds.items())), list(mixed))


def _mark(schema: pa.Schema, mixed: list[str]) -> pa.Schema:
    """Note in the schema which columns became text; the manifest will say so."""
    return schema.with_metadata({_MIXED: json.dumps(mixed).encode()}) if mixed else schema


def concat(batches: Sequence[pa.RecordBatch], schema: pa.Schema | None) -> pa.Table:
    """One table of batches whose schemas may differ (not empty unless a schema is given)."""
    if schema is None:
        found = unify(batch.schema for batch in batches)
        schema = _mark(found.schema, found.mixed)
    return pa.Table.from_batches([conform(batch, schema) for batch in batches], schema=schema)


def conform(batch: Any, schema: pa.Schema) -> Any:
    """The record batch or table with exactly these columns; missing ones are null."""
    if batch.schema.equals(schema):
        return batch
    arrays = [
        cast(batch.column(field.name), field.type)
        if batch.schema.get_field_index(field.name) >= 0
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return type(batch).from_arrays(arrays, schema=schema)


def merged(a: pa.DataType, b: pa.DataType) -> tuple[pa.DataType, bool]:
    """The type that holds the values of both, and whether it is text because they have nothing in common."""
    if a == b:
        return a, False
    if pa.types.is_timestamp(a) and pa.types.is_timestamp(b) and a.tz == b.tz:
        return pa.timestamp("us", a.tz), False  # nanoseconds end in the year 2262
    wide = {pa.types.is_uint64(a), pa.types.is_uint64(b)}
    if wide == {True, False} and pa.types.is_integer(a) and pa.types.is_integer(b):
        return pa.string(), True  # no integer type holds both
    try:
        both = pa.unify_schemas([pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive")
    except pa.ArrowException:
        return pa.string(), True
    return both.field("x").type, False


def cast(array: Any, kind: pa.DataType) -> Any:
    """The array as a type that :func:`merged` gave."""
    if array.type == kind:
        return array
    if pa.types.is_string(kind):
        return as_text(array)
    # Large integers and nanoseconds may lose their last digits; failing would lose the whole job.
    return array.cast(kind, safe=False)


# -- values as text -----------------------------------------------------------------------------------


def as_text(array: Any) -> pa.Array:
    """Values as text: numbers as Arrow prints them, nested values as JSON, bytes as base64."""
    array = _for_python(array)
    if pa.types.is_nested(array.type) or pa.types.is_binary(array.type):
        return pa.array([None if v is None else json_text(v) for v in _values(array)], pa.string())
    return array.cast(pa.string())


def _for_python(array: Any) -> Any:
    """The array with texts for nested times, and integers for fine intervals: Python's have microseconds, and its times
    end in 9999."""
    return array.cast(replaced(array.type, _python_holds)) if pa.types.is_nested(array.type) else array


def _python_holds(kind: pa.DataType) -> pa.DataType:
    if is_fine_interval(kind):
        return pa.int64()
    is_time = pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind)
    return pa.string() if is_time else kind


def _values(array: Any) -> list[Any]:
    """The values as Python's. Maps whose keys are text are mappings."""
    return list(array.to_pylist(maps_as_pydicts="strict" if _has(array.type, pa.types.is_map) else None))


def without_bytes(array: Any) -> Any:
    """Nested values with bytes as base64; others as they are."""
    if not _has(array.type, pa.types.is_binary):
        return array
    array = _for_python(array)
    plain = replaced(array.type, lambda kind: pa.string() if pa.types.is_binary(kind) else kind)
    return pa.array([_with_text(value) for value in array.to_pylist()], plain)


def _with_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_text(each) for each in value]
    if isinstance(value, tuple):  # an entry of a map
        return tuple(_with_text(each) for each in value)
    if isinstance(value, dict):
        return {name: _with_text(each) for name, each in value.items()}
    return _plain(value) if isinstance(value, bytes) else value


def _has(kind: pa.DataType, test: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type is, or holds at any depth, one for which the test is true."""
    return test(kind) or any(_has(kind.field(at).type, test) for at in range(kind.num_fields))


def rows_of(table: Any) -> list[dict[str, Any]]:
    """The rows of a table as Python's values. Times that Python has none for are text: with nanoseconds, and beyond
    the years 1 to 9999."""
    columns = [_python_values(_without_nanoseconds(column)) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _python_values(column: Any) -> list[Any]:
    try:
        return _values(column)
    except (OverflowError, ValueError):
        if len(column) > 1:
            half = len(column) // 2
            return [*_python_values(column[:half]), *_python_values(column[half:])]
        nested = pa.types.is_nested(column.type)
        return _values(_for_python(column)) if nested else column.cast(pa.string()).to_pylist()


def _without_nanoseconds(column: Any) -> Any:
    kind = column.type
    exact = (
        pa.types.is_timestamp(kind) or pa.types.is_duration(kind) or pa.types.is_time64(kind)
    ) and kind.unit == "ns"
    return column.cast(pa.string()) if exact and not pa.types.is_duration(kind) else column


def json_text(value: Any) -> str:
    """A value of the results as JSON: NaN and infinities are null, bytes base64, times ISO 8601."""
    return _plain(value) if isinstance(value, bytes) else json.dumps(finite(value), ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, timedelta):
        return f"{value.days * 86_400_000_000 + value.seconds * 1_000_000 + value.microseconds} microseconds"
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


_FORMULA = r"^([=+\-@\t\r])"


def without_formulas(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with an apostrophe before each text that a spreadsheet would take for a formula."""
    import pyarrow.compute as pc

    arrays = [
        pc.replace_substring_regex(array, pattern=_FORMULA, replacement=r"'\1")
        if pa.types.is_string(array.type)
        else array
        for array in batch.columns
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def finite(value: Any) -> Any:
    """The value with null for every NaN and infinity, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, tuple):  # an entry of a map
        return tuple(finite(inner) for inner in value)
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return value


def only_finite(array: Any) -> Any:
    """The array with null for every NaN and infinity."""
    if _all_finite(array):
        return array
    if pa.types.is_floating(array.type):
        import pyarrow.compute as pc  # slow to import, and workers can do without it

        return pc.if_else(pc.is_finite(array), array, pa.scalar(None, array.type))
    array = _for_python(array)
    return pa.array([finite(value) for value in array.to_pylist()], array.type)


def _all_finite(array: Any) -> bool:
    if pa.types.is_floating(array.type):
        import pyarrow.compute as pc

        return pc.all(pc.is_finite(array)).as_py() is not False
    return not pa.types.is_nested(array.type) or all(map(_all_finite, _leaves(array)))
