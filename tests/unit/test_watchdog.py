"""The clock of a worker's time limit, and what a worker leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tally.engines import watchdog
from tally.engines.watchdog import STOPPED_LIMITS, Clock, Note

LOOK = 0.25
"""Seconds between two looks of the engine."""
BUSY = Note(3, 5, 9, beat=1, limit=2.0)


def first_exceeded(clock: Clock, note: Note, looks: int, *, stopped: bool = False, since: float = 0.0) -> int | None:
    """The number of the first look at which the limit was exceeded."""
    for number in range(looks):
        if clock.exceeded(note, since + LOOK * number, stopped=stopped):
            return number
    return None


def test_a_worker_that_runs_has_its_time_and_no_more() -> None:
    assert first_exceeded(Clock(), BUSY, 100) == 9  # the first look begins it, and the eighth after that is 2.0 s
    assert first_exceeded(Clock(), BUSY._replace(limit=0.0), 100) is None


def test_each_batch_has_its_own_time() -> None:
    clock = Clock()
    for beat in range(1, 20):
        assert first_exceeded(clock, BUSY._replace(beat=beat), 8, since=2.0 * beat) is None


@pytest.mark.parametrize("asleep", [3.0, 60.0, 1e6])
def test_a_machine_that_slept_or_was_stopped_with_its_worker_has_lost_no_time(asleep: float) -> None:
    clock = Clock()
    assert first_exceeded(clock, BUSY, 4) is None
    assert clock.exceeded(BUSY, asleep, stopped=False) is None
    assert first_exceeded(clock, BUSY, 9, since=asleep) == 2  # what it had used before counts, and one second more


def test_a_stopped_worker_has_its_limit_several_times() -> None:
    clock = Clock()
    assert first_exceeded(clock, BUSY, int(STOPPED_LIMITS * 2.0 / LOOK), stopped=True) is None
    assert clock.exceeded(BUSY, STOPPED_LIMITS * 2.0, stopped=False) is None
    assert first_exceeded(clock, BUSY, 10, stopped=True, since=STOPPED_LIMITS * 2.0) is not None
    assert clock.exceeded(BUSY, STOPPED_LIMITS * 3.0, stopped=True) == "stopped"


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tally.engines import watchdog

note, trace = Path(sys.argv[1]), Path(sys.argv[2])
watchdog.create(note)
watchdog.attach(note, trace)
watchdog.begin(7)
watchdog.idle()
watchdog.begin(5)
watchdog.busy(1, 3, ahead=2, limit=9.0)
before = watchdog.read(note)
watchdog.reset()
after = watchdog.read(note)
assert after.beat > before.beat and after._replace(beat=before.beat) == before
if sys.argv[3] == "spent":
    os.kill(os.getpid(), watchdog.DUMP_SIGNAL)
    watchdog.give_up("no threads left")
os.kill(os.getpid(), watchdog.DUMP_SIGNAL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["spent", "killed"])
def test_what_is_left_of_a_worker(tmp_path: Path, how: str) -> None:
    note, trace = tmp_path / "note", tmp_path / "trace"
    ran = subprocess.run([sys.executable, "-c", SCRIPT, note, trace, how], capture_output=True, text=True, check=False)
    assert ran.returncode == (1 if how == "spent" else -9), ran.stderr
    found = watchdog.read(note)
    assert (found.start, found.stop, found.reach, found.earlier, found.items, found.limit) == (1, 3, 5, 7, 12, 9.0)
    assert watchdog.suspects(found, timed_out=True) == (1, 3)
    assert watchdog.suspects(found, timed_out=False) == (1, 5)
    stack, spent = watchdog.last_words(trace)
    if how == "spent":
        assert (stack, spent) == (None, "no threads left")
    else:
        assert stack is not None
        assert "most recent call first" in stack
        assert spent is None
