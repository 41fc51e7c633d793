"""Driving a job in this process: the lease, the workers, the coordinator, and what follows its end."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import tally
from tally.alerts.delivery import conclude
from tally.config import settings
from tally.database.lease import new_token
from tally.database.waiting import Patience
from tally.engines.base import Engine, Limits
from tally.engines.factory import make_engine
from tally.errors import (
    ClusterLostError,
    DatabaseAwayError,
    JobStateError,
    OwnershipLostError,
    StorageError,
    TallyError,
)
from tally.jobs import worker
from tally.jobs.assemble import Parts, assemble
from tally.jobs.chunks import new_nonce
from tally.jobs.coordinator import Coordinator
from tally.jobs.events import Assumed, Event, Events, Finished, Subscriber, Warned
from tally.jobs.kept_log import KeptLog
from tally.jobs.lease_renewer import LEASE_SECONDS
from tally.jobs.spec import JobSpec
from tally.jobs.split import Conductor, Launcher, Processes
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord, JobStore, Lease
from tally.jobs.tidy import undo_retry
from tally.jobs.traces import traced
from tally.logs import about
from tally.models.load import verify
from tally.models.reference import ModelRef
from tally.models.resolve import refreshed
from tally.push.factory import open_receiver
from tally.sinks.base import Sink
from tally.sources.selection import Selection


def drive(
    store: JobStore,
    job_id: str,
    *,
    events: Events,
    stop: Stop,
    parts: Parts | None = None,
    engine: Engine | None = None,
    retry_dead: bool = False,
    held: bool = False,
    launcher: Launcher | None = None,
) -> JobRecord:
    """Coordinate the job in this process until it is finished or stopped; returns it as it then is.

    parts: of the job, if this process has assembled them already. engine: one that is prepared; see
        :mod:`tally.jobs.prestart`.
    retry_dead: replay the dead items; allowed for a finished job too, which stays finished if that comes to nothing.
    held: the job is new; the process that made it still holds it, and has asked this one to drive it.
    launcher: of the parts, if it is split; by default, they are processes of this machine.
    """
    patience = Patience(events.waiting)
    record = patience(lambda: store.get(job_id))
    if record.state == "cancelled" or (record.state == "finished" and not retry_dead):
        raise JobStateError(f"job {record.id} is {record.state}", hint=f"See it with: tally jobs show {record.id}")
    if record.state == "waiting":
        raise JobStateError(f"job {record.id} waits for a server to start it", hint="Start one with: tally up")
    spec = JobSpec(**record.spec)
    try:
        if parts is None or retry_dead:
            model = ModelRef.from_dict(record.model)
            parts = assemble(spec, refreshed(model) if retry_dead else model)
        verify(parts.model)  # before anything is touched
    except TallyError as error:
        if record.parent is not None and (lease := store.acquire(record.id, seconds=LEASE_SECONDS, retry=retry_dead)):
            store.release(lease, "failed", error=str(error))  # who has it started is not told otherwise
        raise
    whole, selection = record.parent or record.id, spec.selection
    if record.part is not None:
        parts, selection = _part(parts, record.part)
    if record.output != (output := parts.describe_output()):  # of a job from before outputs were described, say
        patience(lambda: store.respec(record.id, record.spec, output=output))
    token, nonce = new_token(), new_nonce()  # so that what is done again is done once
    lease = patience(lambda: store.acquire(record.id, seconds=LEASE_SECONDS, held=held, retry=retry_dead, token=token))
    if lease is None:
        raise JobStateError(
            f"job {record.id} is driven by another process now ({record.owner_host}, pid {record.owner_pid})",
            hint=f"Follow it with: tally jobs watch {record.id}",
        )
    joined = False
    if record.parent is None and (
        patience(lambda: store.parts(record.id)) or (spec.split is not None and not record.items)
    ):
        state = _conduct(store, lease, record, parts, spec, launcher, events, stop, retry_dead=retry_dead)
        if state != "finished":
            return patience(lambda: store.get(record.id))
        record, joined, retry_dead = patience(lambda: store.get(record.id)), True, False
    if engine is None:
        engine = make_engine(spec.engine, cpus=spec.cpus, gpus=spec.gpus, memory=spec.memory, resources=spec.resources)
    kept: KeptLog | None = None
    try:
        least, most = spec.workers or (engine.default_slots(),) * 2
        engine.start(
            worker.setup,
            (
                worker.Setup(
                    parts.model,
                    parts.source,
                    parts.sink,
                    spec.device,
                    spec.batch_size,
                    spec.timeout,
                    spec.overlay,
                    spec.thumbnails,
                    spec.decoding,
                    spec.empty_rows,
                ),
            ),
            slots=0 if joined else max(1, least),
            limits=Limits(memory=spec.memory or engine.default_memory(most), items=spec.worker_items),
            log=settings().log_of(whole),
        )
        _check_still_there(record, parts.sink)
        parts.sink.claim(whole)
        if retry_dead:
            _reopen(store, lease, record, parts, patience, nonce)
        # Its own, as the caller's may serve several jobs, or this one again.
        told = Events(events, _record_of(store, lease, patience), _alerts_of(store, events, patience))
        if spec.log:
            kept = KeptLog(record.id, parts.sink)
            parts.sink.log = kept.path
            told.subscribe(kept)
        coordinator = Coordinator(
            store,
            patience(lambda: store.get(record.id)),
            lease,
            spec=spec,
            source=parts.source,
            sink=parts.sink,
            engine=engine,
            workers=(least, most),
            batch_size=parts.batch_size,
            manifest=_facts(spec, parts.model),
            receiver=None if spec.push is None else open_receiver(spec.push, _pushed(whole, parts.model)),
            events=told,
            selection=selection,
            complete=joined,
        )
    except BaseException as error:
        engine.stop(kill=True)
        if kept is not None:
            kept.close()
        stopped = isinstance(error, (KeyboardInterrupt, ClusterLostError))
        with suppress(DatabaseAwayError):  # the error at hand is the one to tell
            again = record.state == "finished" and record.parent is None
            if (again or record.is_retry) and (retry_dead or not stopped):
                undo_retry(store, lease, parts.sink, error)
            else:
                store.release(lease, "interrupted" if stopped else "failed", error=str(error) or None)
        raise
    stop.attach(coordinator)
    try:
        with about(record.id), traced(record.id, told):
            coordinator.run()
    finally:
        if kept is not None:
            kept.close()
    return patience(lambda: store.get(record.id))


def _part(parts: Parts, part: dict[str, Any]) -> tuple[Parts, Selection]:
    """What of a split job is one part's."""
    source, sink = parts.source, parts.sink
    if "between" in part:
        return replace(parts, source=source.between(*part["between"])), Selection()
    work = None if sink.work is None else f"{sink.work}/{part['number']}"
    share, shares = map(int, part["shard"].split("/"))
    return replace(parts, source=source.located(work)), Selection(shard=(share, shares), may_be_empty=True)


