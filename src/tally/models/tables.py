"""The model registry's tables; migrations cover them together with the job store's.

Times are seconds since the epoch.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)

metadata = MetaData()

# A removed version keeps its row: its number is never given to other content.
model_versions = Table(
    "model_versions",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("hash", String(71), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("removed_at", Double),
)

model_aliases = Table(
    "model_aliases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["name", "version"], ["model_versions.name", "model_versions.version"]),
)

model_alias_history = Table(
    "model_alias_history",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("name", String(128), nullable=False),
    Column("alias", String(128), nullable=False),
    Column("version", Integer, nullable=False),
    # set or rollback
    Column("action", String(16), nullable=False),
    Column("at", Double, nullable=False),
    Index("model_alias_history_by_alias", "name", "alias", "id"),
)
