"""What every source must do. Inherit the class, override its three fixtures, and name it ``Test...``."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tally.scorers.base import Item, Scorer
from tally.sources.base import Chunk, ChunkLimit, Source, Timings


class Recorder(Scorer):
    """Prepares values as they are, fails where told to, and notes how often it was asked."""

    def __init__(self, fail: Sequence[str] = ()) -> None:
        self.fail = frozenset(fail)
        self.prepared: list[str] = []
        self._lock = threading.Lock()

    def prepare(self, item: Item) -> Any:
        with self._lock:
            self.prepared.append(item.key)
        if item.key in self.fail:
            raise ValueError(f"cannot prepare {item.key}")
        return item.value


def listed(values: Any) -> list[Any]:
    """Keys or positions of a batch as a list, be they an Arrow array or not."""
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values)


def chunks_of(source: Source, items: int, *, after: str | None = None, first: int = 0) -> list[Chunk]:
    """All chunks beyond a cursor, of at most so many items."""
    return list(source.plan(after, first, lambda: ChunkLimit(items, 1 << 40)))


class SourceContract:
    """Override ``source`` (readable items, at least four of them in one chunk where chunks may be large),
    ``keys`` (their keys, in order) and, for other inputs than images, ``input``.
    """

    @pytest.fixture
    def source(self) -> Source:
        raise NotImplementedError("override the fixture source")

    @pytest.fixture(autouse=True)
    def prepared(self, source: Source) -> Source:
        """The source as it is when it is planned and read."""
        source.prepare()
        return source

    @pytest.fixture
    def keys(self) -> list[str]:
        raise NotImplementedError("override the fixture keys")

    @pytest.fixture
    def input(self) -> str:
        return "image"

    @pytest.fixture
    def scorer(self, input: Any) -> Recorder:  # noqa: A002
        scorer = Recorder()
        scorer.input, scorer.batch_size = input, 2
        return scorer

    @pytest.fixture
    def chunk(self, source: Source) -> Chunk:
        """The source's largest chunk."""
        return max(chunks_of(source, 1000), key=lambda chunk: chunk.count)

    @pytest.mark.parametrize("items", [1, 2, 3, 1000])
    def test_chunks_hold_every_item_once_in_order(self, source: Source, keys: list[str], items: int) -> None:
        chunks = chunks_of(source, items)
        assert [key for chunk in chunks for key in source.keys(chunk)] == keys
        assert [chunk.count for chunk in chunks] == [len(source.keys(chunk)) for chunk in chunks]
        assert all(0 < chunk.count <= items for chunk in chunks)
        assert [chunk.first for chunk in chunks] == [
            sum(each.count for each in chunks[:at]) for at in range(len(chunks))
        ]

    def test_the_limit_is_asked_before_each_chunk(self, source: Source, keys: list[str]) -> None:
        sizes = [1, 2, *[1000] * len(keys)]
        asked = iter(sizes)
        chunks = list(source.plan(None, 0, lambda: ChunkLimit(next(asked), 1 << 40)))
        assert chunks[0].count == 1
        assert all(chunk.count <= size for chunk, size in zip(chunks, sizes, strict=False))

    def test_planning_goes_on_after_every_cursor(self, source: Source) -> None:
        chunks = chunks_of(source, 2)
        for at, chunk in enumerate(chunks):
            rest = chunks_of(source, 2, after=chunk.cursor, first=chunk.first + chunk.count)
            assert rest == chunks[at + 1 :]

    def test_a_cursor_at_the_end_gives_nothing(self, source: Source) -> None:
        last = chunks_of(source, 1000)[-1]
        assert chunks_of(source, 2, after=last.cursor, first=last.first + last.count) == []

    def test_a_small_byte_limit_still_plans_every_item(self, source: Source, keys: list[str]) -> None:
        chunks = list(source.plan(None, 0, lambda: ChunkLimit(1000, 1)))
        assert [key for chunk in chunks for key in source.keys(chunk)] == keys

    def test_payloads_are_json_and_keys_text(self, source: Source) -> None:
        for chunk in chunks_of(source, 2):
            assert json.loads(json.dumps(chunk.payload)) == chunk.payload
            chunk.cursor.encode()
            for key in source.keys(chunk):
                key.encode()

    def test_it_travels_to_workers(self, source: Source, scorer: Recorder, keys: list[str]) -> None:
        there = pickle.loads(pickle.dumps(source))  # noqa: S301  # our own bytes
        chunks = chunks_of(source, 1000)
        batches = [batch for chunk in chunks for batch in there.read(chunk, scorer, Timings())]
        assert [key for batch in batches for key in listed(batch.keys)] == keys

    @pytest.mark.parametrize("size", [1, 2, 3, 1000])
    def test_batches_are_windows_in_order(self, source: Source, chunk: Chunk, scorer: Recorder, size: int) -> None:
        scorer.batch_size = size
        keys = source.keys(chunk)
        batches = list(source.read(chunk, scorer, Timings()))
        assert [(batch.start, batch.stop) for batch in batches] == [
            (start, min(start + size, len(keys))) for start in range(0, len(keys), size)
        ]
        for batch in batches:
            assert batch.dead == []
            assert listed(batch.positions) == list(range(batch.start, batch.stop))
            assert listed(batch.keys) == list(keys[batch.start : batch.stop])
            assert len(batch.values) == len(batch.keys)

    def test_one_failure_costs_one_item_and_moves_no_other(
        self, source: Source, chunk: Chunk, scorer: Recorder
    ) -> None:
        keys = source.keys(chunk)
        failing = keys[1]
        scorer.fail = frozenset([failing])
        batches = list(source.read(chunk, scorer, Timings()))
        assert [(batch.start, batch.stop) for batch in batches][:2] == [(0, 2), (2, 4)]
        assert batches[0].keys == keys[:1]
        [(position, error)] = batches[0].dead
        assert (position, error.stage) == (1, "prepare")
        assert failing in error.message
        assert "Traceback" not in error.message
        assert [key for batch in batches for key in batch.keys] == [key for key in keys if key != failing]

    def test_slices_are_chunks(self, source: Source, chunk: Chunk, scorer: Recorder) -> None:
        keys = list(source.keys(chunk))
        part = source.slice(chunk, 1, 4)
        assert (part.first, part.count) == (chunk.first + 1, 3)
        assert list(source.keys(part)) == keys[1:4]
        assert [key for batch in source.read(part, scorer, Timings()) for key in listed(batch.keys)] == keys[1:4]
        assert list(source.keys(source.slice(part, 1, 2))) == keys[2:3]

    def test_keys_are_a_sequence(self, source: Source, chunk: Chunk) -> None:
        keys = source.keys(chunk)
        every = list(keys)
        assert len(keys) == len(every) == chunk.count
        assert [keys[at] for at in reversed(range(len(keys)))] == every[::-1]
        assert (keys[-1], list(keys[1:3])) == (every[-1], every[1:3])

    def test_preparing_again_changes_nothing(self, source: Source, keys: list[str]) -> None:
        before = chunks_of(source, 2)
        source.prepare()
        assert chunks_of(source, 2) == before
        assert [key for chunk in before for key in source.keys(chunk)] == keys

    def test_combining_keeps_items_and_order(self, source: Source, keys: list[str]) -> None:
        chunks = chunks_of(source, 1)
        combined = source.combine(chunks)
        assert [key for chunk in combined for key in source.keys(chunk)] == keys
        assert sum(chunk.count for chunk in combined) == len(keys)
        assert len(combined) <= len(chunks)
        assert source.combine([]) == []

    def test_closing_stops_what_works_ahead(self, source: Source, chunk: Chunk, scorer: Recorder) -> None:
        batches = source.read(chunk, scorer, Timings())
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        asked = len(scorer.prepared)
        assert next(batches, None) is None
        assert len(scorer.prepared) == asked

    def test_time_is_accounted_for(self, source: Source, scorer: Recorder) -> None:
        timings = Timings()
        for chunk in chunks_of(source, 1000):
            for _ in source.read(chunk, scorer, timings):
                pass
        assert timings.read + timings.decode > 0
        assert timings.score == timings.write == 0


