"""What commands share in reading their options and showing tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from tally.errors import SpecError


def pairs(flag: str, assignments: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; values are read as YAML, so numbers, lists and booleans are what they look like."""
    import yaml

    found: dict[str, Any] = {}
    problems = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            problems.append(f"{flag} {assignment!r} is not of the form KEY=VALUE")
            continue
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key.strip()] = value
    if problems:
        raise SpecError(problems, hint=f"For example: {flag} preprocess.channels=bgr {flag} top=5")
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people on a terminal; plain columns for everything else."""
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
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
