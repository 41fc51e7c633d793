"""Planning: chunk sizes follow the measured rate, and the planner never runs far ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tally.errors import StorageError
from tally.jobs import plan
from tally.jobs.plan import (
    FIRST_CHUNKS_PER_SLOT,
    GROWTH,
    MAX_BYTES,
    OPEN_CHUNKS_PER_SLOT,
    PATIENCE_SECONDS,
    ChunkSizer,
    Planner,
)
from tally.sources.base import Chunk, ChunkLimit, Source

DEADLINE = 60.0
TARGET_SECONDS = Source.chunk_seconds


def measured(batch_size: int, rate: float) -> ChunkSizer:
    """A sizer past its first chunks."""
    sizer = ChunkSizer(batch_size, 1)
    for _ in range(plan.FIRST_CHUNKS_PER_SLOT):
        assert sizer() == ChunkLimit(batch_size, MAX_BYTES)
    sizer.observe(round(rate), 1.0)
    return sizer


# Sizes -----------------------------------------------------------------------------------------------


def test_the_first_chunks_hold_one_batch() -> None:
    sizer = ChunkSizer(16, 3)
    sizer.observe(100_000, 1.0)
    first = [sizer() for _ in range(3 * plan.FIRST_CHUNKS_PER_SLOT)]
    assert first == [ChunkLimit(16, MAX_BYTES)] * len(first)
    assert sizer().items > 16


def test_chunks_grow_to_the_target() -> None:
    sizer = measured(16, 500)
    sizes = [sizer().items for _ in range(6)]
    assert sizes[0] == 16 * GROWTH
    assert sizes == sorted(sizes)
    assert max(b / a for a, b in zip([16, *sizes], sizes, strict=False)) <= GROWTH
    assert sizes[-1] == int(500 * TARGET_SECONDS) // 16 * 16
    assert all(size % 16 == 0 for size in sizes)


def test_chunks_have_bounds() -> None:
    slow, fast = measured(16, 1), measured(16, 10_000_000)
    assert [slow().items for _ in range(5)] == [16] * 5
    assert [fast().items for _ in range(9)][-1] == Source.chunk_items
    huge = measured(60_000, 10_000_000)
    assert huge().items == 60_000


def test_a_chunk_that_took_no_time() -> None:
    sizer = measured(4, 4)
    sizer.observe(4, 0.0)
    assert sizer().items == 4 * GROWTH


def test_the_rate_forgets() -> None:
    sizer = measured(1, 100)
    for _ in range(20):
        sizer()
        sizer.observe(10, 1.0)
    assert sizer().items == pytest.approx(10 * TARGET_SECONDS, abs=1)


def test_long_chunks_count_for_more_than_short_ones() -> None:
    sizer = ChunkSizer(1, 1)
    sizer.observe(1, 1.0)  # everything was cold
    sizer.observe(1000, 10.0)
    for _ in range(20):
        sizer()
    assert sizer().items == pytest.approx(2 * 1000.7 / 10.7, abs=1)
    assert sizer.seconds(100) == pytest.approx(1.07, abs=0.01)
    assert ChunkSizer(1, 1).seconds(1) == float("inf")


def test_few_chunks_are_cut_while_the_rate_cannot_be_trusted() -> None:
    sizer = ChunkSizer(1, 2)
    sizes: queue.SimpleQueue[int] = queue.SimpleQueue()

    def ask() -> None:
        for _ in range(100):
            sizes.put(sizer().items)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    first = plan.FIRST_CHUNKS_PER_SLOT * 2
    assert [sizes.get(timeout=DEADLINE) for _ in range(first)] == [1] * first
    sizer.observe(1, 0.1)  # 10 per second, for a tenth of a second: that is no rate
    ahead = OPEN_CHUNKS_PER_SLOT * 2 - first + 1
    assert [sizes.get(timeout=DEADLINE) for _ in range(ahead)] == [4, 16, 20][:ahead]
    assert sizes.empty()
    sizer.observe(400, 4.0)  # this is one
    rest = [sizes.get(timeout=DEADLINE) for _ in range(100 - first - ahead)]
    assert rest[-1] == pytest.approx(200, abs=10)
    thread.join(DEADLINE)


def test_it_waits_for_a_measurement() -> None:
    sizer = ChunkSizer(8, 1)
    sizes: queue.SimpleQueue[int] = queue.SimpleQueue()

    def ask() -> None:
        for _ in range(plan.FIRST_CHUNKS_PER_SLOT + 1):
            sizes.put(sizer().items)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    for _ in range(plan.FIRST_CHUNKS_PER_SLOT):
        assert sizes.get(timeout=DEADLINE) == 8
    assert sizes.empty()
    sizer.observe(1000, 1.0)
    assert sizes.get(timeout=DEADLINE) == 8 * GROWTH
    thread.join(DEADLINE)


@pytest.mark.parametrize("how", ["stopped", "out of patience"])
def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    sizer = ChunkSizer(8, 1)
    if how == "stopped":
        sizer.stop()
    else:
        monkeypatch.setattr(plan, "PATIENCE_SECONDS", 0.0)
    assert [sizer().items for _ in range(9)] == [8] * 9


# The planner -----------------------------------------------------------------------------------------


class Numbers:
    """Plans chunks of consecutive items; notes how many it was asked for."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.given = count, error, 0
        self.asked: tuple[str | None, int] | None = None
        self.prepared = 0

    def prepare(self) -> None:
        self.prepared += 1

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        self.asked = (after, first)
        for number in range(self.count):
            size = limit().items
            self.given += 1
            yield Chunk(first, size, {}, str(number))
            first += size
        if self.error is not None:
            raise self.error


