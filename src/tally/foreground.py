"""A job in the foreground: its progress on the terminal (or in a notebook), and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tally.jobs.coordinator import Coordinator, Progress
from tally.jobs.launch import drive
from tally.jobs.store import JobRecord, JobStore


def run(store: JobStore, job_id: str, *, quiet: bool = False, retry_dead: bool = False) -> JobRecord:
    """Drive the job here, showing its progress on standard error.

    The first Ctrl-C (or SIGTERM) stops the job cleanly: running chunks finish and are committed; the
    second kills the workers. Either way the job can be resumed.
    """
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    with _display(console, store.get(job_id).unit) as (show, say), _signals(say) as hold:
        return drive(store, job_id, listen=show, say=say, started=hold, retry_dead=retry_dead)


@contextmanager
def _display(console: Console, unit: str) -> Iterator[tuple[Any, Any]]:
    def say(line: str) -> None:
        console.print(f"[dim]{escape(line)}[/dim]")

    if console.quiet or not (console.is_terminal or console.is_jupyter):
        yield _Lines(say, unit), say
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

    def show(progress: Progress) -> None:
        bar.update(
            task,
            description=progress.state if progress.done else "loading the model",
            total=progress.items if progress.planned else None,
            completed=progress.done,
            rate=f"{progress.rate:,.1f} {unit}/s" if progress.rate else "",
            dead=f"[red]{progress.dead:,} failed[/red]" if progress.dead else "",
        )

    with bar:
        yield show, say


class _Lines:
    """Progress for logs: a line at each tenth that is reached."""

    def __init__(self, say: Any, unit: str) -> None:
        self._say, self._unit = say, unit
        self._tenth: int | None = None

    def __call__(self, progress: Progress) -> None:
        if not progress.planned or not progress.items:
            return
        tenth = 10 * progress.done // progress.items
        if self._tenth is None:
            self._tenth = 0 if progress.rate else tenth  # a job that goes on did not reach that now
        if tenth > self._tenth:
            self._tenth = tenth
            self._say(
                f"{progress.done:,}/{progress.items:,} {self._unit}, {progress.rate:,.1f} {self._unit}/s, "
                f"{progress.dead:,} failed"
            )


@contextmanager
def _signals(say: Any) -> Iterator[Any]:
    """Turn SIGINT and SIGTERM into a clean stop while the job runs; a no-op outside the main thread."""
    holder: list[Coordinator] = []
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 1:
            say("stopping: running chunks are finished and saved (again to kill them)")
        if holder:
            holder[0].stop(now=count > 1)
        elif count > 1:
            raise KeyboardInterrupt

    def hold(coordinator: Coordinator) -> None:
        holder.append(coordinator)
        if count:
            coordinator.stop()

    if threading.current_thread() is not threading.main_thread():
        yield holder.append
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield hold
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interactive() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()
