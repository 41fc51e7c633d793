"""What running jobs take of this machine, from its own table of processes: who drives them, and with which workers."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tally.database.lease import host
from tally.jobs.store import JobRecord

GPU_SECONDS = 5.0
"""Seconds between two looks at the memory of GPUs, and the most that one may take."""
_TRACKER = "multiprocessing.resource_tracker"


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that scores, with those that it has started. cpu: percent of one core since the last look; None at
    the first. memory: resident bytes. gpu: bytes of GPU memory; None where there is no telling."""

    pid: int
    cpu: int | None
    memory: int
    gpu: int | None


@dataclass(frozen=True, slots=True)
class Driven:
    """Who drives a job. machine: its name. workers: None if it runs elsewhere, so that they cannot be seen."""

    job: str
    machine: str
    pid: int | None
    workers: tuple[Worker, ...] | None


class Machine:
    """Looks at processes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, psutil.Process] = {}
        self._gpu: dict[int, int] | None = None
        self._next_gpu = 0.0

    def driven(self, records: Iterable[JobRecord]) -> list[Driven]:
        """Of those of the jobs that are alive, who drives them, and how busy the workers are."""
        with self._lock:
            known, self._known = self._known, {}
            return [self._one(record, known) for record in records if record.alive]

    def _one(self, record: JobRecord, known: dict[int, psutil.Process]) -> Driven:
        machine = (record.owner_host or "").partition(" (")[0]
        if record.owner_host != host():
            return Driven(record.id, machine, record.owner_pid, None)
        workers: list[Worker] = []
        with suppress(psutil.Error):
            for child in psutil.Process(record.owner_pid).children():
                with suppress(psutil.Error):  # it has ended meanwhile
                    if not any(_TRACKER in each for each in child.cmdline()):
                        workers.append(self._worker(child, known))
        return Driven(record.id, machine, record.owner_pid, tuple(workers))

    def _worker(self, process: psutil.Process, known: dict[int, psutil.Process]) -> Worker:
        shares, memory, new = [], 0, True
        pids = []
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                same = known.get(each.pid)
                one = same if same is not None and same == each else each  # a pid may be another process's by now
                new = new and one is each
                self._known[one.pid] = one
                shares.append(one.cpu_percent())
                memory += one.memory_info().rss
                pids.append(one.pid)
        gpu = self._gpus()
        taken = None if gpu is None else sum(gpu.get(pid, 0) for pid in pids)
        return Worker(process.pid, None if new else round(sum(shares)), memory, taken)

    def _gpus(self) -> dict[int, int] | None:
        """Bytes of GPU memory by process; None where there is no telling."""
        if time.monotonic() >= self._next_gpu:
            self._gpu = _gpu_memory()
            self._next_gpu = time.monotonic() + GPU_SECONDS
        return self._gpu


def _gpu_memory() -> dict[int, int] | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=GPU_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found: dict[int, int] = {}
    for line in done.stdout.splitlines():
        pid, _, mebibytes = line.partition(",")
        if pid.strip().isdecimal() and mebibytes.strip().isdecimal():
            found[int(pid)] = found.get(int(pid), 0) + (int(mebibytes) << 20)
    return found
