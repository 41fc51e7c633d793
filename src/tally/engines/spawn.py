"""How worker processes are spawned: once for each slot, and without the caller's main script.

A script or notebook therefore needs no ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Collection
from contextlib import suppress
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from typing import Any

import psutil

from tally.processes import SAFE_PATH, environment, track_resources

_main_swap = threading.Lock()


class _Popen(popen_spawn_posix.Popen):
    """multiprocessing's own, but for the safe path, the environment, and what :meth:`_described` says."""

    _child: subprocess.Popen[bytes]
    _fds: list[int]

    def _launch(self, process_obj: Any) -> None:
        track_resources()
        tracker: int = resource_tracker.getfd()  # type: ignore[assignment]
        content = self._described(process_obj)
        ends: list[int] = []
        try:
            sentinel, childs_sentinel = os.pipe()
            ends += sentinel, childs_sentinel
            childs_input, given = os.pipe()
            ends += childs_input, given
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=childs_input)
            command.insert(1, SAFE_PATH)
            # Ctrl-C is for the coordinator to handle; the signal mask is inherited, so that a worker that is just
            # starting is safe from it too.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                inherited = [*self._fds, tracker, childs_input, childs_sentinel]
                self._child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=inherited, env=environment(),
                    restore_signals=False, start_new_session=True,
                )  # fmt: skip
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        except BaseException:
            _close(*ends)
            raise
        _close(childs_sentinel, childs_input)
        self.pid = self._child.pid
        self.sentinel = sentinel
        # The child sees by the pipe's end that this process is gone: it stays open.
        self.finalizer = util.Finalize(self, _close, (sentinel, given))
        with suppress(BrokenPipeError), open(given, "wb", closefd=False) as file:
            file.write(content)

    def _described(self, process_obj: Any) -> bytes:
        """What the child is told about itself.

        multiprocessing would import the caller's main script into the worker: a script without a __main__ guard would
        start the job again from there.
        """
        content = io.BytesIO()
        with _main_swap:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            set_spawning_popen(self)
            try:
                reduction.dump(spawn.get_preparation_data(process_obj._name), content)
                reduction.dump(process_obj, content)
            finally:
                set_spawning_popen(None)
                sys.modules["__main__"] = main
        return content.getvalue()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        self.returncode = self._child.poll() if flag == os.WNOHANG else self._child.wait()
        return self.returncode


def _close(*descriptors: int) -> None:
    for each in descriptors:
        os.close(each)


class Process(SpawnProcess):
    """A worker process."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - multiprocessing's name
        return _Popen(process_obj)


class Context(SpawnContext):
    """A spawn context for one process, a slot's worker.

    When the worker is lost, pebble would start another, which would overwrite what the lost one left behind.
    That is refused, and pebble calls the pool broken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.worker: Process | None = None
        track_resources()  # the pool's locks would start it

    def Process(self, *args: Any, **kwargs: Any) -> Process:  # type: ignore[override]  # noqa: N802
        if self.worker is not None:
            raise ChildProcessError("a slot has one worker")
        self.worker = Process(*args, **kwargs)
        return self.worker


def workers_of(pids: Collection[int]) -> dict[int, int]:
    """How many processes that multiprocessing has started, workers, each of these processes has."""
    found = dict.fromkeys(pids, 0)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (parent := process.ppid()) in found:
                found[parent] += "--multiprocessing-fork" in process.cmdline()
    return found
