"""when the process began that has a lease: its id may be another's by now"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"

TABLES = ("endpoints", "jobs", "pipeline_runs", "runs", "sweeps", "alerts", "schedule_runs", "starts")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("owner_started", sa.Double(), nullable=True))
