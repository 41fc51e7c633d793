"""The tables of schedules and of their runs; migrations cover them together with the job store's.

Times are seconds since the epoch: those of intervals whole ones, all others by the database's own clock.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

schedules = Table(
    "schedules",
    metadata,
    Column("name", String(128), primary_key=True),
    # The fields of the job file, with absolute places, and where the file was.
    Column("template", JSON, nullable=False),
    Column("file", Text, nullable=False),
    Column("cron", String(255), nullable=False),
    Column("timezone", String(128), nullable=False),
    Column("overlap", String(16), nullable=False),
    Column("catch_up", String(16), nullable=False),
    Column("paused", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    # Ticks up to here have become runs, or were passed over.
    Column("planned_until", Double, nullable=False),
)

schedule_runs = Table(
    "schedule_runs",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("schedule", String(128), ForeignKey("schedules.name", ondelete="CASCADE"), nullable=False),
    Column("interval_start", BigInteger, nullable=False),
    Column("interval_end", BigInteger, nullable=False),
    # pending, running, finished, failed or skipped
    Column("state", String(16), nullable=False),
    # cron, catch-up or backfill
    Column("reason", String(16), nullable=False),
    Column("again", Integer, nullable=False),  # over the results of an earlier run
    Column("job_id", String(32)),
    Column("attempts", Integer, nullable=False),  # how often it was begun
    Column("failures", Integer, nullable=False),  # how often it ended with an error
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("next_at", Double),  # not to be begun before
    Column("started_at", Double),
    Column("finished_at", Double),
    # Who is at it; the lease runs out by the database's clock.
    Column("token", String(32)),
    Column("owner_host", String(255)),
    Column("owner_pid", Integer),
    Column("lease_until", Double),
    # Both ends: another cron expression makes other intervals from the same beginnings.
    UniqueConstraint("schedule", "interval_start", "interval_end"),
    Index("schedule_runs_by_state", "schedule", "state", "interval_start"),
)
