"""Text that every database takes, quoted SQL, quantities and times as people write them, errors in a line, and
suggestions for mistyped words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from difflib import get_close_matches

_DURATION = re.compile(r"(?i)\s*(\d+(?:\.\d+)?)\s*(ms|s|sec|m|min|h|d)?\s*")
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> float:
    """The seconds of ``30s``, ``5m``, ``1h``, ``1d`` or a bare number. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("should be a duration such as 30s, 5m, 1h or 1d")
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def local_time(at: float | None) -> str:
    """Seconds since the epoch as people write a time, in their own zone; ``-`` for None."""
    return "-" if at is None else datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def iso_time(at: float | None) -> str | None:
    """Seconds since the epoch in ISO 8601, UTC, to the second."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def storable(text: str) -> str:
    """Text that every database takes: what is no character (bytes of a file's name, say) is written as an escape."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def sql_name(name: str) -> str:
    """The name of a column or table, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def sql_text(text: object) -> str:
    """The text as a literal of SQL; a path, say, is written as it is."""
    return "'" + str(text).replace("'", "''") + "'"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like ``word``, if any is close."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` to end a message with, or nothing."""
    found = closest(word, known)
    return f"; did you mean {found!r}?" if found is not None else ""


def error_line(error: BaseException) -> str:
    """An exception in one line: ``ValueError: what it says``."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def raised_at(error: BaseException, file: str | None = None) -> str | None:
    """``score.py, line 7``: where an exception was raised, or the last line of ``file`` on the way there, if any."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if file is None or name == file:
            found = f"{name.rsplit('/', 1)[-1]}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found
