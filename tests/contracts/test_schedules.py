"""The store of schedules keeps its contract on every database that it is meant for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

from tally.database.connect import connect
from tally.database.tables import metadata
from tally.testing.schedules import ScheduleStoreContract
from tally.triggers.store import ScheduleStore


class TestSqliteSchedules(ScheduleStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ScheduleStore]:
        store = ScheduleStore(connect(f"sqlite:///{tmp_path / 'tally.db'}"))
        yield store
        store.engine.dispose()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_database() as url:
        yield url


class TestPostgresSchedules(ScheduleStoreContract):
    @pytest.fixture
    def store(self, postgres: str) -> Iterator[ScheduleStore]:
        store = ScheduleStore(connect(postgres))
        yield store
        with store.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(sa.delete(table))
        store.engine.dispose()
