"""A job in the foreground: its events on the terminal (or in a notebook), and Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tally.engines.base import Engine
from tally.jobs.events import Assumed, Event, Events, Note, Progress, StateChanged, Subscriber, Waiting, Warned
from tally.jobs.facade import Jobs
from tally.jobs.signals import stop_on_signals
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord
from tally.text import visible


def run(
    jobs: Jobs,
    job: str,
    *,
    quiet: bool = False,
    retry_dead: bool = False,
    here: bool = False,
    engine: Engine | None = None,
) -> JobRecord:
    """Drive the job, showing its progress on standard error: in this process, or in the cluster that its spec names.

    The first Ctrl-C (or SIGTERM) stops the job cleanly: running chunks finish and are committed; the
    second kills the workers. Either way the job can be resumed. A job in a cluster continues, and is returned as it is.
    here: in this process even then, as it is inside the cluster. engine: one that is prepared.
    """
    record = jobs.get(job)
    stop = Stop()
    with shown(record, quiet=quiet) as subscriber, stop_on_signals(stop):
        return jobs.run(
            record.id,
            events=Events(subscriber),
            stop=stop,
            engine=engine,
            retry_dead=retry_dead,
            in_this_process=here,
        )


@contextmanager
def shown(record: JobRecord, *, quiet: bool = False) -> Iterator[Subscriber]:
    """A subscriber that shows the job's events on standard error while the context lasts."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    lines = _Lines(console, record, quiet=quiet)
    if quiet or not (console.is_terminal or console.is_jupyter):
        yield lines
        return
    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[dead]}"),
        console=console,
    )
    task = bar.add_task("starting", total=None, rate="", dead="")

    def show(event: Event) -> None:
        if not isinstance(event, Progress):
            lines(event)
            return
        bar.update(
            task,
            description=event.state if event.done else "loading the model",
            total=event.items if event.planned else None,
            completed=event.done,
            rate=f"{event.rate:,.1f} {record.unit}/s" if event.rate else "",
            dead=f"[red]{event.dead:,} failed[/red]" if event.dead else "",
        )

    with bar:
        yield show


class _Lines:
    """Notes, and for logs a line at each tenth of the job that is reached. quiet: warnings, and what is away, alone."""

    def __init__(self, console: Console, record: JobRecord, *, quiet: bool) -> None:
        self._console, self._job, self._unit, self._quiet = console, record.id, record.unit, quiet
        self._tenth: int | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Warned(text) | Assumed(text):
                self._console.print(f"[yellow]warning:[/yellow] {escape(visible(text, lines=True))}")
            case Waiting(text):  # what is away is worth knowing, too, or a quiet job would seem to hang
                self._say(text)
            case _ if self._quiet:
                pass
            case Note(text):
                self._say(text)
            case StateChanged("paused"):
                self._say(f"paused; go on with: tally jobs resume {self._job}")
            case StateChanged():
                self._say("resumed")
            case Progress(items=items, planned=True) if items:
                self._show(event)
            case _:
                pass

    def _show(self, progress: Progress) -> None:
        tenth = 10 * progress.done // progress.items
        if self._tenth is None:
            self._tenth = 0 if progress.rate else tenth  # a job that is resumed had reached that before
        if tenth > self._tenth:
            self._tenth = tenth
            self._say(
                f"{progress.done:,}/{progress.items:,} {self._unit}, {progress.rate:,.1f} {self._unit}/s, "
                f"{progress.dead:,} failed"
            )

    def _say(self, line: str) -> None:
        self._console.print(f"[dim]{escape(visible(line, lines=True))}[/dim]")


def interactive() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()
