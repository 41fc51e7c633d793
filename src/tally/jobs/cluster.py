"""A job whose coordinator runs inside a Ray cluster, as a Ray job: started from here, and followed from here.

The command line only follows. If it is killed, the job continues, and the next command that follows it finds it in
the database. If the coordinator is lost instead (with the cluster's head, say), the process that follows the job starts
another one, which continues from there.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tally.config import settings
from tally.errors import ClusterLostError, JobError, TallyError
from tally.jobs.events import Events
from tally.jobs.follow import Follower, is_driven
from tally.jobs.spec import JobSpec
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord, JobStore
from tally.jobs.tidy import sink_of
from tally.masking import has_secret, mask
from tally.models.mirror import upload_to_mirror
from tally.models.reference import ModelRef
from tally.storage import is_url

if TYPE_CHECKING:
    from tally.engines.ray.cluster import Cluster, State

SUBMITTED_BY = "TALLY_SUBMITTED_BY"
"""Environment variable of the coordinator: the versions of the command line that started it."""

LOSSES = 5
"""So many coordinators in a row that end without having done anything are no accident: the job fails."""


def cluster_for(spec: JobSpec) -> Cluster | None:
    """The cluster that runs the job's coordinator; None if this process does."""
    if spec.engine != "ray":
        return None
    from tally.engines.ray.cluster import find

    return find(spec.address)


def drive_in_cluster(
    store: JobStore, job_id: str, cluster: Cluster, *, events: Events, stop: Stop, retry_dead: bool = False
) -> JobRecord:
    """Have the job driven in the cluster until it is finished or stopped; returns it as it then is.

    stop and KeyboardInterrupt end the following; the job continues. Raises what made the job fail.
    """
    driver = _Driver(store, job_id, cluster, events, stop, retry_dead)
    try:
        if driver.wait_for_cluster():
            return driver.run()
    except KeyboardInterrupt:
        pass
    return store.get(job_id)


class _Driver:
    """Follows a job, and starts a coordinator for it in the cluster whenever it has none."""

    def __init__(
        self, store: JobStore, job_id: str, cluster: Cluster, events: Events, stop: Stop, retry_dead: bool
    ) -> None:
        self._store, self._cluster, self._events, self._stop = store, cluster, events, stop
        self._retry_dead = retry_dead
        self._before = store.get(job_id)
        self._follower = Follower(store, self._before, events, stop)
        self._name: str | None = None
        self._losses, self._done_before = 0, -1

    def wait_for_cluster(self) -> bool:
        """Wait for the cluster, if the job has begun in it. Returns whether it is there: False if told to stop first.

        Raises ClusterLostError for a new job, which is not begun without its cluster.
        """
        while not self._stop.asked:
            try:
                self._cluster.check()
            except ClusterLostError as error:
                if self._before.started_at is None:
                    raise
                self._follower.wait_for(error)
            else:
                self._follower.is_back()
                return True
        return False

    def run(self) -> JobRecord:
        """Raises JobError if the job failed."""
        record = self._follower.until(self._go_on)
        undone = record.state == "finished" and record.error is not None  # a retry that came to nothing
        if (record.state == "failed" or undone) and not self._stop.asked:
            raise JobError(record.error or "the job failed")
        return record

    def _go_on(self, record: JobRecord) -> JobRecord | None:
        """Nobody drives the job: wait for its coordinator, or start another. Returns the job if it has ended."""
        driven = self._was_driven(record)
        if driven and _over(record) and record.state != "interrupted":
            return record
        state: State = "unknown" if self._name is None else self._cluster.state(self._name)
        if state in ("waiting", "running"):
            return None
        record = self._store.get(record.id)  # what the coordinator did last comes before its end
        if is_driven(record):
            return None
        driven = self._was_driven(record)
        if state != "unknown" and driven and _over(record):
            return record
        if state == "stopped":
            return record  # somebody stopped it by Ray's own means
        self._losses = self._losses + 1 if record.done == self._done_before else 1
        self._done_before = record.done
        no_accident = state == "ended" and not driven
        if no_accident or (state in ("ended", "killed") and self._losses >= LOSSES):
            assert self._name is not None
            raise JobError(
                f"the coordinator of job {record.id} ended inside the cluster at {mask(self._cluster.address)}"
                + ("" if driven else " before it had the job")
                + f"; the last that it printed:\n{self._cluster.log_tail(self._name) or '(nothing)'}",
                hint=_same_database(),
            )
        lost = self._name is not None and driven
        self._start(record)
        if lost:
            self._events.note("the coordinator was lost; another one continues")
        return None

    def _was_driven(self, record: JobRecord) -> bool:
        """Whether a coordinator has had the job since this process began to look."""
        before = self._before
        return self._follower.saw_it_driven or (
            (record.state, record.error, record.usage) != (before.state, before.error, before.usage)
        )

    def _start(self, record: JobRecord) -> None:
        # Now, as nobody has the job: another coordinator would remove what is uploaded as it finishes, or has done so.
        _keep_address(self._store, _upload_model(self._store, record), self._cluster)
        name = f"tally-{record.id}-{secrets.token_hex(3)}"
        command = f"-P -m tally coordinate {record.id} --quiet"
        if self._retry_dead and record.dead == self._before.dead:  # none of them is being replayed yet
            command += " --dead"
        # A cluster that was started on this machine may have another Python first on its path.
        ours = shlex.quote(sys.executable)
        self._name = name  # before it is sent: a cluster that is late with its answer may have begun it all the same
        self._cluster.submit(
            f'p={ours}; "$p" -P -c \'import tally\' 2>/dev/null || p=python; exec "$p" {command}', name, _environment()
        )


