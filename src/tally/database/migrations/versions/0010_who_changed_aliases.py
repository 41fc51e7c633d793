"""who changed aliases"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("model_alias_history", sa.Column("who", sa.String(length=200), nullable=True))
