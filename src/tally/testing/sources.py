"""What every source must do. Inherit the class, override its fixtures, and name it ``Test...``.

:class:`SourceContract` for sources with an end, :class:`TableSourceContract` for those of tables,
:class:`EndlessSourceContract` for queues.
"""

from __future__ import annotations

import json
import pickle
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tally.errors import SourceNotFoundError
from tally.scorers.base import Item, Scorer
from tally.sources.base import Chunk, ChunkLimit, Source, Timings
from tally.sources.selection import Selection


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

    def test_it_says_what_it_is(self, source: Source, input: Any) -> None:  # noqa: A002
        assert input in source.accepts
        assert source.unit in ("items", "frames", "rows")
        assert source.media in (None, "image", "video", "table", "archive")
        assert source.bounded

    def test_acknowledging_and_closing_change_nothing(self, source: Source, keys: list[str]) -> None:
        chunks = chunks_of(source, 2)
        source.acknowledge(chunks, {})
        source.acknowledge(chunks, {})
        assert chunks_of(source, 2) == chunks
        source.close()
        source.close()
        assert [key for chunk in chunks for key in source.keys(chunk)] == keys

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

    def test_chosen_items_are_chunks(self, source: Source, chunk: Chunk, scorer: Recorder) -> None:
        keys = list(source.keys(chunk))
        parts = source.choose(chunk, [0, 2, 3])
        assert [key for part in parts for key in source.keys(part)] == [keys[0], *keys[2:4]]
        assert sum(part.count for part in parts) == 3
        assert {part.cursor for part in parts} == {chunk.cursor}
        parts = [Chunk(part.first, part.count, json.loads(json.dumps(part.payload)), part.cursor) for part in parts]
        batches = [batch for part in parts for batch in source.read(part, scorer, Timings())]
        assert [key for batch in batches for key in listed(batch.keys)] == [keys[0], *keys[2:4]]

    @pytest.mark.parametrize("selection", [Selection(sample=3), Selection(shard=(2, 2)), Selection(3, 0.9, (1, 2))])
    def test_a_part_is_the_same_in_any_chunks(self, source: Source, keys: list[str], selection: Selection) -> None:
        def planned(items: int, after: Chunk | None = None) -> list[Chunk]:
            cursor, first = (None, 0) if after is None else (after.cursor, after.first + after.count)
            return list(selection.plan(source, cursor, first, lambda: ChunkLimit(items, 1 << 40)))

        def named(chunks: Sequence[Chunk]) -> list[str]:
            return [key for chunk in chunks for key in source.keys(chunk)]

        try:
            whole = named(planned(1000))
        except SourceNotFoundError:
            return
        assert whole == [key for key in keys if key in set(whole)]
        assert selection.limit is None or len(whole) <= selection.limit
        assert selection.sample != 3 or len(whole) == 3
        for items in (1, 2):
            chunks = planned(items)
            assert named(chunks) == whole
            assert all(chunk.count <= items for chunk in chunks)
            for at, chunk in enumerate(chunks):
                assert chunk.first == sum(each.count for each in chunks[:at])
                assert named(planned(3, chunk)) == named(chunks[at + 1 :])

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


class Planning:
    """Plans a source in a thread of its own, as a coordinator does; chunks of at most ``items``."""

    def __init__(self, source: Source, items: int = 3) -> None:
        self.source = source
        self.asked = 0
        """How often the limit of a chunk was asked for."""
        self._items = items
        self._chunks: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for chunk in self.source.plan(None, 0, self._limit):
                self._chunks.put(chunk)
        except BaseException as error:
            self._chunks.put(error)

    def _limit(self) -> ChunkLimit:
        self.asked += 1
        return ChunkLimit(self._items, 1 << 40)

    def items(self, count: int) -> list[Chunk]:
        """Waits for the next chunks, until they hold that many items together."""
        chunks: list[Chunk] = []
        while sum(chunk.count for chunk in chunks) < count:
            found = self._chunks.get(timeout=60)
            if isinstance(found, BaseException):
                raise found
            chunks.append(found)
        assert sum(chunk.count for chunk in chunks) == count
        return chunks

    def close(self) -> list[Chunk]:
        """Close the source; the chunks that nobody has asked for."""
        self.source.close()
        self._thread.join(60)
        assert not self._thread.is_alive(), "closing has not ended plan()"
        return list(self._chunks.queue)