def _over(record: JobRecord) -> bool:
    """Whether the coordinator has put the job down, for good or until somebody resumes it."""
    return not record.alive and record.owner is None and record.state != "created"


def _environment() -> dict[str, str]:
    """The coordinator's environment variables, besides the cluster's own. No secrets: Ray shows them on its pages."""
    from tally.engines.ray.cluster import versions

    told = {SUBMITTED_BY: versions()}
    database = os.environ.get("TALLY_DATABASE")
    if sa.make_url(settings().database).get_backend_name() == "sqlite":
        told["TALLY_HOME"] = str(settings().home)
    if database is not None and not has_secret(database):
        told["TALLY_DATABASE"] = database
    registry = os.environ.get("TALLY_REGISTRY")
    if registry is not None:
        told["TALLY_REGISTRY"] = registry
    return told


def check_versions() -> None:
    """In the coordinator: raises TallyError unless the command line that started it has the same versions."""
    from tally.engines.ray.cluster import versions

    theirs, ours = os.environ.get(SUBMITTED_BY), None
    if theirs is not None and theirs != (ours := versions()):
        raise TallyError(
            f"the cluster has {ours}, and the command that started the job has {theirs}",
            hint="Install the same versions on both sides: in the cluster's image, or where the command runs.",
        )


def _upload_model(store: JobStore, record: JobRecord) -> JobRecord:
    """Put a model that only this machine has where the cluster's nodes can fetch it: beside the output."""
    work = sink_of(record).work
    if work is None or not is_url(work):
        return record  # who can write the output sees this machine's files, or the same at the same paths
    ref = ModelRef.from_dict(record.model)
    uploaded = upload_to_mirror(ref, f"{work}/model")
    return record if uploaded == ref else store.respec(record.id, record.spec, model=uploaded.to_dict())


def _keep_address(store: JobStore, record: JobRecord, cluster: Cluster) -> JobRecord:
    """Note the cluster in the job, so that the job stays there if it is resumed where Ray's rules lead elsewhere."""
    if record.spec.get("address") is not None:
        return record
    return store.respec(record.id, {**record.spec, "address": cluster.address})


def _same_database() -> str:
    shown = mask(settings().database)
    return (
        f"It needs, in the cluster: Tally of the same version, this database ({shown}) in TALLY_DATABASE, and the "
        "credentials of the storage. 'ray job logs' shows all that it printed."
    )
