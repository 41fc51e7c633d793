"""The columns of many files as one table: one inspection, which reports every problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.errors import SourceNotFoundError, StorageError
from tally.sources.tables import delimited, jsonlines
from tally.sources.tables.damage import NO_ROWS, TWICE, unreadable
from tally.sources.tables.formats import TEXT, open_parquet, plain_type, unify
from tally.sources.tables.ingest import TableFile, connect
from tally.sources.tables.packed import plain_text
from tally.sources.tables.select import TableRequest
from tally.sources.tables.stored import open_stored
from tally.sources.tables.type_inference import LOOKED_AT, Kinds, arrow_type
from tally.storage import temporary
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_THREADS = 16
_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_ ]*(\(\d+(, *\d+)?\))?")


@dataclass
class Found:
    """One schema for all files.

    types: DuckDB's, of the columns of CSV and JSON Lines. assumed: what was assumed about CSV files, in words.
    metadata: of each Parquet file, by location and name. odd: what to tell of columns that are text for the sake of
    some values, by column.
    """

    schema: pa.Schema
    problems: list[str]
    types: dict[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    metadata: dict[tuple[int, str], pq.FileMetaData] = field(default_factory=dict)
    odd: Mapping[str, str] = field(default_factory=dict)

    def with_paths(self, columns: Mapping[str, str]) -> Found:
        """With the columns that stand in the files' paths, and their DuckDB types."""
        import pyarrow as pa

        if not columns:
            return self
        with connect() as connection:
            added = [pa.field(name, arrow_type(connection, kind)) for name, kind in columns.items()]
        return replace(self, schema=pa.schema([*self.schema, *added]))

    def alike(self) -> list[str]:
        """Problems with names that differ only in capitals, which DuckDB does not tell apart."""
        seen: dict[str, str] = {}
        problems = []
        for name in self.schema.names:
            other = seen.setdefault(name.lower(), name)
            if other != name:
                problems.append(f"columns {other!r} and {name!r} differ only in capitals; rename one of them")
        return problems

    def check_where(self, where: str) -> list[str]:
        """The problems that DuckDB finds with a condition."""
        import duckdb
        import pyarrow as pa

        from tally.sinks.columns import stored_type

        plain = pa.schema(
            [(name, stored_type(kind)) for name, kind in zip(self.schema.names, self.schema.types, strict=True)]
        )
        with connect() as connection:
            connection.register("rows", plain.empty_table())
            connection.execute("SET enable_external_access = false")
            try:
                connection.execute(f"SELECT 1 FROM rows WHERE (\n{where}\n) LIMIT 0")  # noqa: S608
            except duckdb.Error as error:
                reason = str(error).strip().splitlines()[0]
                missing = re.search('Referenced column ("(.*?)") not found', reason)
                text = f" Text stands in single quotes: '{missing[2]}'." if missing and missing[1] in where else ""
                return [f"where: {where!r}: {reason}{text}"]
        return []


@dataclass(frozen=True)
class _Looked:
    """A text file that was inspected.

    kinds: of the values in each of its columns; those of JSON Lines need not be in every file. odd: of columns of text,
    the first value that makes them so.
    """

    key: str
    kinds: Mapping[str, Kinds]
    odd: Mapping[str, str]
    dialect: delimited.Dialect | None = None


def inspect(inputs: Sequence[TableFile], request: TableRequest, csv: Mapping[str, Any]) -> Found:
    """The schema of all files. Raises StorageError if one cannot be read, SourceNotFoundError if all are empty."""
    import pyarrow as pa

    binary = [each for each in inputs if each.format not in TEXT]
    texts = [each for each in inputs if each.format in TEXT]
    schemas: list[tuple[str, pa.Schema]] = []
    metadata: dict[tuple[int, str], pq.FileMetaData] = {}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="tally-footer") as pool:
        for each, (found, meta) in zip(binary, pool.map(_schema, binary), strict=True):
            if found.names:  # a file without columns has no rows either
                schemas.append((each.key, found))
            if meta is not None:
                metadata[each.location, each.name] = meta
    problems: list[str] = []
    types: dict[str, str] = {}
    looked: list[_Looked] = []
    if texts:
        looked = _look_at(texts, request, csv)
        with connect() as connection:
            types = _settle(looked, request, csv, problems, connection)
            kinds = {name: arrow_type(connection, kind) for name, kind in types.items()}
        optional = [name for each in looked if each.dialect is None for name in each.kinds]
        for seen in looked:
            names = tuple(seen.kinds) if seen.dialect is not None else tuple(dict.fromkeys(optional))
            schemas.append((seen.key, pa.schema([(name, kinds[name]) for name in names])))
    if not schemas:
        named = ", ".join(each.key for each in inputs[:3])
        what = f"nothing to score: {named} {'is' if len(inputs) == 1 else 'are'} empty"
        raise SourceNotFoundError(what, hint=NO_ROWS)
    schema, differing = unify(schemas, partial(_needs, request))
    differing += _rounded(
        schema, schemas, {each.key: metadata.get((each.location, each.name)) for each in inputs}, request
    )
    assumed = dict.fromkeys(
        f"{each.key}: {said}" for each in looked if each.dialect is not None and (said := each.dialect.remark())
    )
    shown = tuple(assumed)[:1]
    if len(assumed) > 1:
        shown = (f"{shown[0]}; so or similarly in {len(assumed) - 1:,} more",)
    odd = _odd(looked, types, request)
    if problems or differing:
        return Found(schema, [*problems, *differing], types, metadata=metadata)
    return Found(schema, [], types, shown, metadata, odd)


