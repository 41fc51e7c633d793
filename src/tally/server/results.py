"""SQL over a job's results for requests: bounded in time, rows and memory.

Each query runs in a process beside the server's, so one that is slow, greedy or brings DuckDB down costs no page its
answer. The process opens no model and runs no code of the user's.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import TimeoutError as LateError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from tally.errors import SpecError, StorageError
from tally.jobs.facade import Jobs
from tally.server.api.views import Rows

SECONDS = 20.0
MEMORY = "1GiB"
PROCESSES = 2


class Results:
    """Answers queries. Safe to use from several threads."""

    def __init__(self) -> None:
        self._pool: Any = None

    def query(self, job: str, sql: str, *, limit: int) -> Rows:
        """At most ``limit`` rows of the answer. Raises SpecError where the query is wrong, or takes too long."""
        if self._pool is None:
            self._pool = ProcessPool(max_workers=PROCESSES, context=multiprocessing.get_context("spawn"))
        future = self._pool.schedule(_answer, args=(job, sql, limit), timeout=SECONDS)
        try:
            found: Rows = future.result()
        except LateError:
            raise SpecError(
                f"the query was stopped after {SECONDS:g} s", hint="Ask for less, or use tally query."
            ) from None
        except ProcessExpired:
            raise StorageError("the process that answered the query has ended", hint="Ask for less.") from None
        return found

    def close(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()


_jobs: Jobs | None = None


def _answer(job: str, sql: str, limit: int) -> Rows:
    """In the process of the query; the connection to the database is kept for the next one."""
    global _jobs
    if _jobs is None:
        _jobs = Jobs()
    table = _jobs.query(job, sql, limit=limit + 1, memory=MEMORY)
    columns = {field.name: str(field.type) for field in table.schema}
    return Rows(columns=columns, rows=table.slice(0, limit).to_pylist(), truncated=table.num_rows > limit)
