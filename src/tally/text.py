"""Text that every database takes, quantities and times as people write them, suggestions for mistyped words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

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


_KEPT = "\u00a0\u200c\u200d\u3000"
"""Spaces, and what joins or parts letters in many scripts: they change nothing but their own place."""


def visible(text: str, *, lines: bool = False) -> str:
    r"""Text that a terminal or a log shows as it is: whatever controls how it is shown is written as an escape.

    Such are ``\\x1b`` and what else moves the cursor, marks of direction, and ends of lines; lines: those of ``\\n``
    and tabs are kept, for text that has several.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in _KEPT or (lines and each in "\n\t") else _escape(each) for each in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


_BEGINNING = 4
"""Letters that tell which longer word is meant."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like ``word``, if any is close: one in other capitals, or the only one that begins
    so, before one with other letters."""
    words, lower = list(known), word.lower()
    same = [each for each in words if each.lower() == lower]
    longer = [each for each in words if each.lower().startswith(lower)] if len(word) >= _BEGINNING else []
    if same or len(longer) == 1:
        return (same or longer)[0]
    return next(iter(get_close_matches(word, words, n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` to end a message with, or nothing."""
    found = closest(word, known)
    return f"; did you mean {found!r}?" if found is not None else ""


_PLAINLY = {
    "dict_type": "should be names with values",
    "finite_number": "should be a finite number",
    "greater_than": "should be more than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "string_type": "should be text",
    "string_unicode": "is not UTF-8 text",
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("list_type", "tuple_type"), "should be a list"),
}


def finding(error: Mapping[str, Any]) -> str:
    """What pydantic found wrong with a field, in plain words: ``should be at least 1 (given: 0)``."""
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    if kind == "string_too_short":
        return "is empty"
    if kind == "literal_error" and (known := re.findall(r"'([^']*)'", context["expected"])):
        *some, last = known
        said = f"should be {', '.join(some)} or {last}" if some else f"should be {last}"
        said += did_you_mean(given, known) if isinstance(given, str) else ""
    elif kind in _PLAINLY:
        bounds = {name: f"{each:,.15g}" for name, each in context.items() if isinstance(each, (int, float))}
        said = _PLAINLY[kind].format(**bounds)
    else:
        said = str(context["error"]) if kind == "value_error" else error["msg"].removeprefix("Input ")
        said = said[:1].lower() + said[1:]
    return f"{said} (given: {given!r})"


def expanded(path: str | Path) -> Path:
    """The path with ``~`` as the user's folder. ``~name`` is a file's name where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
