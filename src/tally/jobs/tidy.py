"""Forgetting jobs, and removing what they had not finished writing. Neither model nor source is opened."""

from __future__ import annotations

import shutil
from pathlib import Path

from tally.config import settings
from tally.errors import JobStateError, StorageError
from tally.jobs.given import given_folder
from tally.jobs.kept_log import kept_log_of
from tally.jobs.store import JobRecord, JobStore, Lease
from tally.sinks.base import OutputDescription, Sink
from tally.sinks.factory import reopen
from tally.sources.listing import is_video
from tally.storage import normalised


def discard(store: JobStore, record: JobRecord) -> None:
    """Forget a job that nobody drives, with everything that it has not finished writing."""
    if record.alive or any(part.alive for part in store.parts(record.id)):
        raise JobStateError(f"job {record.id} is {record.state}", hint=f"Stop it first: tally jobs cancel {record.id}")
    release(store, record)
    store.delete(record.id)
    places = settings()
    for log in (places.log_of(record.id), places.coordinator_log_of(record.id), kept_log_of(record.id)):
        log.unlink(missing_ok=True)


def forget_given(store: JobStore, record: JobRecord) -> None:
    """Remove the items that were given to a job which is forgotten, unless another job has the same."""
    for place in record.spec.get("source") or ():
        kept = Path(place).parent
        if kept.parent == given_folder() and not store.list(text=str(kept), limit=1).jobs:
            shutil.rmtree(kept, ignore_errors=True)


def release(store: JobStore, record: JobRecord) -> None:
    """Remove what the job has not finished writing, unless its place is another job's by now."""
    if record.state == "finished" or not record.output or record.parent is not None:
        return
    sink = sink_of(record)
    if sink.holder() != record.id:
        return
    if record.output.get("endless") and _has_unpublished(store, record, sink):
        raise JobStateError(
            f"job {record.id} has results that are not published yet, and their messages do not come again",
            hint=f"Publish them first: tally jobs resume {record.id}, and stop it with Ctrl-C.",
        )
    sink.release()


def undo_retry(store: JobStore, lease: Lease, sink: Sink, error: BaseException | None = None) -> None:
    """Leave a job that is being retried as finished as it was before.

    error: why. If the results of the retry are being published already, they are: the job can be resumed.
    """
    why = None if error is None else str(error) or type(error).__name__
    try:
        published = sink.publishing
        if not published:
            sink.release()
    except StorageError:  # what is left there is removed by the next retry
        published = False
    if published:
        store.release(lease, "failed", error=why)
    else:
        store.undo_retry(lease, error=why)


def _has_unpublished(store: JobStore, record: JobRecord, sink: Sink) -> bool:
    """Whether results of an endless source are committed, and so acknowledged, that are not published."""
    manifest = sink.manifest() or {}
    published = manifest["generation"] if manifest.get("job") == record.id else -1
    generations = range(published + 1, record.generation + 1)
    return any(next(store.outputs(record.id, generation=each), None) is not None for each in generations)


def sink_at(place: str) -> Sink:
    """A place of which nothing is known but where it is, for removing what a job has left there."""
    return reopen(OutputDescription("video" if is_video(place) else "rows", normalised(place), merged=None))


def sink_of(record: JobRecord) -> Sink:
    """Where the job's results are, for reading or removing them. Raises JobStateError if it never began."""
    if not record.output:
        raise JobStateError(f"job {record.id} is {record.state}, and has written nothing")
    return reopen(OutputDescription.from_json(record.output))
