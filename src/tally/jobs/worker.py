"""One chunk in a worker: read → decode → score → encode → write.

A worker has no database and no credentials for one, and knows nothing of the job beyond this chunk.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from tally import garbage
from tally.engines import watchdog
from tally.errors import DatabaseAwayError, ItemError, ModelRefutedError, StorageAwayError, TallyError, error_line
from tally.jobs import imported
from tally.jobs.open_models import OpenModels
from tally.jobs.reread import Reread, select
from tally.media.images import Decoding
from tally.models import kinds
from tally.models.load import load
from tally.models.reference import ModelRef
from tally.scorers.base import Result, Scorer, Thumbnailed
from tally.scorers.run import Part, configured, memory_of, score
from tally.sinks.base import Output, Sink, Writer
from tally.sources.base import Batch, Chunk, Source, Timings
from tally.storage import while_waiting
from tally.text import storable

STARTUP_SECONDS = 600.0
"""Seconds that loading a model may take before its worker counts as hung."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker is given once, when it starts.

    batch_size: None leaves it to the scorer. timeout: seconds for one batch. overlay: results are drawn onto the
    pictures that they are about. thumbnails: pixels of the small pictures that are kept. decoding: how pictures are
    decoded. empty_rows: an item without rows gets one, without the scorer's values.
    """

    model: ModelRef
    source: Source
    sink: Sink
    device: str
    batch_size: int | None
    timeout: float
    overlay: bool = False
    thumbnails: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    empty_rows: bool = False


@dataclass(frozen=True, slots=True)
class DeadItem:
    """position: inside the chunk."""

    position: int
    key: str
    stage: str
    error: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attempt at a chunk. ``seconds`` is wall time in the worker. assumed: see :class:`Scorer`."""

    output: Output
    dead: list[DeadItem]
    timings: Timings
    seconds: float
    assumed: Sequence[str] = ()


@dataclass(slots=True)
class Worker:
    """A worker's state: the loaded scorer beside its source and sink. chosen: scorers that items have chosen."""

    scorer: Scorer
    source: Source
    sink: Sink
    timeout: float
    description: str = field(default="")
    chosen: OpenModels | None = None
    empty_rows: bool = False

    def scorer_of(self, chunk: Chunk) -> Scorer:
        """The chunk's scorer. Raises what keeps one from being loaded that its items have chosen."""
        ref = self.source.model(chunk)
        if ref is None:
            return self.scorer
        assert self.chosen is not None
        watchdog.busy(0, chunk.count, limit=STARTUP_SECONDS)
        return self.chosen.get(ref)


class _Kept(NamedTuple):
    """What this process was set up with. forget: see :func:`memory_of`; None of a model that serves one job only."""

    given: Setup
    worker: Worker
    forget: Callable[[], None] | None


_kept: _Kept | None = None


def setup(given: Setup) -> Worker:
    """Load the scorer; or, in a process that has served a job, take the one that is loaded, as it was then.

    Raises ModelError if it cannot be used, TallyError if this process cannot serve that job too.
    """
    global _kept
    watchdog.busy(0, 0, limit=STARTUP_SECONDS)
    if _kept is not None:
        return _again(_kept, given)
    while_waiting(watchdog.reset)  # time spent waiting for a store does not count against an item
    loaded = load(given.model, given.device)
    scorer = configured(
        loaded,
        overlay=given.overlay,
        thumbnails=given.thumbnails,
        batch_size=given.batch_size,
        decoding=given.decoding,
    )
    # Runs when the process is asked to end, not when it is killed.
    Finalize(None, scorer.close, exitpriority=1)
    chosen = OpenModels(given.device, given.batch_size, given.decoding)
    Finalize(None, chosen.close, exitpriority=1)
    if not kinds.is_data(given.model):
        Finalize(None, garbage.write_out, exitpriority=0)  # after these
    worker = Worker(scorer, given.source, given.sink, given.timeout, scorer.describe(), chosen, given.empty_rows)
    if watchdog.is_watched():
        _kept = _Kept(given, worker, memory_of(scorer) if kinds.is_data(given.model) else None)
    return worker


def _again(kept: _Kept, given: Setup) -> Worker:
    """For another job of the same model."""
    if replace(given, source=kept.given.source, sink=kept.given.sink, timeout=kept.given.timeout) != kept.given:
        raise TallyError("this worker has loaded something else")
    if kept.forget is None or not imported.is_current():
        raise TallyError("this worker is for one job only, or older than the code that it runs")
    kept.forget()
    return replace(kept.worker, source=given.source, sink=given.sink, timeout=given.timeout)


def describe(worker: Worker) -> str:
    """What was loaded, and where it runs. The first task of every job: it shows that the model loads."""
    return worker.description


