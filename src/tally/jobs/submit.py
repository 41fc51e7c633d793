"""From a spec to a job in the store: a new one, or the earlier one that was asked for again."""

from __future__ import annotations

from typing import Any

from tally.alerts.delivery import conclude
from tally.alerts.evaluation import check
from tally.errors import JobExistsError, JobNotFoundError, OutputExistsError, TallyError
from tally.jobs.assemble import Parts, assemble, describe_model, output_without_source
from tally.jobs.lease_renewer import LEASE_SECONDS
from tally.jobs.spec import JobSpec, is_in_home
from tally.jobs.store import JobRecord, JobStore
from tally.jobs.tidy import discard
from tally.masking import mask
from tally.sinks.base import Sink
from tally.text import local_time

_HALTED = {"interrupted": "was interrupted", "paused": "was paused", "failed": "failed"}


def submit(
    store: JobStore,
    spec: JobSpec,
    *,
    model: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    waiting: str | None = None,
) -> tuple[JobRecord, Parts]:
    """A job for this spec, and its parts: a new one, or with ``resume`` the earlier one that was not finished.

    model: a live Scorer that stands for ``spec.model``.
    resume: what does not change the result (workers, device, limits ...) is from now on as this spec says.
    overwrite: do it again, over the results of an earlier finished job.
    waiting: the id of the waiting job that this one is.
    Raises JobExistsError if the same was asked for before and neither is given, OutputExistsError if another job of
    this place was not finished and ``overwrite`` is not given. An earlier job that has not scored anything is no
    obstacle, whatever its model was: it is forgotten.
    """
    ref = describe_model(spec, model)
    parts = assemble(spec, ref)
    check(spec.alerts, spec.webhook, parts.sink.describe().columns)
    # What the source holds is settled now, whatever is put into its folder later.
    spec = _storable(spec.model_copy(update={"media": parts.source.media or spec.media}))
    fingerprint = spec.fingerprint(ref.hash)
    earlier = store.find(fingerprint)
    if earlier is not None and earlier.state == "created" and not earlier.alive and parts.sink.holder() != earlier.id:
        store.delete(earlier.id)  # its process was killed before it had its place
    elif earlier is not None and _still_there(earlier, parts.sink):
        if resume and not earlier.alive and earlier.state != "finished":
            fields = spec.model_dump(mode="json")
            return store.respec(earlier.id, fields, output=parts.describe_output()), parts
        _make_way(store, earlier, spec, overwrite=overwrite)
    _clear_place(store, parts.sink, spec, ref.hash, same=earlier, overwrite=overwrite)
    record = store.create(
        fingerprint=fingerprint,
        spec=spec.model_dump(mode="json"),
        model=ref.to_dict(),
        output=parts.describe_output(),
        waiting=waiting,
        hold=LEASE_SECONDS,
    )
    try:
        parts.sink.claim(record.id, overwrite=overwrite)
    except BaseException:
        store.delete(record.id)
        raise
    return record, parts


def _make_way(store: JobStore, earlier: JobRecord, spec: JobSpec, *, overwrite: bool) -> None:
    """Forget an earlier job of the same spec, where that is what was asked. Raises JobExistsError where it is not."""
    if earlier.alive:
        raise JobExistsError(
            f"job {earlier.id} is this same job, and is under way ({earlier.done:,} items done): {_driver(earlier)}",
            job_id=earlier.id,
            hint=f"There is nothing to resume or to start. Follow it with: tally jobs watch {earlier.id}",
        )
    if earlier.state == "finished":
        if not overwrite:
            raise JobExistsError(
                f"job {earlier.id} already did this same job and finished on {local_time(earlier.finished_at)}: "
                f"the results are in {_place(spec)}",
                job_id=earlier.id,
                hint="Do it again with --overwrite, or write to another place with --out.",
            )
        return
    scored = earlier.done - earlier.dead
    if scored and not overwrite:
        raise JobExistsError(
            f"job {earlier.id} is this same job, and {_HALTED.get(earlier.state, 'was not finished')}: "
            f"{scored:,} of its items are scored",
            job_id=earlier.id,
            hint=f"Go on with: tally jobs resume {earlier.id}   (or --resume; --overwrite starts again)",
        )
    discard(store, earlier)


