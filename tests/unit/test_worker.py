"""One chunk in a worker: whatever a scorer or an item does, the outcome says it, and says it in storable words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.given import Given, flagging, refusing, rows

from tally.engines import watchdog
from tally.errors import ItemError, StorageError, TallyError
from tally.jobs import worker
from tally.jobs.worker import Worker, run_chunk
from tally.scorers.base import Result, Scorer, TableResult
from tally.sinks.base import Output, Sink, Writer
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings


class Numbers(Source):
    """Items are the numbers of the payload; some of them cannot be read."""

    def __init__(self, unreadable: Sequence[int] = (), *, numbered: bool = False, reads_ahead: int = 0) -> None:
        self.unreadable, self.numbered, self.reads_ahead = unreadable, numbered, reads_ahead
        self.closed = 0

    def ahead(self, batch_size: int) -> int:
        return self.reads_ahead

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        raise NotImplementedError

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        try:
            for start in range(0, chunk.count, scorer.batch_size):
                batch = Batch(start, min(start + scorer.batch_size, chunk.count))
                for position in range(batch.start, batch.stop):
                    number = chunk.first + position
                    if number in self.unreadable:
                        batch.dead.append((position, ItemError(f"no item {number}", stage="read")))
                    else:
                        batch.keys.append(f"item-{number}")
                        batch.values.append(number)
                        batch.positions.append(position)
                if self.numbered:
                    batch.info = [{"number": position} for position in batch.positions]
                yield batch
        finally:
            self.closed += 1

    def keys(self, chunk: Chunk) -> list[str]:
        return [f"item-{chunk.first + position}" for position in range(chunk.count)]

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        return Chunk(chunk.first + start, stop - start, {})


class Rows(Numbers):
    """The same as rows of tables."""

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        for start in range(0, chunk.count, scorer.batch_size):
            stop = min(start + scorer.batch_size, chunk.count)
            numbers = pa.array(range(chunk.first + start, chunk.first + stop))
            keys = pa.array([f"item-{n}" for n in numbers.to_pylist()])
            yield Batch(start, stop, keys, pa.table({"n": numbers}), np.arange(start, stop))


@dataclass
class Memory(Writer):
    """Keeps what is written; refuses some keys; may fail."""

    refused: Sequence[str] = ()
    full_after: int | None = None
    written: list[tuple[str, Any]] = field(default_factory=list)
    state: str = "open"

    def add(
        self, keys: Sequence[str], results: Sequence[Result], info: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[int, ItemError]]:
        assert len(keys) == len(results) > 0
        assert info is None or [f"item-{each['number']}" for each in info] == list(keys)
        assert not any(isinstance(result, Exception) for result in results)
        if self.full_after is not None and len(self.written) >= self.full_after:
            raise StorageError("no space left")
        bad = [(index, ItemError("not a row", stage="write")) for index, key in enumerate(keys) if key in self.refused]
        out = {index for index, _ in bad}
        self.written += [pair for index, pair in enumerate(zip(keys, results, strict=True)) if index not in out]
        return bad

    def close(self) -> Output:
        self.state = "closed"
        return Output(["part"], rows=len(self.written), bytes=1)

    def abort(self) -> None:
        self.state = "aborted"


def run(scorer: Scorer, count: int, source: Numbers | None = None, writer: Memory | None = None) -> worker.Outcome:
    class OneSink(Sink):
        claim = holder = finalize = release = withdraw = committed = manifest = None  # type: ignore[assignment]

        def open(self, attempt: str, chunk: Chunk) -> Writer:
            assert attempt == "attempt-1"
            return writer or Memory()

    OneSink.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    worker = Worker(scorer, source or Numbers(), OneSink(), timeout=60.0)  # type: ignore[abstract]
    return run_chunk(worker, Chunk(0, count, {}), "attempt-1")


def test_every_item_is_written_once() -> None:
    scorer, source, writer = Given(rows), Numbers(), Memory()
    outcome = run(scorer, 10, source, writer)
    assert writer.written == [(f"item-{n}", {"value": n}) for n in range(10)]
    assert scorer.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert outcome.output == Output(["part"], rows=10, bytes=1)
    assert outcome.dead == []
    assert (writer.state, source.closed) == ("closed", 1)
    assert outcome.seconds >= outcome.timings.score >= 0


@pytest.mark.parametrize("numbered", [False, True])
def test_dead_items_of_every_stage_in_order(numbered: bool) -> None:
    def function(batch: list[int]) -> list[Result]:
        return [KeyError(value) if value == 6 else {"value": value} for value in refusing(2)(batch) and batch]

    writer = Memory(refused=["item-0", "item-7"])
    outcome = run(Given(function), 9, Numbers([1, 8], numbered=numbered), writer)
    assert [(each.position, each.key, each.stage) for each in outcome.dead] == [
        (0, "item-0", "write"),
        (1, "item-1", "read"),
        (2, "item-2", "score"),
        (6, "item-6", "score"),
        (7, "item-7", "write"),
        (8, "item-8", "read"),
    ]
    assert [key for key, _ in writer.written] == ["item-3", "item-4", "item-5"]
    assert outcome.output.rows == 3


def test_an_error_tells_type_text_and_place() -> None:
    (dead,) = run(Given(refusing(0)), 1).dead
    assert dead.error.startswith("ValueError: cannot score 0 (given.py, line ")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ItemError("too dark", stage="prepare", hint="use a lamp"), "too dark\n  use a lamp"),
        (TallyError("no such label", hint="see labels.txt"), "no such label\n  see labels.txt"),
        (ValueError("a\n   b\tc"), "ValueError: a b c"),
        (RuntimeError(), "RuntimeError"),
        (ItemError(7, stage="prepare"), "7"),  # type: ignore[arg-type]
        (OSError(2, "No such file", "caf\udce9.jpg"), "OSError: [Errno 2] No such file: 'caf\\udce9.jpg'"),
        (ValueError("nul\0 and \udcff and ☃"), "ValueError: nul\\0 and \\udcff and ☃"),
    ],
)
def test_exceptions_as_results(error: Exception, text: str) -> None:
    writer = Memory()
    outcome = run(Given(lambda batch: [error if value == 1 else {"value": value} for value in batch]), 3, None, writer)
    (dead,) = outcome.dead
    assert dead.position == 1
    assert dead.stage == ("prepare" if isinstance(error, ItemError) else "score")
    assert dead.error.strip() == text.replace("OSError", type(error).__name__)
    assert [key for key, _ in writer.written] == ["item-0", "item-2"]


def test_texts_can_be_stored_and_have_a_length() -> None:
    (dead,) = run(Given(lambda batch: [ItemError("\udcff\0" * 3000)]), 1).dead
    assert len(dead.error) < 4100
    assert dead.error.endswith(" ...")
    assert dead.error.startswith(r"\udcff\0\udcff\0")
    dead.error.encode("utf-8")


def test_nothing_is_asked_of_scorer_and_writer_when_nothing_can_be_read() -> None:
    scorer, writer = Given(rows), Memory()
    outcome = run(scorer, 3, Numbers([0, 1, 2]), writer)
    assert scorer.batches == []
    assert writer.written == []
    assert len(outcome.dead) == 3
    assert outcome.output.rows == 0


@pytest.mark.parametrize("what", ["output", "results"])
def test_what_concerns_the_whole_chunk_is_raised_and_leaves_nothing(what: str) -> None:
    source = Numbers()
    if what == "output":
        writer = Memory(full_after=4)
        with pytest.raises(StorageError, match="no space left"):
            run(Given(rows), 12, source, writer)
    else:
        writer = Memory()
        with pytest.raises(TallyError, match="returned 0 results for 4 items"):
            run(Given(lambda batch: []), 12, source, writer)
    assert (writer.state, source.closed) == ("aborted", 1)


def test_what_is_worked_on_is_told_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []

    def busy(start: int, stop: int, *, ahead: int = 0, limit: float | None = None) -> None:
        assert limit == 60.0
        told.append((start, stop, stop + ahead))

    monkeypatch.setattr(watchdog, "busy", busy)

    def function(batch: list[int]) -> list[Result]:
        start, stop, _ = told[-1]
        assert start <= batch[0] <= batch[-1] < stop
        return rows(batch)

    run(Given(function), 10, Numbers(reads_ahead=3))
    assert told[0] == (0, 4, 8)  # by whole batches
    assert told[-1] == (0, 10, 10)
    assert all(0 <= start <= stop <= reach <= 10 for start, stop, reach in told)


# tables ----------------------------------------------------------------------------------------------


def test_rows_that_fail_within_a_table_cost_only_themselves() -> None:
    writer = Memory()
    outcome = run(Given(flagging(1, 4)), 6, Rows(), writer)
    assert [(dead.position, dead.error) for dead in outcome.dead] == [
        (1, "ValueError: cannot score 1"),
        (4, "ValueError: cannot score 4"),
    ]
    assert writer.written == [(f"item-{n}", {"n": n, "double": 2 * n}) for n in (0, 2, 3, 5)]


def test_a_table_that_raises_is_halved_and_the_rest_is_written_in_order() -> None:
    def function(table: pa.Table) -> TableResult:
        if 2 in table.column("n").to_pylist():
            raise ValueError("two")
        return flagging(4)(table)

    writer = Memory()
    outcome = run(Given(function), 6, Rows(), writer)
    assert [(dead.position, dead.key) for dead in outcome.dead] == [(2, "item-2"), (4, "item-4")]
    assert writer.written == [(f"item-{n}", {"n": n, "double": 2 * n}) for n in (0, 1, 3, 5)]


def test_lists_as_the_result_of_a_table_are_rows_too() -> None:
    writer = Memory()
    outcome = run(Given(lambda table: refusing(3)(table.column("n").to_pylist())), 4, Rows(), writer)
    assert [dead.key for dead in outcome.dead] == ["item-3"]
    assert writer.written == [(f"item-{n}", {"value": n}) for n in range(3)]
