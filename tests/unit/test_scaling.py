"""How many workers there should be."""

from __future__ import annotations

from tally.jobs.scaling import IDLE_SECONDS, SHRINK_SECONDS, Scaler


def test_it_grows_at_once_up_to_the_most() -> None:
    scaler = Scaler(2, 8)
    assert scaler.target(0, slots=2, busy=2, open_chunks=7, running=True) == 4
    assert scaler.target(0, slots=4, busy=4, open_chunks=1000, running=True) == 8
    assert scaler.target(0, slots=8, busy=8, open_chunks=1000, running=True) is None


def test_it_shrinks_after_a_while_of_idleness() -> None:
    scaler = Scaler(2, 8)
    assert scaler.target(0, slots=8, busy=3, open_chunks=6, running=True) is None
    assert scaler.target(SHRINK_SECONDS / 2, slots=8, busy=3, open_chunks=6, running=True) is None
    assert scaler.target(SHRINK_SECONDS, slots=8, busy=3, open_chunks=6, running=True) == 3


def test_work_for_all_slots_begins_the_while_anew() -> None:
    scaler = Scaler(2, 8)
    scaler.target(0, slots=8, busy=3, open_chunks=6, running=True)
    assert scaler.target(5, slots=8, busy=8, open_chunks=6, running=True) is None, "all are busy"
    assert scaler.target(SHRINK_SECONDS, slots=8, busy=3, open_chunks=6, running=True) is None
    assert scaler.target(2 * SHRINK_SECONDS, slots=8, busy=3, open_chunks=2, running=True) == 2, "the least stay"


def test_none_are_kept_when_there_is_nothing_to_do_for_long() -> None:
    scaler = Scaler(2, 8)
    assert scaler.target(0, slots=4, busy=1, open_chunks=0, running=True) is None
    assert scaler.target(1, slots=4, busy=0, open_chunks=0, running=True) is None
    assert scaler.target(IDLE_SECONDS, slots=4, busy=0, open_chunks=0, running=True) is None
    assert scaler.target(1 + IDLE_SECONDS, slots=4, busy=0, open_chunks=0, running=True) == 0
    assert scaler.target(2 + IDLE_SECONDS, slots=0, busy=0, open_chunks=0, running=True) is None
    assert scaler.target(3 + IDLE_SECONDS, slots=0, busy=0, open_chunks=1, running=True) == 2


def test_a_paused_job_has_nothing_to_do() -> None:
    scaler = Scaler(1, 4)
    assert scaler.target(0, slots=4, busy=0, open_chunks=100, running=False) is None
    assert scaler.target(IDLE_SECONDS, slots=4, busy=0, open_chunks=100, running=False) == 0


def test_a_fixed_number_stays() -> None:
    scaler = Scaler(4, 4)
    assert scaler.target(0, slots=4, busy=0, open_chunks=0, running=True) is None
    assert scaler.target(10 * IDLE_SECONDS, slots=4, busy=0, open_chunks=1000, running=True) is None
