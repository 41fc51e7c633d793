"""Alerts: rules that are judged once a job has finished or failed, and the webhook that those which hold are sent to.

A row of the table ``alerts`` is one rule's outcome in one generation of a job. It is sent at least once: whoever
sends it has claimed it for a while first, and says afterwards what came of it. A sender that is killed in between
lets its claim run out, and the next one sends it again, under the same id, by which the receiver knows it. Tries,
and when the next is due, are kept in the row, so that any process goes on where another stopped. Times are seconds
since the epoch by the database's clock.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

import tally
from tally.alerts import rules, webhook
from tally.alerts.rules import Rule
from tally.database import lease
from tally.database.clock import now
from tally.database.tables import alerts, jobs
from tally.errors import JobNotFoundError, SourceNotFoundError, SpecError, TallyError
from tally.jobs.store import JobRecord, JobStore
from tally.sinks.base import Sink
from tally.text import storable

log = logging.getLogger(__name__)

TRIES = 12
FIRST_DELAY, DELAY_FACTOR, LONGEST_DELAY = 2.0, 3.0, 8 * 3600.0
"""Seconds to the second try, how much longer each further delay is, and the longest: about 21 hours in all."""

LEASE_SECONDS = 60.0
"""How long a claim lasts; a try takes a quarter of that at most."""

PATIENCE = 10.0
"""Seconds that the end of a job waits for its alerts to be delivered."""

PASS_SECONDS = 30.0
"""After so long the rest of what is due is left to the next call."""

_LOOK_BACK = 7 * 86_400.0
_LONGEST_ERROR = 4000


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule's outcome.

    value: what was measured (of an event, 1 or 0); None where nothing could be, or the job failed before there was a
        result to measure.
    state: quiet (the rule does not hold), pending (to be sent), delivered, or failed: given up, or, with no attempts,
        ``error`` says why it could not be judged.
    error: why the last try failed.
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
        """The same at each try."""
        return f"alert_{self.job_id}_{self.generation}_{self.position}"

    def describe(self) -> str:
        """The rule, its value, and where it stands, in one line."""
        said = self.measured()
        if self.state == "quiet":
            return (
                f"{self.rule}: quiet{said}" if self.value is not None else f"{self.rule}: not measured, the job failed"
            )
        if self.state == "delivered":
            return f"{self.rule}: delivered {_when(self.delivered_at)}{said}"
        if self.attempts == 0:
            outcome = "to be sent" if self.state == "pending" else f"cannot be judged: {self.error}"
            return f"{self.rule}: {outcome}{said}"
        tries = f"{self.attempts} tries, the last: {self.error}" if self.attempts > 1 else str(self.error)
        outcome = f"again after {_when(self.next_at)}" if self.state == "pending" else "given up"
        return f"{self.rule}: not delivered, {outcome}; {tries}{said}"

    def measured(self) -> str:
        """`` (17)``, or nothing where there is no number."""
        if self.value is None or self.rule in rules.EVENTS:
            return ""
        return f" ({rules.shown(rules.parse(self.rule), self.value)})"


def check(alert_rules: Sequence[str], hook: str | None, columns: Collection[str] | None) -> None:
    """Whether alerts with these rules could be judged and sent. Raises SpecError with every problem.

    columns: of the results, as far as they are known before; none where they are not rows.
    """
    problems: list[str] = []
    hint = None
    if alert_rules and hook is None:
        problems.append("alerts: there is no webhook to send them to")
        hint = "Add --webhook https://..., or --webhook env:NAME to keep the address in the environment."
    if hook is not None and not alert_rules:
        problems.append("webhook: there is no alert that would be sent to it")
        hint = "Add a rule, such as --alert 'anomalies > 0'."
    if columns is not None and "anomaly" not in columns:
        problems += [
            f"alerts: {rule!r} counts rows whose column 'anomaly' is true, and the results have no such column"
            for rule in alert_rules
            if rules.parse(rule).name == "anomalies"
        ]
    if hook is not None and alert_rules:
        for needed in (lambda: webhook.address(hook), webhook.secret):
            try:
                needed()
            except SpecError as error:
                problems += error.problems
                hint = error.hint or hint
    if problems:
        raise SpecError(problems, hint=hint)


def conclude(
    store: JobStore,
    record: JobRecord,
    sink: Sink,
    *,
    error: BaseException | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Judge the rules of a job that has ended, send what holds, and say how that went; for a while only.

    error: what the job failed with.
    """
    if not record.spec.get("alerts"):
        return
    evaluate(store, record, sink, error=error)
    deliver(store, job_id=record.id, patience=PATIENCE)
    told = [alert for alert in of(store, record.id) if alert.generation == record.generation]
    for alert in told:
        if alert.state != "quiet":
            say(f"alert: {alert.describe()}")
    if any(alert.state == "pending" for alert in told):
        say(f"  it is tried again by: tally schedule run --forever   (or now: tally jobs alerts {record.id} --send)")