def run_chunk(worker: Worker, chunk: Chunk, attempt: str) -> Outcome:
    """Score one chunk and write its results under the attempt's name.

    Bad items end up in ``dead``. Raises only what concerns the whole chunk: the output cannot be written, say.
    """
    watchdog.begin(chunk.count)
    began = time.perf_counter()
    timings = Timings()
    dead: list[tuple[int, str, str]] = []  # not the errors themselves: they may hold on to large values
    try:
        scorer = worker.scorer_of(chunk)
    except (StorageAwayError, DatabaseAwayError):
        raise
    except TallyError as error:
        return _all_dead(worker, chunk, error, began)
    writer = worker.sink.open(attempt, chunk)
    size = scorer.batch_size
    # Whole batches, so that the parts into which a crash cuts the chunk keep their batches.
    ahead = -(-worker.source.ahead(size) // size) * size

    def busy(start: int, stop: int) -> None:
        stop = min(stop, chunk.count)
        watchdog.busy(start, stop, ahead=min(ahead, chunk.count - stop), limit=worker.timeout)

    def record(found: Sequence[tuple[int, ItemError]]) -> None:
        texts = [(position, storable(str(error.stage)), _bounded(str(error))) for position, error in found]
        if texts:
            _give_up_if_spent(text for _, _, text in texts)
        dead.extend(texts)

    reread: Reread | None = None

    def anew(start: int, stop: int) -> AbstractContextManager[Any]:
        """Of the batch that is being scored."""
        nonlocal reread
        busy(batch.start, batch.stop)  # a part of it has the time of a batch
        if reread is None or reread.batch is not batch:
            reread = Reread(worker.source, chunk, scorer, batch, timings)
        return reread(start, stop)

    busy(0, size)  # before the first batch is there: reading ahead begins at once
    batches = worker.source.read(chunk, scorer, timings)
    try:
        for batch in batches:
            busy(batch.start, batch.stop)
            record(batch.dead)
            if len(batch.keys):
                start = time.perf_counter()
                results = score(scorer, batch.values, len(batch.keys), anew)
                scored = time.perf_counter()
                timings.score += scored - start
                record(_write(writer, batch, results, empty_rows=worker.empty_rows))
                timings.write += time.perf_counter() - scored
            busy(batch.stop, batch.stop + size)
        # All items are scored: if the worker is lost while it closes the output, no item is to blame.
        watchdog.busy(0, chunk.count, limit=worker.timeout)
        start = time.perf_counter()
        output = writer.close()
        timings.write += time.perf_counter() - start
    except BaseException as error:
        _give_up_if_spent([error_line(error)])
        writer.abort()
        if isinstance(error, ModelRefutedError) and scorer is not worker.scorer:
            return _all_dead(worker, chunk, error, began)  # the job has other models
        raise
    finally:
        batches.close()  # type: ignore[attr-defined]
    keys: Sequence[str] = worker.source.keys(chunk) if dead else ()
    return Outcome(
        output=output,
        dead=[DeadItem(position, keys[position], stage, error) for position, stage, error in sorted(dead)],
        timings=timings,
        seconds=time.perf_counter() - began,
        assumed=tuple(scorer.assumed),
    )


def _all_dead(worker: Worker, chunk: Chunk, error: TallyError, began: float) -> Outcome:
    """A model that items have chosen, and that cannot be used, costs those items."""
    text = _bounded(str(error))
    _give_up_if_spent([text])
    dead = [DeadItem(position, key, "load", text) for position, key in enumerate(worker.source.keys(chunk))]
    return Outcome(Output(), dead, Timings(), time.perf_counter() - began)


def _give_up_if_spent(errors: Iterable[str]) -> None:
    """End the worker if items failed because it has no descriptors or threads left: what it still holds is from others.

    An item that takes all of them by itself does so in a fresh worker too.
    """
    if not watchdog.is_watched():
        return
    texts = " ".join(errors)
    try:
        os.close(os.dup(2))
    except OSError as error:
        texts += os.strerror(error.errno or 0)
    if os.strerror(errno.EMFILE) in texts:
        watchdog.give_up("the worker ran out of file descriptors")
    if "can't start new thread" in texts:
        watchdog.give_up("the worker ran out of threads")


def _write(writer: Writer, batch: Batch, parts: Sequence[Part], *, empty_rows: bool) -> list[tuple[int, ItemError]]:
    """Hand the batch's results to the writer; returns position and error of each item that has none."""
    dead: list[tuple[int, ItemError]] = []
    start = 0
    for part in parts:
        good: Sequence[int] = range(part.count)
        if part.errors:
            good = [index for index in good if index not in part.errors]
        dead += [(int(batch.positions[start + index]), error) for index, error in part.errors.items()]
        if good:
            at = [start + index for index in good] if len(parts) > 1 or part.errors else None
            keys, info = _select(batch.keys, at), _select(batch.info, at)
            results = _select(part.results, good if part.errors else None)
            if empty_rows and not hasattr(results, "num_rows"):
                results = [_with_a_row(result) for result in results]
            if hasattr(results, "num_rows"):
                refused = writer.add_table(keys, results, info)
            elif hasattr(keys, "to_pylist"):
                refused = writer.add_rows(keys, results, info)
            else:
                refused = writer.add(keys, results, info)
            dead += [(int(batch.positions[start + good[index]]), error) for index, error in refused]
        start += part.count
    return dead


def _with_a_row(result: Result) -> Result:
    """A result of no rows as one without values; any other as it is."""
    if isinstance(result, Thumbnailed):
        return replace(result, result=_with_a_row(result.result))
    several = isinstance(result, Sequence) and not isinstance(result, str | bytes)
    return [{}] if several and not result else result


def _select(values: Any, indices: Sequence[int] | None) -> Any:
    """Some of the values; all of them if ``indices`` is None."""
    return values if indices is None or values is None else select(values, indices)


def _bounded(text: str) -> str:
    """The text, storable and of at most 4,000 characters."""
    clean = storable(text)
    return clean if len(clean) <= 4000 else clean[:4000] + " ..."
