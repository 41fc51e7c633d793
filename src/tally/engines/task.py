"""What code of a task may call while it runs on a worker: report to the task's caller, and see whether to stop.

Without an engine both do nothing. They may be called from any thread of the task.
"""

from __future__ import annotations

import mmap
import pickle
from pathlib import Path
from socket import socket
from typing import Any

from tally.engines.mailbox import Outbox

_stop_flag: mmap.mmap | bytes = b"\0"
_bell: socket | None = None
_outbox: Outbox | None = None


def report(value: Any) -> None:
    """Send a value to whoever submitted this task with :class:`~tally.engines.base.Reports`; any that pickles.

    It returns at once, or, where all reports are to arrive and too many were not received yet, when there is room.
    Reports that were sent before a crash arrive all the same.
    """
    if (outbox := _outbox) is not None:
        outbox.put(pickle.dumps(value))


def stopping() -> bool:
    """Whether this task is asked to stop: return soon, or the worker is killed. Cheap enough for every batch."""
    return _stop_flag[0] != 0


# -- for engines -----------------------------------------------------------------------------------


def attach(stop_flag: Path, bell: socket) -> None:
    """In a new worker: the file whose first byte says whether to stop, and the bell of its mailboxes."""
    global _stop_flag, _bell
    with stop_flag.open("r+b") as file:
        _stop_flag = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
    bell.set_inheritable(False)
    _bell = bell


def begin(mailbox: str | None, backlog: int | None) -> None:
    """A task begins; its reports go to that mailbox, if there is one."""
    global _outbox
    if mailbox is not None and _bell is not None:
        _outbox = Outbox(mailbox, backlog, _bell)


def end() -> None:
    """A task ends: later reports of its threads are dropped."""
    global _outbox
    _outbox = None
