"""The log of a process: lines without secrets, and without what a terminal would obey.

``TALLY_LOG_FORMAT=json`` makes each line a JSON object: time, level, message, and where that is known, which job and
chunk it is about.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from tally.errors import SpecError
from tally.masking import mask
from tally.text import visible

FORMAT = "TALLY_LOG_FORMAT"

_jobs: list[str] = []


@contextmanager
def about(job_id: str) -> Iterator[None]:
    """Meanwhile this process drives the job, and what any of its threads logs is about it, unless it drives others."""
    _jobs.append(job_id)
    try:
        yield
    finally:
        _jobs.remove(job_id)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(mask(super().format(record)), lines=True)


class _Json(logging.Formatter):
    """job: what all lines are about."""

    def __init__(self, job: str | None = None) -> None:
        super().__init__()
        self._job = job

    def format(self, record: logging.LogRecord) -> str:
        """One line. A record's ``extra`` may hold ``job``, and ``chunk``: its first item and their count."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": mask(record.getMessage()),
        }
        job = self._job or getattr(record, "job", _jobs[0] if len(set(_jobs)) == 1 else None)
        if job is not None:
            line["job"] = job
        if (chunk := getattr(record, "chunk", None)) is not None:
            line["chunk"] = dict(zip(("first", "count"), chunk, strict=True))
        if record.exc_info:
            line["trace"] = mask(self.formatException(record.exc_info))
        return json.dumps(line)


def json_lines(job_id: str) -> logging.Formatter:
    """A JSON object a line, about one job."""
    return _Json(job_id)


def log_to_stderr() -> None:
    """Log what happens inside to standard error. Raises SpecError where the environment asks for an unknown format."""
    wanted = os.environ.get(FORMAT) or "text"
    if wanted not in ("text", "json"):
        raise SpecError(f"{FORMAT} must be text or json, not {wanted!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if wanted == "json" else _Text("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])  # what libraries do is not worth a line
    logging.getLogger("tally").setLevel(logging.INFO)