def _rounded(
    schema: pa.Schema,
    schemas: Sequence[tuple[str, pa.Schema]],
    metadata: Mapping[str, pq.FileMetaData | None],
    request: TableRequest,
) -> list[str]:
    """Problems with kept columns that are floats in some files, and in others hold numbers that floats would round."""
    import pyarrow as pa

    problems = []
    for name, common in zip(schema.names, schema.types, strict=True):
        if not pa.types.is_float64(common) or not _is_kept(name, request):
            continue
        for key, each in schemas:
            kind = each.field(name).type if name in each.names else common
            wide = kind in (pa.int64(), pa.uint64()) or (pa.types.is_decimal(kind) and kind.precision > _FLOAT_DIGITS)
            if wide and not _within(metadata.get(key), name):
                problems.append(
                    f"column {name!r} is {kind} in {key} and a float in other files, where it would lose digits; "
                    "score them in two jobs"
                )
                break
    return problems


def _within(meta: pq.FileMetaData | None, name: str) -> bool:
    """Whether a float64 holds all integers of a column, as far as the file's statistics tell."""
    if meta is None:
        return False
    for index in range(meta.num_row_groups):
        group = meta.row_group(index)
        for column in (group.column(number) for number in range(group.num_columns)):
            if column.path_in_schema != name:
                continue
            known = column.statistics
            if known is None or (not known.has_min_max and known.null_count != column.num_values):
                return False
            if known.has_min_max and max(abs(known.min), abs(known.max)) > 2**_FLOAT_BITS:
                return False
    return True


_FLOAT_BITS, _FLOAT_DIGITS = 53, 15
"""Of the integers and the decimals of which a float64 holds each."""


def _schema(each: TableFile) -> tuple[pa.Schema, pq.FileMetaData | None]:
    """The file's schema, with plain types; and the metadata of a Parquet file."""
    import pyarrow as pa

    meta = None
    if each.format != "parquet":
        with open_stored(each.format, each.store, each.name) as stored:
            schema = stored.schema
    else:
        with open_parquet(each.store, each.name) as file:
            schema, meta = file.schema_arrow, file.metadata
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise StorageError(f"{each.key} has two columns of the name {twice!r}", hint=TWICE)
    return pa.schema([(item.name, plain_type(item.type)) for item in schema]), meta


def _look_at(texts: Sequence[TableFile], request: TableRequest, csv: Mapping[str, Any]) -> list[_Looked]:
    import duckdb

    looked: list[_Looked] = []
    closely = partial(_closely, request)
    with temporary.folder("schema") as folder, connect() as connection:
        for number, each in enumerate(texts):
            if len(looked) >= LOOKED_AT:
                break
            known = repr((each.store.url, each.name, each.store.version(each.name), each.key, request, csv))
            if known in _KNOWN:
                looked += _KNOWN[known]
                continue
            before = len(looked)
            path = each.store.local_path(each.name)
            plain = plain_text(path, each.key, each.format, Path(folder), number)
            try:
                if each.format != "csv":
                    kinds, odd = jsonlines.infer_types(connection, plain, closely)
                    if kinds:
                        looked.append(_Looked(each.key, kinds, odd))
                elif (dialect := delimited.look(plain, each.key, csv)) is not None:
                    text = delimited.readable(plain, dialect, Path(folder), each.key)
                    see = partial(_seen, connection, dialect, each.key, closely)
                    looked.append(delimited.evenly(see, text, dialect, Path(folder)))
            except duckdb.Error as error:
                raise unreadable(each.key, error) from None
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[known] = looked[before:]
    return looked


_KNOWN: dict[str, list[_Looked]] = {}
"""What was found in files: a job is put together when it is submitted, and again when it is run, often at once."""
_MOST_KNOWN = 256


def _seen(
    connection: Any, dialect: delimited.Dialect, key: str, closely: Callable[[str, Kinds], bool], path: Path
) -> _Looked:
    return _Looked(key, *delimited.infer_types(connection, path, dialect, closely), dialect)


