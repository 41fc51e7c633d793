"""nonces of jobs and chunks: a commit whose answer was lost may be tried again"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # Not in batches, which would copy the tables: both databases add a column that may be empty in no time.
    op.add_column("jobs", sa.Column("nonce", sa.String(length=32), nullable=True))
    op.add_column("chunks", sa.Column("nonce", sa.String(length=32), nullable=True))
