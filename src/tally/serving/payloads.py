"""A sample of requests with their answers, kept as Parquet: to see what a model was asked, and to score it again.

Each replica writes files of its own, ``MODEL/VERSION/DATE/part-….parquet``, each whole or not at all. A log that cannot
be written costs no request anything: what is lost is said in the process's log.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tally.errors import TallyError
from tally.storage import open_store

if TYPE_CHECKING:
    from tally.serving.messages import Answer, Call

log = logging.getLogger(__name__)

ROWS = 1_000
"""Requests in one file, at most."""
BYTES = 64 << 20
"""Bytes of bodies and answers in one file, at most, but for the last."""
SECONDS = 30.0
"""How long a request may wait until it is in a file."""
WAITING = 10_000
"""Requests that may wait to be written; more are left out."""


class PayloadLog:
    """Safe to use from several threads. place: a folder or a bucket."""

    def __init__(self, place: str, model: str, version: str) -> None:
        self._store = open_store(place)
        self._model, self._version = model, version
        self._queue: queue.Queue[tuple[float, Call, Answer] | None] = queue.Queue(WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._run, name="payloads", daemon=True)
        self._thread.start()

    def add(self, call: Call, answer: Answer) -> None:
        """Keep a request and its answer; never waits."""
        try:
            self._queue.put_nowait((time.time(), call, answer))
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        ended = False
        while not ended:
            rows: list[tuple[float, Call, Answer]] = []
            size, until = 0, time.monotonic() + SECONDS
            while len(rows) < ROWS and size < BYTES:
                try:
                    found = self._queue.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if found is None:
                    ended = True
                    break
                rows.append(found)
                size += len(found[1].body) + len(found[2].body)
            if rows:
                self._write(rows)

    def _write(self, rows: list[tuple[float, Call, Answer]]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        calls = [call for _, call, _ in rows]
        answers = [answer for _, _, answer in rows]
        table = pa.table(
            {
                "time": pa.array([int(at * 1_000_000) for at, _, _ in rows], pa.timestamp("us", "UTC")),
                "model": [self._model] * len(rows),
                "version": [self._version] * len(rows),
                "protocol": [call.protocol for call in calls],
                "content_type": [call.parameters.get("header:content-type") for call in calls],
                "body": pa.array([call.body for call in calls], pa.binary()),
                "status": pa.array([answer.status for answer in answers], pa.int16()),
                "answer": pa.array([answer.body for answer in answers], pa.binary()),
                "rows": pa.array([answer.rows for answer in answers], pa.int32()),
                "waited": pa.array([answer.waited for answer in answers], pa.float64()),
                "scored": pa.array([answer.scored for answer in answers], pa.float64()),
            }
        )
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        now = datetime.now(UTC)
        name = f"{self._model}/{self._version}/{now:%Y-%m-%d}/part-{now:%H%M%S}-{secrets.token_hex(4)}.parquet"
        try:
            self._store.write(name, sink.getvalue())
        except TallyError as error:
            log.error("%d requests are not in the payload log: %s", len(rows), error.message)
        if self._left_out:
            log.warning("%d requests were left out of the payload log: it is written too slowly", self._left_out)
            self._left_out = 0
