"""Driving a job in this process: the lease, the workers, the coordinator, and what follows its end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import tally
from tally.alerts.delivery import conclude
from tally.config import settings
from tally.database.lease import new_token
from tally.database.waiting import Patience
from tally.engines.base import Engine, Limits
from tally.engines.factory import make_engine
from tally.errors import ClusterLostError, DatabaseAwayError, JobStateError, StorageError
from tally.jobs import worker
from tally.jobs.assemble import Parts, assemble
from tally.jobs.chunks import new_nonce
from tally.jobs.coordinator import Coordinator
from tally.jobs.events import Assumed, Event, Events, Finished, Subscriber, Warned
from tally.jobs.kept_log import KeptLog
from tally.jobs.lease_renewer import LEASE_SECONDS
from tally.jobs.spec import JobSpec
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
) -> JobRecord:
    """Coordinate the job in this process until it is finished or stopped; returns it as it then is.

    parts: of the job, if this process has assembled them already. engine: one that is prepared; see
        :mod:`tally.jobs.prestart`.
    retry_dead: replay the dead items; allowed for a finished job too, which stays finished if that comes to nothing.
    held: the job is new; the process that made it still holds it, and has asked this one to drive it.
    """
    patience = Patience(events.waiting)
    record = patience(lambda: store.get(job_id))
    if record.state == "cancelled" or (record.state == "finished" and not retry_dead):
        raise JobStateError(f"job {record.id} is {record.state}", hint=f"See it with: tally jobs show {record.id}")
    if record.state == "waiting":
        raise JobStateError(f"job {record.id} waits for a server to start it", hint="Start one with: tally up")
    spec = JobSpec(**record.spec)
    if parts is None or retry_dead:
        model = ModelRef.from_dict(record.model)
        parts = assemble(spec, refreshed(model) if retry_dead else model)
    verify(parts.model)  # before anything is touched
    if record.output != (output := parts.describe_output()):  # of a job from before outputs were described, say
        patience(lambda: store.respec(record.id, record.spec, output=output))
    token, nonce = new_token(), new_nonce()  # so that what is done again is done once
    lease = patience(lambda: store.acquire(record.id, seconds=LEASE_SECONDS, held=held, retry=retry_dead, token=token))
    if lease is None:
        raise JobStateError(
            f"job {record.id} is driven by another process now ({record.owner_host}, pid {record.owner_pid})",
            hint=f"Follow it with: tally jobs watch {record.id}",
        )
    if engine is None:
        engine = make_engine(spec.engine, cpus=spec.cpus, gpus=spec.gpus, memory=spec.memory, resources=spec.resources)
    kept: KeptLog | None = None
    try:
        least, most = spec.workers or (engine.default_slots(),) * 2
        engine.start(
            worker.setup,
            (
                worker.Setup(
                    parts.model, parts.source, parts.sink, spec.device, spec.batch_size, spec.timeout, spec.overlay
                ),
            ),
            slots=max(1, least),
            limits=Limits(memory=spec.memory or engine.default_memory(most), items=spec.worker_items),
            log=settings().log_of(record.id),
        )
        _check_still_there(record, parts.sink)
        parts.sink.claim(record.id)
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
            receiver=None if spec.push is None else open_receiver(spec.push, _pushed(record, parts.model)),
            events=told,
        )
    except BaseException as error:
        engine.stop(kill=True)
        if kept is not None:
            kept.close()
        stopped = isinstance(error, (KeyboardInterrupt, ClusterLostError))
        with suppress(DatabaseAwayError):  # the error at hand is the one to tell
            if (record.state == "finished" or record.is_retry) and (retry_dead or not stopped):
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


def _pushed(record: JobRecord, model: ModelRef) -> dict[str, Any]:
    """What the bodies of pushed rows may name, beside the rows."""
    return {"job": record.id, "model": model.name, "version": model.version}


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