class EndlessSourceContract:
    """Override ``make`` (a new source of the same queue, as another process would have it), ``send`` (puts messages of
    these keys into the queue) and ``acknowledged`` (the keys that were acknowledged, in order; again if they were
    again), and ``input``, if it is not ``bytes``.
    """

    @pytest.fixture
    def make(self) -> Callable[[], Source]:
        raise NotImplementedError("override the fixture make")

    @pytest.fixture
    def send(self) -> Callable[[Sequence[str]], None]:
        raise NotImplementedError("override the fixture send")

    @pytest.fixture
    def acknowledged(self) -> Callable[[], list[str]]:
        raise NotImplementedError("override the fixture acknowledged")

    @pytest.fixture
    def input(self) -> str:
        return "bytes"

    @pytest.fixture
    def planning(self, make: Callable[[], Source]) -> Any:
        """Begins to plan with a source that is made; closes all of them at the end."""
        begun: list[Planning] = []

        def begin() -> Planning:
            source = make()
            source.prepare()
            begun.append(Planning(source))
            return begun[-1]

        yield begin
        for each in begun:
            each.close()

    def test_it_says_what_it_is(self, make: Any, input: Any) -> None:  # noqa: A002
        source = make()
        assert not source.bounded
        assert input in source.accepts
        source.close()

    def test_messages_are_planned_as_they_come(self, planning: Any, send: Any) -> None:
        send(["a", "b", "c", "d"])
        planned = planning()
        chunks = planned.items(4)
        send(["e"])
        chunks += planned.items(1)
        assert [key for chunk in chunks for key in planned.source.keys(chunk)] == ["a", "b", "c", "d", "e"]
        assert all(chunk.count == len(planned.source.keys(chunk)) <= 3 for chunk in chunks)
        assert [chunk.first for chunk in chunks] == [
            sum(each.count for each in chunks[:at]) for at in range(len(chunks))
        ]

    def test_the_limit_is_asked_once_for_each_chunk(self, planning: Any, send: Any) -> None:
        planned = planning()
        chunks = []
        for key in ("a", "b", "c"):
            send([key])
            chunks += planned.items(1)
        planned.close()
        assert len(chunks) <= planned.asked <= len(chunks) + 1

    def test_closing_ends_the_planning(self, planning: Any, send: Any) -> None:
        idle = planning()
        assert idle.close() == []
        idle.source.close()
        send(["a"])
        [chunk] = planning().items(1)
        assert chunk.count == 1

    def test_chunks_are_json_and_are_read_anywhere(self, planning: Any, send: Any, input: Any) -> None:  # noqa: A002
        send(["a", "b", "c"])
        planned = planning()
        scorer = Recorder()
        scorer.input, scorer.batch_size = input, 2
        there = pickle.loads(pickle.dumps(planned.source))  # noqa: S301  # our own bytes
        for chunk in planned.items(3):
            again = Chunk(chunk.first, chunk.count, json.loads(json.dumps(chunk.payload)), chunk.cursor)
            batches = list(there.read(again, scorer, Timings()))
            assert [key for batch in batches for key in batch.keys] == planned.source.keys(chunk)
            assert [position for batch in batches for position in batch.positions] == list(range(chunk.count))

    def test_nothing_is_acknowledged_before_it_is_done(self, planning: Any, send: Any, acknowledged: Any) -> None:
        send(["a", "b", "c"])
        planned = planning()
        chunks = planned.items(3)
        assert acknowledged() == []
        planned.source.acknowledge(chunks, {})
        assert acknowledged() == ["a", "b", "c"]
        planned.source.acknowledge(chunks, {})
        assert acknowledged() == ["a", "b", "c"]

    def test_parts_are_acknowledged_one_by_one(self, planning: Any, send: Any, acknowledged: Any) -> None:
        send(["a", "b", "c"])
        planned = planning()
        for chunk in planned.items(3):
            for at in range(chunk.count):
                part = planned.source.slice(chunk, at, at + 1)
                planned.source.acknowledge([part], {})
                assert acknowledged()[-1:] == planned.source.keys(part)
        assert acknowledged() == ["a", "b", "c"]

    def test_what_was_not_acknowledged_comes_again(self, planning: Any, send: Any, acknowledged: Any) -> None:
        send(["a", "b", "c"])
        first = planning()
        done, *_ = [first.source.slice(chunk, 0, 1) for chunk in first.items(3)]
        first.source.acknowledge([done], {})
        first.close()
        second = planning()
        chunks = second.items(2)
        again = [key for chunk in chunks for key in second.source.keys(chunk)]
        assert sorted([*first.source.keys(done), *again]) == ["a", "b", "c"]
        second.source.acknowledge(chunks, {})
        assert sorted(acknowledged()) == ["a", "b", "c"]

    def test_the_chunks_of_before_a_crash_are_acknowledged_by_key(
        self, planning: Any, send: Any, acknowledged: Any
    ) -> None:
        send(["a", "b"])
        first = planning()
        before = first.items(2)
        first.close()
        second = planning()
        second.source.acknowledge(before, {})  # not delivered again yet, or just now
        second.items(2)
        assert set(acknowledged()) <= {"a", "b"}
        second.source.acknowledge(before, {})
        assert acknowledged() == ["a", "b"]

    def test_a_message_that_comes_twice_is_one_item(self, planning: Any, send: Any, acknowledged: Any) -> None:
        send(["a"])
        planned = planning()
        [chunk] = planned.items(1)
        send(["a", "b"])
        [other] = planned.items(1)
        assert planned.source.keys(other) == ["b"]
        planned.source.acknowledge([chunk, other], {})
        assert sorted(acknowledged()) == ["a", "a", "b"]


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
