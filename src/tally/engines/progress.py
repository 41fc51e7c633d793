"""What a worker is busy with, told so that it survives the worker.

A worker calls :func:`busy` before each batch. The engine that started the worker has given it a file to
note that in (mapped into memory: what was written last survives ``kill -9``), and one for the stack that
the worker leaves when it crashes or outlasts the time limit. Without an engine the notes go nowhere.
"""

from __future__ import annotations

import faulthandler
import mmap
import struct
import time
from pathlib import Path
from typing import IO

_NOTE = struct.Struct("<qqq")

_board: mmap.mmap | bytearray = bytearray(_NOTE.size)
_trace: IO[bytes] | None = None
_armed: tuple[float, float] | None = None


def attach(board: Path, trace: Path) -> None:
    """In a new worker: note to these files from now on. ``trace`` gets the stack of a crash."""
    global _board, _trace
    with board.open("r+b") as file:
        _board = mmap.mmap(file.fileno(), _NOTE.size)
    _trace = trace.open("wb", buffering=0)
    faulthandler.enable(_trace)
    idle()


def busy(start: int, stop: int, *, ahead: int = 0, limit: float | None = None) -> None:
    """The worker is about to work on the positions ``start <= p < stop`` of its chunk.

    ahead: so many positions more are being read ahead of these. One of them may crash the worker, but not
    make it wait: they are suspects when it dies, and are not when its time runs out.
    limit: seconds that this may take; then the process leaves its stack and exits, even when native code
    holds the interpreter (faulthandler's thread needs no lock). None: as long as it likes. The clock starts
    anew at each call, to within a tenth of the limit.
    """
    global _armed
    _NOTE.pack_into(_board, 0, start, stop, stop + ahead)
    if _trace is None:
        return
    if limit is None:
        _disarm()
        return
    now = time.monotonic()
    if _armed is None or _armed[1] != limit or now - _armed[0] > min(1.0, limit / 10):
        faulthandler.dump_traceback_later(limit, exit=True, file=_trace)
        _armed = (now, limit)


def waiting() -> None:
    """What the worker waits for has shown that it is at work on it: the time limit counts from now on. Any thread."""
    global _armed
    if _armed is not None and _trace is not None:
        limit = _armed[1]
        faulthandler.dump_traceback_later(limit, exit=True, file=_trace)
        _armed = (time.monotonic(), limit)


def idle() -> None:
    """The worker has nothing to do: there is no time limit."""
    _NOTE.pack_into(_board, 0, -1, -1, -1)
    _disarm()


def _disarm() -> None:
    global _armed
    if _armed is not None:
        faulthandler.cancel_dump_traceback_later()
        _armed = None


def create(board: Path) -> None:
    """In the engine: an empty file for a worker to be started."""
    board.write_bytes(_NOTE.pack(-1, -1, -1))


def read(board: Path, *, timed_out: bool) -> tuple[int, int] | None:
    """In the engine: the suspects by what the worker said last, or None if it was idle or starting."""
    start, stop, reach = _NOTE.unpack(board.read_bytes()[: _NOTE.size])
    return None if start < 0 else (start, stop if timed_out else reach)


def stack(trace: Path) -> tuple[str | None, bool]:
    """In the engine: the stack that a lost worker left, if any, and whether its time limit was the cause."""
    text = trace.read_text("utf-8", "replace").strip() if trace.exists() else ""
    return text or None, text.startswith("Timeout (")
