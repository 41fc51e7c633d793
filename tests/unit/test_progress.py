"""The clock of a worker's time limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from pathlib import Path
from tally.engines import progress

board, trace, word = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
progress.create(board)
progress.attach(board, trace)
progress.waiting()  # before anything is limited
progress.busy(3, 5, limit=1.0)
for _ in range(8):
    time.sleep(0.4)
    if word == "patient":
        progress.waiting()
progress.idle()
print("done")
"""


@pytest.mark.parametrize("word", ["patient", "hung"])
def test_who_waits_for_what_is_at_work_is_not_hung(tmp_path: Path, word: str) -> None:
    board, trace = tmp_path / "board", tmp_path / "trace"
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(board), str(trace), word], capture_output=True, text=True, check=False
    )
    if word == "patient":
        assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
    else:
        assert ran.returncode == 1
        assert trace.read_text().startswith("Timeout (")
