"""The rows of the table ``alerts``: each is one rule's outcome in one generation of a job, and its delivery."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa

from tally.alerts import rules
from tally.database.clock import now
from tally.database.tables import alerts
from tally.text import local_time


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule's outcome. Times are seconds since the epoch by the database's clock.

    value: what was measured (of an event, 1 or 0); None where nothing could be, or the job failed before there was a
        result to measure.
    state: quiet (the rule does not hold), pending (to be sent), delivered, or failed: given up, or, with no attempts,
        ``error`` says why the rule could not be evaluated.
    error: why the last attempt failed.
    """

    id: int
    job_id: str
    generation: int
    position: int
    rule: str
    value: float | None
    state: str
    attempts: int
    error: str | None
    created_at: float
    next_at: float | None
    delivered_at: float | None

    @property
    def message_id(self) -> str:
        """The same at each attempt."""
        return f"alert_{self.job_id}_{self.generation}_{self.position}"

    def describe(self) -> str:
        """The rule, its value, and its state, in one line."""
        value = self.measured()
        if self.state == "quiet":
            return (
                f"{self.rule}: quiet{value}" if self.value is not None else f"{self.rule}: not measured, the job failed"
            )
        if self.state == "delivered":
            return f"{self.rule}: delivered {local_time(self.delivered_at)}{value}"
        if self.attempts == 0:
            outcome = "to be sent" if self.state == "pending" else f"cannot be judged: {self.error}"
            return f"{self.rule}: {outcome}{value}"
        tries = f"{self.attempts} tries, the last: {self.error}" if self.attempts > 1 else str(self.error)
        outcome = f"again after {local_time(self.next_at)}" if self.state == "pending" else "given up"
        return f"{self.rule}: not delivered, {outcome}; {tries}{value}"

    def measured(self) -> str:
        """`` (17)``, or nothing where there is no number."""
        if self.value is None or self.rule in rules.EVENTS:
            return ""
        return f" ({rules.shown(rules.parse(self.rule), self.value)})"


def alerts_of(engine: sa.Engine, job_id: str) -> list[Alert]:
    """A job's alerts: of each generation, in the order of the rules."""
    query = select_alerts().where(alerts.c.job_id == job_id).order_by(alerts.c.generation, alerts.c.position)
    with engine.connect().execution_options(reading=True) as connection:
        return [Alert(**row) for row in connection.execute(query).mappings()]


def resend(engine: sa.Engine, job_id: str) -> int:
    """Make the job's alerts that are not delivered due now, also those given up. Returns how many there are."""
    given_up = sa.and_(alerts.c.state == "failed", alerts.c.attempts > 0)
    with engine.begin() as connection:
        changed = connection.execute(
            sa.update(alerts)
            .where(alerts.c.job_id == job_id, sa.or_(alerts.c.state == "pending", given_up))
            .values(state="pending", attempts=0, next_at=now())
        )
    return changed.rowcount


def select_alerts() -> sa.Select[Any]:
    """The columns of an :class:`Alert`."""
    return sa.select(*(alerts.c[field.name] for field in fields(Alert)))
