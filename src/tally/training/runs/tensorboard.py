"""Starting TensorBoard on runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tally import processes
from tally.errors import RunError
from tally.training.runs.events import can_write
from tally.training.runs.store import EVENTS, RunRecord


def show(records: Sequence[RunRecord], *, host: str, port: int, say: Callable[[str], object]) -> int:
    """Run TensorBoard until it is stopped; its exit code. Raises RunError without it, or where nothing is there."""
    if not can_write():
        raise RunError(
            "TensorBoard is not installed", hint="pip install 'tally-scoring[train]', or just: pip install tensorboard"
        )
    here = [each for each in records if (Path(each.folder) / EVENTS).is_dir()]
    if not here:
        raise RunError(
            "none of these runs has event files on this machine" if records else "there are no runs yet",
            hint="Runs write them where tensorboard is installed: pip install 'tally-scoring[train]'",
        )
    with tempfile.TemporaryDirectory(prefix="tally-tensorboard-") as folder:
        for each in here:
            Path(folder, shown_name(each)).symlink_to(Path(each.folder) / EVENTS)
        say(f"TensorBoard shows {len(here):,} runs; Ctrl-C ends it")
        arguments = ["--logdir", folder, "--host", host, "--port", str(port)]
        command = [sys.executable, processes.SAFE_PATH, "-m", "tensorboard.main", *arguments]
        process = subprocess.Popen(command, env=processes.environment())
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return 0


def shown_name(record: RunRecord) -> str:
    """What TensorBoard calls a run: its name, and its id, as one folder's name."""
    name = re.sub(r"[^\w.=,@ -]+", "-", record.name)[:100].strip(" .-")
    return record.id if name in ("", record.id) else f"{name} {record.id}"
