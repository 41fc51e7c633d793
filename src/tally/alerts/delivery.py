"""Delivering alerts to their webhook, at least once each.

A sender takes the alert's lease first, and writes down afterwards what came of it. When a sender is killed in
between, its lease runs out, and the next one sends the alert again under the same id, by which the receiver knows it.
Attempts, and when the next is due, are in the row, so that any process can continue where another stopped.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

import tally
from tally.alerts import job as alerted
from tally.alerts import webhook
from tally.alerts.alert import Alert, alerts_of, select_alerts
from tally.alerts.evaluation import evaluate
from tally.alerts.job import AlertedJob
from tally.database import lease
from tally.database.clock import now
from tally.database.tables import alerts
from tally.errors import DatabaseAwayError, SpecError, TallyError
from tally.text import storable

log = logging.getLogger(__name__)

TRIES = 12
FIRST_DELAY, DELAY_FACTOR, LONGEST_DELAY = 2.0, 3.0, 8 * 3600.0
"""Seconds to the second try, the factor from each delay to the next, and the longest: about 21 hours in all."""

LEASE_SECONDS = 60.0
"""A try takes a quarter of that at most."""

PATIENCE = 10.0
"""Seconds that the end of a job waits for its alerts to be delivered."""

LOOK_SECONDS = 10.0
"""Seconds between two looks for alerts of all jobs that are due."""

PASS_SECONDS = 30.0
"""Limit for one call; the rest of what is due is left to the next."""

_LONGEST_ERROR = 4000


def conclude(
    engine: sa.Engine,
    job_id: str,
    *,
    error: BaseException | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Evaluate the rules of a job that has ended, deliver for a while what holds, and say how that went.

    error: what the job failed with.
    """
    job = alerted.read(engine, job_id)
    if job is None or not job.rules:
        return
    evaluate(engine, job_id, error=error)
    deliver(engine, job_id=job_id, patience=PATIENCE)
    concluded = [alert for alert in alerts_of(engine, job_id) if alert.generation == job.generation]
    for alert in concluded:
        if alert.state != "quiet":
            say(f"alert: {alert.describe()}")
    if any(alert.state == "pending" for alert in concluded):
        say(f"  it is tried again by: tally schedule run --forever   (or now: tally jobs alerts {job_id} --send)")


def deliver(engine: sa.Engine, *, job_id: str | None = None, patience: float = 0.0) -> None:
    """Send the alerts that are due, of one job or of all. Several processes may do so at once.

    patience: seconds to keep going, also waiting for tries that are not due yet. The outcome is in the rows.
    """
    begun = time.monotonic()
    until = begun + (patience or PASS_SECONDS)
    while time.monotonic() < until:
        if (acquired := _acquire(engine, job_id)) is not None:
            _send(engine, *acquired)
            continue
        pause = _due_in(engine, job_id) if patience else None
        if pause is None or time.monotonic() + pause > until:
            return
        time.sleep(max(pause, 0.02))


@contextmanager
def delivering(engine: sa.Engine) -> Iterator[None]:
    """Meanwhile, a thread delivers the alerts of all jobs, also of those whose process was killed before it could."""
    stopping = threading.Event()

    def work() -> None:
        while not stopping.is_set():
            try:
                for job_id in alerted.unevaluated(engine):
                    evaluate(engine, job_id)
                deliver(engine)
            except DatabaseAwayError:
                pass  # whatever else works on it says so
            except (OSError, TallyError) as error:
                log.warning("alerts: %s", error)
            stopping.wait(LOOK_SECONDS)

    threading.Thread(target=work, name="tally-alerts", daemon=True).start()
    try:
        yield
    finally:
        stopping.set()


