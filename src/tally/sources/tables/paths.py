"""Columns that stand in the paths of files: ``region=eu/day=2026-01-01/part.parquet``, or as a pattern says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from urllib.parse import unquote

from tally.storage import key_of

_NULL = "__HIVE_DEFAULT_PARTITION__"
_NAMED = re.compile(r"\{(\w+)\}")
_FOLDER = re.compile(r"(\w+)=(.+)")


def check(pattern: str) -> list[str]:
    """The problems with a pattern."""
    names = _NAMED.findall(pattern)
    if not names:
        return [f"path_columns: {pattern!r} names no column; an example is '{{Device}}_{{Tag}}.csv'"]
    twice = [name for name in names if names.count(name) > 1]
    wrong = [name for name in names if name[0].isdigit()]
    return [f"path_columns: {pattern!r} names {(twice or wrong)[0]!r} twice or as a number"] if twice or wrong else []


def values(url: str, pattern: str | None) -> dict[str, str | None]:
    """The columns in a file's path, and their values as text: folders such as ``region=eu`` just above it, and those
    that the pattern names. Raises ValueError if the path does not fit, or fits in more than one way.
    """
    path = key_of(url)
    found: dict[str, str | None] = {}
    for folder in reversed(path.split("/")[:-1]):
        match = _FOLDER.fullmatch(folder)
        if match is None:
            break
        found = {match[1]: None if match[2] == _NULL else unquote(match[2]), **found}
    return found if pattern is None else found | _matched(path, pattern)


def _matched(path: str, pattern: str) -> dict[str, str | None]:
    folder, _, name = path.rpartition("/")
    stem = f"{folder}/{re.sub(r'[.][A-Za-z]+([.](gz|bz2|xz|zst|zip))?$', '', name, flags=re.IGNORECASE)}"
    for text in dict.fromkeys((stem, path)):
        lazy, greedy = (re.search(_compiled(pattern, times), text) for times in ("+?", "+"))
        if lazy is not None and greedy is not None:
            if lazy.groupdict() != greedy.groupdict():
                raise ValueError(f"{name} fits {pattern!r} in more than one way")
            return dict(lazy.groupdict())
    raise ValueError(f"{name} does not fit {pattern!r}")


def _compiled(pattern: str, times: str) -> str:
    parts = re.split(r"\{(\w+)\}", pattern)
    made = "".join(f"(?P<{part}>[^/]{times})" if at % 2 else re.escape(part) for at, part in enumerate(parts))
    return rf"(?:^|(?<=/)){made}$"


def columns(urls: Sequence[str], pattern: str | None) -> tuple[dict[str, str], list[str], list[str]]:
    """The columns that stand in the paths of all files, with their DuckDB types; problems; and what is to be told."""
    problems: list[str] = []
    found: list[Mapping[str, str | None]] = []
    for each in urls:
        try:
            found.append(values(each, pattern))
        except ValueError as error:
            problems.append(f"path_columns: {error}")
    if problems:
        more = len(problems) - 3
        return {}, [*problems[:3], *([f"path_columns: so are {more:,} more files"] if more > 0 else [])], []
    every = dict.fromkeys(name for each in found for name in each)
    partial = [name for name in every if not all(name in each for each in found)]
    told = [f"{', '.join(partial)} in the names of some folders, not of all: no column"] if partial else []
    return {name: _type([each[name] for each in found]) for name in every if name not in partial}, [], told


def _type(texts: Sequence[str | None]) -> str:
    given = [text for text in texts if text is not None]
    if given and all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) and text != "-0" for text in given):
        return "BIGINT"
    if given and all(re.fullmatch(r"\d{4}-\d\d-\d\d", text) and _is_date(text) for text in given):
        return "DATE"
    return "VARCHAR"


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).year > 0
    except ValueError:
        return False
