"""Processes of steps, as their driver sees them: started through the launcher, and found again after a driver's end."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from tally.errors import PipelineError
from tally.pipelines.steps import launcher
from tally.pipelines.steps.launcher import MARK

_LONGEST_LINE = 64 << 20
_LOOK_SECONDS = 0.05
"""How often it is looked whether a process that another launcher has started is over."""


@dataclass(frozen=True, slots=True)
class End:
    """How a step's process ended. code: negative: a signal. late: its limit was over. error: why none was started."""

    code: int
    late: bool
    error: str | None
    at: float

    @classmethod
    def of(cls, folder: Path) -> End | None:
        """What the step's folder says; None if its process has not ended, or was lost."""
        try:
            found = json.loads((folder / "exit").read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(found["code"], found["late"], found.get("error"), found["at"])


@dataclass(frozen=True, slots=True)
class Command:
    """What the launcher is asked to start: see :mod:`tally.pipelines.steps.launcher`."""

    mark: str
    folder: Path
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    root: bool
    binds: Sequence[tuple[str, str, bool]] = ()
    keep: Sequence[str] = ()
    opaque: Sequence[str] = ()
    limit: float | None = None
    stdout: Path | None = None
    after: Sequence[str] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.mark, "folder": str(self.folder), "argv": list(self.argv),
            "env": {**self.env, MARK: self.mark}, "cwd": self.cwd, "root": self.root,
            "binds": [list(each) for each in self.binds],
            "keep": list(self.keep), "opaque": list(self.opaque), "limit": self.limit,
            "stdout": str(self.stdout) if self.stdout else None,
            "after": list(self.after) if self.after else None,
        }  # fmt: skip


class Processes:
    """The launcher of one driver; ``async with`` starts it, and lets go of it.

    folder: where launchers note that they are there. Only the event loop's thread may use it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends: dict[str, asyncio.Future[End]] = {}
        self._adopted: dict[str, tuple[signal.Signals, float] | None] = {}
        # Steps of other launchers: the signal that they are to be sent next, and when.
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        await self._wait_for_others()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(Path(launcher.__file__)), str(self._folder),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True, limit=_LONGEST_LINE,
        )  # fmt: skip
        assert self._process.stdout is not None
        if not await self._process.stdout.readline():
            raise PipelineError("the process that starts steps did not come up")
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._listening is not None
        self._process.stdin.close()
        self._listening.cancel()
        with suppress(asyncio.CancelledError):
            await self._listening
        if not self._ends:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), 5)

    async def _wait_for_others(self) -> None:
        """Wait until launchers of drivers that were killed have begun all they were asked to begin."""
        for lock in self._folder.glob("*.lock"):
            try:
                number = os.open(lock, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                while True:
                    try:
                        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError:
                        if lock.with_suffix(".closed").exists():
                            break
                        await asyncio.sleep(0.01)
                        continue
                    lock.unlink(missing_ok=True)
                    lock.with_suffix(".closed").unlink(missing_ok=True)
                    break
            finally:
                os.close(number)

    async def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            found = json.loads(line)
            if (future := self._ends.pop(found.get("id"), None)) is not None and not future.done():
                future.set_result(End(found["code"], found["late"], found.get("error"), found["at"]))
        for future in self._ends.values():
            if not future.done():
                future.set_exception(PipelineError("the process that starts steps was killed"))
        self._ends.clear()

    def _say(self, request: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    async def run(self, command: Command) -> End:
        """Start a process, and wait for its end."""
        future: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._ends[command.mark] = future
        self._say(command.to_json())
        return await future

    def stop(self, mark: str, *, now: bool = False) -> None:
        """Ask a step's processes to end, then kill them; ``now``: kill them at once."""
        if mark in self._adopted:
            self._adopted[mark] = (signal.SIGKILL if now else signal.SIGTERM, time.monotonic())
        else:
            self._say({"stop": mark, "now": now})

    def lives(self, mark: str, folder: Path) -> bool:
        """Whether a process that another launcher has started goes on."""
        return End.of(folder) is None and self._is_kept(folder) and self._leader(mark, folder) is not None

    async def adopt(self, mark: str, folder: Path) -> End | None:
        """Wait for the end of a process that another driver's launcher has started, and holds to its limits.

        None if there is none, and it left no end: then it may be started. What outlived its launcher is killed first.
        """
        self._adopted[mark] = None
        try:
            while True:
                kept = self._is_kept(folder)
                if (end := End.of(folder)) is not None:
                    return end
                if not kept:
                    kill_marked(mark)
                    return None
                due, leader = self._adopted[mark], self._leader(mark, folder)
                if due is not None and leader is not None and due[1] <= time.monotonic():
                    self._adopted[mark] = (signal.SIGKILL, time.monotonic() + launcher.GRACE_SECONDS)
                    _signal(leader, due[0])
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            del self._adopted[mark]

    def _is_kept(self, folder: Path) -> bool:
        """Whether the launcher of a step that was begun is there: it writes down how the step ends."""
        try:
            note = json.loads((folder / "pid").read_text("utf-8"))
            with (self._folder / f"{note['launcher']}.lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            pass
        return False

    @staticmethod
    def _leader(mark: str, folder: Path) -> int | None:
        """The first process of a step that is kept, if it lives."""
        try:
            note = json.loads((folder / "pid").read_text("utf-8"))
            process = psutil.Process(note["pid"])
            return process.pid if process.ppid() == note["launcher"] else None
        except (OSError, ValueError, psutil.Error):
            return None


def _signal(leader: int, number: signal.Signals) -> None:
    with suppress(OSError):
        os.killpg(leader, number)


def kill_marked(mark: str, *, prefix: bool = False) -> None:
    """Kill every process of a step, by its mark; prefix: of all steps whose ids begin so."""
    for process in psutil.process_iter():
        try:
            its = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        if its == mark or (prefix and its.startswith(mark)):
            with suppress(psutil.Error):
                process.kill()
