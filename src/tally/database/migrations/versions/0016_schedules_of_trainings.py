"""what does a schedule's run, where that is no job, and what came of it"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.add_column("schedule_runs", sa.Column("training_id", sa.String(32), nullable=True))
    op.add_column("schedule_runs", sa.Column("sweep_id", sa.String(32), nullable=True))
    op.add_column("schedule_runs", sa.Column("outcome", sa.Text(), nullable=True))
