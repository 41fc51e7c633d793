"""which run of a pipeline does a schedule's run"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.add_column("schedule_runs", sa.Column("pipeline_id", sa.String(32), nullable=True))
