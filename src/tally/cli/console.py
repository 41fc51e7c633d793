"""What commands share in reading their options and showing tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import click

from tally.errors import SpecError
from tally.text import visible


def pairs(flag: str, assignments: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; values are read as in YAML files: see :func:`tally.plain_yaml.value`."""
    from tally import plain_yaml

    found: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in _split(flag, assignments, problems):
        try:
            found[key] = plain_yaml.value(value)
        except ValueError as error:
            problems.append(f"{flag} {key}={value[:100]}: {error}; text that begins so is put in quotes: '\"...\"'")
    if problems:
        raise SpecError(problems, hint=f"For example: {flag} preprocess.channels=bgr {flag} top=5")
    return found


def literal_pairs(flag: str, assignments: Sequence[str], read: Collection[str] = ()) -> dict[str, Any]:
    """``KEY=VALUE`` pairs whose values are the text that was given. Of a key that is given again, a list of them.

    read: keys whose values are no text; they are read as those of :func:`pairs`.
    """
    texts: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in _split(flag, assignments, problems):
        if key in texts and key not in read:
            earlier = texts[key]
            texts[key] = [*(earlier if isinstance(earlier, list) else [earlier]), value]
        else:
            texts[key] = value
    if problems:
        raise SpecError(problems, hint=f"For example: {flag} delim=';'")
    return texts | pairs(flag, [f"{key}={texts[key]}" for key in texts if key in read])


def text_pairs(flag: str, assignments: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` pairs whose values are the text that was given. Raises SpecError for a key that is given twice."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for key, value in _split(flag, assignments, problems):
        if found.setdefault(key, value) != value:
            problems.append(f"{flag} {key}: is given twice, as {found[key]!r} and as {value!r}")
    if problems:
        raise SpecError(problems)
    return found


def _split(flag: str, assignments: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if equals and key.strip():
            yield key.strip(), value
        else:
            problems.append(f"{flag} {assignment!r} is not of the form KEY=VALUE")


def say(text: object = "", *, err: bool = False, **style: Any) -> None:
    """Print lines for people; a name in them cannot control the terminal."""
    click.secho(visible(str(text), lines=True), err=err, **style)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people on a terminal; plain columns for everything else."""
    rows = [[visible(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(*head, box=None, header_style="bold")
        for row in rows:
            shown.add_row(*(Text(cell) for cell in row))
        Console().print(shown)
        return
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
