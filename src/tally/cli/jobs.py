"""``tally jobs``: list, follow, stop, resume and retry jobs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tally.cli import completion, installation
from tally.cli.console import say, table
from tally.cli.foreground import cost, duration, share
from tally.cli.values import Choice, fail_on_dead, moment
from tally.jobs.states import ENDED, STATES
from tally.masking import mask
from tally.text import local_time, visible

if TYPE_CHECKING:
    from tally.jobs.facade import Jobs
    from tally.jobs.outbox import Pushes
    from tally.jobs.store import JobRecord


CANCEL_SECONDS = 10.0
"""How long a command waits for what becomes of a job that was asked to cancel."""


SOURCES = 5
"""How many sources of a job are shown."""


@click.group()
def jobs() -> None:
    """List, follow, stop, resume and retry jobs.

    JOB is a job's id, the beginning of it, or the place that it writes to.
    """


@jobs.command("list")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, 1_000_000_000),
    default=20,
    show_default=True,
    help="How many, newest first.",
)
@click.option("--state", type=Choice(STATES), help="Only jobs in this state.")
@click.option("--model", shell_complete=completion.registered, help="Only jobs with the model of this name.")
@click.option("--out", "place", help="Only jobs that write to this place.")
@click.option("--text", help="Only jobs with this in their id, model, sources or output.")
@click.option(
    "--since",
    callback=moment,
    metavar="TIME",
    help="Only jobs created at or after this time: 2026-11-28, or 2d for the last two days.",
)
@click.option("--until", callback=moment, metavar="TIME", help="Only jobs created before this time.")
@click.option("--after", metavar="PAGE", help="Continue the list: the value printed at the end of the page before.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(as_json: bool, **wanted: Any) -> None:
    """List the newest jobs. Filters combine: a job must match all of them."""
    page = installation.jobs().list(**wanted)
    records = page.jobs
    if as_json:
        for record in records:
            say(_json(record))
    elif records:
        _show(records)
    else:
        asked = any(value is not None for name, value in wanted.items() if name != "limit")
        none = "no job matches" if asked else "no jobs yet; start one with: tally score SOURCE --model MODEL --out OUT"
        say(none, err=True)
    if page.next is not None:
        say(f"there are more; the next page: --after {page.next}", err=True)


def _show(records: Sequence[JobRecord]) -> None:
    rows = [
        (
            each.id,
            each.state,
            share(each),
            f"{each.dead:,}",
            each.model["name"],
            each.spec["out"],
            local_time(each.created_at),
        )
        for each in records
    ]
    table(("JOB", "STATE", "DONE", "DEAD", "MODEL", "OUT", "CREATED"), rows)


@jobs.command(short_help="Progress, timings, cost, error of a job.")
@click.argument("job", shell_complete=completion.jobs)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(job: str, as_json: bool) -> None:
    """Everything about a job: progress, timings per stage, cost, alerts, error, where the results are."""
    jobs = installation.jobs()
    record = jobs.get(job)
    judged, pushes, parts = jobs.alerts(record.id), jobs.pushes(record.id), jobs.parts(record.id)
    if as_json:
        more: dict[str, Any] = {
            "alerts": [asdict(alert) for alert in judged],
            "parts": [asdict(each) for each in parts],
        }
        more["pushes"] = None if pushes is None else asdict(pushes)
        say(_json(record, **more))
        return
    others = [] if pushes is None else [("pushed", _pushed(pushes))]
    if parts:
        states = Counter(each.state for each in parts)
        others.append(("parts", f"{len(parts)}: " + ", ".join(f"{count} {state}" for state, count in states.items())))
    for name, value in _facts(record) + others + [("alert", alert.describe()) for alert in judged]:
        say(f"{name:<12} {visible(value)}")
    if record.error:
        say(f"{'error':<12} " + record.error.replace("\n", "\n" + " " * 13))


@jobs.command()
@click.argument("job", shell_complete=completion.jobs)
def watch(job: str) -> int:
    """Follow a job until it ends. Ctrl-C stops following, not the job."""
    from tally.jobs.events import Assumed, Event, Events, Progress, Waiting, Warned

    jobs = installation.jobs()
    shown = ""

    def show(event: Event) -> None:
        nonlocal shown
        match event:
            case Progress():
                line = f"{event.state}: {share(event)}, {event.dead:,} failed"
                if line != shown:
                    say(line)
                    shown = line
            case Waiting(text) | Warned(text) | Assumed(text):
                say(text, err=True)
            case _:
                pass

    record = jobs.follow(job, events=Events(show))
    if record.error:
        say(record.error, err=True)
    return 0 if record.state == "finished" else 1


@jobs.command(short_help="Stop handing out work, for a while.")
@click.argument("job", shell_complete=completion.jobs)
def pause(job: str) -> None:
    """Stop handing out work; running chunks are finished and saved. The model stays loaded."""
    record = installation.jobs().pause(job)
    say(f"job {record.id} is pausing; go on with: tally jobs resume {record.id}")


@jobs.command(short_help="Go on with a job that was stopped.")
@click.argument("job", shell_complete=completion.jobs)
@click.option("--device", shell_complete=completion.devices, help="From now on: auto, cpu, cuda[:N] or tensorrt[:N].")
@click.option("-w", "--workers", help="From now on: worker processes, 8 or 4..64.")
@click.option("--timeout", type=float, help="From now on: seconds that one batch may take.")
@click.option("--memory", help="From now on: memory that one worker may hold, e.g. 2GiB.")
@click.option("--max-dead", help="From now on: share of failed items at which the job stops.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
@fail_on_dead
def resume(job: str, quiet: bool, fail_on_dead: float | None, **options: Any) -> int:
    """Go on with a job that was paused, interrupted, killed or has failed; follow one that runs in a cluster.

    The options that are given are changed; those that would change the result cannot be.
    """
    from tally.cli.foreground import see_through

    jobs = installation.jobs()
    jobs.change(job, **options)
    record = jobs.unpause(job)
    if record.alive and not jobs.runs_in_a_cluster(record):
        say(f"job {record.id} was told to continue; follow it with: tally jobs watch {record.id}")
        return 0
    return see_through(jobs, record.id, quiet=quiet, fail_on_dead=fail_on_dead)


@jobs.command(short_help="Stop a job for good.")
@click.argument("job", shell_complete=completion.jobs)
def cancel(job: str) -> None:
    """Stop a job for good, and remove what it had not finished writing."""
    jobs = installation.jobs()
    before = jobs.get(job)
    record = _put_down(jobs, jobs.cancel(before.id))
    if record.alive:
        say(f"job {record.id} is being cancelled; see what becomes of it with: tally jobs show {record.id}")
    elif record.state != "finished":
        say(f"job {record.id} is {record.state}")
    elif not before.is_retry:
        say(f"job {record.id} has finished before it could be cancelled: the results are in {record.spec['out']}")
    elif record.manifest == before.manifest:
        say(f"the retry of job {record.id} is cancelled; its results are as they were")
    else:
        say(f"the retry of job {record.id} has finished before it could be cancelled: its results joined the others")


def _put_down(jobs: Jobs, record: JobRecord) -> JobRecord:
    """The job once its coordinator has let go of it, or as it is after a while: then it is known what it ends as."""
    until = time.monotonic() + CANCEL_SECONDS
    while record.alive and time.monotonic() < until:
        time.sleep(0.1)
        record = jobs.get(record.id)
    return record


@jobs.command(short_help="Replay a job's dead items.")
@click.argument("job", shell_complete=completion.jobs)
@click.option("--dead", is_flag=True, required=True, help="Replay the dead items.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
@fail_on_dead
def retry(job: str, dead: bool, quiet: bool, fail_on_dead: float | None) -> int:
    """Replay a job's dead items, after their cause was mended; what succeeds joins the results."""
    from tally.cli.foreground import see_through

    jobs = installation.jobs()
    record = jobs.get(job)
    if not record.dead:
        more = "" if record.state in ENDED else f"; it is {record.state}, go on with: tally jobs resume {record.id}"
        say(f"job {record.id} has no dead items{more}")
        return 0
    return see_through(jobs, record.id, quiet=quiet, retry_dead=dead, fail_on_dead=fail_on_dead)


