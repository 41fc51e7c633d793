"""Evaluating a job's rules once it has finished or failed, by its row and its results. No model is opened."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from tally.alerts import job as alerted
from tally.alerts import rules, webhook
from tally.alerts.job import AlertedJob
from tally.alerts.rules import Rule
from tally.database.clock import now
from tally.database.tables import alerts, jobs
from tally.errors import SourceNotFoundError, SpecError, TallyError, error_line
from tally.text import storable

_NO_WEBHOOK = "alerts: there is no webhook to send them to"
_NO_ALERT = "webhook: there is no alert to send to it"


def unpaired(fields: Mapping[str, Any]) -> list[str]:
    """What a job that is kept to be run later has against it: rules without a webhook, or a webhook without rules.

    Its address and the secret may be known only to the process that runs it, so they are looked at there.
    """
    if fields.get("alerts") and not fields.get("webhook"):
        return [f"{_NO_WEBHOOK}; add webhook: https://..., or webhook: env:NAME"]
    if fields.get("webhook") and not fields.get("alerts"):
        return [f"{_NO_ALERT}; add a rule, such as alerts: [failed]"]
    return []


def check(alert_rules: Sequence[str], hook: str | None, columns: Collection[str] | None) -> None:
    """Whether alerts with these rules could be evaluated and sent. Raises SpecError with every problem.

    columns: of the results, as far as they are known before; none where they are not rows.
    """
    problems: list[str] = []
    hint = None
    if alert_rules and hook is None:
        problems.append(_NO_WEBHOOK)
        hint = "Add --webhook https://..., or --webhook env:NAME to keep the address in the environment."
    if hook is not None and not alert_rules:
        problems.append(_NO_ALERT)
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


def evaluate(engine: sa.Engine, job_id: str, *, error: BaseException | None = None) -> None:
    """Evaluate the rules of a job that has finished or failed; does nothing for other jobs.

    error: what the job failed with, if it has just done so.
    Repeating it changes nothing, except that a rule which was quiet, or could not be evaluated, may hold by now: the
    job has failed, and then was resumed. A rule is sent once for each generation of the results.
    """
    job = alerted.read(engine, job_id)
    if job is None or not job.rules or job.state not in ("finished", "failed"):
        return
    outcomes = {text: _outcome(rules.parse(text), job, error) for text in job.rules}
    these = (alerts.c.job_id == job.id, alerts.c.generation == job.generation)
    open_again = sa.or_(alerts.c.state == "quiet", sa.and_(alerts.c.state == "failed", alerts.c.attempts == 0))
    with engine.begin() as connection:
        # Locked, so that of two that evaluate the job the second finds the first one's rows.
        if connection.scalar(sa.select(jobs.c.id).where(jobs.c.id == job.id).with_for_update()) is None:
            return
        known = {row.rule: row for row in connection.execute(sa.select(alerts).where(*these))}
        free = 1 + max((row.position for row in known.values()), default=-1)
        for text, outcome in outcomes.items():
            values = {**outcome, "created_at": now(), "next_at": now() if outcome["state"] == "pending" else None}
            if text in known:
                connection.execute(sa.update(alerts).where(alerts.c.id == known[text].id, open_again).values(**values))
                continue
            row = {"job_id": job.id, "generation": job.generation, "position": free, "rule": text, "attempts": 0}
            connection.execute(sa.insert(alerts).values(**row, **values))
            free += 1


def _outcome(rule: Rule, job: AlertedJob, error: BaseException | None) -> dict[str, Any]:
    """The columns ``value``, ``state`` and ``error`` of a rule's row."""
    try:
        value = _measure(rule.name, job, error)
    except Exception as problem:  # whatever it is, the job's results are there, and it has ended as it has
        reason = problem.message if isinstance(problem, TallyError) else error_line(problem)
        return {"value": None, "state": "failed", "error": storable(reason)}
    holds = value is not None and rule.holds(value)
    return {"value": value, "state": "pending" if holds else "quiet", "error": None}


def _measure(name: str, job: AlertedJob, error: BaseException | None) -> float | None:
    match name:
        case "anomalies":
            return _anomalies(job) if job.state == "finished" else None
        case "dead_share":
            return job.dead / job.done if job.done else 0.0
        case "failed":
            return float(job.state == "failed")
        case "no_data":
            nothing = job.planned and job.items == 0  # a job may fail before its source was listed
            return float(nothing or isinstance(error, SourceNotFoundError))
        case _:
            return float({"rows": job.rows, "items": job.items, "dead": job.dead, "seconds": job.seconds}[name])


def _anomalies(job: AlertedJob) -> float:
    """Rows of the finished output whose ``anomaly`` is true."""
    from tally.sinks.base import OutputDescription
    from tally.sinks.factory import reopen
    from tally.sinks.query import query

    if job.rows == 0:
        return 0.0
    sink = reopen(OutputDescription.from_json(job.output))
    if sink.holder() != job.id:
        raise SpecError(f"the results are no longer at {job.out}")
    if "anomaly" not in query(sink, (), "FROM results LIMIT 0").column_names:
        raise SpecError("the results have no column 'anomaly'")
    counted = query(sink, (), "SELECT count_if(TRY_CAST(anomaly AS BOOLEAN)) AS anomalies FROM results")
    return float(counted["anomalies"][0].as_py())
