"""The coordinator's judgement, apart from its loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tally.errors import WorkerCrashedError, WorkerError, WorkerMemoryError, WorkerTimeoutError
from tally.jobs.coordinator import UNSETTLED_ATTEMPTS, Coordinator
from tally.jobs.plan import ChunkSizer
from tally.jobs.store import Done, Lost, StoredChunk
from tally.sources.base import Chunk


class Names:
    """A source of which only slices are wanted."""

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        return Chunk(chunk.first + start, stop - start, {})


def coordinator(*, rate: float = 10, **state: Any) -> Any:
    sizer = ChunkSizer(8, 2)
    sizer.observe(round(rate * 10), 10.0)
    given = {
        "_sizer": sizer,
        "_items": 1000,
        "_done": 0,
        "_planned": True,
        "_batch_size": 8,
        "_source": Names(),
        **state,
    }
    return SimpleNamespace(_engine=SimpleNamespace(slots=2), _spec=SimpleNamespace(attempts=3), **given)


def too_large(count: int, *, attempts: int = 1, losses: int = 0, **state: Any) -> bool:
    stored = StoredChunk(1, Chunk(0, count, {}), attempts, losses, "a")
    return Coordinator._is_too_large_a_share(coordinator(**state), stored)


def test_near_the_end_large_chunks_are_shared_out() -> None:
    assert not too_large(96)
    assert too_large(96, _done=900)
    assert not too_large(96, _done=900, _planned=False), "more may come"
    assert not too_large(8, _done=990), "a batch is not cut"
    assert not too_large(96, _done=900, attempts=2), "it has been begun as it is"
    assert not too_large(96, _done=900, losses=1)
    assert not too_large(96, _done=900, rate=500), "it is done in no time"


@pytest.mark.parametrize(("count", "cut"), [(64, 32), (20, 8), (9, 8), (8, 4), (5, 2), (2, 1)])
def test_halves_are_cut_between_batches_where_there_are_several(count: int, cut: int) -> None:
    first, second = Coordinator._halves(coordinator(), Chunk(100, count, {}))
    assert (first.first, first.count, second.first, second.count) == (100, cut, 100 + cut, count - cut)


def bisect(count: int, losses: int, suspects: tuple[int, int] | None, *, certain: bool) -> list[tuple[int, int, int]]:
    state = coordinator()
    state._halves = lambda chunk: Coordinator._halves(state, chunk)
    parts = Coordinator._bisect(state, Chunk(0, count, {}), losses, suspects, certain)
    return [(part.first, part.count, against) for part, against in parts]


def test_suspects_are_cut_out_and_alone_bear_the_loss() -> None:
    assert bisect(64, 1, (16, 24), certain=False) == [(0, 16, 0), (16, 8, 1), (24, 40, 0)]
    assert bisect(64, 1, (0, 8), certain=True) == [(0, 8, 1), (8, 56, 0)]


def test_a_loss_that_may_come_from_outside_is_tried_again_as_it_was() -> None:
    assert bisect(8, 1, (0, 8), certain=False) == [(0, 8, 1)]
    assert bisect(8, 2, None, certain=False) == [(0, 8, 2)]
    assert bisect(8, 3, None, certain=False) == [(0, 4, 2), (4, 4, 2)]


def test_a_certain_cause_is_halved_at_once_and_an_item_alone_has_another_chance() -> None:
    assert bisect(8, 1, (0, 8), certain=True) == [(0, 4, 2), (4, 4, 2)]
    assert bisect(2, 3, None, certain=False) == [(0, 1, 1), (1, 1, 1)]


def retried(error: WorkerError, *, attempts: int, losses: int = 0, count: int = 1) -> tuple[list[Done], list[int]]:
    """What is dead after such a loss, and the losses that count against what is run again."""
    state = coordinator()
    state._source = SimpleNamespace(keys=lambda chunk: ["item"], slice=Names().slice)
    state._halves = lambda chunk: Coordinator._halves(state, chunk)
    state._bisect = lambda *given: Coordinator._bisect(state, *given)
    done: list[Done] = []
    lost: list[Lost] = []
    stored = StoredChunk(1, Chunk(0, count, {}), attempts, losses, "a")
    Coordinator._retry(state, stored, "a", error, done, lost)
    return done, [against for each in lost for _, against in each.parts]


@pytest.mark.parametrize("suspects", [None, (0, 0)])
@pytest.mark.parametrize("kind", [WorkerCrashedError, WorkerTimeoutError, WorkerMemoryError])
def test_a_worker_that_had_not_begun_blames_no_item(kind: type[WorkerError], suspects: tuple[int, int] | None) -> None:
    error = kind("killed", suspects=suspects)
    assert retried(error, attempts=UNSETTLED_ATTEMPTS, losses=2) == ([], [2])
    assert retried(error, attempts=UNSETTLED_ATTEMPTS, losses=2, count=8) == ([], [2])


def test_an_item_is_to_blame_when_it_was_being_scored_or_never_comes_to_an_end() -> None:
    at_it = WorkerCrashedError("killed", suspects=(0, 1))
    assert retried(at_it, attempts=1, losses=1) == ([], [2])
    [dead], again = retried(at_it, attempts=3, losses=2)
    assert (dead.dead[0].key, again) == ("item", [])
    [dead], again = retried(WorkerCrashedError("killed"), attempts=UNSETTLED_ATTEMPTS + 1, losses=2)
    assert (dead.dead[0].key, again) == ("item", [])