def _conduct(
    store: JobStore,
    lease: Lease,
    record: JobRecord,
    parts: Parts,
    spec: JobSpec,
    launcher: Launcher | None,
    events: Events,
    stop: Stop,
    *,
    retry_dead: bool,
) -> str:
    """See the parts of a split job through; its state then. If it is finished, what they have is the job's own, and it
    is still held; else it is put down."""
    patience = Patience(events.waiting)
    told = Events(events, _alerts_of(store, events, patience))
    conductor = Conductor(
        store, record, lease,
        spec=spec, source=parts.source, launcher=launcher or Processes(), events=events, retry_dead=retry_dead,
    )  # fmt: skip
    try:
        _check_still_there(record, parts.sink)
        parts.sink.claim(record.id)
        stop.attach(conductor)
        with about(record.id):
            state = conductor.run()
        if state != "interrupted":
            patience(lambda: store.join(lease))
        if state == "cancelled":
            parts.sink.release()
        if state != "finished":
            patience(lambda: store.release(lease, state))
            told(Finished(record.id, state))
    except OwnershipLostError:
        raise
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, ClusterLostError, DatabaseAwayError))
        with suppress(DatabaseAwayError):  # the error at hand is the one to tell
            store.release(lease, "interrupted" if interrupted else "failed", error=str(error) or None)
        if isinstance(error, Exception):
            told(Finished(record.id, "interrupted" if interrupted else "failed", error))
        raise
    return state


def _record_of(store: JobStore, lease: Lease, patience: Patience) -> Subscriber:
    """Keeps warnings with the job."""

    def keep(event: Event) -> None:
        match event:
            case Warned(text):
                patience(lambda: store.remark(lease, text))
            case Assumed(text):
                patience(lambda: store.assume(lease, text))
            case _:
                pass

    return keep


def _alerts_of(store: JobStore, events: Events, patience: Patience) -> Subscriber:
    """Evaluates and sends the alerts of a job that has ended. What cannot be sent now is sent later by others."""

    def conclude_alerts(event: Event) -> None:
        match event:
            case Finished(job_id, _, None):
                patience(lambda: conclude(store.engine, job_id, say=events.note))
            case Finished(job_id, _, error):
                with suppress(DatabaseAwayError):
                    conclude(store.engine, job_id, error=error, say=events.note)
            case _:
                pass

    return conclude_alerts


def _check_still_there(record: JobRecord, sink: Sink) -> None:
    """Raises StorageError if the place holds nothing of what the job has scored: it cannot go on from there."""
    scored = record.done - record.dead
    if scored and sink.holder() is None:
        raise StorageError(
            f"what job {record.id} has scored ({scored:,} {record.unit}) is no longer at {sink.place}",
            hint="Bring it back, or score again: give the command that began the job.",
        )


def _reopen(store: JobStore, lease: Lease, record: JobRecord, parts: Parts, patience: Patience, nonce: str) -> None:
    """Make the dead items what is left to do."""
    open_chunks = patience(lambda: store.counts(record.id))
    if record.planned and not open_chunks["pending"] + open_chunks["running"]:
        parts.source.renew()
    parts.source.prepare()
    dead = patience(lambda: [each.chunk for each in store.dead(record.id)])
    manifest = parts.sink.manifest() or {}
    published = (manifest.get("job"), manifest.get("generation")) == (record.id, record.generation)
    replay, model = parts.source.combine(dead), parts.model.to_dict()
    patience(
        lambda: store.reopen(
            lease, replay, published=published, model=model, unmarked=parts.source.unmarked, nonce=nonce
        )
    )


def _pushed(job_id: str, model: ModelRef) -> dict[str, Any]:
    """What the bodies of pushed rows may name, beside the rows."""
    return {"job": job_id, "model": model.name, "version": model.version}


def _facts(spec: JobSpec, model: ModelRef) -> dict[str, Any]:
    """What the manifest says of how the results came about."""
    return {
        "tally": tally.__version__,
        "model": {
            "name": model.name,
            "version": model.version,
            "kind": model.kind,
            "hash": model.hash if model.files else None,  # of models that messages choose, each row has it
            # A thousand class names say nothing that the hash does not.
            "options": {name: value for name, value in model.options.items() if name != "labels"},
        },
        "source": list(spec.source),
        "spec": spec.model_dump(mode="json", exclude={"source", "out", "webhook"}),
    }
