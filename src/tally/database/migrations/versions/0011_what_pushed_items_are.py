"""what is told of pushed items beside their rows"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("pushes", sa.Column("info", sa.JSON(), nullable=True))