def of(store: JobStore, job_id: str) -> list[Alert]:
    """A job's alerts: of each generation, in the order of the rules."""
    query = _select().where(alerts.c.job_id == job_id).order_by(alerts.c.generation, alerts.c.position)
    with store.engine.connect().execution_options(reading=True) as connection:
        return [Alert(**row) for row in connection.execute(query).mappings()]


# -- judging -------------------------------------------------------------------------------------------


def evaluate(store: JobStore, record: JobRecord, sink: Sink, *, error: BaseException | None = None) -> None:
    """Judge the rules of a job that has finished or failed; of other jobs, nothing.

    Repeating it changes nothing, but that a rule which was quiet, or could not be judged, may hold by now: the job
    has failed, and then was resumed. A rule is sent once for each generation of the results.
    """
    texts: list[str] = record.spec.get("alerts") or []
    if not texts or record.state not in ("finished", "failed"):
        return
    outcomes = {text: _judge(rules.parse(text), store, record, sink, error) for text in texts}
    it = (alerts.c.job_id == record.id, alerts.c.generation == record.generation)
    again = sa.or_(alerts.c.state == "quiet", sa.and_(alerts.c.state == "failed", alerts.c.attempts == 0))
    with store.engine.begin() as connection:
        # Locked, so that of two that judge the job the second finds the first one's rows.
        if connection.scalar(sa.select(jobs.c.id).where(jobs.c.id == record.id).with_for_update()) is None:
            return
        known = {row.rule: row for row in connection.execute(sa.select(alerts).where(*it))}
        free = 1 + max((row.position for row in known.values()), default=-1)
        for text, outcome in outcomes.items():
            values = {**outcome, "created_at": now(), "next_at": now() if outcome["state"] == "pending" else None}
            if text in known:
                connection.execute(sa.update(alerts).where(alerts.c.id == known[text].id, again).values(**values))
                continue
            connection.execute(
                sa.insert(alerts).values(
                    job_id=record.id, generation=record.generation, position=free, rule=text, attempts=0, **values
                )
            )
            free += 1


def unevaluated(store: JobStore) -> list[JobRecord]:
    """Jobs with rules that ended within a week and were not judged: their coordinator was killed just before it did."""
    judged = sa.select(alerts.c.id).where(alerts.c.job_id == jobs.c.id, alerts.c.generation == jobs.c.generation)
    query = sa.select(jobs.c.id).where(
        jobs.c.state.in_(("finished", "failed")),
        sa.func.coalesce(jobs.c.finished_at, jobs.c.started_at) > now() - _LOOK_BACK,
        jobs.c.spec["alerts"].as_string() != "[]",
        ~judged.exists(),
    )
    with store.engine.connect().execution_options(reading=True) as connection:
        found = connection.scalars(query).all()
    return [store.get(job_id) for job_id in found]


