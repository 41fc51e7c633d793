"""One chunk, in a worker: read → decode → score → encode → write.

No database, no credentials for it, and no idea of the job beyond this chunk.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any

from tally.engines import progress
from tally.errors import ItemError, TallyError
from tally.models.load import load
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer, TableResult
from tally.sinks.base import Output, Sink, Writer
from tally.sources.base import Batch, Chunk, Source, Timings
from tally.storage import while_waiting
from tally.text import storable

STARTUP_SECONDS = 600.0
"""How long loading a model may take before its worker counts as hung."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs once. overlay: results are drawn onto the pictures that they are of."""

    model: ModelRef
    source: Source
    sink: Sink
    device: str
    batch_size: int | None
    timeout: float
    overlay: bool = False


@dataclass(frozen=True, slots=True)
class DeadItem:
    """position: inside the chunk."""

    position: int
    key: str
    stage: str
    error: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attempt at a chunk. ``seconds`` is wall time in the worker."""

    output: Output
    dead: list[DeadItem]
    timings: Timings
    seconds: float


@dataclass(frozen=True, slots=True)
class Part:
    """Results of ``count`` items that follow each other: a sequence, or a ``pyarrow.Table``.

    errors: those that failed, by position; what ``results`` holds there means nothing.
    """

    count: int
    results: Any
    errors: Mapping[int, Exception] = field(default_factory=dict)


@dataclass(slots=True)
class Worker:
    """A worker's state: the loaded scorer beside its source and sink."""

    scorer: Scorer
    source: Source
    sink: Sink
    timeout: float
    description: str = field(default="")


def setup(given: Setup) -> Worker:
    """Load the scorer. Raises ModelError if it cannot be used."""
    progress.busy(0, 0, limit=STARTUP_SECONDS)
    while_waiting(progress.waiting)  # an item is not to blame for a store that is away
    scorer = load(given.model, given.device)
    if given.overlay:
        from tally.scorers.vision.overlay import Overlay

        scorer = Overlay(scorer)
    if given.batch_size is not None:
        scorer.batch_size = given.batch_size
    # Runs when the process is asked to end, not when it is killed.
    Finalize(None, scorer.close, exitpriority=1)
    return Worker(scorer, given.source, given.sink, given.timeout, scorer.describe())


def describe(worker: Worker) -> str:
    """What was loaded, and where it runs. The first task of every job: it shows that the model loads."""
    return worker.description


