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

FOLLOW_SECONDS = 2.0
"""How often runs that have begun since are looked for."""


def show(
    records: Sequence[RunRecord],
    *,
    host: str,
    port: int,
    say: Callable[[str], object],
    later: Callable[[], Sequence[RunRecord]] | None = None,
) -> int:
    """Run TensorBoard until it is stopped; its exit code.

    later: asked now and then for runs that are to be shown, too.
    Raises RunError without TensorBoard; without ``later``, also where nothing is there.
    """
    if not can_write():
        raise RunError(
            "TensorBoard is not installed",
            hint="pip install 'tally-scoring[retrain]', or just: pip install tensorboard",
        )
    here = [each for each in records if (Path(each.folder) / EVENTS).is_dir()]
    if not here and later is None:
        raise RunError(
            "none of these runs has event files on this machine" if records else "there are no runs yet",
            hint="Runs write them where tensorboard is installed: pip install 'tally-scoring[retrain]'",
        )
    with tempfile.TemporaryDirectory(prefix="tally-tensorboard-") as folder:
        _link(here, folder)
        say(f"TensorBoard shows {len(here):,} runs{'' if later is None else ', and those that begin'}; Ctrl-C ends it")
        arguments = ["--logdir", folder, "--host", host, "--port", str(port)]
        command = [sys.executable, processes.SAFE_PATH, "-m", "tensorboard.main", *arguments]
        process = subprocess.Popen(command, env=processes.environment())
        try:
            while True:
                try:
                    return process.wait(None if later is None else FOLLOW_SECONDS)
                except subprocess.TimeoutExpired:
                    assert later is not None
                    _link(later(), folder)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return 0


def _link(records: Sequence[RunRecord], folder: str) -> None:
    for each in records:
        link, events = Path(folder, shown_name(each)), Path(each.folder) / EVENTS
        if events.is_dir() and not link.is_symlink():
            link.symlink_to(events)


def shown_name(record: RunRecord) -> str:
    """What TensorBoard calls a run: its name, and its id, as one folder's name."""
    name = re.sub(r"[^\w.=,@ -]+", "-", record.name)[:100].strip(" .-")
    return record.id if name in ("", record.id) else f"{name} {record.id}"
