"""Names and text in SQL, quoted."""

from __future__ import annotations


def sql_name(name: str) -> str:
    """The name of a column or table, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def sql_text(text: object) -> str:
    """The text as a literal of SQL; a path, say, is written as it is."""
    return "'" + str(text).replace("'", "''") + "'"