class Run:
    """A planner, with what it delivered and how it ended."""

    def __init__(self, source: Any, **options: Any) -> None:
        self.chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        sizer = ChunkSizer(2, 1)
        sizer.observe(1, 1.0)
        self.ready = threading.Event()
        options = {"after": None, "first": 0, "planned": False, "prepared": self.ready.set, **options}
        self.planner = Planner(source, sizer=sizer, deliver=self.chunks.put, ended=self.ends.put, **options)
        self.planner.start()

    def take(self, count: int) -> list[Chunk]:
        return [self.chunks.get(timeout=DEADLINE) for _ in range(count)]


def test_all_chunks_are_delivered_in_order() -> None:
    source = Numbers(5)
    run = Run(source, after="here", first=10)
    assert run.ends.get(timeout=DEADLINE) is None
    run.planner.join(DEADLINE)
    assert source.asked == ("here", 10)
    assert [chunk.first for chunk in run.take(5)] == [10, 12, 14, 16, 18]
    assert run.chunks.empty()
    assert run.ends.empty()


def test_a_source_that_is_planned_is_only_made_ready() -> None:
    source = Numbers(5)
    run = Run(source, planned=True)
    assert run.ready.wait(DEADLINE)
    run.planner.join(DEADLINE)
    assert (source.prepared, source.asked) == (1, None)
    assert run.chunks.empty()
    assert run.ends.empty()


def test_a_source_that_cannot_be_made_ready_is_not_planned() -> None:
    source = Numbers(5)
    error = StorageError("no room")
    source.prepare = lambda: (_ for _ in ()).throw(error)  # type: ignore[method-assign]
    run = Run(source)
    assert run.ends.get(timeout=DEADLINE) is error
    assert not run.ready.is_set()
    assert source.asked is None


def test_an_error_ends_planning_after_what_was_found() -> None:
    error = StorageError("the bucket is gone")
    run = Run(Numbers(3, error))
    assert run.ends.get(timeout=DEADLINE) is error
    run.planner.join(DEADLINE)
    assert len(run.take(3)) == 3
    assert run.ends.empty()


def test_it_stays_only_so_far_ahead() -> None:
    source = Numbers(100)
    run = Run(source, ahead=3)
    run.take(3)
    assert run.chunks.empty()
    run.planner.taken(0)
    run.planner.taken(2)
    run.take(2)
    assert run.chunks.empty()
    assert source.given <= 6  # one more is made and waits
    run.planner.stop()
    run.planner.join(DEADLINE)
    assert not run.planner.is_alive()
    assert run.chunks.empty()
    assert run.ends.empty()


def test_it_can_be_stopped_while_it_waits_for_a_rate() -> None:
    sizer = ChunkSizer(2, 1)
    delivered: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    source: Any = Numbers(100)
    planner = Planner(
        source,
        after=None,
        first=0,
        planned=False,
        sizer=sizer,
        prepared=lambda: None,
        deliver=delivered.put,
        ended=ends.put,
    )
    planner.start()
    for _ in range(plan.FIRST_CHUNKS_PER_SLOT):
        delivered.get(timeout=DEADLINE)
    planner.stop()
    planner.join(DEADLINE)
    assert not planner.is_alive()
    assert delivered.empty()


def test_chunks_that_held_nothing_new_are_not_waited_for() -> None:
    """A resumed queue delivers again what is done: nobody measures that, and each chunk waited for half a minute."""
    sizer = ChunkSizer(8, 1)
    asked: list[ChunkLimit] = []
    for _ in range(FIRST_CHUNKS_PER_SLOT):
        sizer()
    thread = threading.Thread(target=lambda: asked.append(sizer()))
    thread.start()
    sizer.dropped(FIRST_CHUNKS_PER_SLOT)
    thread.join(PATIENCE_SECONDS / 2)
    assert [each.items for each in asked] == [8]
