"""A job whose source is shared out: each part has a coordinator of its own, and the output is one.

The parts are jobs whose rows say whose they are. Each plans what is its own of the source, and stages what it scores in
the job's output. The job itself has a coordinator that does nothing but this: it has the parts started, and again where
they are lost, adds up what they say, passes on what the user asks, and ends with them. Once all of them are finished,
what they have becomes the job's own (:meth:`tally.jobs.store.JobStore.join`): from then on it is a job like any other,
and its output is made as that of any other.

If this coordinator is killed, the parts continue; the next one finds them.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.config import settings
from tally.database.waiting import Patience
from tally.engines.factory import make_engine
from tally.errors import JobError, JobStateError, TallyError
from tally.jobs.children import Children
from tally.jobs.coordinator import GRACE_SECONDS
from tally.jobs.events import Events, Planned
from tally.jobs.follow import Follower, is_driven
from tally.jobs.lease_renewer import LEASE_SECONDS, lease_renewer
from tally.jobs.spec import JobSpec
from tally.jobs.starts import StartStore
from tally.jobs.states import Request
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord, JobStore, Lease
from tally.sources.base import Source

if TYPE_CHECKING:
    from tally.engines.ray.cluster import Cluster

log = logging.getLogger("tally")

LOOK_SECONDS = 0.5
"""Seconds between two looks at the parts."""
LOSSES = 5
"""So many coordinators of a part in a row that end without having done anything are no accident: the job fails."""
PUT_DOWN_SECONDS = LEASE_SECONDS + 2 * GRACE_SECONDS
"""How long parts may take to end that were told to."""
_NOT_OF_PARTS = {"split": None, "alerts": (), "webhook": None, "log": False, "price_per_hour": None}


class Launcher(ABC):
    """Starts coordinators of parts. shared: all of them on this machine, whose workers and memory they share."""

    shared = False

    @abstractmethod
    def start(self, part: JobRecord, *, retry_dead: bool) -> None:
        """Have the part driven; returns at once."""

    @abstractmethod
    def is_starting(self, part: JobRecord) -> bool:
        """Whether what :meth:`start` has begun may still be there."""

    def kill(self) -> None:  # noqa: B027  # coordinators elsewhere are not this process's to kill
        """End what was started, at once."""


class Processes(Launcher):
    """Processes of this machine."""

    shared = True

    def __init__(self) -> None:
        self._children: Children[str] = Children(threading.Event())

    def start(self, part: JobRecord, *, retry_dead: bool) -> None:
        log_file = settings().coordinator_log_of(part.parent or part.id)
        more = ["dead"] if retry_dead else []
        path = json.dumps([each or str(Path.cwd()) for each in sys.path])  # a model may be a class of this program's
        self._children.start(part.id, "tally.jobs.part", part.id, path, *more, log=log_file)

    def is_starting(self, part: JobRecord) -> bool:
        self._reap()
        return part.id in self._children.work

    def kill(self) -> None:
        self._children.stop(self._reap, at_once=lambda: True)

    def _reap(self) -> None:
        for each in self._children.ended():
            self._children.forget(each)


class Served(Launcher):
    """Whichever server has room."""

    def __init__(self, starts: StartStore) -> None:
        self._starts = starts

    def start(self, part: JobRecord, *, retry_dead: bool) -> None:
        self._starts.ask(part.id, "retry" if retry_dead else "resume")

    def is_starting(self, part: JobRecord) -> bool:
        return self._starts.is_waiting(part.id)


class InCluster(Launcher):
    """Jobs of a Ray cluster, each followed by a thread that starts its coordinator again where that is lost."""

    def __init__(self, store: JobStore, cluster: Cluster) -> None:
        self._store, self._cluster = store, cluster
        self._threads: dict[str, threading.Thread] = {}

    def start(self, part: JobRecord, *, retry_dead: bool) -> None:
        from tally.jobs.cluster import drive_in_cluster

        def follow() -> None:
            try:
                drive_in_cluster(
                    self._store, part.id, self._cluster, events=Events(), stop=Stop(), retry_dead=retry_dead
                )
            except TallyError as error:  # of a part that has failed, its row says so
                log.error("part %s of job %s: %s", (part.part or {}).get("number"), part.parent, error)

        self._threads[part.id] = thread = threading.Thread(target=follow, name=f"tally-{part.id}", daemon=True)
        thread.start()

    def is_starting(self, part: JobRecord) -> bool:
        thread = self._threads.get(part.id)
        return thread is not None and thread.is_alive()


class Conductor:
    """Has the parts of one job driven. Used by one thread, but for :meth:`stop`."""

    def __init__(
        self,
        store: JobStore,
        record: JobRecord,
        lease: Lease,
        *,
        spec: JobSpec,
        source: Source,
        launcher: Launcher,
        events: Events,
        retry_dead: bool = False,
    ) -> None:
        self._store, self._lease, self._launcher = store, lease, launcher
        self._spec, self._source, self._events = spec, source, events
        self._retry_dead = retry_dead
        self._patience = Patience(events.waiting)
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._follower = Follower(store, record, events)
        self._asked: Request = "run"
        self._stopping = self._planned = False
        self._error: JobError | None = None
        self._state = "running"
        self._seconds, self._since = record.usage.get("seconds", 0.0), time.monotonic()
        self._begun: set[str] = set()
        self._replay: set[str] = set()
        self._losses: dict[str, tuple[int, int]] = {}

    def stop(self, *, now: bool = False) -> None:
        """Have the parts save what they have, and end; with ``now``, kill those that are processes here. Any thread."""
        if not self._stopping:
            self._stopping = True
            self._events.note("stopping: running chunks of all parts are finished and saved (again to kill them)")
        self._patience.give_up(0.0 if now else GRACE_SECONDS)
        self._inbox.put(("stop", now))

    def run(self) -> str:
        """See the parts through; ``finished`` if all of them are, ``interrupted`` or ``cancelled`` if none runs now.

        Raises what made one of them fail, once all have ended; OwnershipLostError.
        """
        renewer = lease_renewer(self._store, self._lease, self._inbox, self._patience)
        renewer.start()
        try:
            self._share_out()
            while (state := self._look()) is None:
                self._hear()
        finally:
            renewer.stop()
        if self._error is not None and state != "cancelled":
            raise self._error
        return state

    def _share_out(self) -> None:
        """Make the parts, unless they are made."""
        parts = self._patience(lambda: self._store.parts(self._lease.job_id))
        if self._retry_dead:
            self._replay = {each.id for each in parts if each.dead}
        if parts or self._spec.split is None:
            return
        cuts, count = self._source.cuts(self._spec.split), self._spec.split
        if cuts is None:
            own: list[dict[str, Any]] = [{"shard": f"{number}/{count}"} for number in range(1, count + 1)]
            self._events.note(f"split into {count} parts: each lists all, and scores its share")
        else:
            ends = [None, *cuts, None]
            own = [{"between": list(pair)} for pair in pairwise(ends)]
            self._events.note(f"split into {len(own)} parts by name: each lists its own")
        numbered = [{"number": number, **each} for number, each in enumerate(own, 1)]
        fields = self._spec_of_part(len(own), 0)
        self._patience(lambda: self._store.split(self._lease, numbered, fields))

    def _spec_of_part(self, count: int, number: int) -> dict[str, Any]:
        """The spec of one of so many parts: its share of the workers, and of this machine's memory."""
        spec, update = self._spec, dict[str, Any](_NOT_OF_PARTS)
        workers, memory = spec.workers, spec.memory
        if self._launcher.shared:
            engine = make_engine(spec.engine)
            workers = workers or (engine.default_slots(),) * 2
            memory = memory or engine.default_memory(max(workers[1], count))
        if workers is not None:
            least, most = (each // count + (number < each % count) for each in workers)
            update["workers"] = (least if workers[0] == 0 else max(1, least), max(1, most))
        return spec.model_copy(update=update | {"memory": memory}).model_dump(mode="json")

    def _hear(self) -> None:
        with suppress(queue.Empty):
            message = self._inbox.get(timeout=LOOK_SECONDS)
            while True:
                match message:
                    case ("wanted", wanted):
                        self._asked = wanted
                    case ("stop", True):
                        self._launcher.kill()
                    case ("lost", error):
                        raise error
                message = self._inbox.get_nowait()

    @property
    def _wanted(self) -> Request:
        """What is asked of the parts."""
        if self._asked != "cancel" and (self._stopping or self._error is not None):
            return "stop"
        return self._asked

    def _look(self) -> str | None:
        """Look at all parts, and do what is to be done; the state in which the job ends, if it does."""
        now = time.monotonic()
        if self._state == "running":  # waiting costs nothing
            self._seconds += now - self._since
        self._since = now
        parts = self._patience(lambda: self._store.gather(self._lease, seconds=self._seconds))
        self._tell(parts)
        for number, each in enumerate(parts):
            self._see_to(each, number, len(parts))
        if any(is_driven(each) or self._launcher.is_starting(each) for each in parts):
            return None
        if self._wanted in ("cancel", "stop"):
            return "cancelled" if self._wanted == "cancel" else "interrupted"
        return "finished" if not self._replay and all(each.state == "finished" for each in parts) else None

    def _see_to(self, part: JobRecord, number: int, count: int) -> None:
        wanted = self._wanted
        if is_driven(part):
            self._begun.add(part.id)
            if part.wanted != wanted:
                with suppress(JobStateError):  # it has ended meanwhile
                    self._patience(lambda: self._store.request(part.id, wanted))
            return
        if self._launcher.is_starting(part):
            return
        if part.id in self._begun:
            self._replay.discard(part.id)
            if part.state in ("failed", "cancelled") and self._error is None:
                self._error = JobError(part.error or f"part {number + 1} was cancelled")
        if wanted != "run" or self._error is not None or (part.state == "finished" and part.id not in self._replay):
            return
        lost, done = self._losses.get(part.id, (0, -1))
        lost = lost + 1 if part.done == done else 1
        self._losses[part.id] = (lost, part.done)
        if lost > LOSSES:
            self._error = JobError(
                f"the coordinator of part {number + 1} of {count} ended {LOSSES} times without having done anything",
                hint=f"What it printed: tally jobs log {self._lease.job_id}",
            )
            return
        self._patience(lambda: self._store.respec(part.id, self._spec_of_part(count, number)))
        if part.id in self._begun and part.id not in self._replay:
            self._events.note(f"the coordinator of part {number + 1} was lost; another one continues")
        self._begun.add(part.id)
        self._launcher.start(part, retry_dead=part.id in self._replay)

    def _tell(self, parts: list[JobRecord]) -> None:
        """What the parts say, the job says, once."""
        wanted, job_id = self._wanted, self._lease.job_id
        if wanted in ("run", "pause") and (state := "paused" if wanted == "pause" else "running") != self._state:
            self._patience(lambda: self._store.mark(self._lease, state))
            self._state = state
        record = self._patience(lambda: self._store.get(job_id))
        remarks = dict.fromkeys(line for each in parts for line in each.remarks if line not in record.remarks)
        assumed = dict.fromkeys(line for each in parts for line in each.assumed if line not in record.assumed)
        for line in remarks:
            self._patience(partial(self._store.remark, self._lease, line))
        for line in assumed:
            self._patience(partial(self._store.assume, self._lease, line))
        if remarks or assumed:
            record = self._patience(lambda: self._store.get(job_id))
        self._follower.show(record)
        if record.planned and not self._planned:
            self._planned = True
            self._events(Planned(record.items))


def put_down(store: JobStore, lease: Lease) -> None:
    """The parts of a job that was cancelled, while nobody conducts them, become its own, once they have ended.

    Raises JobStateError if one of them does not.
    """
    until = time.monotonic() + PUT_DOWN_SECONDS
    while alive := [each for each in store.parts(lease.job_id) if is_driven(each)]:
        for each in alive:
            if each.wanted != "cancel":
                with suppress(JobStateError):
                    store.request(each.id, "cancel")
        if time.monotonic() > until:
            raise JobStateError(f"{len(alive)} parts of job {lease.job_id} do not end", hint="Try again.")
        time.sleep(0.1)
    store.join(lease)