@jobs.command(short_help="The items that failed, and why.")
@click.argument("job", shell_complete=completion.jobs)
@click.option(
    "-n", "--limit", type=click.IntRange(1, 1_000_000_000), default=100, show_default=True, help="How many at most."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def dead(job: str, limit: int, as_json: bool) -> None:
    """The items that failed for good, each with its reason."""
    jobs = installation.jobs()
    record = jobs.get(job)
    if not record.dead:
        say(f"job {record.id} has no dead items" + ("" if record.state in ENDED else " so far"), err=True)
    for number, each in enumerate(jobs.dead(record.id)):
        if number == limit:
            say(f"... and {record.dead - limit:,} more (-n {record.dead})", err=True)
            break
        if as_json:
            say(json.dumps({"key": each.key, "stage": each.stage, "error": each.error}))
        else:
            # The first line says it; a stack may follow, which --json shows.
            say(f"{visible(each.key)}\t{each.stage}\t{each.error.splitlines()[0] if each.error else ''}")


@jobs.command(short_help="The last lines that a job's processes wrote.")
@click.argument("job", shell_complete=completion.jobs)
@click.option("-n", "--lines", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Of each, at most.")
def log(job: str, lines: int) -> None:
    """What the coordinator wrote, where a server started it, and what workers printed: here, or at the server."""
    printed = installation.jobs().printed(job, lines=lines)
    for who, written in (("coordinator", printed.coordinator), ("workers", printed.workers)):
        if written:
            say(f"{who}:", err=True)
        for line in written:
            say(line)
    if not (printed.coordinator or printed.workers):
        say(f"the processes of job {job} wrote nothing here", err=True)


@jobs.command(short_help="The alerts of a job, and what became of them.")
@click.argument("job", shell_complete=completion.jobs)
@click.option("--send", is_flag=True, help="Send undelivered alerts now, including those that were given up.")
def alerts(job: str, send: bool) -> int:
    """The rules of a job that has ended, what was measured, and whether the webhook was told."""
    jobs = installation.jobs()
    record = jobs.get(job)
    judged = jobs.send_alerts(record.id) if send else jobs.alerts(record.id)
    for alert in judged:
        say(alert.describe())
    if not judged:
        why = "it is not finished" if record.spec.get("alerts") else "it has no rules (--alert)"
        say(f"job {record.id} has no alerts: {why}", err=True)
    return 1 if any(alert.state in ("pending", "failed") for alert in judged) else 0


@jobs.command()
@click.argument("job", shell_complete=completion.jobs)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def delete(job: str, dry_run: bool) -> None:
    """Forget a job. Finished results stay where they are; what was not finished is removed."""
    jobs = installation.jobs()
    record = jobs.get(job)
    unfinished = "" if record.state in ENDED else f", and its unfinished output at {record.spec['out']}"
    if dry_run:
        say(f"would remove job {record.id} from the list{unfinished}")
        return
    jobs.delete(record.id)
    say(f"job {record.id} is deleted{unfinished}")


def _facts(record: JobRecord) -> list[tuple[str, str]]:
    from tally.alerts.webhook import shown
    from tally.config import settings

    usage = record.usage
    seconds = usage.get("seconds", 0.0)
    model = record.model
    version = f" version {model['version']}" if model.get("version") else ""
    stages = ", ".join(f"{name} {usage.get(name, 0.0):.2f} s" for name in ("read", "decode", "score", "write"))
    asked = "" if record.wanted == "run" or not record.alive else f" (asked to {record.wanted})"
    kind = f"{version} ({model['kind']}), {model['hash'][:19]}" if "kind" in model else ""  # else not looked at yet
    if model.get("kind") == "routed":
        kind = ", as each message says"
    facts = [
        ("job", record.id),
        ("state", record.state + asked),
        ("source", _some(record.spec["source"])),
        ("model", model["name"] + kind),
        ("out", record.spec["out"]),
        ("items", f"{record.items:,}" + ("" if record.planned else " so far, still listing")),
        ("done", f"{share(record)}; {record.dead:,} failed, {record.rows:,} rows, {record.bytes:,} bytes"),
        ("created", local_time(record.created_at)),
        ("finished", local_time(record.finished_at)),
        ("time", f"{duration(seconds)}, {record.done / seconds if seconds else 0:,.1f} {record.unit}/s"),
        ("stages", f"{stages} (all workers; {usage.get('worker_seconds', 0.0):.2f} s busy)"),
    ]  # fmt: skip
    if record.parent is not None:
        facts.insert(1, ("part of", f"job {record.parent}"))
    if part := ", ".join(
        f"{name} {value}" for name in ("limit", "sample", "shard") if (value := record.spec.get(name))
    ):
        facts.insert(3, ("part", part))
    if options := record.spec.get("queue"):
        meta = {f"meta.{name}": place for name, place in options.get("meta", {}).items()}
        plain = {name: value for name, value in options.items() if name != "meta"}
        facts.insert(3, ("queue", ", ".join(f"{name}={mask(str(value))}" for name, value in (plain | meta).items())))
    if (spent := cost(record)) is not None:
        facts.append(("cost", spent))
    if hook := record.spec.get("webhook"):
        facts.append(("alerts", f"{', '.join(record.spec['alerts'])}; to {shown(hook)}"))
    if record.owner:
        facts.append(
            ("driven by", f"{record.owner_host}, pid {record.owner_pid}" + ("" if record.alive else " (gone)"))
        )
    log = settings().log_of(record.id)
    if log.exists() and log.stat().st_size:
        facts.append(("log", str(log)))
    notes = (record.manifest or {}).get("notes", [])
    facts += [("assumed", line) for line in record.assumed]
    facts += [("warning", line) for line in record.remarks]
    facts += [("note", line) for line in notes]
    if record.state in ("interrupted", "paused", "failed"):
        hopeless = record.planned and 0 < record.items == record.dead
        facts.append(("next", f"tally jobs retry {record.id} --dead" if hopeless else f"tally jobs resume {record.id}"))
    return facts


def _some(places: Sequence[str]) -> str:
    """The first of many places, and how many more there are."""
    more = len(places) - SOURCES
    return ", ".join(places[:SOURCES]) + (f" and {more:,} more (--json has all)" if more > 0 else "")


def _pushed(pushes: Pushes) -> str:
    first = f" (the first: {pushes.reason})" if pushes.reason else ""
    return (
        f"to {pushes.to}: {pushes.delivered:,} items delivered, {pushes.waiting:,} waiting, {pushes.refused:,} "
        f"refused{first}"
    )


def _json(record: JobRecord, **more: Any) -> str:
    from tally.jobs.spec import shown

    return json.dumps(asdict(record) | more | {"spec": shown(record.spec)}, default=str)
