"""The last lines that a job's processes wrote on this machine: its coordinator, where a server started that, and its
workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tally.config import settings
from tally.masking import mask
from tally.text import visible

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Printed:
    """Lines, oldest first, with secrets masked. Empty where another machine ran the job, or nothing was written."""

    coordinator: list[str]
    workers: list[str]


def printed_by(job_id: str, *, lines: int) -> Printed:
    """At most so many lines of each, of the last megabyte."""
    places = settings()
    return Printed(tail(places.coordinator_log_of(job_id), lines), tail(places.log_of(job_id), lines))


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a file, of its last megabyte, with secrets masked; none where there is no such file."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST_BYTES))
            found = file.read().split(b"\n")
    except OSError:
        return []
    whole = found[1:] if size > _MOST_BYTES else found
    last = whole[:-1] if not whole[-1] else whole
    return [visible(mask(each.decode("utf-8", "replace"))) for each in last[-lines:]]
