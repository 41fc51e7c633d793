"""A job in the foreground: its events on the terminal (or in a notebook), and Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from tally.engines.base import Engine
from tally.jobs.events import Assumed, Event, Events, Note, Progress, StateChanged, Subscriber, Waiting, Warned
from tally.jobs.facade import Jobs
from tally.jobs.signals import stop_on_signals
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord
from tally.text import visible

if TYPE_CHECKING:
    from rich.console import Console

Say: TypeAlias = Callable[[str, str], None]
"""Prints a line: what it begins with, if that stands out, and the rest."""
_STYLED = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
"""Environment variables by which people have rich write colours where there is no terminal."""


def run(
    jobs: Jobs,
    job: str,
    *,
    quiet: bool = False,
    retry_dead: bool = False,
    here: bool = False,
    engine: Engine | None = None,
    said: Callable[[str], str] = str,
) -> JobRecord:
    """Drive the job, showing its progress on standard error: in this process, or in the cluster that its spec names.

    The first Ctrl-C (or SIGTERM) stops the job cleanly: running chunks finish and are committed; the
    second kills the workers. Either way the job can be resumed. A job in a cluster continues, and is returned as it is.
    here: in this process even then, as it is inside the cluster. engine: one that is prepared.
    said: has warnings and notes speak the caller's language.
    """
    record = jobs.get(job)
    stop = Stop()
    with shown(record, quiet=quiet) as show, stop_on_signals(stop):

        def subscriber(event: Event) -> None:
            show(replace(event, text=said(event.text)) if isinstance(event, Assumed | Warned | Note) else event)

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
    if not (sys.stderr.isatty() or "IPython" in sys.modules or any(map(os.environ.get, _STYLED))):
        yield _Lines(_plain, record, quiet=quiet)  # rich takes longer to import than a small job to score
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_jupyter and not quiet:
        from tally.notebooks import progress

        with progress.shown(record) as view:
            yield view
        return
    lines = _Lines(_styled(console), record, quiet=quiet)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield lines
        return
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

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


def note(text: str) -> None:
    """A line for people, of what needs no job to run."""
    _plain("", text)


def _plain(label: str, text: str) -> None:
    with suppress(OSError):  # nobody reads it any more; the job goes on
        print(f"{label} {text}" if label else text, file=sys.stderr, flush=True)


def _styled(console: Console) -> Say:
    from rich.markup import escape

    def say(label: str, text: str) -> None:
        console.print(f"[yellow]{label}[/yellow] {escape(text)}" if label else f"[dim]{escape(text)}[/dim]")

    return say


class _Lines:
    """Notes, and for logs a line at each tenth of the job that is reached. quiet: warnings, and what is away, alone."""

    def __init__(self, say: Say, record: JobRecord, *, quiet: bool) -> None:
        self._print, self._job, self._unit, self._quiet = say, record.id, record.unit, quiet
        self._tenth: int | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Warned(text) | Assumed(text):
                self._print("warning:", visible(text, lines=True))
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
        self._print("", visible(line, lines=True))


def interactive() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()
