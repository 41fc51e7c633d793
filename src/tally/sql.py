"""Names and text in SQL, quoted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def sql_name(name: str) -> str:
    """The name of a column or table, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def sql_text(text: object) -> str:
    """The text as a literal of SQL; a path, say, is written as it is."""
    return "'" + str(text).replace("'", "''") + "'"


def distinct_names(names: Sequence[str]) -> dict[str, str]:
    """For each column the name that SQL knows it by: its own, with a number where others differ only in capitals, or
    where it is empty.

    SQL does not tell capitals apart: of two columns V and v, it would give the first one for both.
    """
    taken = {name.lower() for name in names}
    seen = {""}
    called: dict[str, str] = {}
    for name in names:
        unique, number = name, 0
        while (number and unique.lower() in taken) or unique.lower() in seen:
            number += 1
            unique = f"{name}_{number}"
        seen.add(unique.lower())
        called[name] = unique
    return called


def json_place(name: str) -> str:
    """The place of a field of an object, as DuckDB's functions for JSON take it (a JSON pointer, RFC 6901)."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def hide_progress(connection: Any) -> None:
    """Have a connection of DuckDB draw no progress bar: a long query would draw it into a server's log.

    In a notebook without ipywidgets it draws none, and fails when it is told so.
    """
    import duckdb

    with suppress(duckdb.InvalidInputException):
        connection.execute("SET enable_progress_bar = false")
