"""Killing a job at random moments, and going on with it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SCORERS = Path(__file__).with_name("scorers")


def tally(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tally", *map(str, arguments)]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def storm(command: list[str], result: Path, *, kills: int, seed: int, log: Path) -> None:
    """Run the job, killing a worker, its coordinator or everything, so often; then let it finish.

    result: is there once the job is finished.
    """
    dice = random.Random(seed)
    resume = [*command, "--resume"]
    process = start(command, log)
    killed = {"worker": 0, "coordinator": 0, "everything": 0}
    deadline = time.monotonic() + 600
    while sum(killed.values()) < kills and time.monotonic() < deadline:
        try:
            process.wait(timeout=dice.uniform(0.05, 1.0))
        except subprocess.TimeoutExpired:
            pass
        if process.poll() is not None:
            if result.exists():
                break
            process = start(resume, log)
            continue
        workers = workers_of(process)
        victim = dice.choices(["worker", "coordinator", "everything"], weights=[4, 1, 1])[0]
        if victim == "worker" and workers:
            _kill(dice.choice(workers).pid)
        elif victim == "coordinator":
            _kill(process.pid)
        else:
            for each in [*workers, process]:
                _kill(each.pid)
        killed[victim] += 1
    process.wait(timeout=300)
    for _ in range(3):
        if not result.exists():
            subprocess.run([*resume, "-q"], check=True, timeout=300)
    print(f"kills: {killed}")
    assert result.exists(), log.read_text()
    assert sum(killed.values()) == kills, "the job was over before it was disturbed enough"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
