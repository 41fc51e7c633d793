"""What is decided about lost, slow and large chunks, and about too many dead items."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tally.errors import (
    ModelError,
    StorageError,
    TallyError,
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
    WorkerSpentError,
    WorkerTimeoutError,
)
from tally.jobs import policy
from tally.jobs.policy import (
    UNSETTLED_ATTEMPTS,
    DeadLimit,
    Decision,
    ItemIsDead,
    JobFails,
    LoadAgain,
    LoadingLosses,
    Part,
    RetryPolicy,
    RunAgain,
    Stragglers,
    is_too_large_a_share,
)

RETRY = RetryPolicy(attempts=3, batch_size=8)


def too_large(count: int, *, left: int = 1000, rate: float = 10) -> bool:
    return is_too_large_a_share(count, left=left, slots=2, batch_size=8, seconds=count / rate)


def test_near_the_end_large_chunks_are_shared_out() -> None:
    assert not too_large(96)
    assert too_large(96, left=100)
    assert not too_large(8, left=10), "a batch is not cut"
    assert not too_large(96, left=100, rate=500), "it is done in no time"


@pytest.mark.parametrize(("count", "cut"), [(64, 32), (20, 8), (9, 8), (8, 4), (5, 2), (2, 1)])
def test_halves_are_cut_between_batches_where_there_are_several(count: int, cut: int) -> None:
    assert RETRY.halves(count, 1) == [Part(0, cut, 1), Part(cut, count, 1)]


def after(count: int, losses: int, suspects: tuple[int, int] | None, *, certain: bool) -> list[tuple[int, int, int]]:
    """First position, items and losses of what is run again. losses: those that count with this one."""
    kind = WorkerTimeoutError if certain else WorkerCrashedError
    handed_out = 1 if suspects else UNSETTLED_ATTEMPTS + 1
    decision = RETRY.decide(count, kind("lost", suspects=suspects), losses=losses - 1, handed_out=handed_out)
    assert isinstance(decision, RunAgain)
    return [(part.start, part.stop - part.start, part.losses) for part in decision.parts]


def test_suspects_are_cut_out_and_alone_bear_the_loss() -> None:
    assert after(64, 1, (16, 24), certain=False) == [(0, 16, 0), (16, 8, 1), (24, 40, 0)]
    assert after(64, 1, (0, 8), certain=True) == [(0, 8, 1), (8, 56, 0)]


def test_a_loss_that_may_come_from_outside_is_tried_again_as_it_was() -> None:
    assert after(8, 1, (0, 8), certain=False) == [(0, 8, 1)]
    assert after(8, 2, None, certain=False) == [(0, 8, 2)]
    assert after(8, 3, None, certain=False) == [(0, 4, 2), (4, 4, 2)]


def test_a_certain_cause_is_halved_at_once_and_an_item_alone_has_another_chance() -> None:
    assert after(8, 1, (0, 8), certain=True) == [(0, 4, 2), (4, 4, 2)]
    assert after(2, 3, None, certain=False) == [(0, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize("suspects", [None, (0, 0)])
@pytest.mark.parametrize("kind", [WorkerCrashedError, WorkerTimeoutError, WorkerMemoryError])
@pytest.mark.parametrize("count", [1, 8])
def test_a_worker_that_had_not_begun_blames_no_item(
    kind: type[WorkerError], suspects: tuple[int, int] | None, count: int
) -> None:
    error = kind("killed", suspects=suspects)
    assert RETRY.decide(count, error, losses=2, handed_out=UNSETTLED_ATTEMPTS) == LoadAgain()


def test_an_item_is_to_blame_when_it_was_being_scored_or_never_comes_to_an_end() -> None:
    at_it = WorkerCrashedError("killed", suspects=(0, 1))
    assert RETRY.decide(1, at_it, losses=1, handed_out=1) == RunAgain([Part(0, 1, 2)])
    assert RETRY.decide(1, at_it, losses=2, handed_out=3) == ItemIsDead()
    unknown = WorkerCrashedError("killed")
    assert RETRY.decide(1, unknown, losses=2, handed_out=UNSETTLED_ATTEMPTS + 1) == ItemIsDead()
    for kind in (WorkerTimeoutError, WorkerMemoryError):
        assert RETRY.decide(1, kind("lost", suspects=(0, 1)), losses=0, handed_out=1) == ItemIsDead()


@pytest.mark.parametrize(
    ("error", "losses", "expected"),
    [
        (ModelError("damaged"), 0, JobFails()),
        (StorageError("full"), 0, JobFails()),
        (TallyError("unreadable"), 0, RunAgain([Part(0, 8, 1)])),
        (ZeroDivisionError(), 1, RunAgain([Part(0, 8, 2)])),
        (ZeroDivisionError(), 2, JobFails()),
    ],
)
def test_what_is_no_workers_fault_is_tried_again_unless_that_would_end_the_same(
    error: Exception, losses: int, expected: Decision
) -> None:
    assert RETRY.decide(8, error, losses=losses, handed_out=1) == expected


def test_losses_while_loading_are_counted_until_a_worker_loads() -> None:
    losses = LoadingLosses()
    assert losses.add(3)
    assert losses.add(3)
    losses.reset()
    assert [losses.add(3) for _ in range(3)] == [True, True, False]
    assert losses.count == 3


@dataclass
class Running:
    since: float
    doubled: bool = False


def test_stragglers_are_those_that_take_much_longer_than_usual() -> None:
    stragglers = Stragglers()
    slow, slower, second = Running(40.0), Running(10.0), Running(0.0, doubled=True)
    running = [slow, slower, second, Running(95.0)]
    assert stragglers.pick(running, idle=4, now=100.0) == [], "nothing is known of how long a chunk takes"
    for seconds in (1.0, 15.0, 100.0):
        stragglers.observe(seconds)
    assert stragglers.pick(running, idle=4, now=100.0) == [slower, slow]
    assert stragglers.pick(running, idle=1, now=100.0) == [slower]
    assert stragglers.pick(running, idle=0, now=100.0) == []
    assert stragglers.pick(running, idle=4, now=40.0 + policy.STRAGGLER_FACTOR * 15.0) == [slower]


@pytest.mark.parametrize(
    ("done", "dead", "strict", "reached"),
    [
        (999, 999, False, None),
        (1000, 500, False, None),
        (1000, 501, False, "share"),
        (1, 1, True, "strict"),
        (1000, 0, True, None),
    ],
)
def test_too_many_dead_items(done: int, dead: int, strict: bool, reached: str | None) -> None:
    assert DeadLimit(0.5, 1000, strict).reached(done, dead) == reached


@pytest.mark.parametrize("kind", [WorkerMemoryError, WorkerSpentError])
def test_what_earlier_items_left_behind_is_nobodys_fault(kind: type[WorkerError]) -> None:
    policy = RetryPolicy(3, 4)

    def decide(count: int, suspects: tuple[int, int], *, fresh: bool, handed_out: int = 1) -> Decision:
        return policy.decide(count, kind("full", suspects=suspects, fresh=fresh), losses=1, handed_out=handed_out)

    assert decide(1, (0, 1), fresh=False) == RunAgain([Part(0, 1, 1)])
    assert decide(4, (0, 4), fresh=False) == RunAgain([Part(0, 4, 1)])
    assert decide(12, (4, 8), fresh=False) == RunAgain([Part(0, 4, 0), Part(4, 8, 1), Part(8, 12, 0)])
    assert decide(1, (0, 1), fresh=True) == ItemIsDead()
    assert decide(4, (0, 4), fresh=True) == RunAgain([Part(0, 2, 2), Part(2, 4, 2)])
    assert decide(1, (0, 1), fresh=False, handed_out=11) == ItemIsDead()  # not for ever