class TableSourceContract(SourceContract):
    """What every source of tables must do. Override ``source``, ``keys`` and ``rows``."""

    @pytest.fixture
    def rows(self) -> list[dict[str, Any]]:
        """What a scorer is given of each item, in order."""
        raise NotImplementedError("override the fixture rows")

    @pytest.fixture
    def input(self) -> str:
        return "table"

    def test_one_failure_costs_one_item_and_moves_no_other(
        self, source: Source, chunk: Chunk, scorer: Recorder
    ) -> None:
        for batch in source.read(chunk, scorer, Timings()):
            assert (len(batch.keys), len(batch.dead)) == (batch.stop - batch.start, 0)
        assert scorer.prepared == []  # rows of tables are scored as they are

    def test_closing_stops_what_works_ahead(self, source: Source, chunk: Chunk, scorer: Recorder) -> None:
        running = set(threading.enumerate())
        batches = source.read(chunk, scorer, Timings())
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert next(batches, None) is None
        assert set(threading.enumerate()) <= running

    def test_values_are_the_rows(self, source: Source, scorer: Recorder, rows: list[dict[str, Any]]) -> None:
        found: list[dict[str, Any]] = []
        for chunk in chunks_of(source, 3):
            for batch in source.read(chunk, scorer, Timings()):
                found += batch.values.to_pylist()
        assert found == rows

    def test_info_is_as_it_is_declared(self, source: Source, chunk: Chunk, scorer: Recorder) -> None:
        from tally.sinks.columns import type_named

        for batch in source.read(chunk, scorer, Timings()):
            if not source.columns:
                assert batch.info is None
                continue
            assert batch.info.num_rows == len(batch.keys)
            kinds = {name: type_named(kind) for name, kind in source.columns.items()}
            assert dict(zip(batch.info.schema.names, batch.info.schema.types, strict=True)) == kinds

    def test_the_column_of_the_order_tells_the_order(self, source: Source, scorer: Recorder) -> None:
        if source.order is None:
            return
        places = [
            place
            for chunk in chunks_of(source, 1000)
            for batch in source.read(chunk, scorer, Timings())
            for place in batch.info[source.order].to_pylist()
        ]
        assert len(set(places)) == len(places)