def _closely(request: TableRequest, name: str, kinds: Kinds) -> bool:
    """Whether all values of a column have to be looked at, and not only a sample, which has these kinds."""
    if kinds and kinds.exact == "VARCHAR":
        return False
    # A model's own columns become numbers of float64 whatever digits they have. Faults cost their lines.
    return kinds.exact == "BIGINT" or request.where is not None or request.features is None or _is_kept(name, request)


def _needs(request: TableRequest, name: str) -> bool:
    """Whether a column is needed, as far as it is known before the columns are."""
    if not isinstance(request.features, tuple) or _is_kept(name, request):
        return True
    made_of = request.window is not None and any(each.startswith(f"{name}_") for each in request.features)
    return name in request.features or made_of


def _is_kept(name: str, request: TableRequest) -> bool:
    kept = (*request.keep, *request.by, *request.exact_features)
    return name in kept or "*" in request.keep or name == request.time


def _settle(
    looked: Sequence[_Looked], request: TableRequest, csv: Mapping[str, Any], problems: list[str], connection: Any
) -> dict[str, str]:
    """The type of every column of the text files."""
    import duckdb

    found: dict[str, Kinds] = {}
    for each in looked:
        for name, kinds in each.kinds.items():
            found[name] = found.get(name, Kinds()) + kinds
    types = {name: _type(name, kinds, request) for name, kinds in found.items()}
    if isinstance(request.features, int):
        numbers = [n for n in types if types[n] in ("BIGINT", "DOUBLE") and n not in (*request.by, request.time)]
        if len(numbers) < request.features:  # then the model takes a kept column
            types = {name: _type(name, kinds, replace(request, keep=())) for name, kinds in found.items()}
    for name, kind in csv.get("types", {}).items():
        if name not in types:
            problems.append(f"csv: types: there is no column {name!r}{did_you_mean(name, types)}")
            continue
        try:
            if not _TYPE.fullmatch(str(kind)):
                raise ValueError(kind)
            arrow_type(connection, str(kind).upper())
        except (ValueError, duckdb.Error):
            problems.append(f"csv: types: {name}: there is no type {kind!r}; examples are BIGINT, DOUBLE, VARCHAR")
            continue
        types[name] = str(kind).upper()
    return types


def _type(name: str, kinds: Kinds, request: TableRequest) -> str:
    """The DuckDB type of a column. Text, if no other holds its values as exactly as they are needed."""
    kept = _is_kept(name, request)
    kind = kinds.exact if kept else kinds.rounded
    if name in request.by:
        return kind
    if name in request.exact_features:
        return kind if name in request.keep or "*" in request.keep else "VARCHAR"
    named = not isinstance(request.features, int) and name in (request.features or ())
    if not kinds:
        return "DOUBLE" if named else kind  # no value at all: the columns that a model names hold numbers
    if kind != "VARCHAR":
        return kind
    if name == request.time and kinds.mostly in ("TIMESTAMP", "TIMESTAMPTZ"):
        return kinds.mostly
    number = isinstance(request.features, int) or request.window is not None
    return "DOUBLE" if kinds.mostly == "DOUBLE" and (named or (number and not kept)) else kind


def _odd(looked: Sequence[_Looked], types: Mapping[str, str], request: TableRequest) -> dict[str, str]:
    """What to tell of columns that are text for the sake of some values, or of how they are written: by column."""
    told: dict[str, str] = {}
    for name in types:
        held = sum((each.kinds[name] for each in looked if name in each.kinds), Kinds())
        if held.differs_in_zones and (name == request.time or _is_kept(name, request)):
            told[name] = f"{name} is text, as some of its times have a zone, and others have none"
    for each in looked:
        for name, value in each.odd.items():
            used = request.features is None or isinstance(request.features, int) or name in request.features
            if types.get(name) != "VARCHAR" or name in told or not (used or _is_kept(name, request)):
                continue
            if name in request.exact_features:
                continue
            kind = each.kinds[name].mostly
            numbers = each.kinds[name].numbers
            if each.dialect is None:  # JSON says what is text
                helps = None
            else:
                helps = delimited.advice(value, kind) if kind else _written(value, numbers=numbers)
            if helps is None and kind is not None:
                code = re.fullmatch(r"[-+]?0[0-9]+", value)
                helps = f"csv types={{{name}: {kind}}} " + (
                    "drops its zeros" if code else "makes such lines dead items"
                )
            if helps:
                timely = (kind or "").startswith("TIME") or "format=" in helps
                what = "time" if timely else "number"
                told[name] = f"{each.key}: {name} is text, as {value[:50]!r} is no {what} ({helps})"
    return told


def _written(value: str, *, numbers: bool) -> str | None:
    """The option for CSV with which a value would be a number, or else a time. numbers: whether others are numbers."""
    if not numbers and not re.search(r"[0-9]", value):
        return None
    return delimited.advice(value, "DOUBLE") or delimited.advice(value, "TIMESTAMP")
