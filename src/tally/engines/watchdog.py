"""What a worker is busy with, noted so that it survives the worker, and the time limit for it.

A worker calls :func:`busy` before each batch. The engine that started the worker has given it two files: a note in
shared memory (what was written last survives ``kill -9``), and one for the stack of a worker that crashes or exceeds
its time limit. Without an engine the notes go nowhere.
"""

from __future__ import annotations

import faulthandler
import mmap
import struct
import time
from pathlib import Path
from typing import IO

_NOTE = struct.Struct("<qqq")

_note: mmap.mmap | bytearray = bytearray(_NOTE.size)
_trace: IO[bytes] | None = None
_armed: tuple[float, float] | None = None
"""Since when the time limit runs, and the limit, in seconds."""


# -- in a worker -----------------------------------------------------------------------------------


def attach(note: Path, trace: Path) -> None:
    """In a new worker: use these files from now on. ``trace`` gets the stack of a crash."""
    global _note, _trace
    with note.open("r+b") as file:
        _note = mmap.mmap(file.fileno(), _NOTE.size)
    _trace = trace.open("wb", buffering=0)
    faulthandler.enable(_trace)
    idle()


def busy(start: int, stop: int, *, ahead: int = 0, limit: float | None = None) -> None:
    """The worker is about to work on the positions ``start <= p < stop`` of its chunk.

    ahead: how many positions after these are being read ahead. Each of them may be what crashes the worker, but none
        delays it: they are suspects of a crash, and not of a time limit that is exceeded.
    limit: how many seconds this may take. After that the process writes its stack and exits, even when native code
        holds the interpreter (faulthandler's thread needs no lock). Each call starts the clock anew, to within a tenth
        of the limit. None: no limit.
    """
    global _armed
    _NOTE.pack_into(_note, 0, start, stop, stop + ahead)
    if _trace is None:
        return
    if limit is None:
        _disarm()
        return
    now = time.monotonic()
    if _armed is None or _armed[1] != limit or now - _armed[0] > min(1.0, limit / 10):
        faulthandler.dump_traceback_later(limit, exit=True, file=_trace)
        _armed = (now, limit)


def reset() -> None:
    """Start the clock of the time limit anew: the worker waits for something that is known to be alive. Any thread."""
    global _armed
    if _armed is not None and _trace is not None:
        limit = _armed[1]
        faulthandler.dump_traceback_later(limit, exit=True, file=_trace)
        _armed = (time.monotonic(), limit)


def idle() -> None:
    """The worker has nothing to do: there is no time limit."""
    _NOTE.pack_into(_note, 0, -1, -1, -1)
    _disarm()


def _disarm() -> None:
    global _armed
    if _armed is not None:
        faulthandler.cancel_dump_traceback_later()
        _armed = None


# -- in the engine ---------------------------------------------------------------------------------


def create(note: Path) -> None:
    """An empty note for a worker that is about to start."""
    note.write_bytes(_NOTE.pack(-1, -1, -1))


def suspects(note: Path, *, timed_out: bool) -> tuple[int, int] | None:
    """The positions that a lost worker was busy with, half-open; None if it was idle or starting."""
    start, stop, stop_ahead = _NOTE.unpack(note.read_bytes()[: _NOTE.size])
    return None if start < 0 else (start, stop if timed_out else stop_ahead)


def last_stack(trace: Path) -> tuple[str | None, bool]:
    """The stack that a lost worker left, if any, and whether it exceeded its time limit."""
    text = trace.read_text("utf-8", "replace").strip() if trace.exists() else ""
    return text or None, text.startswith("Timeout (")
