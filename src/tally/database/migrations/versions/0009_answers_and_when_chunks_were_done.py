"""answers that a server has given, by their idempotency keys; and when chunks were done"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    # Not in batches, which would copy the table.
    op.add_column("chunks", sa.Column("done_at", sa.Double(), nullable=True))
    op.create_index("chunks_by_time", "chunks", ["done_at"], unique=False)
    op.create_table(
        "answers",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
