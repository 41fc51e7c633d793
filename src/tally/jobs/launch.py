"""From a spec to a running job: the one way that the command line, Python and later the server share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tally
from tally.alerts import delivery
from tally.config import settings
from tally.database.connect import connect
from tally.database.waiting import Patience
from tally.engines.base import Engine, Limits
from tally.errors import (
    ClusterLostError,
    DatabaseAwayError,
    JobExistsError,
    JobStateError,
    TallyError,
)
from tally.jobs import worker
from tally.jobs.assemble import MEDIA, assemble, describe_model, make_scorer, output_sink
from tally.jobs.chunks import new_nonce
from tally.jobs.coordinator import Coordinator, Progress
from tally.jobs.lease_renewer import LEASE_SECONDS
from tally.jobs.spec import JobSpec, absolute
from tally.jobs.store import JobRecord, JobStore, new_token
from tally.models.load import verify
from tally.models.reference import ModelRef
from tally.models.resolve import refreshed
from tally.sinks.base import Sink
from tally.sinks.files import FilesSink
from tally.sinks.rows import RowsSink
from tally.sinks.video import VideoSink

_HALTED = {"interrupted": "was interrupted", "paused": "was paused", "failed": "failed"}


def open_store() -> JobStore:
    """The job store that the environment names."""
    return JobStore(connect(settings().database))


def submit(
    store: JobStore,
    spec: JobSpec,
    *,
    model: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> JobRecord:
    """A job for this spec: a new one, or with ``resume`` the earlier one that was not finished.

    resume: what does not change the result (workers, device, limits ...) is from now on as this spec says.
    overwrite: do it again, over the results of an earlier finished job.
    Raises JobExistsError when the same was asked before and neither was said. An earlier job that has not
    scored anything stands in nobody's way: it is forgotten.
    """
    ref = describe_model(spec, model)
    parts = assemble(spec, ref)
    delivery.check(spec.alerts, spec.webhook, parts.sink.columns if isinstance(parts.sink, RowsSink) else ())
    # What a folder is taken for stays, whatever is put into it later.
    spec = spec.model_copy(update={"media": MEDIA.get(type(parts.source), spec.media)})
    for line in ref.assumed:
        say(line)
    fingerprint = spec.fingerprint(ref.hash)
    earlier = store.find(fingerprint)
    if earlier is not None and _still_there(earlier, parts.sink):
        if earlier.alive:
            raise JobExistsError(
                f"job {earlier.id} is doing exactly this now ({earlier.done:,} items done)",
                job_id=earlier.id,
                hint=f"Follow it with: tally jobs watch {earlier.id}",
            )
        if earlier.state != "finished":
            if resume:
                return store.respec(earlier.id, spec.model_dump(mode="json"))
            scored = earlier.done - earlier.dead
            if scored and not overwrite:
                raise JobExistsError(
                    f"job {earlier.id} began exactly this and {_HALTED.get(earlier.state, 'was not finished')}: "
                    f"{scored:,} of its items are scored",
                    job_id=earlier.id,
                    hint=f"Go on with: tally jobs resume {earlier.id}   (or --resume; --overwrite starts again)",
                )
            discard(store, earlier)
        elif not overwrite:
            raise JobExistsError(
                f"job {earlier.id} did exactly this and finished on {when(earlier.finished_at)}: "
                f"the results are in {spec.out}",
                job_id=earlier.id,
                hint="Do it again with --overwrite, or write to another place with --out.",
            )
    record = store.create(
        fingerprint=fingerprint,
        spec=spec.model_dump(mode="json"),
        model=ref.to_dict(),
        output=_output(spec, parts.sink),
        hold=LEASE_SECONDS,
    )
    try:
        parts.sink.claim(record.id, overwrite=overwrite)
    except BaseException:
        store.delete(record.id)
        raise
    return record


def submit_failed(store: JobStore, spec: JobSpec, error: TallyError) -> JobRecord:
    """A job that failed before it began, as there was nothing to score: its alerts are told all the same."""
    ref = describe_model(spec)
    record = store.create(
        fingerprint=spec.fingerprint(ref.hash),
        spec=spec.model_dump(mode="json"),
        model=ref.to_dict(),
        output=_output(spec, output_sink(spec, make_scorer(spec, ref), None, video=spec.media == "video")),
        hold=LEASE_SECONDS,
    )
    lease = store.acquire(record.id, seconds=LEASE_SECONDS)
    assert lease is not None
    store.release(lease, "failed", error=str(error))
    record = store.get(record.id)
    delivery.conclude(store, record, sink_of(record), error=error)
    return record


def drive(
    store: JobStore,
    job_id: str,
    *,
    listen: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
    started: Callable[[Coordinator], None] = lambda coordinator: None,
    retry_dead: bool = False,
    held: bool = False,
) -> JobRecord:
    """Coordinate the job in this process until it is finished or stopped; returns it as it then is.

    started: gets the coordinator, so that a signal handler can stop it.
    retry_dead: replay the dead items; allowed for a finished job too.
    held: the job is new, and whoever made it asks this process to drive it.
    """
    patience = Patience(say)
    record = patience(lambda: store.get(job_id))
    if record.state == "cancelled" or (record.state == "finished" and not retry_dead):
        raise JobStateError(f"job {record.id} is {record.state}", hint=f"See it with: tally jobs show {record.id}")
    spec = JobSpec(**record.spec)
    model = ModelRef.from_dict(record.model)
    parts = assemble(spec, refreshed(model) if retry_dead else model)
    verify(parts.model)  # before anything is touched
    token, nonce = new_token(), new_nonce()  # so that what is done again is done once
    lease = patience(lambda: store.acquire(record.id, seconds=LEASE_SECONDS, held=held, token=token))
    if lease is None:
        raise JobStateError(
            f"job {record.id} is driven by another process now ({record.owner_host}, pid {record.owner_pid})",
            hint=f"Follow it with: tally jobs watch {record.id}",
        )
    engine = engine_for(spec)
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
            limits=Limits(memory=spec.memory or engine.default_memory(most)),
            log=log_of(record.id),
        )
        parts.sink.claim(record.id)
        if retry_dead:
            parts.source.prepare()
            dead = patience(lambda: [each.chunk for each in store.dead(record.id)])
            manifest = parts.sink.manifest() or {}
            published = (manifest.get("job"), manifest.get("generation")) == (record.id, record.generation)
            replay, ref = parts.source.combine(dead), parts.model.to_dict()
            patience(lambda: store.reopen(lease, replay, published=published, model=ref, nonce=nonce))
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
            listen=listen,
            say=say,
        )
    except BaseException as error:
        engine.stop(kill=True)
        stopped = isinstance(error, (KeyboardInterrupt, ClusterLostError))
        with suppress(DatabaseAwayError):  # the error at hand is the one to tell
            store.release(lease, "interrupted" if stopped else "failed", error=str(error) or None)
        raise
    started(coordinator)
    try:
        coordinator.run()
    except Exception as error:
        with suppress(DatabaseAwayError):
            delivery.conclude(store, store.get(record.id), parts.sink, error=error, say=say)
        raise
    ended = patience(lambda: store.get(record.id))
    patience(lambda: delivery.conclude(store, ended, parts.sink, say=say))
    return ended


def discard(store: JobStore, record: JobRecord) -> None:
    """Forget a job that nobody drives, with everything that it has not finished writing."""
    if record.alive:
        raise JobStateError(f"job {record.id} is running", hint=f"Stop it first: tally jobs cancel {record.id}")
    release(record)
    store.delete(record.id)
    log_of(record.id).unlink(missing_ok=True)


def release(record: JobRecord) -> None:
    """Remove what the job has not finished writing, unless its place is another job's by now."""
    sink = sink_of(record)
    if record.state != "finished" and sink.holder() == record.id:
        sink.release()


