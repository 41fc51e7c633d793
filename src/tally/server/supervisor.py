"""Starts coordinators, and adopts the jobs of dead ones.

Its whole state is in the database: which jobs wait to be started, and which have lost their coordinator. So any number
of servers work beside each other, and each may be killed at any time: coordinators are processes in sessions of their
own, which continue. No model is opened here, and no user's code is imported.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tally import processes
from tally.config import append_private, settings
from tally.database.lease import host
from tally.errors import DatabaseAwayError, TallyError
from tally.jobs.facade import Jobs
from tally.jobs.starts import Start
from tally.jobs.states import ENDED
from tally.jobs.store import JobRecord
from tally.storage import is_url

log = logging.getLogger("tally")

LOOK_SECONDS = 1.0
"""Seconds between two looks at what is to be started."""
ORPHAN_SECONDS = 5.0
"""Seconds between two looks for jobs that have lost their coordinator."""
ATTEMPTS = 3
"""How often a coordinator may die before it has its job."""
STOP_SECONDS = 40.0
"""How long coordinators may take to save what they have, once the server is to stop."""


@dataclass(frozen=True, slots=True)
class _Child:
    start: Start
    process: subprocess.Popen[bytes]


def log_of(job_id: str) -> Path:
    """What the job's coordinator prints."""
    return settings().home / "logs" / f"{job_id}.coordinator.log"


class Supervisor:
    """Runs what waits to be started, at most so many jobs at once, until it is stopped. Used by one thread, but for
    :meth:`stop`, :meth:`wake` and :attr:`running`."""

    def __init__(self, jobs: Jobs, *, parallel: int) -> None:
        self._jobs, self._parallel = jobs, parallel
        self._children: list[_Child] = []
        self._wake, self._stopping = threading.Event(), False
        self._next_orphans = 0.0

    @property
    def running(self) -> int:
        """How many coordinators of this server are alive."""
        return len(self._children)

    def wake(self) -> None:
        """Something is to be started: look now."""
        self._wake.set()

    def stop(self) -> None:
        """Start nothing more. Running jobs save what they have, and go on when a server is started again."""
        self._stopping = True
        self._wake.set()

    def run(self) -> None:
        """Work until :meth:`stop`."""
        while not self._stopping:
            try:
                self._turn()
            except DatabaseAwayError as error:
                log.warning("%s", error.message)
            except (OSError, TallyError) as error:
                log.error("%s", error)
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
        self._end()

    def _turn(self) -> None:
        self._reap()
        if time.monotonic() >= self._next_orphans:
            self._adopt()
            self._next_orphans = time.monotonic() + ORPHAN_SECONDS
        while not self._stopping and len(self._children) < self._parallel:
            start = self._jobs.starts.claim()
            if start is None:
                return
            self._begin(start)

    def _adopt(self) -> None:
        """Have jobs started again whose coordinator is gone."""
        for record in self._jobs.orphaned():
            if self._reaches(record):
                log.info("job %s has lost its coordinator: it is started again", record.id)
                self._jobs.starts.ask(record.id, "resume")

    def _reaches(self, record: JobRecord) -> bool:
        """Whether what the job reads and writes is there for this host, too."""
        spec = record.spec
        places = [*spec.get("source", ()), spec.get("out", "")]
        return record.owner_host == host() or all(is_url(place) for place in places)

    def _begin(self, start: Start) -> None:
        assert start.token is not None
        log_file = log_of(start.job_id)
        command = processes.command("tally.server.drive", start.job_id, start.token)
        try:
            with append_private(log_file) as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError:
            self._jobs.starts.put_back(start.job_id, start.token)
            raise
        self._children.append(_Child(start, process))
        threading.Thread(target=self._wake_when_ended, args=(process,), daemon=True).start()

    def _wake_when_ended(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._wake.set()

    def _reap(self) -> None:
        """Settle what has ended. A coordinator that died before it had its job is started again, a few times."""
        for child in [each for each in self._children if each.process.poll() is not None]:
            start, token = child.start, child.start.token or ""
            unsettled = self._jobs.starts.put_back(start.job_id, token)
            if unsettled is not None and unsettled.attempts >= ATTEMPTS:
                how = f"its process died {ATTEMPTS} times before it could begin; its log: {log_of(start.job_id)}"
                log.error("job %s is not started: %s", start.job_id, how)
                self._jobs.store.give_up(start.job_id, "failed", error=how)
                self._jobs.starts.forget(start.job_id)
            self._children.remove(child)  # last: if the database is away, the next turn tries again

    def _end(self) -> None:
        """Stop the coordinators, which save what they have, and have their jobs started again by the next server."""
        stopped = list(self._children)
        for child in stopped:
            child.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in stopped:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
        try:
            self._reap()
            for child in stopped:
                if self._jobs.store.get(child.start.job_id).state not in (*ENDED, "failed", "paused"):
                    self._jobs.starts.ask(child.start.job_id, "resume", who=child.start.who)
        except TallyError as error:  # those that are left count as orphaned
            log.warning("%s", error)
