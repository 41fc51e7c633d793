"""A job's events in a notebook, in one place of the cell's output. IPython is there, or this would be no notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, cast

from tally.jobs.events import Assumed, Event, Note, Progress, StateChanged, Subscriber, Waiting, Warned
from tally.jobs.store import JobRecord
from tally.text import visible

MOST_LINES = 30
"""Lines above the bar; of more, the last."""


@contextmanager
def shown(record: JobRecord) -> Iterator[Subscriber]:
    """A subscriber that shows the job's progress below the running cell while the context lasts."""
    from IPython.display import HTML, display

    html: Callable[[str], Any] = HTML
    view = _View(record)
    handle = cast("Any", display)(html(view.html()), display_id=True)

    def show(event: Event) -> None:
        if view.take(event) and handle is not None:
            handle.update(html(view.html()))

    yield show


class _View:
    """What is shown: lines that should be read, and where the job stands."""

    def __init__(self, record: JobRecord) -> None:
        self._job, self._unit = record.id, record.unit
        self._lines: list[str] = []
        self._progress: Progress | None = None

    def take(self, event: Event) -> bool:
        """Whether the event changes what is shown."""
        match event:
            case Warned(text) | Assumed(text):
                self._say(text, warning=True)
            case Waiting(text) | Note(text):
                self._say(text)
            case StateChanged("paused"):
                self._say(f"paused; go on with: tally.Job({self._job!r}).resume()")
            case StateChanged():
                self._say("resumed")
            case Progress():
                self._progress = event
            case _:
                return False
        return True

    def _say(self, text: str, *, warning: bool = False) -> None:
        said = escape(visible(text, lines=True)).replace("\n", "<br>")
        self._lines.append(f"<b>warning:</b> {said}" if warning else said)
        del self._lines[:-MOST_LINES]

    def html(self) -> str:
        lines = "".join(f'<div style="opacity:.8">{each}</div>' for each in self._lines)
        now = self._progress
        if now is None or not now.done:
            return f"<div>{lines}<progress></progress> {'loading the model' if now else 'starting'}</div>"
        known = f' value="{now.done}" max="{now.items}"' if now.planned else ""
        of = f"{now.done:,} of {now.items:,}" if now.planned else f"{now.done:,}"
        rate = f", {now.rate:,.1f} {self._unit}/s" if now.rate else ""
        failed = f', <b style="color:#b00">{now.dead:,} failed</b>' if now.dead else ""
        return (
            f'<div>{lines}<progress{known} style="width:20em"></progress> '
            f"{escape(now.state)} {of} {escape(self._unit)}{rate}{failed}</div>"
        )
