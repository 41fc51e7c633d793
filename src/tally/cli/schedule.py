"""``tally schedule``: jobs, trainings and pipelines on time, and for times gone by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tally.cli import installation
from tally.cli.console import say, table
from tally.cli.values import Choice
from tally.errors import JobNotFoundError, SpecError
from tally.text import visible

if TYPE_CHECKING:
    from tally.triggers.cron import Cron, Interval
    from tally.triggers.loop import Loop
    from tally.triggers.store import Run, Schedule, ScheduleStore

_NEAR = 3 * 3600
"""Seconds around a change of the clock whose runs are shown."""


@click.group()
def schedule() -> None:
    """Run jobs, trainings, pipelines and clean-ups on time: hourly, nightly, for days gone by.

    Each run is for one interval: the time from one tick of the schedule to the next.
    """


@schedule.command(short_help="Run a job, a training or a pipeline on time.")
@click.argument("name")
@click.argument("file")
@click.option("--cron", help="Minute, hour, day, month, weekday: '0 * * * *' is every full hour.")
@click.option("--timezone", help="Time zone of --cron, e.g. Europe/Berlin.  [default: UTC]")
@click.option(
    "--overlap",
    type=Choice(["queue", "skip", "parallel"]),
    help="What to do with a run that is due while the previous one is still running.  [default: queue]",
)
@click.option(
    "--catch-up",
    type=Choice(["all", "latest", "none"]),
    help="Which missed intervals to run later.  [default: all]",
)
@click.option(
    "--from", "since", metavar="TIME", help="Begin with the first interval from this time on.  [default: now]"
)
@click.option("--replace", is_flag=True, help="Change the schedule that has this name.")
def add(
    name: str,
    file: str,
    cron: str | None,
    timezone: str | None,
    overlap: str | None,
    catch_up: str | None,
    since: str | None,
    replace: bool,
) -> None:
    """Run the job that the YAML FILE describes, whenever --cron says.

    Or a training (train: anomaly, retrain, style, script; sweep: retrain, script), whose fields are the flags of its
    command; or an Argo workflow, as it is or as 'pipeline: FILE' and the flags of tally pipeline run; or a clean-up
    (clean: jobs, runs). A CronWorkflow says itself when it is run.

    Its values may hold {interval_start} and {interval_end}, with a format ({interval_start:%Y-%m-%d}) and in UTC
    ({interval_start_utc:%H%M}); a job's 'out' must contain one. The file is read once, now.

    \b
    tally schedule add hourly job.yaml --cron '0 * * * *' --timezone Europe/Berlin
    tally schedule run --forever
    """
    from tally.triggers import template

    store = installation.schedules()
    added = store.define(
        name, lambda: template.read(file), file=str(Path(file).absolute()), cron=cron, timezone=timezone,
        overlap=overlap, catch_up=catch_up, since=since, replace=replace,
    )  # fmt: skip
    clock, now = added.clock(), store.clock()
    following = clock.next(max(now, added.planned_until), 1)[0]
    say(f"schedule {name} runs next at {clock.text(following.end)}, for {clock.span(following)}")
    if late := len(clock.ending(added.planned_until, now)):
        say(f"  intervals that are over already: {late:,}; catch-up is {added.catch_up}")
    if added.paused:
        say(f"  it is paused, as the file says; go on with: tally schedule resume {name}")
    say("  Something has to run it: tally up, or tally schedule run --forever", err=True)


@schedule.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(as_json: bool) -> None:
    """All schedules, with their next and last runs."""
    from tally.triggers.works.kinds import does

    store = installation.schedules()
    schedules = store.all()
    if as_json:
        for each in schedules:
            say(_json(each, runs=store.counts(each.name)))
        return
    if not schedules:
        say("no schedules yet; add one with: tally schedule add NAME job.yaml --cron '0 * * * *'", err=True)
        return
    rows = []
    for each in schedules:
        clock, counts = each.clock(), store.counts(each.name)
        last = next(iter(store.runs(each.name, limit=1)), None)
        at = "paused" if each.paused else clock.text(_next(store, each, clock, 1)[0].end)
        shown = "-" if last is None else f"{last.state}: {clock.span(last.interval)}"
        counted = ", ".join(f"{counts[state]:,} {state}" for state in _STATES if counts.get(state))
        rows.append((each.name, does(each.template), each.cron, each.timezone, at, shown, counted or "-"))
    table(("NAME", "DOES", "CRON", "ZONE", "NEXT RUN", "LAST INTERVAL", "RUNS"), rows)


def _json(schedule: Schedule, **more: Any) -> str:
    from tally.triggers.works.kinds import told

    return json.dumps(asdict(schedule) | more | {"template": told(schedule.template)})


_STATES = ("running", "pending", "failed", "skipped", "empty", "finished")


@schedule.command(short_help="Next times, last runs, and what the clock's changes do.")
@click.argument("name")
@click.option(
    "-n", "--limit", type=click.IntRange(1, 1_000_000_000), default=10, show_default=True, help="How many runs."
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(name: str, limit: int, as_json: bool) -> None:
    """Everything about a schedule: its next times, its last runs, and what happens when the clock is set."""
    from tally.triggers.loop import log_of
    from tally.triggers.works.kinds import told

    store = installation.schedules()
    found = store.get(name)
    clock, runs = found.clock(), store.runs(name, limit=limit)
    following = _next(store, found, clock, 5)
    if as_json:
        last = [asdict(run) for run in runs]
        say(_json(found, next=[asdict(each) for each in following], runs=last))
        return
    for label, value in (
        ("schedule", found.name + (" (paused)" if found.paused else "")),
        ("file", found.file),
        *((label, _told(value)) for label, value in told(found.template).items()),
        ("cron", f"{found.cron}   on the clock of {found.timezone}"),
        ("overlap", found.overlap),
        ("catch-up", found.catch_up),
        ("log", log_of(name)),
    ):
        say(f"{label:<12} {visible(str(value))}")
    if (change := _clock_change(clock, store.clock())) is not None:
        say(f"{'clock change':<12} {change}")
    say()
    table(("NEXT RUN", "INTERVAL"), [(clock.text(each.end), clock.span(each)) for each in following])
    if runs:
        say()
        rows = [(clock.span(r.interval), r.state, r.reason, *_done(r), _short(r.error)) for r in runs]
        table(("INTERVAL", "STATE", "REASON", "BY", "DONE", "ERROR"), rows)


@schedule.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def pause(names: tuple[str, ...]) -> None:
    """Start no new runs; running ones continue."""
    store = installation.schedules()
    for found in [store.get(name) for name in names]:
        store.pause(found.name, True)
        say(f"schedule {found.name} is paused; go on with: tally schedule resume {found.name}")


@schedule.command(short_help="Start runs again.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def resume(names: tuple[str, ...]) -> None:
    """Start runs again. --catch-up of the schedule says which of the intervals missed meanwhile are run."""
    store = installation.schedules()
    for found in [store.get(name) for name in names]:
        missed = len(found.clock().ending(found.planned_until, store.clock()))
        store.pause(found.name, False)
        more = f"; intervals missed meanwhile: {missed:,}; catch-up is {found.catch_up}" if missed else ""
        say(f"schedule {found.name} is resumed{more}")


@schedule.command(short_help="Run what is due, or --forever.")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--forever", is_flag=True, help="Keep running, and start what becomes due.")
@click.option("--failed", is_flag=True, help="Also retry failed runs.")
def run(names: tuple[str, ...], forever: bool, failed: bool) -> int:
    """Run what is due, of all schedules or those named, and wait for it.

    With --forever it keeps running until it is stopped: Ctrl-C or SIGTERM stops it cleanly, and what runs saves what it
    has.
    Several may run at once, here and on other hosts with the same database: no interval is run twice.
    """
    from contextlib import nullcontext

    from tally.alerts.delivery import delivering
    from tally.triggers.loop import Loop

    store = installation.schedules()
    known = [store.get(name) for name in names] if names else store.all()
    if failed:
        again = sum(store.retry(each.name) for each in known)
        say(f"failed runs that are tried again: {again:,}", err=True)
    loop = Loop(store, names=names, say=lambda line: say(line, err=True))
    with _signals(loop):
        if forever:
            say(
                "running " + (", ".join(each.name for each in known) or "what will be added") + "; Ctrl-C stops",
                err=True,
            )
        with delivering(store.engine) if forever else nullcontext():
            loop.run(forever=forever)
    if loop.stopped:
        return 0 if forever else 130
    if not loop.begun:
        soon = [(_next(store, each, each.clock(), 1)[0].end, each) for each in known if not each.paused]
        if soon:
            at, first = min(soon, key=lambda pair: pair[0])
            say(f"nothing is due; the next run is that of {first.name} at {first.clock().text(at)}", err=True)
        else:
            say("nothing is due: " + ("all is paused" if known else "there are no schedules"), err=True)
    return 1 if loop.failed else 0


@schedule.command(short_help="Forget a schedule; what it has run stays.")
@click.argument("name")
def remove(name: str) -> None:
    """Forget a schedule and what it has run; jobs, trainings and results stay."""
    installation.schedules().remove(name)
    say(f"schedule {name} is removed; its jobs, trainings and results stay")


@schedule.command(short_help="Run intervals gone by.")
@click.argument("name")
@click.option("--from", "since", required=True, metavar="TIME", help="Start of the first interval, at the earliest.")
@click.option("--to", "until", metavar="TIME", help="Run intervals that begin before this.  [default: now]")
@click.option("--again", is_flag=True, help="Run finished and empty intervals again and replace their results.")
def backfill(name: str, since: str, until: str | None, again: bool) -> int:
    """Run the intervals that begin from --from on and before --to, unless they are finished or had nothing to score.

    TIME is a date or a time on the clock of the schedule's zone. The same command again continues where it was stopped,
    and retries what failed.

    \b
    tally schedule backfill nightly --from 2026-01-01 --to 2026-01-08
    """
    from tally.triggers.loop import Loop

    store = installation.schedules()
    found = store.get(name)
    clock, now = found.clock(), store.clock()
    begin = clock.moment(since, "--from")
    end = clock.moment(until, "--to") if until else int(now) + 1
    if end <= begin:
        raise SpecError(f"--to ({clock.text(end)}) is not after --from ({clock.text(begin)})")
    intervals = clock.starting(begin, end)
    over = [each for each in intervals if each.end <= now]
    if not over:
        what = "is over yet" if intervals else "begins then"
        raise SpecError(f"no interval of {name} {what}: {clock.text(begin)} to {clock.text(end)}")
    if len(over) < len(intervals):
        say(f"intervals that are not over yet, and left out: {len(intervals) - len(over):,}", err=True)
    report = _Report(store, name, clock, {run.id for run in store.backfill(name, over, again=again)}, over)
    loop = Loop(store, names=[name], within=report.within, listen=report.show)
    with _signals(loop):
        loop.run()
    report.show()
    return report.end(stopped=loop.stopped)


class _Report:
    """A line for each interval of a backfill that comes to its end."""

    def __init__(self, store: ScheduleStore, name: str, clock: Cron, ids: set[int], intervals: list[Interval]) -> None:
        from tally.triggers.cron import Interval

        self.within = Interval(intervals[0].start, intervals[-1].start + 1)
        self._store, self._name, self._clock, self._ids = store, name, clock, ids
        self._counts: dict[str, int] = {}
        self._ended = {run.id for run in self._runs() if run.state in ("finished", "empty")}
        if self._ended:
            say(f"{len(self._ended):,} of {len(ids):,} intervals are finished already", err=True)

    def show(self) -> None:
        """What has ended since the last time."""
        import tally.jobs.facade  # noqa: F401 - takes time, and there is some until the first run has ended

        counts = self._store.counts(self._name, within=self.within)
        if counts == self._counts:
            return
        self._counts = counts
        for run in self._runs():
            if run.state in ("finished", "empty", "failed") and run.id not in self._ended:
                self._ended.add(run.id)
                by, done = _done(run)
                if by.startswith("job "):
                    done = f"{done} done"
                what = f"{done} ({by})" if run.state == "finished" else str(run.error)
                count = f"[{len(self._ended):,}/{len(self._ids):,}]"
                say(f"{count} {self._clock.span(run.interval)} {run.state}: {what}", err=True)

    def end(self, *, stopped: bool) -> int:
        """Say how it ended; the exit code."""
        runs = self._runs()
        finished, empty = (sum(run.state == state for run in runs) for state in ("finished", "empty"))
        nothing = f", {empty:,} had nothing to score" if empty else ""
        say(f"{finished:,} of {len(runs):,} intervals are finished{nothing}")
        if stopped:
            say("  Go on with the same command.", err=True)
            return 130
        if finished + empty < len(runs):
            say("  After mending the cause, the same command tries the others again.", err=True)
            return 1
        return 0

    def _runs(self) -> list[Run]:
        found = reversed(self._store.runs(self._name, within=self.within))
        return [run for run in found if run.id in self._ids]


@contextmanager
def _signals(loop: Loop) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the loop cleanly."""
    from tally.jobs.signals import stop_signals

    def stop(count: int) -> None:
        if count == 1:
            say("stopping: what runs saves what it has (again to kill it)", err=True)
        loop.stop()

    with stop_signals(stop):
        yield


