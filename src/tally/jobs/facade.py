"""Everything that can be done with jobs. The command line, Python, triggers and the server use nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tally.alerts.alert import Alert, alerts_of, resend
from tally.alerts.delivery import PATIENCE, deliver
from tally.alerts.evaluation import evaluate
from tally.config import settings
from tally.database.connect import connect
from tally.database.waiting import Patience
from tally.errors import DatabaseAwayError, JobNotFoundError, JobStateError, SpecError, TallyError
from tally.jobs import tidy
from tally.jobs.chunks import Dead
from tally.jobs.cluster import cluster_for, drive_in_cluster
from tally.jobs.events import Assumed, Events, write_to_log
from tally.jobs.follow import LOOK_SECONDS, Follower, is_driven
from tally.jobs.lease_renewer import LEASE_SECONDS
from tally.jobs.outbox import Pushes
from tally.jobs.printed import Printed, printed_by
from tally.jobs.run import drive
from tally.jobs.spec import JobSpec, absolute, make
from tally.jobs.split import InCluster, Launcher, Processes, Served, put_down
from tally.jobs.starts import StartStore
from tally.jobs.states import ENDED, NOTHING_LEFT, State
from tally.jobs.stop import Stop
from tally.jobs.store import JobPage, JobRecord, JobStore, Part
from tally.jobs.submit import submit, submit_failed
from tally.sinks.base import Output, Sink

if TYPE_CHECKING:
    import pyarrow as pa

    from tally.engines.base import Engine
    from tally.jobs.assemble import Parts
    from tally.scorers.base import Scorer, Thumbnail


class Jobs:
    """The jobs in one database: by default the one that the environment names.

    ``job`` is a job's id, the beginning of it, or the place that it writes to. Looking at jobs opens no model, runs
    no code of the user's and reads no source. Methods may be called from several threads. Each raises
    JobNotFoundError where there is no such job, DatabaseAwayError while the database does not answer.
    A part of a split job can be looked at and run; what is changed is the whole.

    served: the parts of split jobs are started by servers.
    """

    elsewhere = "in the cluster"
    """Where a job runs that is followed from here, in words."""

    def __init__(self, store: JobStore | None = None, *, served: bool = False) -> None:
        self._served = served
        self.store = store if store is not None else JobStore(connect(settings().database))
        self.starts = StartStore(self.store.engine)
        self._assembled: dict[str, Parts] = {}

    # -- making and running ------------------------------------------------------------------------

    def submit(
        self,
        spec: JobSpec,
        *,
        model: Scorer | type[Scorer] | Callable[[Any], Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        waiting: str | None = None,
    ) -> JobRecord:
        """A job for this spec, not yet running; see :func:`tally.jobs.submit.submit`."""
        record, parts = submit(
            self.store,
            spec,
            model=model,
            resume=resume,
            overwrite=overwrite,
            waiting=waiting,
        )
        self._assembled = {record.id: parts}  # for the run that follows, if it does
        return record

    def enqueue(
        self, spec: JobSpec, *, who: str = "", overwrite: bool = False, request: str | None = None
    ) -> JobRecord:
        """A new job that waits for a server to start it. Nothing of it is opened here. See :meth:`JobStore.enqueue`."""
        return self.store.enqueue(spec.model_dump(mode="json"), who=who, overwrite=overwrite, request=request)

    def ask_to_start(self, job: str, action: Literal["resume", "retry"], *, who: str = "") -> JobRecord:
        """Have a server continue the job, or replay its dead items. Raises JobStateError where that cannot be."""
        record = self._whole(job)
        if record.alive:
            if action == "retry":
                raise JobStateError(f"job {record.id} is {record.state}", hint="Wait until it has ended.")
            return self.unpause(record.id)
        if record.state == "cancelled" or (record.state == "finished" and action == "resume"):
            raise JobStateError(f"job {record.id} is {record.state}", hint=NOTHING_LEFT[record.state])
        if record.state != "waiting":
            self.starts.ask(record.id, action, who=who)
        return record

    def submit_failed(self, spec: JobSpec, error: TallyError) -> JobRecord:
        """A job that failed before it began; see :func:`tally.jobs.submit.submit_failed`."""
        return submit_failed(self.store, spec, error)

    def run(
        self,
        job: str,
        *,
        events: Events | None = None,
        stop: Stop | None = None,
        engine: Engine | None = None,
        retry_dead: bool = False,
        in_this_process: bool = False,
    ) -> JobRecord:
        """Drive the job until it is finished or stopped, here or in the cluster that its spec names.

        Returns it as it then is. retry_dead: replay its dead items. engine: one that is prepared for a job of this
        process; see :mod:`tally.jobs.prestart`.
        in_this_process: even where the spec names a cluster, as this process runs inside of it.
        Raises what made the job fail, after saving that; JobStateError where another process drives it.
        """
        record = self.get(job)
        spec = JobSpec(**record.spec)
        events, stop = Events() if events is None else events, stop or Stop()
        events.subscribe(write_to_log)
        for sentence in record.assumed:
            events(Assumed(sentence))
        cluster = None if in_this_process else cluster_for(spec)
        if cluster is not None:
            return drive_in_cluster(self.store, record.id, cluster, events=events, stop=stop, retry_dead=retry_dead)
        if spec.engine == "ray" and spec.split is not None and cluster_for(spec) is None:
            raise SpecError("split: there is no cluster", hint="Name it: --address http://HEAD:8265")
        if spec.engine == "ray" and not in_this_process:
            events.note("Ray's rules lead to no cluster: one is started on this machine for as long as the job takes")
        return drive(
            self.store,
            record.id,
            events=events,
            stop=stop,
            parts=self._assembled.pop(record.id, None),
            engine=engine if spec.engine == "local" else None,
            retry_dead=retry_dead,
            held=in_this_process,
            launcher=self._launcher(spec),
        )

    def _launcher(self, spec: JobSpec) -> Launcher:
        """Who starts the parts of a split job."""
        if (cluster := cluster_for(spec)) is not None:
            return InCluster(self.store, cluster)
        return Served(self.starts) if self._served else Processes()

    def see_through(
        self, job: str, *, events: Events | None = None, stop: Stop | None = None, engine: Engine | None = None
    ) -> JobRecord:
        """Drive the job, or follow it while another process drives it, until it has ended or is stopped here.

        engine: as for :meth:`run`.
        """
        events, stop = Events() if events is None else events, stop or Stop()
        patiently = Patience(events.waiting)
        record = patiently(lambda: self.get(job))
        while record.state not in ENDED and not stop.asked:
            prepared, engine = engine, None
            if is_driven(record):
                if prepared is not None:
                    prepared.stop(kill=True)
                record = self.follow(record.id, events=events, stop=stop)
                continue
            try:
                return self.run(record.id, events=events, stop=stop, engine=prepared)
            except DatabaseAwayError:  # before the job was taken, or after it was put down
                record = patiently(lambda: self.get(job))
            except JobStateError:  # another process was faster
                record = patiently(lambda: self.get(job))
                if not record.alive and record.state not in ENDED:
                    raise
                stop.wait(LOOK_SECONDS)
        return record

    def follow(self, job: str, *, events: Events | None = None, stop: Stop | None = None) -> JobRecord:
        """Follow the job until nobody drives it any more; returns it as it then is. Does not touch it.

        stop ends the following, not the job.
        """
        follower = Follower(self.store, self.get(job), Events() if events is None else events, stop)
        return follower.until(lambda now: None if now.alive else now)

    def runs_in_a_cluster(self, record: JobRecord) -> bool:
        """Whether the job's coordinator is in a cluster, so that it can be followed like one that runs here."""
        return cluster_for(JobSpec(**record.spec)) is not None

    # -- asking of a job ---------------------------------------------------------------------------

    def pause(self, job: str) -> JobRecord:
        """Hand out nothing more until the job is resumed. Raises JobStateError unless it is running."""
        record = self._whole(job)
        if not record.alive:
            go_on = f"Go on with: tally jobs resume {record.id}"
            raise JobStateError(
                f"job {record.id} is not running: it is {record.state}", hint=None if record.state in ENDED else go_on
            )
        self.store.request(record.id, "pause")
        return record

    def unpause(self, job: str) -> JobRecord:
        """Have the process that drives the job hand out again. If it is not ``alive``, :meth:`run` continues it."""
        record = self._whole(job)
        if record.alive:
            self.store.request(record.id, "run")
        return record

    def change(self, job: str, **options: Any) -> JobRecord:
        """Give a job that is stopped other options: its device, workers, limits, whatever does not change the result.

        Raises SpecError for an option that does, or is wrong; JobStateError while another process drives the job.
        """
        record = self._whole(job)
        given = {name: value for name, value in options.items() if value is not None}
        if not given:
            return record
        if record.alive or record.state in ENDED:
            raise JobStateError(
                f"job {record.id} is {record.state}: its options cannot be changed",
                hint="Stop it first, with Ctrl-C where it runs." if record.alive else None,
            )
        before = JobSpec(**record.spec)
        spec = make(**{**record.spec, **given})
        named = [name for name in ("model", "artifacts", "trust") if getattr(spec, name) != getattr(before, name)]
        if differing := named + spec.differing(before):
            raise SpecError(
                f"{', '.join(differing)}: another value would give another result than job {record.id} has begun",
                hint="Start a job of its own, in another place or with --overwrite.",
            )
        return self.store.respec(record.id, spec.model_dump(mode="json"))

    def cancel(self, job: str) -> JobRecord:
        """Stop the job for good, and remove what it had not finished writing.

        A job that is being retried is finished again, with the results that it had. Returns the job. It is ``alive``
        if a coordinator has it, which has been told, and stops soon.
        """
        record = self._whole(job)
        if record.state == "waiting" and self.store.give_up(record.id, "cancelled"):
            return self.store.get(record.id)
        if not record.alive and record.state not in ENDED and record.output:
            tidy.sink_of(record)  # raises what would keep its output from being removed, before anything is changed
        self.store.request(record.id, "cancel")
        if record.alive:
            return record
        try:
            lease = self.store.acquire(record.id, seconds=LEASE_SECONDS)
        except JobStateError:  # another process was faster
            return self.store.get(record.id)
        if lease is not None and record.is_retry:
            tidy.undo_retry(self.store, lease, tidy.sink_of(record))
        elif lease is not None:
            try:
                put_down(self.store, lease)
                tidy.release(self.store, record)
            except BaseException:
                self.store.request(record.id, "run")  # it was refused: who resumes the job does not cancel it
                self.store.release(lease, record.state, error=record.error)
                raise
            self.store.release(lease, "cancelled")
        return self.store.get(record.id)

    def delete(self, job: str) -> JobRecord:
        """Forget a job that nobody drives; finished results stay where they are, unfinished ones are removed."""
        record = self._whole(job)
        tidy.discard(self.store, record)
        tidy.forget_given(self.store, record)
        return record

    def mend(self, place: str) -> str:
        """Free a place that is claimed by a job of a lost database. Returns what was done, in a sentence.

        Raises JobStateError if this database knows the job.
        """
        sink = tidy.sink_at(absolute(place))
        if not sink.claimed:
            return f"{sink.place} is not claimed by any job: there is nothing to mend"
        holder = sink.holder() or ""
        try:
            record = self.store.get(holder)
        except JobNotFoundError:
            sink.release()
            return f"{sink.place} is free again: job {holder}, which this database does not know, had not finished it"
        if record.state in ENDED and not record.alive:
            sink.release()
            return f"{sink.place} is free again: job {holder} is {record.state}"
        raise JobStateError(
            f"{sink.place} is claimed by job {holder}, which is {record.state}",
            hint=f"Go on with: tally jobs resume {holder}   (or remove it: tally jobs delete {holder})",
        )

    # -- alerts --------------------------------------------------------------------------------------

    def alerts(self, job: str) -> list[Alert]:
        """The rules of a job that has ended, what was measured, and whether the webhook was told."""
        return alerts_of(self.store.engine, self.get(job).id)

    def send_alerts(self, job: str) -> list[Alert]:
        """Send those that are not delivered, also those that were given up; then as :meth:`alerts`."""
        engine, job_id = self.store.engine, self.get(job).id
        evaluate(engine, job_id)  # its coordinator may have been killed before it did
        resend(engine, job_id)
        deliver(engine, job_id=job_id, patience=PATIENCE)
        return alerts_of(engine, job_id)

    # -- looking -----------------------------------------------------------------------------------

    def parts(self, job: str) -> Sequence[Part]:
        """The parts of a split job that is not finished, in order; see :mod:`tally.jobs.split`."""
        return [Part.of(each) for each in self.store.parts(self.get(job).id)]

    def _whole(self, job: str) -> JobRecord:
        """The job, to be changed. Raises JobStateError for a part of one."""
        record = self.get(job)
        if record.parent is not None:
            raise JobStateError(f"job {record.id} is a part of job {record.parent}", hint=f"Name job {record.parent}.")
        return record

    def get(self, job: str) -> JobRecord:
        """The job. Of several that wrote to one place, the newest that was not cancelled."""
        return self._found(job)

    def list(
        self,
        *,
        state: State | None = None,
        model: str | None = None,
        place: str | None = None,
        text: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        """A page of jobs, newest first: those that match all given filters.

        state: as in :class:`JobRecord`. model: its name. place: where they write to.
        text: part of the id, the model, a source or the place, in upper or lower case.
        since, until: seconds since the epoch; created at ``since`` or later, and before ``until``.
        after: where the page begins: ``next`` of the page before. Raises SpecError for anything else.
        """
        place = None if place is None else absolute(place)
        return self.store.list(
            state=state, model=model, place=place, text=text, since=since, until=until, after=after, limit=limit
        )

    def _found(self, job: str, *, begun: bool = False) -> JobRecord:
        """The job. begun: of those that write to a place, rather one whose results may be there."""
        named = may_be_place(job)
        if named and (record := self._at(job, begun=begun)) is not None:
            return record
        try:
            return self.store.get(job)
        except JobNotFoundError:
            # Where a job still waits, nothing is there yet.
            if not named and job and (record := self._at(job, begun=begun)) is not None:
                return record
            if job and (gone := self.store.list(place=absolute(job), state="cancelled", limit=1).jobs):
                raise JobNotFoundError(
                    f"no job {job!r}: job {gone[0].id}, which was to write there, is cancelled",
                    hint=f"See it with: tally jobs show {gone[0].id}",
                ) from None
            raise

    def _at(self, place: str, *, begun: bool) -> JobRecord | None:
        place = absolute(place)
        return (self.store.at(place, begun=True) if begun else None) or self.store.at(place)

    def pushes(self, job: str) -> Pushes | None:
        """How far what the job pushes has come; None if it pushes nothing."""
        return self.store.pushes(self.get(job).id)

    def at(self, place: str) -> JobRecord | None:
        """The newest job that writes to this place and was not cancelled; None if there is none."""
        return self.store.at(absolute(place))

    def orphaned(self) -> Sequence[JobRecord]:
        """Jobs that should be running and have lost their coordinator, oldest first: :meth:`run` continues them."""
        return self.store.orphaned()

    def dead(self, job: str) -> Iterator[Dead]:
        """The job's dead items, in the source's order."""
        return self.store.dead(self.get(job).id)

    def printed(self, job: str, *, lines: int = 100) -> Printed:
        """The last lines that the job's processes wrote, on this machine."""
        return printed_by(self.get(job).id, lines=lines)

    def outputs(self, job: str) -> Iterator[Output]:
        """What is committed, in the source's order."""
        return self.store.outputs(self._found(job, begun=True).id)

    def sink(self, job: str) -> Sink:
        """Where the job's results are. Raises JobStateError where they are not, or not yet, or another's."""
        record = self._found(job, begun=True)
        sink = tidy.sink_of(record)
        holder = sink.holder()
        if holder != record.id:
            if record.state in ("waiting", "created"):
                raise JobStateError(f"job {record.id} has not begun: there are no results yet", hint="Ask again soon.")
            now = "are gone" if holder is None else f"were replaced by those of job {holder}"
            raise JobStateError(
                f"the results of job {record.id} at {record.spec['out']} {now}",
                hint=f"Score again to have them back, or forget the job: tally jobs delete {record.id}",
            )
        return sink

    def results(self, job: str) -> pa.Table:
        """All rows of the job; of one that is not finished, those committed."""
        from tally.sinks.query import rows

        job = self._found(job, begun=True).id
        return rows(self.sink(job), self.outputs(job))

    def query(self, job: str, sql: str, *, limit: int | None = None, memory: str | None = None) -> pa.Table:
        """SQL (DuckDB's) over the views ``results`` and ``dead``; see :func:`tally.sinks.query.query`."""
        from tally.sinks.query import query

        job = self._found(job, begun=True).id
        return query(self.sink(job), self.outputs(job), sql, self.dead_table(job), limit=limit, memory=memory)

    def thumbnails(self, job: str, keys: Collection[str]) -> Mapping[str, Thumbnail]:
        """The small pictures that the job has kept of these items; none of those that it has not scored."""
        job = self._found(job, begun=True).id
        return self.sink(job).thumbnails_of(self.outputs(job), keys)

    def dead_table(self, job: str) -> pa.Table:
        """The dead items: ``key``, ``stage``, ``error``."""
        import pyarrow as pa

        found = list(self.dead(job))
        columns = {"key": [d.key for d in found], "stage": [d.stage for d in found], "error": [d.error for d in found]}
        return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))


def may_be_place(job: str) -> bool:
    """Whether a job that was named like this is rather named by a place than by its id."""
    try:
        return "/" in job or Path(job).exists()
    except (OSError, ValueError):  # no name that a file could have
        return False


def open_jobs(*, wait: Callable[[str], None]) -> Jobs:
    """The jobs of the environment's database, waiting while that is away. wait: gets a line for the user meanwhile."""
    return Patience(wait)(Jobs)
