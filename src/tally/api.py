"""Tally from Python: ``tally.score(...)``, ``tally.Job`` and ``tally.jobs(...)``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from tally.errors import JobError, JobExistsError, JobNotFoundError, JobStateError, SpecError, TallyError
from tally.jobs.facade import Jobs
from tally.jobs.given import is_place, kept_values
from tally.jobs.prestart import prestarted
from tally.jobs.spec import make
from tally.jobs.states import STATES, State
from tally.jobs.store import JobRecord, page_after
from tally.scorers.base import Scorer
from tally.scorers.scripts.pickled import named
from tally.storage import unexpected
from tally.text import local_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Place: TypeAlias = str | Path


class Table(Protocol):
    """The part of ``pyarrow.Table`` that is used most, with types; pyarrow has none. Results are real Arrow tables."""

    @property
    def num_rows(self) -> int: ...
    @property
    def num_columns(self) -> int: ...
    @property
    def column_names(self) -> list[str]: ...
    @property
    def schema(self) -> Any: ...
    def column(self, i: int | str) -> Any: ...
    def __getitem__(self, key: int | str) -> Any: ...
    def slice(self, offset: int = 0, length: int | None = None) -> Table: ...
    def to_pylist(self) -> list[dict[str, Any]]: ...
    def to_pydict(self) -> dict[str, list[Any]]: ...
    def to_pandas(self) -> Any: ...


@contextmanager
def _of_parameters() -> Iterator[None]:
    """Have errors speak of parameters, where they speak of options of the command line."""
    try:
        yield
    except TallyError as error:
        error.message = _in_python(error.message)
        error.args = (error.message, *error.args[1:])
        if isinstance(error, SpecError):
            error.problems = [_in_python(each) for each in error.problems]
        error.hint = None if error.hint is None else _in_python(error.hint)
        raise
    except OSError as error:  # where nobody expected it
        raise unexpected(error) from error


_OPTION = re.compile(
    r"\btally jobs (?P<verb>resume|retry|dead|cancel|delete|pause|show) (?P<job>[\w./-]+)( --dead)?(?=[\s',;)]|\.?$)"
    r"|(?P<list>\btally jobs list\b)"
    r"|(?P<help>\btally score --help\b)"
    r"|\btally [a-z][^;()'\n]*"  # a command is one in Python, too
    r"|--set (?P<key>[\w.]+)=(?P<setting>[^\s),;]+)"
    r"|--(?P<name>[a-z][a-z-]*)\b(?: (?P<value>classify|detect|restyle|embed|segment|values|cpu)\b)?"
)


def _in_python(text: str) -> str:
    parameters = inspect.signature(score).parameters

    def said(found: re.Match[str]) -> str:
        key, setting, value = found["key"], found["setting"], found["value"]
        if found["verb"] is not None:
            job = f'tally.Job("{found["job"]}")'
            return job if found["verb"] == "show" else f"{job}.{found['verb']}()"
        if found["list"] or found["help"]:
            return "tally.jobs()" if found["list"] else "help(tally.score)"
        if key is not None:
            return f'settings={{"{key}": {setting if setting == "..." else json.dumps(setting)}}}'
        name = (found["name"] or "").replace("-", "_").replace("no_audio", "audio")
        if name == "set":
            return "settings"
        if name not in parameters:
            return found[0]
        if isinstance(parameters[name].default, bool):
            return f"{name}={found['name'] != 'no-audio'}" + (f" {value}" if value else "")
        return f'{name}="{value}"' if value else f"{name}=..."

    return _OPTION.sub(said, text)


@_of_parameters()
def score(
    source: Place | Sequence[Place] | Iterable[Any] | None,
    model: Place | Scorer | type[Scorer] | Callable[[Any], Sequence[Any]],
    out: Place,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    items: Place | None = None,
    item_column: str | None = None,
    key: str | None = None,
    base: Place | None = None,
    limit: int | None = None,
    sample: str | float | None = None,
    shard: str | tuple[int, int] | None = None,
    split: int | None = None,
    task: Literal["classify", "detect", "restyle", "embed", "segment", "values"] | None = None,
    labels: Place | None = None,
    artifacts: Place | None = None,
    settings: Mapping[str, Any] | None = None,
    trust: bool = False,
    format: Literal["parquet", "csv", "jsonl", "jpg", "png", "webp", "mp4", "mov", "mkv", "webm"]  # noqa: A002
    | None = None,
    media: Literal["image", "video", "table", "archive"] | None = None,
    escape_formulas: bool = False,
    empty_rows: bool = False,
    overlay: bool = False,
    thumbnails: int | None = None,
    pages: Literal["first", "all"] = "first",
    background: str | tuple[int, int, int] | None = None,
    max_pixels: int | str = 128_000_000,
    every: int = 1,
    size: tuple[int, int] | str | None = None,
    fit: Literal["contain", "cover", "stretch"] = "stretch",
    fps: float | str | None = None,
    deinterlace: bool = False,
    frames: Literal["jpg", "png", "webp"] | None = None,
    codec: str | None = None,
    crf: float | None = None,
    audio: bool = True,
    by: str | Sequence[str] = (),
    keep: str | Sequence[str] = (),
    where: str | None = None,
    time: str | None = None,
    window: float | str | None = None,
    aggregate: str | Sequence[str] = ("mean",),
    time_unit: Literal["s", "ms", "us", "ns"] | None = None,
    timezone: str | None = None,
    path_columns: str | None = None,
    csv: Mapping[str, Any] | None = None,
    query: str | None = None,
    queue: Mapping[str, Any] | None = None,
    until_empty: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    engine: str = "local",
    address: str | None = None,
    workers: int | str | tuple[int, int] | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    timeout: float = 120.0,
    worker_items: int | None = None,
    memory: int | str | None = None,
    attempts: int = 3,
    max_dead: float | str = 0.5,
    min_dead: int = 1000,
    strict: bool = False,
    log: bool = False,
    price_per_hour: float | None = None,
    alerts: Sequence[str] = (),
    webhook: str | None = None,
    push: str | Mapping[str, Any] | None = None,
) -> Job:
    """Score a collection and return the finished job.

    source: a folder, file, glob, bucket URL, database, or URL of a video, or several; None where ``items`` names a
        list. Or the items: an iterable of paths, URLs, bytes, PIL pictures and arrays (uint8, height × width × 3), or a
        table of pandas or Arrow, whose rows are scored, or with ``item_column`` what that column names or holds. They
        are kept in Tally's home for the workers, until the job is deleted.
    model: what ``--model`` takes, or a Scorer (class or object; it may be defined in the same script or
        notebook), or a function from a batch to its results; ``settings={"input": "bytes"}`` says what a batch holds,
        where that is not pictures.
    out: a folder, a bucket URL, or one ``.csv``, ``.parquet``, ``.jsonl`` or video file.
    escape_formulas: in CSV, text that a spreadsheet would take for a formula begins with an apostrophe.
    empty_rows: an item for which the model gives no row has one, without the model's values.
    resume: continue the same job if it was not finished; one that is finished is returned. overwrite: do it again.
    quiet: show no progress.

    A part. limit: the first so many items. sample: a share (``"1%"``, 0.01) or a number of all, chosen by their keys.
        shard: ``"1/4"``, the first of four shares.
    Many machines. split: so many coordinators share the items out; it is one job all the same.
    Lists. items: a list of paths and URLs: a table, or a text with one on each line. item_column: the column that
        holds them; key: that of the items' keys; base: the folder that relative paths begin in. keep, where and csv are
        for lists, too.
    Models of pictures. task: what an ONNX model does; detected by default. labels: a file with the names of its
        classes. overlay: draw boxes and labels onto the pictures, and write those.
    Pictures. thumbnails: keep a small JPEG of each, whose longer side has so many pixels. pages: of files with
        several, ``first`` or ``all``. background: what transparent ones are laid on, ``white`` or ``#ffffff``.
        max_pixels: larger ones are refused.
    Scripts and scorers. artifacts: the folder that they load from. settings: options of the model, dotted
        (``{"preprocess.channels": "bgr"}``). trust: open models whose opening runs code that they carry.
    Videos. every: score every N-th frame. size: (width, height) in pixels, or ``"640x360"``; -1 for one keeps the
        shape. fit: how frames of another shape get it: stretch, contain (with black bars) or cover. fps: numbered
        pictures are the frames of a video, so many for a second. deinterlace: interlaced frames show one
        moment. frames: write the frames as files of this format.
        codec, crf, audio: of the video that is written.
    Pictures in Parquet. item_column: the column that holds them. Of these and of archives, too: keep.
    Tables. by: columns that make a key. keep: input columns that the results carry. where: a condition in SQL.
        time: the column of timestamps. window: seconds (or ``"5m"``) that readings are gathered over.
        aggregate: what is made of each window. time_unit: of times that are numbers since 1970. timezone: whose days
            windows are. path_columns: columns in the files' paths, such as ``"{Device}_{Tag}.csv"``. csv: how it
            is read.
    Databases. query: what is scored, in their SQL; without, the source names a table: ``postgresql://HOST/DATABASE#T``.
        key: the columns that name the rows.
    Queues. queue: how messages are read. until_empty: end when the queue is empty.
    Workers. workers: how many, or ``"4..64"``; one for each core by default. batch_size: items scored together.
        device: ``auto``, ``cpu``, ``cuda[:N]`` or ``tensorrt[:N]``. timeout: seconds that one batch may take.
        worker_items: after so many a worker is replaced by a fresh one, if the model leaks.
        memory: bytes (or ``"2GiB"``) that one worker may hold. attempts: how often a lost chunk is tried.
    Ray. engine: ``ray``; address: of the cluster's dashboard; cpus, gpus, resources: what each worker reserves.
    Limits. max_dead: share of dead items above which the job stops, once min_dead items are done. strict: stop at the
        first one. price_per_hour: what the machine costs. alerts: rules that are evaluated when the job has ended;
        webhook: who is told if one of them holds. log: keep the job's log beside its output, too.
    Push. push: where rows go, too, as they are committed: a web address, a table of a database, or a mapping.

    Raises TallyError with the next step; JobExistsError when the same was asked for before. Ctrl-C stops
    the job cleanly and raises KeyboardInterrupt; the same call with ``resume=True`` continues it.
    """
    fields = dict(locals())
    for name in ("source", "model", "out", "resume", "overwrite", "quiet"):
        del fields[name]
    from tally import terminal

    sources: Any = [] if source is None else [source] if isinstance(source, (str, Path)) else source
    if not isinstance(sources, (list, tuple)) or not all(is_place(each, media) for each in sources):
        fields |= kept_values(sources, item_column)
        sources = fields.pop("source")
    live = None if isinstance(model, (str, Path)) else model
    fields |= {name: str(value) for name, value in fields.items() if isinstance(value, Path)}
    spec = make(
        source=[str(each) for each in sources],
        model=str(model) if live is None else named(live),
        out=str(out),
        **fields,
    )
    with prestarted(spec) as prepared:
        all_jobs = Jobs()
        try:
            record = all_jobs.submit(spec, model=live, resume=resume, overwrite=overwrite)
        except JobExistsError as error:
            there = Job(error.job_id)
            if not resume or there.state != "finished":
                raise
            if not quiet:
                terminal.note(
                    f"job {there.id} finished on {local_time(there.record.finished_at)}, and is returned as it is: "
                    "overwrite=True scores what is there now"
                )
            return there  # nothing is left to be done
        record = terminal.run(all_jobs, record.id, quiet=quiet, engine=prepared, said=_in_python)
    if record.state == "cancelled":
        raise JobError(f"job {record.id} was cancelled", hint="The same call scores the collection from the start.")
    if record.state == "interrupted":
        raise KeyboardInterrupt(f"job {record.id} was interrupted; the same call with resume=True continues it")
    return Job(record.id)


def jobs(
    *,
    state: State | None = None,
    model: str | None = None,
    place: Place | None = None,
    text: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    after: Job | None = None,
    limit: int = 50,
) -> list[Job]:
    """The newest jobs, newest first: those that match all given filters.

    state: waiting, created, running, paused, interrupted, failed, finished or cancelled.
    model: its name. place: where they write to. text: part of the id, the model, a source or the place.
    since, until: created then or later, and before; a time without a zone is on this machine's clock.
    after: the last job of an earlier call, to continue with those before it.
    """
    if state is not None and state not in STATES:
        raise SpecError(f"state: there is no state {state!r}; there are {', '.join(STATES)}")
    if limit < 1:
        raise SpecError(f"limit: should be at least 1, not {limit}")
    for name, moment in (("since", since), ("until", until)):
        if moment is not None and not isinstance(moment, datetime):
            raise SpecError(f"{name}: should be a datetime.datetime, not {moment!r}")
    page = Jobs().list(
        after=None if after is None else page_after(after.record),
        state=state,
        model=model,
        place=None if place is None else str(place),
        text=text,
        since=None if since is None else since.timestamp(),
        until=None if until is None else until.timestamp(),
        limit=limit,
    )
    return [Job(record.id) for record in page.jobs]


class Job:
    """A job in the job store, by its id, the beginning of it, or the place that it writes to.

    Looking at it opens no model, runs no code of yours and reads no source.
    """

    @_of_parameters()
    def __init__(self, job: str) -> None:
        self._jobs = Jobs()
        self.id = self._jobs.get(job).id

    @property
    def record(self) -> JobRecord:
        """The job's current row."""
        return self._jobs.get(self.id)

    @property
    def state(self) -> str:
        """waiting, created, running, paused, interrupted, failed, finished or cancelled."""
        return self.record.state

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``_manifest.json`` says: files, model, counts. Raises JobStateError until it is finished."""
        manifest = self.record.manifest
        if manifest is None:
            raise JobStateError(f"job {self.id} is {self.state}: there is no manifest yet")
        return manifest

    def results(self) -> Table:
        """All rows as an Arrow table (``.to_pandas()`` for pandas); of a running job, those committed."""
        found: Table = self._jobs.results(self.id)
        return found

    def dead(self) -> Table:
        """The dead items: ``key``, ``stage``, ``error``."""
        found: Table = self._jobs.dead_table(self.id)
        return found

    @_of_parameters()
    def query(self, sql: str) -> Table:
        """SQL (DuckDB's) over the views ``results`` and ``dead``."""
        found: Table = self._jobs.query(self.id, sql)
        return found

    def gallery(self, limit: int = 12, *, where: str | None = None) -> Figure:
        """Its pictures with what was found in them, ``limit`` at most, in the order of their keys.

        where: a condition in SQL on the rows: ``"label = 'cat' and score > 0.9"``. Raises SpecError if there are none.
        """
        from tally.notebooks.figures import gallery

        return gallery(self._jobs, self.record, limit=limit, where=where)

    def timeline(
        self,
        value: str | None = None,
        *,
        time: str | None = None,
        by: str | Sequence[str] | None = None,
        where: str | None = None,
    ) -> Figure:
        """A column's values over time, a line for each key, rows whose column ``anomaly`` is true marked red.

        value: the column that is drawn: ``score``, or the only number. time: the column of times, or of a video's
        seconds. by: the columns that tell lines apart: by default those that the job has as its key. where: a
        condition in SQL. Eight lines at most, those with the most anomalies.
        Raises SpecError where it is not clear which columns are meant.
        """
        from tally.notebooks.figures import timeline

        groups = [by] if isinstance(by, str) else by
        return timeline(self._jobs, self.record, value=value, time=time, by=groups, where=where)

    def confusion(
        self, truth: Mapping[str, str] | Callable[[str], str] | Place = "folder", *, predicted: str = "label"
    ) -> Figure:
        """A matrix of true labels against predicted ones, and how many are right.

        truth: ``"folder"``: the name of the folder that an item is in; a CSV file with the columns ``key`` and
        ``label``; a mapping from keys; or a function of the key. predicted: the column that is compared; of an item
        with several rows the one with the highest score. Items without truth are counted, not compared.
        Raises SpecError, StorageError.
        """
        from tally.notebooks.figures import confusion

        return confusion(self._jobs, self.record, truth, predicted=predicted)

    def pause(self) -> None:
        """Stop handing out work; what runs is finished and saved. :meth:`resume` continues the job."""
        self._jobs.pause(self.id)

    def cancel(self) -> None:
        """Stop it for good, and remove what it had not finished writing."""
        self._jobs.cancel(self.id)

    @_of_parameters()
    def resume(self, *, quiet: bool = False, **options: Any) -> Job:
        """Continue a job that was paused, interrupted or has failed; if another process runs it, that process
        continues it. One that is finished is returned as it is.

        options: fields of the job that are changed before: ``device``, ``workers``, limits, whatever does not change
        the result. Raises SpecError for another.
        """
        if self.state == "finished" and not options:
            return self  # nothing is left to be done
        self._jobs.change(self.id, **options)
        if not self._jobs.unpause(self.id).alive:
            self._run(quiet=quiet)
        return self

    @_of_parameters()
    def retry(self, *, quiet: bool = False) -> Job:
        """Replay the dead items."""
        self._run(quiet=quiet, retry_dead=True)
        return self

    def delete(self) -> None:
        """Forget the job; results that are finished stay where they are."""
        self._jobs.delete(self.id)

    def _run(self, *, quiet: bool, retry_dead: bool = False) -> None:
        from tally import terminal

        terminal.run(self._jobs, self.id, quiet=quiet, retry_dead=retry_dead, said=_in_python)

    def __repr__(self) -> str:
        try:
            record = self.record
        except JobNotFoundError:
            return f"Job({self.id!r}, deleted)"
        return f"Job({self.id!r}, {record.state}, {record.done:,} of {record.items:,} items, {record.dead:,} dead)"

    def _repr_html_(self) -> str | None:
        from tally.notebooks.view import html

        try:
            record = self.record
        except JobNotFoundError:
            return None  # then its repr is shown
        return html(self._jobs, record)
