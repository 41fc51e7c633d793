"""Starts coordinators, and adopts the jobs of dead ones.

Its whole state is in the database: which jobs wait to be started, and which have lost their coordinator. So any number
of servers work beside each other, and each may be killed at any time: coordinators are processes in sessions of their
own, which continue. No model is opened here, and no user's code is imported.

A coordinator whose job has finished rests for a while, with its workers, and is given the next job of the same model.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import suppress

from tally.config import settings
from tally.database.lease import host
from tally.errors import DatabaseAwayError, JobNotFoundError, SourceNotFoundError, TallyError
from tally.jobs.children import Children
from tally.jobs.facade import Jobs
from tally.jobs.starts import Start
from tally.jobs.states import ENDED
from tally.jobs.store import JobRecord
from tally.jobs.tidy import sink_of
from tally.sources.locations import locate
from tally.storage import is_url

log = logging.getLogger("tally")

LOOK_SECONDS = 1.0
"""Seconds between two looks at what is to be started."""
ORPHAN_SECONDS = 5.0
"""Seconds between two looks for jobs that have lost their coordinator."""
RESTING_SECONDS = 1.0
"""How long a coordinator may take from the end of its job until it rests."""
_LIKE = (
    "model", "task", "labels", "artifacts", "settings", "by", "trust", "device", "batch_size", "overlay", "thumbnails",
    "pages", "background", "max_pixels", "empty_rows", "workers",
)  # fmt: skip
"""The fields of a spec that decide what workers load."""
ATTEMPTS = 3
"""How often a coordinator may die before it has its job."""


class Supervisor:
    """Runs what waits to be started, at most so many jobs at once, until it is stopped. Used by one thread, but for
    :meth:`stop`, :meth:`wake`, :attr:`running` and :attr:`resting`.

    A split job, which does nothing but see to its parts, makes room for one of them beside it: so it always goes on.

    keep_warm: seconds for which a coordinator rests, at most: where a job needs another one, those that rest end.
    """

    def __init__(self, jobs: Jobs, *, parallel: int, keep_warm: float = 0.0) -> None:
        self._jobs, self._parallel, self._keep_warm = jobs, parallel, keep_warm
        self._wake, self._stopping = threading.Event(), False
        self._children: Children[Start] = Children(self._wake)
        self._handed: set[str] = set()
        self._split: set[str] = set()
        """The split jobs among what is running."""
        self._next_orphans = 0.0

    @property
    def running(self) -> int:
        """How many coordinators of this server have a job."""
        return len(self._children)

    @property
    def resting(self) -> int:
        """How many of them wait for the next one."""
        return self._children.resting

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
        while not self._stopping and (room := self._parallel + len(self._split) - len(self._children)) > 0:
            start = self._jobs.starts.claim(parts=room <= len(self._split))
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
        """Whether what the job reads and writes is there for this host, too.

        A container that is started again is another host. It has the same files if the job's own mark is in its output;
        or, where that is in a bucket, if it is called the same.
        """
        if record.owner_host == host():
            return True
        files = [each for each in record.spec.get("source", ()) if not is_url(each)]
        if is_url(record.spec.get("out", "")):
            same = not files or (record.owner_host or "").startswith(f"{socket.gethostname()} (")
        else:
            same = bool(record.output) and sink_of(record).holder() == (record.parent or record.id)
        try:
            return same and (not files or bool(locate(files, missing=True)))
        except SourceNotFoundError:
            return False

    def _begin(self, start: Start) -> None:
        assert start.token is not None
        try:
            record = self._jobs.store.get(start.job_id)
        except JobNotFoundError:  # it was deleted just now, and its start with it
            return
        log_file = settings().coordinator_log_of(record.parent or record.id)
        try:
            like = self._like(record)
            if like is None or not self._hand(start, like):
                self._children.make_room()
                more = () if like is None else (str(self._keep_warm),)
                self._children.start(
                    start, "tally.server.drive", start.job_id, start.token, *more, log=log_file, like=like
                )
        except OSError:
            self._jobs.starts.put_back(start.job_id, start.token)
            raise
        if record.spec.get("split") is not None:
            self._split.add(record.id)
        log.info("job %s has a process: %s", start.job_id, start.action, extra={"job": start.job_id})

    def _hand(self, start: Start, like: str) -> bool:
        """Give the job to a coordinator that rests, or will at once: its job has finished. Whether there is one."""
        assert start.token is not None
        log_file = settings().coordinator_log_of(start.job_id)
        deadline = time.monotonic() + RESTING_SECONDS
        while True:
            about_to = any(map(self._has_finished, self._children.working(like)))
            if self._children.hand(start, like, start.job_id, start.token, log=log_file):
                self._handed.add(start.job_id)
                return True
            if not about_to or time.monotonic() > deadline:
                return False
            self._wake.wait(0.02)
            # What else came up meanwhile is seen in the same turn, or in the next.
            self._wake.clear()

    def _has_finished(self, start: Start) -> bool:
        with suppress(TallyError):
            return self._jobs.store.get(start.job_id).state == "finished"
        return False

    def _like(self, record: JobRecord) -> str | None:
        """What jobs have in common that one coordinator may drive, one after another; None of one that has its own.

        It only has to guess well: the coordinator and its workers look at what they really have.
        """
        spec = record.spec
        if not self._keep_warm or spec.get("engine") != "local":
            return None
        if record.parent is not None or spec.get("split") is not None:  # whose workers are those of its parts
            return None
        return json.dumps({name: spec.get(name) for name in _LIKE}, sort_keys=True)

    def _reap(self) -> None:
        """Settle what has ended. A coordinator that died before it had its job is started again, a few times."""
        for start in self._children.ended():
            counted = start.job_id not in self._handed  # who rested may end before it begins, without a fault
            unsettled = self._jobs.starts.put_back(start.job_id, start.token or "", counted=counted)
            if unsettled is not None and unsettled.attempts >= ATTEMPTS:
                log_file = settings().coordinator_log_of(start.job_id)
                how = f"its process died {ATTEMPTS} times before it could begin; its log: {log_file}"
                log.error("job %s is not started: %s", start.job_id, how, extra={"job": start.job_id})
                self._jobs.store.give_up(start.job_id, "failed", error=how)
                self._jobs.starts.forget(start.job_id)
            self._split.discard(start.job_id)
            self._children.forget(start)  # last: if the database is away, the next turn tries again
        self._handed.intersection_update(each.job_id for each in self._children.work)

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
