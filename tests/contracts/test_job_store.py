"""The job store keeps its contract on every database that it is meant for."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tally.jobs.store import JobStore
from tally.testing.jobs import JobStoreContract


class TestJobStore(JobStoreContract):
    @pytest.fixture
    def store(self, engine: sa.Engine) -> JobStore:
        return JobStore(engine)
