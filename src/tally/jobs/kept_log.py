"""The log of a job beside its output, where it is asked for (``log: true``): a JSON object a line.

It grows in Tally's home, and is copied into the output's staging folder now and then, and whenever the job is put down:
so another machine that goes on with the job has what was logged before. When results are published, it is one of their
files.
"""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

from tally.config import append_private, settings
from tally.errors import TallyError
from tally.jobs.events import ChunkDone, Event, writing_to
from tally.logs import json_lines
from tally.sinks.base import Sink
from tally.storage import open_store

log = logging.getLogger("tally")

MOST_BYTES = 16 * 2**20
"""Above this size, only warnings are added."""
KEEP_SECONDS = 30.0
"""Seconds between two copies into the staging folder."""
_NAME = "log.jsonl"


def kept_log_of(job_id: str) -> Path:
    """Where the log of a job grows."""
    return settings().home / "logs" / f"{job_id}.jsonl"


def merged(here: bytes, there: bytes) -> bytes:
    """The lines of both, each once, by their times."""
    if here.startswith(there):
        return here
    ours, theirs = here.splitlines(keepends=True), there.splitlines(keepends=True)
    known = set(ours)
    lines: list[bytes] = [*(line for line in theirs if line not in known), *ours]
    lines.sort(key=_time)
    return b"".join(lines)


def _time(line: bytes) -> bytes:
    """``{"time": "..."``: that."""
    return line[:40]


class KeptLog:
    """A subscriber to a job's events, which writes them down. What else Tally warns of meanwhile is written, too."""

    def __init__(self, job_id: str, sink: Sink) -> None:
        self._sink, self.path = sink, kept_log_of(job_id)
        self._next = time.monotonic() + KEEP_SECONDS
        self._begin()
        self._file = io.TextIOWrapper(append_private(self.path), "utf-8", write_through=True)
        self._handler = logging.StreamHandler(self._file)
        self._handler.setFormatter(json_lines(job_id))
        self._handler.addFilter(self._has_room)
        logger = logging.Logger("tally.job", logging.DEBUG)  # noqa: LOG001  # of this job alone
        logger.addHandler(self._handler)
        self._write = writing_to(logger)
        # Events reach Tally's own log, too; what comes from there is not about them.
        self._others = logging.StreamHandler(self._file)
        self._others.setLevel(logging.WARNING)
        self._others.setFormatter(json_lines(job_id))
        self._others.addFilter(lambda record: record.name != "tally.events" and self._has_room(record))
        log.addHandler(self._others)

    def __call__(self, event: Event) -> None:
        self._write(event)
        if isinstance(event, ChunkDone) and time.monotonic() >= self._next:
            self.keep()

    def keep(self) -> None:
        """Copy it into the staging folder, while that is the job's. What keeps that from being done is no fault of the
        job's: the next time may be better."""
        try:
            if self._sink.work is not None and self._sink.claimed:
                open_store(self._sink.work).write(_NAME, self.path.read_bytes())
        except (OSError, TallyError) as error:
            log.info("the job's log could not be copied: %s", error)
        self._next = time.monotonic() + KEEP_SECONDS

    def close(self) -> None:
        """Nothing more is written."""
        log.removeHandler(self._others)
        self.keep()
        self._file.close()

    def _begin(self) -> None:
        """Go on with what is there, here and from other machines; without a line that a kill has cut short."""
        here = self.path.read_bytes() if self.path.exists() else b""
        whole = merged(here[: here.rfind(b"\n") + 1], self._earlier())
        if whole != here:
            self.path.unlink(missing_ok=True)
            with append_private(self.path) as file:
                file.write(whole)

    def _earlier(self) -> bytes:
        """What another machine has left, of a job that goes on, or that is finished and opened again."""
        if self._sink.work is not None:
            try:
                return open_store(self._sink.work).read(_NAME)
            except FileNotFoundError:
                pass
        manifest = self._sink.manifest() or {}
        if (found := manifest.get("log_file")) is None:
            return b""
        try:
            return self._sink.read(found["path"])
        except FileNotFoundError:
            return b""

    def _has_room(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or self._file.buffer.tell() < MOST_BYTES
