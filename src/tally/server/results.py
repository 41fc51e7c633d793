"""SQL over a job's results for requests: bounded in time, rows and memory.

Each query runs in a process beside the server's, so one that is slow, greedy or brings DuckDB down costs no page its
answer. That process has no database, opens no model and runs no code of the user's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import TimeoutError as LateError
from multiprocessing.context import SpawnContext
from typing import Any

import pyarrow as pa
from pebble import ProcessExpired, ProcessPool

from tally.engines.spawn import Process
from tally.errors import SpecError, StorageError
from tally.jobs.facade import Jobs
from tally.server.api.views import Rows
from tally.sinks.base import Output, OutputDescription
from tally.sinks.factory import reopen
from tally.sinks.query import query

SECONDS = 20.0
MEMORY = "1GiB"
PROCESSES = 2


class _Context(SpawnContext):
    Process = Process


class Results:
    """Answers queries. Safe to use from several threads."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs, self._lock = jobs, threading.Lock()
        self._pool: Any = None

    def query(self, job: str, sql: str, *, limit: int) -> Rows:
        """At most ``limit`` rows of the answer. Raises SpecError where the query is wrong, or takes too long."""
        record = self._jobs.store.get(job)
        self._jobs.sink(record.id)  # says where its results have gone
        given = (record.output, list(self._jobs.outputs(record.id)), self._jobs.dead_table(record.id), sql, limit)
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPool(max_workers=PROCESSES, context=_Context())
        future = self._pool.schedule(_answer, args=given, timeout=SECONDS)
        try:
            found: Rows = future.result()
        except LateError:
            raise SpecError(f"the query was stopped after {SECONDS:g} s", hint="Ask for less.") from None
        except ProcessExpired:
            raise StorageError("the process that answered the query has ended", hint="Ask for less.") from None
        return found

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()


def _answer(output: dict[str, Any], outputs: Sequence[Output], dead: pa.Table, sql: str, limit: int) -> Rows:
    """In the process of the query."""
    sink = reopen(OutputDescription.from_json(output))
    table = query(sink, outputs, sql, dead, limit=limit + 1, memory=MEMORY)
    columns = {field.name: str(field.type) for field in table.schema}
    return Rows(columns=columns, rows=table.slice(0, limit).to_pylist(), truncated=table.num_rows > limit)
