"""A run of a pipeline in a process of its own: ``python -m tally.pipelines.drive RUN``. A server starts it.

Nobody waits for it, and it outlives who started it. Where another process drives the run by then, it ends at once.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tally import garbage, processes
from tally.config import append_private
from tally.errors import PipelineStateError
from tally.logs import log_to_stderr
from tally.pipelines.facade import Pipelines, open_pipelines
from tally.pipelines.store import RunRecord

LOG = "driver.log"
"""In the run's folder: what such processes print."""
_launched: list[subprocess.Popen[bytes]] = []
"""Kept, as Python warns of those that go while their process lives; these are meant to."""


def check_here(pipelines: Pipelines, record: RunRecord) -> None:
    """Raises PipelineStateError where a run that no process drives has its files on another machine."""
    if not record.alive and not pipelines.store.has_made(record):
        raise PipelineStateError(
            f"the files of pipeline {record.id} are on {record.owner_host or 'another machine'}, and not here",
            hint=f"Go on there: tally pipeline resume {record.id}",
        )


def launch(record: RunRecord) -> None:
    """Have a process drive a run whose files are here."""
    _launched[:] = [each for each in _launched if each.poll() is None]
    with append_private(Path(record.folder) / LOG) as output:
        process = subprocess.Popen(
            processes.command("tally.pipelines.drive", record.id),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _launched.append(process)


def main() -> int:
    """The process; its exit code is 0 however the run ended."""
    log_to_stderr()
    pipelines = open_pipelines()
    try:
        lease = pipelines.store.resume(sys.argv[1])
    except PipelineStateError as error:
        print(error, file=sys.stderr)
        return 0
    pipelines.drive(lease)
    return 0


if __name__ == "__main__":
    garbage.leave(main())