def _judge(rule: Rule, store: JobStore, record: JobRecord, sink: Sink, error: BaseException | None) -> dict[str, Any]:
    """The columns ``value``, ``state`` and ``error`` of a rule's row."""
    try:
        value = _measure(rule.name, store, record, sink, error)
    except Exception as problem:  # whatever it is, the job's results are there, and it has ended as it has
        said = problem.message if isinstance(problem, TallyError) else f"{type(problem).__name__}: {problem}"
        return {"value": None, "state": "failed", "error": storable(said)}
    holds = value is not None and rule.holds(value)
    return {"value": value, "state": "pending" if holds else "quiet", "error": None}


def _measure(name: str, store: JobStore, record: JobRecord, sink: Sink, error: BaseException | None) -> float | None:
    match name:
        case "anomalies":
            return _anomalies(store, record, sink) if record.state == "finished" else None
        case "dead_share":
            return record.dead / record.done if record.done else 0.0
        case "seconds":
            return float(record.usage.get("seconds", 0.0))
        case "failed":
            return float(record.state == "failed")
        case "no_data":
            nothing = record.planned and record.items == 0  # a job may fail before its source was listed
            return float(nothing or isinstance(error, SourceNotFoundError))
        case _:
            return float({"rows": record.rows, "items": record.items, "dead": record.dead}[name])


def _anomalies(store: JobStore, record: JobRecord, sink: Sink) -> float:
    """Rows of the final output whose ``anomaly`` is true."""
    from tally.sinks.query import query

    if record.rows == 0:
        return 0.0
    if sink.holder() != record.id:
        raise SpecError(f"the results are no longer at {record.spec['out']}")
    outputs = list(store.outputs(record.id))
    if "anomaly" not in query(sink, outputs, "FROM results LIMIT 0").column_names:
        raise SpecError("the results have no column 'anomaly'")
    counted = query(sink, outputs, "SELECT count_if(TRY_CAST(anomaly AS BOOLEAN)) AS anomalies FROM results")
    return float(counted["anomalies"][0].as_py())


# -- sending -------------------------------------------------------------------------------------------


def deliver(store: JobStore, *, job_id: str | None = None, patience: float = 0.0) -> None:
    """Send the alerts that are due, of one job or of all. Several processes may do so at once.

    patience: seconds to go on for, waiting for tries that are not due yet. What comes of it is in the rows (``of``).
    """
    begun = time.monotonic()
    until = begun + (patience or PASS_SECONDS)
    while time.monotonic() < until:
        if (claim := _claim(store.engine, job_id)) is not None:
            _send(store, *claim)
            continue
        pause = _due_in(store.engine, job_id) if patience else None
        if pause is None or time.monotonic() + pause > until:
            return
        time.sleep(max(pause, 0.02))


def reopen(store: JobStore, job_id: str) -> int:
    """Have the job's alerts that are not delivered sent now, given up ones too. Returns how many those are."""
    given_up = sa.and_(alerts.c.state == "failed", alerts.c.attempts > 0)
    with store.engine.begin() as connection:
        changed = connection.execute(
            sa.update(alerts)
            .where(alerts.c.job_id == job_id, sa.or_(alerts.c.state == "pending", given_up))
            .values(state="pending", attempts=0, next_at=now())
        )
    return changed.rowcount


def _claim(engine: sa.Engine, job_id: str | None) -> tuple[Alert, str] | None:
    """Take what has been due longest, and the token that says so; None if nothing is due."""
    due = (alerts.c.state == "pending", alerts.c.next_at <= now())
    query = _select().where(*due, lease.is_expired(alerts)).order_by(alerts.c.next_at, alerts.c.id).limit(1)
    if job_id is not None:
        query = query.where(alerts.c.job_id == job_id)
    token = lease.new_token()
    while True:
        with engine.begin() as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            # Looked at once more: on PostgreSQL another may have claimed it since.
            if lease.acquire(connection, alerts, alerts.c.id == row["id"], *due, token=token, seconds=LEASE_SECONDS):
                return Alert(**row), token


