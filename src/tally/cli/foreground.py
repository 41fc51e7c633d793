"""A job that a command drives in the foreground, and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tally.cli.console import say
from tally.errors import DatabaseAwayError, ServerAwayError, TallyError

if TYPE_CHECKING:
    from tally.engines.base import Engine
    from tally.jobs.events import Progress
    from tally.jobs.facade import Jobs
    from tally.jobs.store import JobRecord


TOO_MANY_DEAD = 3
"""The exit code of a job that is finished, with more dead items than ``--fail-on-dead`` allows."""


def see_through(
    jobs: Jobs,
    job_id: str,
    *,
    quiet: bool,
    retry_dead: bool = False,
    here: bool = False,
    engine: Engine | None = None,
    fail_on_dead: float | None = None,
) -> int:
    """Drive the job in the foreground, and say how it ended; the exit code. here: in this process in any case.

    fail_on_dead: the share of dead items above which a finished job is no success.
    """
    from tally import terminal

    try:
        record = terminal.run(jobs, job_id, quiet=quiet, retry_dead=retry_dead, here=here, engine=engine)
    except TallyError as error:
        if job_id not in (error.hint or "") and (what_next := _what_next(jobs, job_id, error)):
            error.hint = f"{error.hint}\n  {what_next}" if error.hint else what_next
        raise
    except KeyboardInterrupt:  # pressed twice, before there was anything to stop
        return _interrupted(jobs.get(job_id))
    if record.state == "finished":
        if not quiet:
            say(summary(record), err=True)
        if fail_on_dead is not None and record.dead > fail_on_dead * record.done:
            allowed = f"{100 * fail_on_dead:.10g}%"
            say(f"{record.dead:,} of {record.done:,} {record.unit} failed, over --fail-on-dead {allowed}", err=True)
            return TOO_MANY_DEAD
        return 0
    if record.state == "interrupted":
        return _interrupted(record)
    if record.alive or record.state == "waiting":  # the user has stopped following it
        say(
            f"job {record.id} continues {jobs.elsewhere}: {record.done:,} {record.unit} are done\n"
            f"  Follow it with: tally jobs resume {record.id}   Stop it with: tally jobs cancel {record.id}",
            err=True,
        )
        return 130
    say(f"job {record.id} is {record.state}", err=True)
    return 1


def _what_next(jobs: Jobs, job_id: str, error: TallyError) -> str | None:
    """What the user can do about a job that failed or was interrupted, as far as the database can be asked."""
    try:
        record = jobs.get(job_id)
    except (DatabaseAwayError, ServerAwayError):
        record = None
    if record is not None and record.state == "finished" and record.error is not None:
        as_it_was = "The job is as it was, and so are its results."
        if "--overwrite" in (error.hint or ""):  # the same retry would be refused again
            return as_it_was
        return f"{as_it_was} After mending the cause: tally jobs retry {job_id} --dead"
    if record is not None and record.state not in ("failed", "interrupted"):
        return None
    if any(said in (error.hint or "") for said in ("--overwrite", "the same command")):
        return None  # the error says so itself
    if record is not None and record.done == record.dead:
        # A model that is mended is another model, with which this job cannot go on: the next one takes its place.
        return "Nothing is scored yet. After mending the cause, give the same command again"
    return f"What is done is saved. After mending the cause, go on with: tally jobs resume {job_id}"


def _interrupted(record: JobRecord) -> int:
    say(
        f"job {record.id} is interrupted: {record.done:,} {record.unit} are done and saved\n"
        f"  Go on with: tally jobs resume {record.id}",
        err=True,
    )
    return 130


def summary(record: JobRecord) -> str:
    """How a finished job went, in two or three lines."""
    seconds = record.usage.get("seconds", 0.0)
    rate = record.done / seconds if seconds else 0.0
    scored = record.done - record.dead
    time_taken = f"{duration(seconds)} ({rate:,.1f} {record.unit}/s)"
    lines = [
        f"job {record.id} finished: {scored:,} of {record.items:,} {record.unit} scored in {time_taken}",
        f"  results: {record.spec['out']}",
    ]
    lines += [f"  note: {note}" for note in (record.manifest or {}).get("notes", [])]
    if record.dead:
        lines.append(f"  {record.dead:,} failed; see them with: tally jobs dead {record.id}")
    if (spent := cost(record)) is not None:
        lines.append(f"  cost: {spent}")
    return "\n".join(lines)


def cost(record: JobRecord) -> str | None:
    """What the job has cost so far, where its price is known."""
    price = record.spec.get("price_per_hour")
    if price is None:
        return None
    spent = price * record.usage.get("seconds", 0.0) / 3600
    each = f", {1000 * spent / record.done:.4f} per thousand items" if record.done else ""
    return f"{spent:.4f} at {price:g} per hour{each}"


def share(record: JobRecord | Progress) -> str:
    """How many of its items are done."""
    if not record.planned or not record.items:
        return f"{record.done:,}"
    return f"{record.done:,}/{record.items:,} ({100 * record.done // record.items}%)"


def duration(seconds: float) -> str:
    """Seconds as people write them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
