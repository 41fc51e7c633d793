"""What jobs have written, for requests: SQL over rows, bounded in time, rows and memory; and the files.

Each query runs in a process beside the server's, so one that is slow, greedy or brings DuckDB down costs no page its
answer. That process has no database, opens no model and runs no code of the user's.
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tally.errors import SourceNotFoundError, SpecError
from tally.jobs.facade import Jobs
from tally.server.api.views import ResultFile, Rows
from tally.server.aside import Aside
from tally.sinks.base import Output, OutputDescription
from tally.sinks.factory import reopen
from tally.sinks.formats import PICTURES
from tally.sinks.query import query
from tally.sql import sql_text
from tally.storage import Store, open_store

SECONDS = 20.0
MEMORY = "1GiB"
BLOCK = 1 << 20
MOST_DOWNLOADED = 100_000
"""Rows of an answer that is fetched as a file."""

Ask: TypeAlias = Callable[[str, int], Rows]
"""Gives the answer to a query: at most so many rows."""
Answer = TypeVar("Answer")


class Results:
    """Answers queries, and opens files. Safe to use from several threads."""

    def __init__(self, jobs: Jobs, aside: Aside) -> None:
        self._jobs, self._aside = jobs, aside

    def query(self, job: str, sql: str, *, limit: int) -> Rows:
        """At most ``limit`` rows of the answer. Raises SpecError where the query is wrong, or takes too long."""
        found: Rows = self._ask(_rows, job, sql, limit)
        return found

    def run(self, job: str, function: Callable[[Ask], Answer]) -> Answer:
        """What a function makes of several answers about one state of the job. It runs where queries do."""
        answer: Answer = self._ask(_run, job, function)
        return answer

    def arrow(self, job: str, sql: str, target: Path, *, limit: int) -> bool:
        """As :meth:`query`, into a file, as an Arrow stream; whether there are more rows."""
        more: bool = self._ask(_write_arrow, job, sql, limit, str(target))
        return more

    def download(self, job: str, sql: str, target: Path, *, form: Literal["csv", "parquet"]) -> None:
        """The whole answer into a file. Raises SpecError where it has more than :data:`MOST_DOWNLOADED` rows."""
        if self._ask(_write_file, job, sql, MOST_DOWNLOADED, str(target), form):
            raise SpecError(
                f"the answer has more than {MOST_DOWNLOADED:,} rows",
                hint=f"End the query with 'limit {MOST_DOWNLOADED}', or fetch the job's files.",
            )

    def page(
        self, job: str, *, order: Literal["source", "key"], after: str | None, limit: int
    ) -> tuple[Rows, str | None]:
        """Rows, and where the next page begins; None if this is the last.

        order: that of the source; or by key, which stays what it is while a job adds rows. after: ``next`` of the page
        before. Raises SpecError for anything else.
        """
        if order == "source":
            begin = _number(after)
            found = self.query(job, f"from results limit {limit + 1} offset {begin}", limit=limit)
            return found, str(begin + limit) if found.truncated else None
        key, given = _cursor(after)
        where = "" if key is None else f"where key >= {sql_text(key)}"
        # Several rows may have one key: those of it that were on earlier pages are passed over.
        sql = f"select * from results {where} order by all limit {limit + 1} offset {given}"  # noqa: S608
        found = self.query(job, sql, limit=limit)
        if not found.truncated:
            return found, None
        last = found.rows[-1]["key"]
        same = sum(row["key"] == last for row in found.rows) + (given if last == key else 0)
        return found, base64.urlsafe_b64encode(json.dumps([last, same]).encode()).decode()

    def files(self, job: str) -> list[ResultFile]:
        """The files of a job whose results are published: those that its manifest lists, and the manifest."""
        _, names = self._published(job)
        return [ResultFile(name=name, bytes=size) for name, size in names.items()]

    def file(self, job: str, name: str) -> tuple[Store, int]:
        """Where a file of the output is, and its size in bytes: one of :meth:`files`, or a picture that the rows of a
        finished job name. Raises SourceNotFoundError for any other name."""
        store, names = self._published(job)
        if name not in names and not (names and self._is_made(job, name)):
            raise SourceNotFoundError(f"job {job} has no file {name!r}")
        if store.is_local and not Path(store.url, name).resolve().is_relative_to(Path(store.url).resolve()):
            raise SourceNotFoundError(f"{name!r} is a link that leads out of the output")
        return store, store.size(name)

    def _is_made(self, job: str, name: str) -> bool:
        """Whether the job has made a picture of this name."""
        made = self._jobs.store.get(job).output.get("kind") == "images"
        if not made or PurePosixPath(name).suffix.lower() not in PICTURES:
            return False
        sql = f"select file from results where file = {sql_text(name)} limit 1"  # noqa: S608
        return bool(self.query(job, sql, limit=1).rows)

    def _published(self, job: str) -> tuple[Store, dict[str, int]]:
        """The output's folder; names and sizes of its files, from the job's row: who can write to the output cannot
        add to them."""
        record = self._jobs.store.get(job)
        self._jobs.sink(record.id)  # says where its results have gone
        description = OutputDescription.from_json(record.output)
        manifest = record.manifest or {}
        folder, name = description.place, "_manifest.json"
        if description.merged:
            folder, _, last = description.place.rpartition("/")
            name = f"{last}.manifest.json"
        store = open_store(folder or "/")
        listed = [*manifest.get("files", ()), *manifest.get("thumbnails", ())]
        listed += [dead] if (dead := manifest.get("dead_file")) else []
        names = {str(each["path"]): int(each.get("bytes", -1)) for each in listed}
        if (log := manifest.get("log_file")) is not None:
            names[log["path"]] = store.size(log["path"])
        if manifest:
            names[name] = store.size(name)
        return store, names

    def _ask(self, function: Any, job: str, *more: Any) -> Any:
        record = self._jobs.store.get(job)
        self._jobs.sink(record.id)  # says where its results have gone
        state = record.output, list(self._jobs.outputs(record.id)), self._jobs.dead_table(record.id)
        return self._aside.call(function, *state, *more, seconds=SECONDS, what="the query")


def read_blocks(store: Store, name: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from ``start`` on and before ``stop``."""
    while start < stop and (block := store.read_range(name, start, min(BLOCK, stop - start))):
        yield block
        start += len(block)


