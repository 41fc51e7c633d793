"""How far something is that takes a while, on one line."""

from __future__ import annotations

import os
import sys
import time

import click

from tally.cli.console import say


class Line:
    """One line that is rewritten on a terminal; elsewhere a line at each tenth."""

    def __init__(self) -> None:
        self.done = 0
        self._begun = time.monotonic()
        self._before = 0
        self._shown = 0.0
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def begin(self, done: int = 0) -> None:
        """The clock starts now; ``done`` were done before."""
        self.done = self._before = done
        self._begun = time.monotonic()

    def tell(self, done: int, of: int, unit: str, more: str) -> None:
        """Show that ``done`` are done (0: the clock starts now), with ``more`` at the end of the line."""
        tenth = 10 * done // of > 10 * self.done // of
        self.done = done
        now = time.monotonic()
        if not done:
            self.begin()
        if not done or not (now - self._shown > 0.2 or done == of if self._terminal else tenth):
            return
        self._shown = now
        rate = (done - self._before) / (now - self._begun)
        left = round((of - done) / rate) if rate else 0
        line = f"{done:,}/{of:,} {unit}, {rate:,.1f} {unit}/s, {left // 60}:{left % 60:02d} left, {more}"
        click.echo(f"\r{line}\x1b[K" if self._terminal else line, err=True, nl=not self._terminal)

    def end(self) -> None:
        """Leave the line."""
        if self._terminal and self.done:
            say(err=True)
