"""What a worker is busy with, noted so that it survives the worker, and the time limit for it.

A worker calls :func:`busy` before each batch. The engine that started the worker has given it two files: a note in
shared memory (what was written last survives ``kill -9``), and one for the last words of a worker that is lost: its
stack, or that it can do no more. Without an engine the notes go nowhere.

The engine keeps the time, with a :class:`Clock` for each worker, so that nothing in the worker can turn it off. It
counts the time for which the worker runs: not that of a machine that sleeps, of a terminal that was stopped with
Ctrl-Z, or of a worker that is stopped alone, by a debugger for example. The last is not waited for without an end.
"""

from __future__ import annotations

import faulthandler
import itertools
import mmap
import os
import signal
import struct
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

STOPPED_LIMITS = 10
"""A worker that is stopped alone is ended after so many times its time limit."""
DUMP_SIGNAL = signal.SIGXCPU
"""Has a worker write its stack, even when native code holds the interpreter."""

_STILL_SECONDS = 1.0
"""Between two looks at a worker no more time than this counts: the engine itself stood still."""
_SPENT = "spent: "
_NOTE = struct.Struct("<qqqqdqq")
_BUSY = struct.Struct("<qqqqd")
_BEAT, _BEAT_AT = struct.Struct("<q"), 24
_GIVEN, _GIVEN_AT = struct.Struct("<qq"), 40


class Note(NamedTuple):
    """What a worker has noted.

    start, stop, reach: it works on the positions ``start <= p < stop`` of its chunk, and reads ahead to ``reach``; all
        of them -1 where it is idle or starting.
    beat: changes when the time limit begins anew. limit: seconds; 0 is none.
    earlier: items of the chunks that it was given before this one. items: with those of this one.
    """

    start: int = -1
    stop: int = -1
    reach: int = -1
    beat: int = 0
    limit: float = 0.0
    earlier: int = 0
    items: int = 0


_memory: mmap.mmap | bytearray = bytearray(_NOTE.size)
_trace: IO[bytes] | None = None
_given = 0
_beats = itertools.count(1)


# -- in a worker -----------------------------------------------------------------------------------


def attach(note: Path, trace: Path) -> None:
    """In a new worker: use these files from now on. ``trace`` gets the stack of a crash."""
    global _memory, _trace
    with note.open("r+b") as file:
        _memory = mmap.mmap(file.fileno(), _NOTE.size)
    _trace = trace.open("wb", buffering=0)
    faulthandler.enable(_trace)
    faulthandler.register(DUMP_SIGNAL, _trace)
    idle()


def begin(items: int) -> None:
    """The worker is given a chunk of so many items."""
    global _given
    _GIVEN.pack_into(_memory, _GIVEN_AT, _given, _given + items)
    _given += items


def busy(start: int, stop: int, *, ahead: int = 0, limit: float | None = None) -> None:
    """The worker is about to work on the positions ``start <= p < stop`` of its chunk.

    ahead: how many positions after these are being read ahead. Each of them may be what crashes the worker, but none
        delays it: they are suspects of a crash, and not of a time limit that is exceeded.
    limit: how many seconds this may take. After that the engine has the process write its stack, and ends it. Each
        call starts the clock anew. None: no limit.
    """
    _BUSY.pack_into(_memory, 0, start, stop, stop + ahead, next(_beats), limit or 0.0)


def reset() -> None:
    """Start the clock of the time limit anew: the worker waits for something that is known to be alive. Any thread."""
    _BEAT.pack_into(_memory, _BEAT_AT, next(_beats))


def idle() -> None:
    """The worker has nothing to do: there is no time limit."""
    _BUSY.pack_into(_memory, 0, -1, -1, -1, next(_beats), 0.0)


def give_up(reason: str) -> NoReturn:
    """The worker can do no more, whatever it is given: have it replaced."""
    if _trace is not None:
        _trace.seek(0)
        _trace.truncate()
        _trace.write(f"{_SPENT}{reason}".encode())
    os._exit(1)


def is_watched() -> bool:
    """Whether there is an engine, which replaces a worker that gives up."""
    return _trace is not None


# -- in the engine ---------------------------------------------------------------------------------


def create(note: Path) -> None:
    """An empty note for a worker that is about to start."""
    note.write_bytes(_NOTE.pack(*Note()))


def read(note: Path) -> Note:
    """What the worker noted last."""
    return Note(*_NOTE.unpack(note.read_bytes()[: _NOTE.size]))


def suspects(note: Note, *, timed_out: bool) -> tuple[int, int] | None:
    """The positions that a lost worker was busy with, half-open; None if it was idle or starting."""
    return None if note.start < 0 else (note.start, note.stop if timed_out else note.reach)


def last_words(trace: Path) -> tuple[str | None, str | None]:
    """The stack that a lost worker left, if any, and why it gave up, if it did."""
    text = trace.read_text("utf-8", "replace").strip() if trace.exists() else ""
    if text.startswith(_SPENT):
        return None, text.removeprefix(_SPENT)
    return text or None, None


class Clock:
    """How long a worker has been at what it is doing. Looked at every now and then, by one thread."""

    def __init__(self) -> None:
        self._beat = -1
        self._ran = self._stopped = 0.0
        self._looked: float | None = None

    def exceeded(self, note: Note, now: float, *, stopped: bool) -> str | None:
        """What the worker has exceeded, if anything: ``limit``, or ``stopped`` if it is not running.

        now: ``time.monotonic()``. stopped: whether the process is stopped, by a signal or a debugger.
        """
        passed = 0.0 if self._looked is None else min(now - self._looked, _STILL_SECONDS)
        self._looked = now
        if note.beat != self._beat or not note.limit:
            self._beat, self._ran, self._stopped = note.beat, 0.0, 0.0
            return None
        if stopped:
            self._stopped += passed
        else:
            self._ran += passed
        if self._ran > note.limit:
            return "limit"
        return "stopped" if self._ran + self._stopped > STOPPED_LIMITS * note.limit else None
