"""dead items that are being replayed: a retry that comes to nothing leaves its job as it was"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # Not in a batch, which would copy the table: both databases add a column that may be empty in no time.
    op.add_column("dead_items", sa.Column("retried", sa.Integer(), nullable=True))