def _next(store: ScheduleStore, found: Schedule, clock: Cron, count: int) -> list[Interval]:
    return clock.next(max(store.clock(), found.planned_until), count)


def _clock_change(clock: Cron, now: float) -> str | None:
    """When the zone's clock is set next, and which runs there are around it."""
    change = clock.clock_change(now)
    if change is None:
        return None
    at, by = change
    before = f"{(clock.local(at) - by):%H:%M} {clock.local(at - 1):%Z}"
    ticks = clock.ticks(at - _NEAR, at + _NEAR)
    near = ", ".join(f"{clock.local(tick):%H:%M %Z}" for tick in ticks[:12]) + (", ..." if len(ticks) > 12 else "")
    runs = f"runs around it: {near}" if ticks else "no run is near"
    return f"on {clock.local(at):%Y-%m-%d} {before} becomes {clock.local(at):%H:%M %Z}; {runs}"


def _done(run: Run) -> tuple[str, str]:
    """What does the run, and how far it is or what came of it."""
    if run.job_id is not None:
        return str(run.by), _of_job(run.job_id)
    return run.by or "-", _short(run.outcome) or "-"


def _of_job(job: str) -> str:
    try:
        record = installation.jobs().get(job)
    except JobNotFoundError:
        return "deleted"
    dead = f", {record.dead:,} failed" if record.dead else ""
    return f"{record.done:,} {record.unit}{dead}"


def _short(error: str | None) -> str:
    line = (error or "").partition("\n")[0]
    return line if len(line) <= 100 else line[:97] + "..."


def _told(value: Any) -> str:
    """A field's value in a line."""
    return value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
