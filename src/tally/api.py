"""Tally from Python: ``tally.score(...)`` and ``tally.Job``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.errors import JobStateError
from tally.jobs import launch
from tally.jobs.spec import make
from tally.jobs.store import JobRecord
from tally.scorers.base import Scorer
from tally.sinks.base import Sink

if TYPE_CHECKING:
    import pyarrow as pa


def score(
    source: str | Path | Sequence[str | Path],
    model: str | Path | Scorer | type[Scorer],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Job:
    """Score a collection and return the finished job.

    source: a folder, file, glob or bucket URL, or several.
    model: what ``--model`` takes, or a Scorer (class or object; it may be defined in the same script or
        notebook).
    out: a folder, a bucket URL, or one ``.csv``, ``.parquet`` or ``.jsonl`` file.
    resume: go on with the same job if it was not finished. overwrite: do it again.
    settings: options of the model, dotted (``{"preprocess.channels": "bgr"}``).
    options: the other fields of :class:`tally.jobs.spec.JobSpec` (task, labels, workers, batch_size ...).

    Raises TallyError with the next step; JobExistsError when the same was asked for before. Ctrl-C stops
    the job cleanly and raises KeyboardInterrupt; the same call with ``resume=True`` goes on.
    """
    from tally import terminal

    sources = [source] if isinstance(source, (str, Path)) else source
    live = None if isinstance(model, (str, Path)) else model
    spec = make(
        source=[str(each) for each in sources],
        model=str(model) if live is None else _name(live),
        out=str(out),
        settings=dict(settings or {}),
        **options,
    )
    store = launch.open_store()
    record = launch.submit(store, spec, model=live, resume=resume, overwrite=overwrite)
    record = terminal.run(store, record.id, quiet=quiet)
    if record.state == "interrupted":
        raise KeyboardInterrupt(f"job {record.id} was interrupted; the same call with resume=True goes on")
    return Job(record.id)


def _name(scorer: Any) -> str:
    return scorer.__name__ if isinstance(scorer, type) else type(scorer).__name__


class Job:
    """A job in the job store, by its id, the beginning of it, or the place that it writes to."""

    def __init__(self, job: str) -> None:
        self._store = launch.open_store()
        self.id = launch.find(self._store, job).id

    @property
    def record(self) -> JobRecord:
        """Everything that the job store knows of it, now."""
        return self._store.get(self.id)

    @property
    def state(self) -> str:
        """created, running, paused, interrupted, failed, finished or cancelled."""
        return self.record.state

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``_manifest.json`` says: files, model, counts. Raises JobStateError until it is finished."""
        manifest = self.record.manifest
        if manifest is None:
            raise JobStateError(f"job {self.id} is {self.state}: there is no manifest yet")
        return manifest

    def results(self) -> pa.Table:
        """All rows as an Arrow table (``.to_pandas()`` for pandas); of a running job, those committed."""
        from tally.sinks.query import rows

        return rows(self._sink(), self._store.outputs(self.id))

    def dead(self) -> pa.Table:
        """The dead items: ``key``, ``stage``, ``error``."""
        import pyarrow as pa

        found = list(self._store.dead(self.id))
        columns = {"key": [d.key for d in found], "stage": [d.stage for d in found], "error": [d.error for d in found]}
        return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))

    def query(self, sql: str) -> pa.Table:
        """SQL (DuckDB's) over the views ``results`` and ``dead``."""
        from tally.sinks.query import query

        return query(self._sink(), self._store.outputs(self.id), sql, self.dead())

    def _sink(self) -> Sink:
        sink = launch.sink_of(self.record)
        holder = sink.holder()
        if holder != self.id:
            place = self.record.spec["out"]
            now = "are gone" if holder is None else f"were replaced by those of job {holder}"
            raise JobStateError(
                f"the results of job {self.id} at {place} {now}",
                hint=f"Score again to have them back, or forget the job: tally jobs delete {self.id}",
            )
        return sink

    def resume(self, *, quiet: bool = False) -> Job:
        """Go on with a job that was interrupted, paused or failed."""
        from tally import terminal

        terminal.run(self._store, self.id, quiet=quiet)
        return self

    def retry(self, *, quiet: bool = False) -> Job:
        """Replay the dead items."""
        from tally import terminal

        terminal.run(self._store, self.id, quiet=quiet, retry_dead=True)
        return self

    def delete(self) -> None:
        """Forget the job; results that are finished stay where they are."""
        launch.discard(self._store, self.record)

    def __repr__(self) -> str:
        record = self.record
        return f"Job({self.id!r}, {record.state}, {record.done:,} of {record.items:,} items, {record.dead:,} dead)"
