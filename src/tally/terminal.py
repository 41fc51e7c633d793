"""A job in the foreground: its progress on the terminal (or in a notebook), and Ctrl-C."""

from __future__ import annotations

import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tally.jobs import cluster as remote
from tally.jobs.coordinator import Coordinator, Progress
from tally.jobs.launch import drive
from tally.jobs.spec import JobSpec
from tally.jobs.store import JobRecord, JobStore


def run(
    store: JobStore, job_id: str, *, quiet: bool = False, retry_dead: bool = False, here: bool = False
) -> JobRecord:
    """Drive the job, showing its progress on standard error: in this process, or in the cluster that its spec names.

    The first Ctrl-C (or SIGTERM) stops the job cleanly: running chunks finish and are committed; the
    second kills the workers. Either way the job can be resumed. A job in a cluster goes on, and is returned as it is.
    here: in this process even then, as it is inside the cluster.
    """
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    record = store.get(job_id)
    spec = JobSpec(**record.spec)
    cluster = None if here else remote.cluster_for(spec)
    with _display(console, record.unit) as (show, say):
        if cluster is not None:
            return remote.see_through(store, job_id, cluster, listen=show, say=say, retry_dead=retry_dead)
        if spec.engine == "ray" and not here:
            say("Ray's rules lead to no cluster: one is started on this machine for as long as the job takes")
        with _stoppable(say) as hold:
            return drive(store, job_id, listen=show, say=say, started=hold, retry_dead=retry_dead, held=here)


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
def _stoppable(say: Any) -> Iterator[Any]:
    """Turn SIGINT and SIGTERM into a clean stop while the job runs."""
    holder: list[Coordinator] = []
    stops = 0

    def stop(count: int) -> None:
        nonlocal stops
        stops = count
        if count == 1:
            say("stopping: running chunks are finished and saved (again to kill them)")
        if holder:
            holder[0].stop(now=count > 1)

    def give_up(count: int) -> None:
        if count > 1 and not holder:
            raise KeyboardInterrupt

    def hold(coordinator: Coordinator) -> None:
        holder.append(coordinator)
        if stops:
            coordinator.stop()

    with stop_signals(stop, at_once=give_up):
        yield hold


@contextmanager
def stop_signals(stop: Callable[[int], None], *, at_once: Callable[[int], None] = lambda count: None) -> Iterator[None]:
    """Meanwhile, have ``stop`` called at each SIGINT and SIGTERM, with 1 at the first, 2 at the second and so on.

    A thread calls it: a signal may come while the main thread holds a lock, and who is called by the signal itself
    would wait for that for ever. ``at_once`` is called by the signal itself, and may raise what ends the main thread.
    A no-op outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: queue.SimpleQueue[int] = queue.SimpleQueue()
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        came.put(count)
        at_once(count)

    def run() -> None:
        while each := came.get():
            stop(each)

    thread = threading.Thread(target=run, name="tally-stop", daemon=True)
    thread.start()
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        came.put(0)
        thread.join()


def interactive() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()
