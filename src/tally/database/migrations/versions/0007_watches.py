"""watches, and the objects that they have seen"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "watches",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("exclude", sa.Text(), nullable=True),
        sa.Column("template", sa.JSON(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("parallel", sa.Integer(), nullable=False),
        sa.Column("paused", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("looked_at", sa.Double(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "watch_objects",
        sa.Column("watch", sa.String(length=128), nullable=False),
        sa.Column("object", sa.String(length=32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=True),
        sa.ForeignKeyConstraint(["watch"], ["watches.name"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("watch", "object"),
    )
    with op.batch_alter_table("watch_objects", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_watch_objects_job_id"), ["job_id"], unique=False)
