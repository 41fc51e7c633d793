"""jobs that are split: the parts say whose they are, and what of the source is theirs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("parent", sa.String(32), nullable=True))
    op.add_column("jobs", sa.Column("part", sa.JSON(), nullable=True))
    some = sa.text("parent IS NOT NULL")
    op.create_index("jobs_by_parent", "jobs", ["parent"], sqlite_where=some, postgresql_where=some)