def run_chunk(worker: Worker, chunk: Chunk, attempt: str) -> Outcome:
    """Score one chunk and write its results under the attempt's name.

    Bad items end up in ``dead``; only what concerns the whole chunk (the output cannot be written, say)
    is raised.
    """
    began = time.perf_counter()
    timings = Timings()
    dead: list[tuple[int, str, str]] = []  # not the errors themselves: they may hold on to large values
    writer = worker.sink.open(attempt, chunk)
    size = worker.scorer.batch_size
    # In whole batches, so that what is cut out of the chunk after a crash keeps its batches.
    ahead = -(-worker.source.ahead(size) // size) * size

    def busy(start: int, stop: int) -> None:
        stop = min(stop, chunk.count)
        progress.busy(start, stop, ahead=min(ahead, chunk.count - stop), limit=worker.timeout)

    def note(found: Sequence[tuple[int, ItemError]]) -> None:
        dead.extend((position, error.stage, _bounded(str(error))) for position, error in found)

    busy(0, size)  # at once: reading ahead begins before the first batch is there
    batches = worker.source.read(chunk, worker.scorer, timings)
    try:
        for batch in batches:
            busy(batch.start, batch.stop)
            note(batch.dead)
            if len(batch.keys):
                start = time.perf_counter()
                results = score(worker.scorer, batch.values, len(batch.keys))
                scored = time.perf_counter()
                timings.score += scored - start
                note(_write(writer, batch, results))
                timings.write += time.perf_counter() - scored
            busy(batch.stop, batch.stop + size)
        # Everything is scored: if the worker is lost while closing, no item is to blame.
        progress.busy(0, chunk.count, limit=worker.timeout)
        start = time.perf_counter()
        output = writer.close()
        timings.write += time.perf_counter() - start
    except BaseException:
        writer.abort()
        raise
    finally:
        batches.close()  # type: ignore[attr-defined]
    keys: Sequence[str] = worker.source.keys(chunk) if dead else ()
    return Outcome(
        output=output,
        dead=[DeadItem(position, keys[position], stage, error) for position, stage, error in sorted(dead)],
        timings=timings,
        seconds=time.perf_counter() - began,
    )


def score(scorer: Scorer, values: Any, count: int) -> list[Part]:
    """The batch's results in parts, in order; if scoring raises, the items that raise alone have their exception
    as result.

    values: a sequence of prepared values, or a ``pyarrow.Table``; ``count`` items of it.
    """
    try:
        results: Any = scorer.score(values)
    except Exception as error:
        if count == 1:
            return [Part(1, [error], {0: error})]
        half = count // 2
        return [
            *score(scorer, values[:half], half),
            *score(scorer, values[half:], count - half),
        ]
    errors: Mapping[int, Exception] = {}
    if isinstance(results, TableResult):
        results, errors = results.rows, results.errors
    if hasattr(results, "num_rows"):
        _check_length(scorer, results.num_rows, count)
        return [Part(count, results, errors)]
    # A mapping has a length too: somebody returned one row instead of a list of them.
    if not hasattr(results, "__len__") or isinstance(results, (Mapping, str, bytes)):
        raise TallyError(
            f"{type(scorer).__name__}.score returned {type(results).__name__}, not a sequence with one result per item"
        )
    _check_length(scorer, len(results), count)
    found = {index: result for index, result in enumerate(results) if isinstance(result, Exception)}
    return [Part(count, results, found)]


def _check_length(scorer: Scorer, given: int, count: int) -> None:
    if given != count:
        raise TallyError(
            f"{type(scorer).__name__}.score returned {given} results for {count} items",
            hint="Return one result per item, in the same order; an exception object for an item that failed.",
        )


def _write(writer: Writer, batch: Batch, parts: Sequence[Part]) -> list[tuple[int, ItemError]]:
    """Hand the batch's results to the writer; position and error of each item that has none."""
    dead: list[tuple[int, ItemError]] = []
    start = 0
    for part in parts:
        whole = len(parts) == 1 and not part.errors
        kept = None if whole else [start + i for i in range(part.count) if i not in part.errors]
        dead += [(int(batch.positions[start + i]), _item_error(error)) for i, error in part.errors.items()]
        if kept is None or kept:
            keys, info = _picked(batch.keys, kept), _picked(batch.info, kept)
            results = part.results if kept is None else _picked(part.results, [index - start for index in kept])
            if hasattr(results, "num_rows"):
                refused = writer.add_table(keys, results, info)
            else:
                refused = writer.add(_plain(keys), results, None if info is None else _plain(info))
            dead += [(int(batch.positions[index if kept is None else kept[index]]), error) for index, error in refused]
        start += part.count
    return dead


def _picked(values: Any, indices: Sequence[int] | None) -> Any:
    """Some of a sequence's, an Arrow array's or a table's values."""
    if indices is None or values is None:
        return values
    return values.take(indices) if hasattr(values, "take") else [values[index] for index in indices]


def _plain(values: Any) -> Any:
    return values.to_pylist() if hasattr(values, "to_pylist") else values


def _bounded(text: str) -> str:
    """The text, storable and not too long."""
    clean = storable(text)
    return clean if len(clean) <= 4000 else clean[:4000] + " ..."


def _item_error(error: Any) -> ItemError:
    if isinstance(error, ItemError):
        return error
    if isinstance(error, TallyError):
        return ItemError(error.message, hint=error.hint)
    text = " ".join(str(error).split())
    where = _where(error)
    return ItemError(f"{type(error).__name__}: {text}" + (f" ({where})" if where else ""))


def _where(error: BaseException) -> str:
    """File and line in which the user's code raised."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}, line {trace.tb_lineno}"
