"""Starts coordinators, and adopts the jobs of dead ones.

Its whole state is in the database: which jobs wait to be started, and which have lost their coordinator. So any number
of servers work beside each other, and each may be killed at any time: coordinators are processes in sessions of their
own, which continue. No model is opened here, and no user's code is imported.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress

from tally.config import settings
from tally.database.lease import host
from tally.errors import DatabaseAwayError, JobNotFoundError, TallyError
from tally.jobs.children import Children
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


class Supervisor:
    """Runs what waits to be started, at most so many jobs at once, until it is stopped. Used by one thread, but for
    :meth:`stop`, :meth:`wake` and :attr:`running`."""

    def __init__(self, jobs: Jobs, *, parallel: int) -> None:
        self._jobs, self._parallel = jobs, parallel
        self._wake, self._stopping = threading.Event(), False
        self._children: Children[Start] = Children(self._wake)
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
            except Exception:  # this thread is the only one that starts jobs
                log.exception("starting jobs failed")
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
        self._end()

    def _turn(self) -> None:
        self._reap()
        if time.monotonic() >= self._next_orphans:
            self._next_orphans = time.monotonic() + ORPHAN_SECONDS
            self._adopt()
        while not self._stopping and len(self._children) < self._parallel:
            start = self._jobs.starts.claim()
            if start is None:
                return
            self._begin(start)

    def _adopt(self) -> None:
        """Have jobs started again whose coordinator is gone."""
        for record in self._jobs.orphaned():
            if self._reaches(record):
                log.info("job %s has lost its coordinator: it is started again", record.id, extra={"job": record.id})
                self._jobs.starts.ask(record.id, "resume")

    def _reaches(self, record: JobRecord) -> bool:
        """Whether what the job reads and writes is there for this host, too."""
        spec = record.spec
        places = [*spec.get("source", ()), spec.get("out", "")]
        return record.owner_host == host() or all(is_url(place) for place in places)

    def _begin(self, start: Start) -> None:
        assert start.token is not None
        log_file = settings().coordinator_log_of(start.job_id)
        try:
            self._children.start(start, "tally.server.drive", start.job_id, start.token, log=log_file)
        except OSError:
            self._jobs.starts.put_back(start.job_id, start.token)
            raise
        log.info("job %s has a process: %s", start.job_id, start.action, extra={"job": start.job_id})

    def _reap(self) -> None:
        """Settle what has ended. A coordinator that died before it had its job is started again, a few times."""
        for start in self._children.ended():
            unsettled = self._jobs.starts.put_back(start.job_id, start.token or "")
            if unsettled is not None and unsettled.attempts >= ATTEMPTS:
                log_file = settings().coordinator_log_of(start.job_id)
                how = f"its process died {ATTEMPTS} times before it could begin; its log: {log_file}"
                log.error("job %s is not started: %s", start.job_id, how, extra={"job": start.job_id})
                self._jobs.store.give_up(start.job_id, "failed", error=how)
                self._jobs.starts.forget(start.job_id)
            self._children.forget(start)  # last: if the database is away, the next turn tries again

    def _end(self) -> None:
        """Stop the coordinators, which save what they have, and have their jobs started again by the next server."""
        stopped = self._children.work
        self._children.stop(self._reap_if_possible)
        try:
            for start in stopped:
                with suppress(JobNotFoundError):  # it was deleted meanwhile
                    if self._jobs.store.get(start.job_id).state not in (*ENDED, "failed", "paused"):
                        self._jobs.starts.ask(start.job_id, "resume", who=start.who)
        except TallyError as error:  # those that are left count as orphaned
            log.warning("%s", error)

    def _reap_if_possible(self) -> None:
        try:
            self._reap()
        except TallyError as error:  # what is left counts as orphaned
            log.warning("%s", error)
            for start in self._children.ended():
                self._children.forget(start)
