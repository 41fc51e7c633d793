"""From a database's URL to its rows. A new kind of database is one file and one line here.

A file has ``open_query(url, query)``, ``ERRORS`` (those that its driver raises) and ``is_away(error)``: whether one of
them says that the database does not answer, so that it may later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from tally.database import foreign
from tally.errors import SpecError, StorageAwayError, StorageError, TallyError
from tally.masking import mask
from tally.optional import needed

if TYPE_CHECKING:
    from tally.sources.sql.base import OpenQuery


class _Line(NamedTuple):
    """extra: what brings its driver."""

    module: str
    extra: str | None = None


DATABASES = {
    "postgresql": _Line("tally.sources.sql.postgresql", "postgres"),
    "postgres": _Line("tally.sources.sql.postgresql", "postgres"),
    "mariadb": _Line("tally.sources.sql.mysql", "mariadb"),
    "mysql": _Line("tally.sources.sql.mysql", "mariadb"),
    "sqlite": _Line("tally.sources.sql.sqlite"),
    "duckdb": _Line("tally.sources.sql.duckdb"),
}
"""By the scheme of URLs."""


def is_sql(place: str) -> bool:
    """Whether a source is a database: by its URL, or by the variable that holds it."""
    return foreign.is_database(place) or foreign.variable(place.partition("#")[0]) is not None


def parted(place: str) -> tuple[str, str | None]:
    """A database's URL, and the query at its end, if there is one: what follows ``query=``, as it stands or as URLs
    write it."""
    found = re.search(r"[?&]query=", place)
    if found is None or "#" in place[: found.start()]:
        return place, None
    query = place[found.end() :]
    # SQL has spaces, and URLs have none.
    return place[: found.start()], query if re.search(r"\s", query) else unquote(query)


@contextmanager
def opened(address: str, query: str, *, table: str | None = None) -> Iterator[OpenQuery]:
    """A query of a database, whose columns are known and whose rows are not read yet.

    address: its URL, or ``env:NAME``. table: the one that the query takes whole, as it was named.
    Raises SpecError if the database has something against the query, or its driver is not installed; StorageAwayError
    if it does not answer, StorageError if it lets nobody in.
    """
    url = foreign.value(address, "source")
    shown = foreign.shown(url)
    scheme = foreign.scheme_of(url)
    if scheme not in DATABASES:
        raise SpecError(
            f"source: {shown} is no database that rows are read from",
            hint=f"Those are {', '.join(f'{each}://' for each in DATABASES)}.",
        )
    line = DATABASES[scheme]
    with needed(f"source: {scheme}:// needs", line.extra):
        module = import_module(line.module)
    import sqlalchemy as sa

    try:
        found: OpenQuery = module.open_query(url, query)
        try:
            yield found
        finally:
            found.close()
    except TallyError:
        raise
    except (sa.exc.DBAPIError, *module.ERRORS) as error:
        raise _told(error, shown, module, table) from None


def _told(error: Any, shown: str, module: Any, table: str | None) -> TallyError:
    cause = getattr(error, "orig", None) or error
    reason = mask(" ".join(str(cause).split()))
    if foreign.is_shut_out(cause):
        return StorageError(
            f"{shown} does not let us in: {reason}", hint="Check the database's name, the user and the password."
        )
    if module.is_away(cause):
        return StorageAwayError(f"{shown} does not answer: {reason}")
    if table is not None:
        return SpecError(
            f"source: {shown} does not give the table {table!r}: {reason}",
            hint="A table is named as the database writes it, without quotes: #TABLE or #SCHEMA.TABLE.",
        )
    return SpecError(f"query: {shown} does not take it: {reason}")