def find(store: JobStore, job: str) -> JobRecord:
    """A job by its id, the beginning of it, or the place that it writes to (the newest one that does)."""
    if "/" in job or Path(job).exists():
        record = store.at(absolute(job))
        if record is not None:
            return record
    return store.get(job)


def sink_of(record: JobRecord) -> Sink:
    """Where the job's results are, for reading or removing them; neither model nor source is opened."""
    spec = JobSpec(**record.spec)
    return output_sink(spec, make_scorer(spec, ModelRef.from_dict(record.model)), None, video=spec.media == "video")


def log_of(job_id: str) -> Path:
    """What the job's workers printed: scripts, native libraries, warnings."""
    folder = settings().home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{job_id}.log"


def engine_for(spec: JobSpec) -> Engine:
    """A new engine of the kind that the spec names."""
    if spec.engine == "ray":
        from tally.engines.ray.engine import RayEngine

        return RayEngine(cpus=spec.cpus, gpus=spec.gpus, memory=spec.memory, resources=spec.resources)
    from tally.engines.local import LocalEngine

    return LocalEngine()


def when(seconds: float | None) -> str:
    """A time as people write it, in their own zone."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _still_there(record: JobRecord, sink: Sink) -> bool:
    """Whether the output still belongs to that job; a user may have removed it, and then it is forgotten."""
    return record.alive or sink.holder() == record.id


def _output(spec: JobSpec, sink: Sink) -> dict[str, Any]:
    kind = "video" if isinstance(sink, VideoSink) else "images" if isinstance(sink, FilesSink) else "rows"
    return {
        "kind": kind,
        "format": sink.pictures if isinstance(sink, FilesSink) else sink.format,  # type: ignore[attr-defined]
        "columns": dict(sink.columns) if isinstance(sink, RowsSink) and sink.columns is not None else None,
        "unit": {"video": "frames", "table": "rows"}.get(spec.media or "", "items"),
        "place": spec.out,
    }


def _facts(spec: JobSpec, model: ModelRef) -> dict[str, Any]:
    return {
        "tally": tally.__version__,
        "model": {
            "name": model.name,
            "version": model.version,
            "kind": model.kind,
            "hash": model.hash,
            # A thousand class names say nothing that the hash does not.
            "options": {name: value for name, value in model.options.items() if name != "labels"},
        },
        "source": list(spec.source),
        "spec": spec.model_dump(mode="json", exclude={"source", "out", "webhook"}),
    }