def _number(text: str | None) -> int:
    if text is not None and not (text.isdecimal() and len(text) < 16):
        raise SpecError(f"after: {text[:100]!r} is not the 'next' of a page in the source's order")
    return int(text or 0)


def _cursor(text: str | None) -> tuple[str | None, int]:
    if text is None:
        return None, 0
    try:
        key, given = json.loads(base64.urlsafe_b64decode(text.encode()))
        if not isinstance(key, str) or "\0" in key or type(given) is not int or not 0 <= given < 2**53:
            raise ValueError
        key.encode()
    except (ValueError, TypeError):  # what base64 and JSON raise are ValueErrors, too
        raise SpecError(f"after: {text[:100]!r} is not the 'next' of a page by key") from None
    return key, given


# -- in the process of the query ---------------------------------------------------------------------------------------


def _table(output: dict[str, Any], outputs: Sequence[Output], dead: pa.Table, sql: str, limit: int) -> pa.Table:
    sink = reopen(OutputDescription.from_json(output))
    return query(sink, outputs, sql, dead, limit=limit + 1, memory=MEMORY)


def _rows(output: dict[str, Any], outputs: Sequence[Output], dead: pa.Table, sql: str, limit: int) -> Rows:
    table = _table(output, outputs, dead, sql, limit)
    columns = {field.name: str(field.type) for field in table.schema}
    rows = [{name: _plain(value) for name, value in row.items()} for row in _listed(table.slice(0, limit))]
    return Rows(columns=columns, rows=rows, truncated=table.num_rows > limit)


def _run(
    output: dict[str, Any], outputs: Sequence[Output], dead: pa.Table, function: Callable[[Ask], Answer]
) -> Answer:
    return function(lambda sql, limit: _rows(output, outputs, dead, sql, limit))


def _write_arrow(
    output: dict[str, Any], outputs: Sequence[Output], dead: pa.Table, sql: str, limit: int, target: str
) -> bool:
    table = _table(output, outputs, dead, sql, limit)
    with pa.OSFile(target, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, limit))
    return bool(table.num_rows > limit)


def _write_file(
    output: dict[str, Any], outputs: Sequence[Output], dead: pa.Table, sql: str, limit: int, target: str, form: str
) -> bool:
    table = _table(output, outputs, dead, sql, limit)
    if table.num_rows > limit:
        return True
    if form == "parquet":
        pq.write_table(table, target)
        return False
    with Path(target).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table.column_names)
        for batch in table.to_batches(max_chunksize=10_000):
            for row in _listed(batch):
                writer.writerow([_in_csv(_plain(value)) for value in row.values()])
    return False


def _listed(rows: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python has them. Raises SpecError for times that it knows no date for."""
    try:
        listed: list[dict[str, Any]] = rows.to_pylist()
    except (OverflowError, ValueError) as error:
        raise SpecError(
            f"the answer holds a value that cannot be shown: {error}", hint="Cast its column: select day::varchar ..."
        ) from None
    return listed


def _in_csv(value: Any) -> Any:
    """The value as a cell: lists and mappings as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def _plain(value: Any) -> Any:
    """The value as JSON knows it: bytes in base64, and null for numbers that are none."""
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(name): _plain(each) for name, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case None | bool() | int() | str():
            return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
