"""What runs inside a worker process of the local engine.

Tasks and results travel as bytes that pebble need not understand. If one cannot be pickled, or not be read at the
other end, its task fails; the threads that pebble moves messages with go on.

This module is all that a worker imports of Tally before its setup: what it does not need stays out of it.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from multiprocessing import connection
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple

from tally.engines import task, watchdog


class Files(NamedTuple):
    """Where a worker notes what its engine reads, and the reverse; see :mod:`watchdog` and :mod:`task`."""

    note: Path
    trace: Path
    stop_flag: Path


_setup = b""
_state: Any = None
_ready = False


def begin(setup: bytes, files: Files, bell: socket, log: str | None, threads: int) -> None:
    """A new worker begins. setup: ``(function, arguments)``, pickled; it is called with the first task."""
    global _setup
    # Numeric libraries take every core for themselves unless told otherwise, in each worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if log is not None:
        # Below Python, so that native libraries write there too, and not over the progress bar.
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        # What was printed last matters most when the worker dies.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
    watchdog.attach(files.note, files.trace)
    task.attach(files.stop_flag, bell)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent, files.note.parent), daemon=True).start()
    _setup = setup


def _leave_with(parent: Any, folder: Path) -> None:
    """An orphan must not go on writing: end as soon as the parent does, and tidy up after it."""
    import shutil

    connection.wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def call(packed: bytes, mailbox: str | None, backlog: int | None) -> tuple[bool, bytes, str]:
    """Run a task: ``(function, arguments)``, pickled. mailbox, backlog: for its reports.

    Returns whether it went well, the pickled result or exception, and the latter's traceback as text.
    """
    global _state, _ready
    try:
        if not _ready:
            setup, args = pickle.loads(_setup)  # noqa: S301 - from our own parent
            _state = setup(*args)
            _ready = True
        function, arguments = pickle.loads(packed)  # noqa: S301
        task.begin(mailbox, backlog)
        return True, pickle.dumps(function(_state, *arguments)), ""
    except BaseException as error:
        text = traceback.format_exc()
        try:
            return False, pickle.dumps(error), text
        except Exception:
            return False, b"", text
    finally:
        task.end()
        watchdog.idle()