def _acquire(engine: sa.Engine, job_id: str | None) -> tuple[Alert, str] | None:
    """Take the lease of the alert that has been due longest, with its token; None if nothing is due."""
    due = (alerts.c.state == "pending", alerts.c.next_at <= now())
    query = select_alerts().where(*due, lease.is_expired(alerts)).order_by(alerts.c.next_at, alerts.c.id).limit(1)
    if job_id is not None:
        query = query.where(alerts.c.job_id == job_id)
    token = lease.new_token()
    while True:
        with engine.begin() as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            # On PostgreSQL another process may have been faster since: then look for the next one.
            this = (alerts.c.id == row["id"], *due)
            if lease.acquire(connection, alerts, *this, token=token, seconds=LEASE_SECONDS):
                return Alert(**row), token


def _due_in(engine: sa.Engine, job_id: str | None) -> float | None:
    """Seconds until the next alert may be sent; None if none is pending."""
    free_at = sa.case((alerts.c.lease_until > alerts.c.next_at, alerts.c.lease_until), else_=alerts.c.next_at)
    query = sa.select(sa.func.min(free_at) - now()).where(alerts.c.state == "pending")
    if job_id is not None:
        query = query.where(alerts.c.job_id == job_id)
    with engine.connect().execution_options(reading=True) as connection:
        seconds: float | None = connection.scalar(query)
    return None if seconds is None else max(0.0, seconds)


def _send(engine: sa.Engine, alert: Alert, token: str) -> None:
    job = alerted.read(engine, alert.job_id)
    if job is None:
        return  # deleted meanwhile, and its alerts with it
    try:
        webhook.post(webhook.address(job.webhook), webhook.secret(), alert.message_id, _body(alert, job))
    except webhook.UndeliveredError as error:
        _failed(engine, alert, token, f"{webhook.shown(job.webhook)}: {error}", final=error.final)
    except SpecError as error:
        _failed(engine, alert, token, error.message, final=False)
    else:
        log.info("alert %s of job %s is delivered", alert.message_id, alert.job_id)
        _settle(
            engine, alert, token,
            state="delivered", attempts=alert.attempts + 1, error=None, next_at=None, delivered_at=now(),
        )  # fmt: skip


def _failed(engine: sa.Engine, alert: Alert, token: str, reason: str, *, final: bool) -> None:
    log.warning("alert %s of job %s was not delivered: %s", alert.message_id, alert.job_id, reason)
    attempts = alert.attempts + 1
    if final or attempts >= TRIES:
        values: dict[str, Any] = {"state": "failed", "next_at": None}
    else:
        values = {"next_at": now() + _delay(attempts)}
    _settle(engine, alert, token, attempts=attempts, error=storable(reason), **values)


def _settle(engine: sa.Engine, alert: Alert, token: str, **values: Any) -> None:
    """Write down what came of it, unless the lease ran out and another process sends it now."""
    with engine.begin() as connection:
        lease.release(connection, alerts, alerts.c.id == alert.id, token=token, **values)


def _delay(attempts: int) -> float:
    """Seconds to the next try; a fifth more or less, so that many that failed together do not come back together."""
    wait: float = min(FIRST_DELAY * DELAY_FACTOR ** (attempts - 1), LONGEST_DELAY)
    return wait * random.uniform(0.8, 1.2)  # noqa: S311


def _body(alert: Alert, job: AlertedJob) -> bytes:
    """The JSON that is sent: the rule as it was evaluated, and the job as it is now."""
    body = {
        "id": alert.message_id,
        "type": "job.alert",
        "timestamp": datetime.fromtimestamp(alert.created_at, UTC).isoformat(timespec="milliseconds"),
        "data": {
            "text": f"Tally job {job.id}: {alert.rule}{alert.measured()}, {storable(job.out)}",
            "rule": alert.rule,
            "value": alert.value,
            "job": {
                "id": job.id,
                "generation": alert.generation,
                "state": job.state,
                "out": storable(job.out),
                "model": {"name": job.model, "version": job.version},
                "items": job.items,
                "done": job.done,
                "dead": job.dead,
                "rows": job.rows,
                "seconds": job.seconds,
                "error": job.error and job.error[:_LONGEST_ERROR],
            },
            "tally": tally.__version__,
        },
    }
    return json.dumps(body, separators=(",", ":")).encode()
