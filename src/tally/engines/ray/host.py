"""What runs on a node of the cluster: an actor that holds a local engine of one slot, and carries bytes both ways."""

from __future__ import annotations

import os
import pickle
import platform
import socket
import threading
from concurrent.futures import Future
from typing import Any

from tally.engines.base import Limits, Reports
from tally.engines.local import LocalEngine, PackedTask, new_folder
from tally.engines.mailbox import Inbox
from tally.processes import stay_safe

OUTPUT_BYTES = 256 * 1024
"""How much of what a worker prints during one task is copied to the log."""

Answer = tuple[bool, bytes, str | None, bytes]
"""Whether the task went well; the pickled result or exception; the latter's traceback, or None where the worker was
lost; what it printed."""

News = tuple[list[bytes], Answer | None]
"""Pickled reports of a task, and its answer if it has ended."""


class Host:
    """The actor. ``end`` and ``stop`` may be called while ``run`` or ``more`` runs.

    One call at a time carries reports, and the last of them the answer: so they arrive in order, and before it.
    """

    def facts(self) -> dict[str, str]:
        """The versions here, and what this node is called. The first call; every version must understand it."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return {**versions(), "node": f"{socket.gethostname()} ({address}, {node[:8]})"}

    def begin(self, setup: bytes, limits: Limits, threads: int, logged: bool) -> None:
        """Start the worker."""
        stay_safe()
        folder = new_folder()
        self._log = folder / "worker.log" if logged else None
        self._read = 0
        self._lock = threading.Lock()  # a call to stop a task may overtake the one to run it
        self._number = 0
        self._to_stop = (0, 0.0)
        self._engine = LocalEngine()
        self._engine.start_packed(setup, folder, threads, slots=1, limits=limits, log=self._log)

    def run(self, number: int, task: bytes, reports: bool, backlog: int | None) -> News:
        """Run a task until it reports something or ends. number: counts the tasks of this actor."""
        with self._lock:
            self._run = _Run(task, Reports(_not_here, backlog) if reports else None)
            self._engine.submit_packed(self._run.task)
            self._number = number
            if self._to_stop[0] == number:
                self._engine.stop_task(self._run.task.future, seconds=self._to_stop[1])
        return self.more()

    def more(self) -> News:
        """Go on until the task reports something or ends; what was carried before counts as received."""
        reports, ended = self._run.news()
        if not ended:
            return reports, None
        try:
            return reports, (*self._run.task.future.result(), self._output())
        except Exception as error:
            return reports, (False, pickle.dumps(error), None, self._output())

    def stop(self, number: int, seconds: float) -> None:
        """Stop the task of that number, unless it has ended."""
        with self._lock:
            self._to_stop = (number, seconds)
            if self._number == number:
                self._engine.stop_task(self._run.task.future, seconds=seconds)

    def end(self, kill: bool) -> bytes:
        """End the worker; returns what it printed last."""
        log, self._log = self._log, None
        file = log.open("rb") if log is not None and log.exists() else None
        self._engine.stop(kill=kill)  # and its folder is gone
        if file is None:
            return b""
        with file:
            return _tail(file.fileno(), self._read)[0]

    def _output(self) -> bytes:
        """What the worker has printed since the last time."""
        if self._log is None or not self._log.exists():
            return b""
        with self._log.open("rb") as file:
            output, self._read = _tail(file.fileno(), self._read)
        return output


class _Run:
    """A task of the local engine. Used by one thread, except for :meth:`wake`."""

    def __init__(self, task: bytes, reports: Reports | None) -> None:
        self.task = PackedTask(Future(), task, reports, on_reports=self.wake)
        self.task.future.add_done_callback(self.wake)
        self._inbox: Inbox | None = None
        self._woken = threading.Event()

    def wake(self, cause: Inbox | Future[Any]) -> None:
        """There may be reports, or the task has ended."""
        if isinstance(cause, Inbox):
            self._inbox = cause
        self._woken.set()

    def news(self) -> tuple[list[bytes], bool]:
        """Release the reports of the last call, wait for more or for the end; returns them, and whether it ended."""
        if self._inbox is not None:
            self._inbox.release()
        while True:
            self._woken.wait()
            self._woken.clear()
            ended = self.task.future.done()  # first: nothing is reported after it
            reports = self._inbox.read() if self._inbox is not None else []
            if reports or ended:
                return reports, ended


def versions() -> dict[str, str]:
    """The versions that every node must share with the coordinator."""
    import ray

    from tally import __version__

    return {"Tally": __version__, "Python": platform.python_version(), "Ray": ray.__version__}


def _not_here(report: Any) -> None:
    raise AssertionError("reports are received where the task was submitted")


def _tail(file: int, start: int) -> tuple[bytes, int]:
    """The file's content from ``start``, its beginning left out where it is long; and where it ends."""
    end = os.fstat(file).st_size
    start = min(start, end)  # the engine has left out the middle of it
    skipped = max(0, end - start - OUTPUT_BYTES)
    output = os.pread(file, end - start - skipped, start + skipped)
    return (b"[%d bytes left out]\n" % skipped if skipped else b"") + output, end
