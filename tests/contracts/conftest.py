"""The databases on which stores keep their promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

from tally.database.connect import connect
from tally.database.tables import metadata

NOBODY = 2**22 + 1
"""No process has this id."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """Each of them in turn, without rows."""
    sqlite = f"sqlite:///{tmp_path / 'tally.db'}"
    engine = connect(sqlite if request.param == "sqlite" else request.getfixturevalue("postgres"))
    yield engine
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(sa.delete(table))
    engine.dispose()


def lose(engine: sa.Engine, table: sa.Table, row_id: str) -> None:
    """As if the process that has a row had died."""
    with engine.begin() as connection:
        connection.execute(sa.update(table).where(table.c.id == row_id).values(owner_pid=NOBODY))