def _due_in(engine: sa.Engine, job_id: str | None) -> float | None:
    """Seconds until something may be claimed; None if nothing is pending."""
    free_at = sa.case((alerts.c.lease_until > alerts.c.next_at, alerts.c.lease_until), else_=alerts.c.next_at)
    query = sa.select(sa.func.min(free_at) - now()).where(alerts.c.state == "pending")
    if job_id is not None:
        query = query.where(alerts.c.job_id == job_id)
    with engine.connect().execution_options(reading=True) as connection:
        seconds: float | None = connection.scalar(query)
    return None if seconds is None else max(0.0, seconds)


def _send(store: JobStore, alert: Alert, token: str) -> None:
    try:
        record = store.get(alert.job_id)
    except JobNotFoundError:
        return  # forgotten meanwhile, and its alerts with it
    hook = record.spec.get("webhook") or ""
    try:
        webhook.post(webhook.address(hook), webhook.secret(), alert.message_id, _body(alert, record))
    except (webhook.UndeliveredError, SpecError) as error:
        reason = f"{webhook.shown(hook)}: {error}" if isinstance(error, webhook.UndeliveredError) else error.message
        final = isinstance(error, webhook.UndeliveredError) and error.final
        log.warning("alert %s of job %s was not delivered: %s", alert.message_id, alert.job_id, reason)
        attempts = alert.attempts + 1
        if final or attempts >= TRIES:
            values: dict[str, Any] = {"state": "failed", "next_at": None}
        else:
            values = {"next_at": now() + _delay(attempts)}
        _settle(store.engine, alert, token, attempts=attempts, error=storable(reason), **values)
    else:
        log.info("alert %s of job %s is delivered", alert.message_id, alert.job_id)
        _settle(
            store.engine, alert, token,
            state="delivered", attempts=alert.attempts + 1, error=None, next_at=None, delivered_at=now(),
        )  # fmt: skip


def _settle(engine: sa.Engine, alert: Alert, token: str, **values: Any) -> None:
    """Say what came of it, unless the claim had run out and it is somebody else's to say."""
    with engine.begin() as connection:
        lease.release(connection, alerts, alerts.c.id == alert.id, token=token, **values)


def _delay(attempts: int) -> float:
    """Seconds to the next try; a fifth more or less, so that many that failed together do not come together."""
    wait: float = min(FIRST_DELAY * DELAY_FACTOR ** (attempts - 1), LONGEST_DELAY)
    return wait * random.uniform(0.8, 1.2)  # noqa: S311


def _body(alert: Alert, record: JobRecord) -> bytes:
    """The JSON that is sent: the rule as it was judged, and the job as it is now."""
    error = record.error and record.error[:_LONGEST_ERROR]
    body = {
        "id": alert.message_id,
        "type": "job.alert",
        "timestamp": datetime.fromtimestamp(alert.created_at, UTC).isoformat(timespec="milliseconds"),
        "data": {
            "text": f"Tally job {record.id}: {alert.rule}{alert.measured()}, {storable(record.spec['out'])}",
            "rule": alert.rule,
            "value": alert.value,
            "job": {
                "id": record.id,
                "generation": alert.generation,
                "state": record.state,
                "out": storable(record.spec["out"]),
                "model": {"name": record.model.get("name"), "version": record.model.get("version")},
                "items": record.items,
                "done": record.done,
                "dead": record.dead,
                "rows": record.rows,
                "seconds": record.usage.get("seconds", 0.0),
                "error": error,
            },
            "tally": tally.__version__,
        },
    }
    return json.dumps(body, separators=(",", ":")).encode()


def _select() -> sa.Select[Any]:
    return sa.select(*(alerts.c[field.name] for field in fields(Alert)))


def _when(seconds: float | None) -> str:
    assert seconds is not None
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
