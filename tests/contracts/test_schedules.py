"""The store of schedules keeps its contract on every database that it is meant for."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tally.testing.schedules import ScheduleStoreContract
from tally.triggers.store import ScheduleStore


class TestScheduleStore(ScheduleStoreContract):
    @pytest.fixture
    def store(self, engine: sa.Engine) -> ScheduleStore:
        return ScheduleStore(engine)