def _place(spec: JobSpec) -> str:
    """Where the user wanted the results."""
    return mask(spec.push.url) if spec.push is not None and is_in_home(spec.out) else spec.out


def _clear_place(
    store: JobStore, sink: Sink, spec: JobSpec, model_hash: str, *, same: JobRecord | None, overwrite: bool
) -> None:
    """Forget what another job, which was not finished, has left at the place, where that is nothing or is to go.

    same: a job of the same spec, which was dealt with.
    """
    holder = sink.holder()
    if holder is None or (same is not None and holder == same.id) or not sink.claimed:
        return  # the claim deals with finished results
    try:
        other = store.get(holder)
    except JobNotFoundError:
        if not overwrite:
            raise OutputExistsError(
                f"{sink.place} is claimed by job {holder}, which is not in this database",
                hint="If nothing else is writing there, its database is lost: take the place with --overwrite, or free "
                f"it with: tally doctor --mend {sink.place}",
            ) from None
        sink.release()
        return
    if other.state == "finished":
        sink.release()  # its claim was left behind; its results stay
        return
    if other.alive:
        raise OutputExistsError(
            f"{sink.place} is being written by job {other.id}, which is under way with another "
            f"{_difference(spec, model_hash, other)}: {_driver(other)}",
            hint=f"Follow it with: tally jobs watch {other.id}   (or choose another output; or end it "
            f"without results: tally jobs cancel {other.id})",
        )
    scored = other.done - other.dead
    if scored and not overwrite and other.state != "cancelled":
        raise OutputExistsError(
            f"{sink.place} holds what job {other.id} has scored ({scored:,} {other.unit}) with another "
            f"{_difference(spec, model_hash, other)}; it {_HALTED.get(other.state, 'was not finished')}",
            hint=f"Replace it with --overwrite, go on with it: tally jobs resume {other.id}, or choose another output.",
        )
    discard(store, other)


def _difference(spec: JobSpec, model_hash: str, other: JobRecord) -> str:
    """What another job at the same place does otherwise, in words."""
    differing = spec.differing(JobSpec(**other.spec))
    if other.model["hash"] != model_hash:
        differing.insert(0, "model")
    return " and another ".join(differing) or "source"


def _driver(record: JobRecord) -> str:
    """Who goes on with a job that is under way: often a server, after the process that began it was killed."""
    who = "another process" if record.owner_pid is None else f"process {record.owner_pid} on {record.owner_host}"
    return f"{who} goes on with it"


def submit_failed(store: JobStore, spec: JobSpec, error: TallyError) -> JobRecord:
    """A job that failed before it began, as there was nothing to score: its alerts are sent all the same."""
    ref = describe_model(spec)
    spec = _storable(spec)
    record = store.create(
        fingerprint=spec.fingerprint(ref.hash),
        spec=spec.model_dump(mode="json"),
        model=ref.to_dict(),
        output=output_without_source(spec, ref),
        hold=LEASE_SECONDS,
    )
    lease = store.acquire(record.id, seconds=LEASE_SECONDS)
    assert lease is not None
    store.release(lease, "failed", error=str(error))
    conclude(store.engine, record.id, error=error)
    return store.get(record.id)


def _storable(spec: JobSpec) -> JobSpec:
    """The spec as it is kept: without the signature of the model's URL. The model is known by its content."""
    return spec.model_copy(update={"model": mask(spec.model)})


def _still_there(record: JobRecord, sink: Sink) -> bool:
    """Whether the output still belongs to that job; a user may have removed it, and then it is forgotten."""
    return record.alive or sink.holder() == record.id
