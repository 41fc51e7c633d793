"""What runs inside a worker process of the local engine.

Tasks and results travel as bytes that pebble need not understand. If one cannot be pickled, or not be read at the
other end, its task fails; pebble's threads, which move the messages, continue.

This module is all that a worker imports of Tally before its setup: what it does not need stays out of it.
"""

from __future__ import annotations

import gc
import importlib
import io
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection, util
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple

from tally.engines import task, watchdog


class Files(NamedTuple):
    """Where a worker notes what its engine reads, and the reverse; see :mod:`watchdog` and :mod:`task`.

    early: what the worker prints before its engine says where to.
    """

    note: Path
    trace: Path
    stop_flag: Path
    early: Path


class Setup(NamedTuple):
    """How a worker is set up. call: ``(function, arguments)``, pickled. log: a file that what it prints goes to."""

    call: bytes
    log: str | None


_SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER

_setup: Path
_files: Files
_output: tuple[int, int] | None = None
_state: Any = None
_set_up_for = 0


def begin(setup: Path, files: Files, bell: socket, threads: int, modules: Sequence[str]) -> None:
    """A new worker begins.

    setup: the file with the :class:`Setup`, which is there before the first task. modules: imported meanwhile.
    """
    global _setup, _files, _output
    # Numeric libraries take every core for themselves unless told otherwise, in each worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    _adopt_orphans()
    parent, folder = multiprocessing.parent_process(), files.note.parent
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent, folder), daemon=True).start()
        # Who is idle then is told by its pipe, and may be faster than that thread.
        util.Finalize(None, _end_as_orphan, args=(parent, folder), exitpriority=0)
    try:
        watchdog.attach(files.note, files.trace)
        task.attach(files.stop_flag, bell)
    except FileNotFoundError:
        if parent is not None:
            _end_as_orphan(parent, folder)  # another orphan has tidied up
        raise
    _setup, _files = setup, files
    if setup.exists():
        _print_to(pickle.loads(setup.read_bytes()).log)  # noqa: S301 - from our own parent
    else:
        _output = os.dup(1), os.dup(2)
        _print_to(str(files.early))
    gc.disable()  # imports leave no garbage, and what they made is not looked at again
    for module in modules:
        with suppress(Exception):  # importing it again, where it is needed, says what is wrong
            importlib.import_module(module)
    gc.freeze()
    gc.enable()


def _adopt_orphans() -> None:
    """Processes that code of a model started, and that lose their parent, become children of this one."""
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def _print_to(log: str | None) -> None:
    """Have everything that is printed go to this file, if one is given."""
    if log is None:
        return
    # Below Python, so that native libraries write there too, and not over the progress bar.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    # What was printed last matters most when the worker dies.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _set_up() -> Any:
    """Do what the engine says that the worker needs for its tasks; what was printed early goes where the rest goes."""
    global _output
    given: Setup = pickle.loads(_setup.read_bytes())  # noqa: S301 - from our own parent
    if _output is not None:
        for number, before in enumerate(_output, 1):
            os.dup2(before, number)
            os.close(before)
        _output = None
        _print_to(given.log)
        if early := _files.early.read_bytes():
            os.write(2, early)
    elif _set_up_for:
        _print_to(given.log)
    function, arguments = pickle.loads(given.call)  # noqa: S301
    return function(*arguments)


def _leave_with(parent: Any, folder: Path) -> None:
    """An orphan must not continue writing: end as soon as the parent does."""
    connection.wait([parent.sentinel])
    _end_as_orphan(parent, folder)


def _end_as_orphan(parent: Any, folder: Path) -> None:
    """If the parent is gone: tidy up after it, and end with all that this process has started."""
    import shutil

    from tally.engines import family

    if connection.wait([parent.sentinel], 0):
        shutil.rmtree(folder, ignore_errors=True)
        family.kill_descendants(os.getpid())
        family.kill(os.getpid(), [])  # and itself with them
        os._exit(1)


def nothing(state: Any) -> None:
    """A task that only has a worker set up."""


def call(packed: bytes, mailbox: str | None, backlog: int | None, told: int) -> tuple[bool, bytes, str]:
    """Run a task: ``(function, arguments)``, pickled. mailbox, backlog: for its reports. told: counts the setups that
    the engine was given; for another one, the worker is set up anew.

    Returns whether it went well, the pickled result or exception, and the latter's traceback as text.
    """
    global _state, _set_up_for
    try:
        if told != _set_up_for:
            _state = _set_up()
            _set_up_for = told
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
