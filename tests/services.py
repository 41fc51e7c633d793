"""Services that tests need and not every machine has."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

POSTGRES = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"


def require(name: str, available: bool) -> None:
    """Skip the test where a service is absent; in continuous integration (``CI=true``) it has to be there."""
    if not available:
        message = f"{name} is not there"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@contextmanager
def postgres_database() -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database; it is dropped afterwards.

    The server is the one at ``TALLY_TEST_POSTGRES``, or one on this machine that lets ``postgres`` in.
    """
    url = sa.make_url(os.environ.get("TALLY_TEST_POSTGRES", POSTGRES))
    shown = url.render_as_string(hide_password=True)
    server = sa.create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 5})
    try:
        try:
            server.connect().close()
        except sa.exc.OperationalError:
            available = False
        else:
            available = True
        require(f"PostgreSQL at {shown}", available)
        name = f"tally_test_{secrets.token_hex(6)}"
        with server.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        try:
            yield url.set(database=name).render_as_string(hide_password=False)
        finally:
            with server.connect() as connection:
                connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        server.dispose()
