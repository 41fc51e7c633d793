"""The columns of many files as one table: one inspection, which reports every problem."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.errors import SourceNotFoundError, StorageError
from tally.sources.tables import delimited, jsonlines
from tally.sources.tables.formats import arrow_schema, open_parquet, plain_type, unify
from tally.sources.tables.ingest import TableFile, connect, link
from tally.sources.tables.select import TableRequest
from tally.sources.tables.type_inference import SAMPLE_CELLS, SAMPLE_ROWS, InferredType, arrow_type
from tally.storage import temporary
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_THREADS = 16
_LOOKED_AT = 64
"""The most text files that are inspected. Further ones have to be like them."""
_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_ ]*(\(\d+(, *\d+)?\))?")


@dataclass
class Found:
    """One schema for all files.

    types: DuckDB's, of the columns of CSV and JSON Lines. assumed: what was assumed about CSV files, in words.
    metadata: of each Parquet file, by location and name.
    """

    schema: pa.Schema
    problems: list[str]
    types: dict[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    metadata: dict[tuple[int, str], pq.FileMetaData] = field(default_factory=dict)

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

        with connect() as connection:
            connection.register("rows", self.schema.empty_table())
            connection.execute("SET enable_external_access = false")
            try:
                connection.execute(f"SELECT 1 FROM rows WHERE (\n{where}\n) LIMIT 0")  # noqa: S608
            except duckdb.Error as error:
                return [f"where: {where!r}: {str(error).strip().splitlines()[0]}"]
        return []


@dataclass(frozen=True)
class _Looked:
    """A text file that was inspected. names: all its columns; those of JSON Lines need not be in every file."""

    key: str
    names: tuple[str, ...]
    inferred: Mapping[str, InferredType]
    whole: bool
    dialect: delimited.Dialect | None = None


def inspect(inputs: Sequence[TableFile], request: TableRequest, csv: Mapping[str, Any]) -> Found:
    """The schema of all files. Raises StorageError if one cannot be read, SourceNotFoundError if all are empty."""
    import pyarrow as pa

    binary = [each for each in inputs if each.format in ("parquet", "arrow")]
    texts = [each for each in inputs if each.format in ("csv", "jsonl")]
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
        looked = _look_at(texts, csv)
        with connect() as connection:
            types = _settle(looked, request, csv, problems, connection)
            kinds = {name: arrow_type(connection, kind) for name, kind in types.items()}
        optional = [name for each in looked if each.dialect is None for name in each.names]
        for seen in looked:
            names = seen.names if seen.dialect is not None else tuple(dict.fromkeys(optional))
            schemas.append((seen.key, pa.schema([(name, kinds[name]) for name in names])))
    if not schemas:
        named = ", ".join(each.key for each in inputs[:3])
        raise SourceNotFoundError(f"nothing to score: {named} {'is' if len(inputs) == 1 else 'are'} empty")
    schema, differing = unify(schemas)
    assumed = dict.fromkeys(
        f"{each.key}: {said}" for each in looked if each.dialect is not None and (said := each.dialect.remark())
    )
    shown = tuple(assumed)[:1]
    if len(assumed) > 1:
        shown = (f"{shown[0]}; so or similarly in {len(assumed) - 1:,} more",)
    return Found(schema, [*problems, *differing], types, shown, metadata)


def _schema(each: TableFile) -> tuple[pa.Schema, pq.FileMetaData | None]:
    """The file's schema, with plain types; and the metadata of a Parquet file."""
    import pyarrow as pa

    meta = None
    if each.format == "arrow":
        schema = arrow_schema(each.store, each.name)
    else:
        with open_parquet(each.store, each.name) as file:
            schema, meta = file.schema_arrow, file.metadata
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise StorageError(f"{each.key} has two columns of the name {twice!r}")
    return pa.schema([(item.name, plain_type(item.type)) for item in schema]), meta


def _look_at(texts: Sequence[TableFile], csv: Mapping[str, Any]) -> list[_Looked]:
    import duckdb

    looked: list[_Looked] = []
    with temporary.folder("schema") as folder, connect() as connection:
        for number, each in enumerate(texts):
            if len(looked) >= _LOOKED_AT:
                break
            path = each.store.local_path(each.name)
            packed = ".gz" if path.suffix.lower() == ".gz" else ""
            plain = link(path, Path(folder), number, f".text{packed}")
            rows = max(SAMPLE_ROWS, SAMPLE_CELLS // min(len(texts), _LOOKED_AT) // 4)
            try:
                if each.format == "jsonl":
                    inferred, whole = jsonlines.infer_types(connection, plain, rows)
                    if inferred:
                        looked.append(_Looked(each.key, tuple(inferred), inferred, whole))
                    continue
                dialect = delimited.look(plain, each.key, csv)
                if dialect is None:
                    continue
                rows = max(SAMPLE_ROWS, rows * 4 // len(dialect.names))
                text = delimited.readable(plain, dialect, Path(folder), each.key)
                inferred, whole = delimited.infer_types(connection, text, dialect, rows)
            except duckdb.Error as error:
                raise StorageError(f"cannot read {each.key}: {str(error).strip().splitlines()[0]}") from None
            looked.append(_Looked(each.key, dialect.names, inferred, whole, dialect))
    return looked


def _settle(
    looked: Sequence[_Looked], request: TableRequest, csv: Mapping[str, Any], problems: list[str], connection: Any
) -> dict[str, str]:
    """The type of every column of the text files."""
    import duckdb

    names = list(dict.fromkeys(name for each in looked for name in each.names))
    inferred = {name: [each.inferred[name] for each in looked if name in each.inferred] for name in names}
    whole = all(each.whole for each in looked) and len(looked) < _LOOKED_AT
    types = {name: _type(name, inferred[name], request, whole=whole) for name in names}
    if isinstance(request.features, int):
        numbers = [n for n in names if types[n] in ("BIGINT", "DOUBLE") and n not in (*request.by, request.time)]
        if len(numbers) < request.features:  # then the model takes a kept column
            types = {name: _type(name, inferred[name], replace(request, keep=()), whole=whole) for name in names}
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


def _type(name: str, inferred: Sequence[InferredType], request: TableRequest, *, whole: bool) -> str:
    known = [each for each in inferred if each.strict]
    kinds = {each.strict for each in known}
    kind = "VARCHAR"
    if len(kinds) == 1:
        [kind] = kinds
    elif kinds and kinds <= {"BIGINT", "DOUBLE"}:
        kind = "DOUBLE"
    elif kinds and kinds <= {"DATE", "TIMESTAMP"}:
        kind = "TIMESTAMP"
    if name in request.by:
        return kind
    if kind == "BIGINT" and not whole:
        return "DOUBLE"  # rows that were not sampled may have fractions
    named = not isinstance(request.features, int) and name in (request.features or ())
    if not known and named:
        return "DOUBLE"  # no value at all: the columns that a model names hold numbers
    if kind != "VARCHAR" or not known:
        return kind
    mostly = {each.mostly or "VARCHAR" for each in known}
    if name == request.time and len(mostly) == 1 and mostly <= {"TIMESTAMP", "TIMESTAMPTZ"}:
        return mostly.pop()
    number = isinstance(request.features, int) or request.window is not None or named
    return "DOUBLE" if mostly == {"DOUBLE"} and (named or (number and name not in request.keep)) else kind
