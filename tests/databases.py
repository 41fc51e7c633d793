"""Empty databases of every kind that rows are read from and go into."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
import sqlalchemy as sa
from tests.services import postgres_database, require

from tally.database import foreign

KINDS = ("sqlite", "duckdb", "postgresql", "mariadb")


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a new, empty database."""
    with ExitStack() as stack:
        if kind in foreign.FILES:
            yield f"{kind}:///{folder / f'rows.{kind}'}"
        elif kind == "postgresql":
            url = sa.make_url(stack.enter_context(postgres_database()))
            stack.enter_context(pytest.MonkeyPatch.context()).setenv("PGPASSWORD", url.password or "none")
            yield url.set(drivername="postgresql", password=None).render_as_string()
        else:
            pytest.importorskip("pymysql")
            server = sa.create_engine("mariadb+pymysql://root@127.0.0.1:3306", isolation_level="AUTOCOMMIT")
            stack.callback(server.dispose)
            require("MariaDB", _answers(server))
            name = f"tally_test_{secrets.token_hex(6)}"
            with server.connect() as connection:
                connection.exec_driver_sql(f"CREATE DATABASE {name}")
            stack.callback(_dropped, server, name)
            yield f"mariadb://root@127.0.0.1:3306/{name}"


def _dropped(server: sa.Engine, name: str) -> None:
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")


def _answers(server: sa.Engine) -> bool:
    try:
        server.connect().close()
    except sa.exc.DBAPIError:
        return False
    return True


def execute(url: str, *statements: str) -> None:
    """Run SQL in the database."""
    if url.startswith("duckdb:"):
        with duckdb.connect(foreign.file_of(url)) as connection:
            for each in statements:
                connection.execute(each)
        return
    with engine_of(url).begin() as connection:
        for each in statements:
            connection.execution_options(no_parameters=True).exec_driver_sql(each)


def in_table(url: str, query: str = "SELECT * FROM found ORDER BY 1, 2") -> Sequence[tuple[Any, ...]]:
    """The rows that the query gives."""
    if url.startswith("duckdb:"):
        with duckdb.connect(foreign.file_of(url)) as connection:
            return connection.execute(query).fetchall()
    with engine_of(url).connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def engine_of(url: str) -> sa.Engine:
    """SQLAlchemy's engine, which keeps no connection."""
    made = sa.make_url(url)
    return sa.create_engine(made.set(drivername=foreign.DRIVERS[made.drivername]), poolclass=sa.NullPool)
