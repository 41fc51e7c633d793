"""What alerts know about a job: the columns of its row that rules measure and messages tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from tally.database.clock import now
from tally.database.tables import alerts, jobs

_LOOK_BACK = 7 * 86_400.0
"""Seconds: a job that ended longer ago and was not evaluated stays so."""


@dataclass(frozen=True, slots=True)
class AlertedJob:
    """A job as alerts see it. out: as the user wrote it. output: what its output is, as its row says.

    seconds: of work. planned: everything in the source is known; ``items`` is then all of it.
    """

    id: str
    generation: int
    state: str
    rules: tuple[str, ...]
    webhook: str = field(repr=False)
    out: str
    output: dict[str, Any]
    model: str | None
    version: int | None
    planned: bool
    items: int
    done: int
    dead: int
    rows: int
    seconds: float
    error: str | None


def read(engine: sa.Engine, job_id: str) -> AlertedJob | None:
    """The job as it is now; None if it was deleted."""
    with engine.connect().execution_options(reading=True) as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().first()
    if row is None:
        return None
    spec, model = row["spec"], row["model"]
    return AlertedJob(
        id=row["id"],
        generation=row["generation"],
        state=row["state"],
        rules=tuple(spec.get("alerts") or ()),
        webhook=spec.get("webhook") or "",
        out=spec["out"],
        output=row["output"] or {},
        model=model.get("name"),
        version=model.get("version"),
        planned=bool(row["planned"]),
        items=row["items"],
        done=row["done"],
        dead=row["dead"],
        rows=row["rows"],
        seconds=float(row["usage"].get("seconds", 0.0)),
        error=row["error"],
    )


def unevaluated(engine: sa.Engine) -> list[str]:
    """Ids of jobs with rules that ended within a week and were not evaluated: their coordinator was killed before."""
    evaluated = sa.select(alerts.c.id).where(alerts.c.job_id == jobs.c.id, alerts.c.generation == jobs.c.generation)
    query = sa.select(jobs.c.id, jobs.c.spec).where(
        jobs.c.state.in_(("finished", "failed")),
        sa.func.coalesce(jobs.c.finished_at, jobs.c.started_at) > now() - _LOOK_BACK,
        # Text, as PostgreSQL's JSON functions refuse documents with file names that are not UTF-8. It may find more.
        sa.cast(jobs.c.spec, sa.Text).contains('"alerts": ["', autoescape=True),
        ~evaluated.exists(),
    )
    with engine.connect().execution_options(reading=True) as connection:
        return [row.id for row in connection.execute(query) if row.spec.get("alerts")]
