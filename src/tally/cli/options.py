"""Options that several commands have, each written once."""

from __future__ import annotations

from typing import Any

import click

from tally.cli import completion, values


def in_tables(command: Any) -> Any:
    """How times in tables are read, and what their files' names say."""
    return _with(
        command,
        click.option(
            "--time-unit",
            shell_complete=completion.words("s", "ms", "us", "ns"),
            help="Windows only: the unit of times that are numbers since 1970: s, ms, us, ns.  "
            "[default: told by the values]",
        ),
        click.option(
            "--timezone", metavar="ZONE", help="Windows of days only: whose days they are, e.g. Europe/Berlin."
        ),
        click.option(
            "--path-columns",
            metavar="PATTERN",
            help="Tables only: columns in the files' names, e.g. '{Device}_{Tag}.csv'; region=eu/ gives them by "
            "itself.",
        ),
    )


def of_pictures(command: Any) -> Any:
    """How an endpoint decodes pictures. What is not said is None."""
    return _with(
        command,
        click.option("--pages", type=values.Choice(("first", "all")), help="As with 'tally score'.  [default: first]"),
        click.option("--background", metavar="COLOUR", callback=values.colour, help="As with 'tally score'."),
        click.option(
            "--max-pixels", metavar="N", callback=values.millions, help="As with 'tally score'.  [default: 128M]"
        ),
    )


def _with(command: Any, *options: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command
