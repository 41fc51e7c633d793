"""The clock of a worker's time limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from pathlib import Path
from tally.engines import watchdog

note, trace, word = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
watchdog.create(note)
watchdog.attach(note, trace)
watchdog.reset()  # before anything is limited
watchdog.busy(3, 5, limit=1.0)
for _ in range(8):
    time.sleep(0.4)
    if word == "patient":
        watchdog.reset()
watchdog.idle()
print("done")
"""


@pytest.mark.parametrize("word", ["patient", "hung"])
def test_a_worker_that_resets_its_clock_is_not_hung(tmp_path: Path, word: str) -> None:
    note, trace = tmp_path / "note", tmp_path / "trace"
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(note), str(trace), word], capture_output=True, text=True, check=False
    )
    if word == "patient":
        assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
    else:
        assert ran.returncode == 1
        assert trace.read_text().startswith("Timeout (")
