"""What the store of schedules must do on every database. Inherit the class, override its fixture ``store``, and name
it ``Test...``. Leases run out because their row is changed, not because anybody waits.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from tally.database.clock import now
from tally.database.connect import connect
from tally.database.tables import schedule_runs
from tally.errors import JobStateError, OwnershipLostError, SpecError
from tally.triggers.cron import Cron, Interval
from tally.triggers.store import BACK_OFF, BEGINNINGS, PARALLEL, TRIES, Run, Schedule, ScheduleStore

BEGIN = 1_767_225_600
"""1 January 2026 in UTC."""
HOUR = 3600


def hours(first: int, count: int) -> list[Interval]:
    """So many hours, from the ``first`` on."""
    return [Interval(BEGIN + hour * HOUR, BEGIN + (hour + 1) * HOUR) for hour in range(first, first + count)]


def add(store: ScheduleStore, name: str = "hourly", **changes: Any) -> Schedule:
    """A schedule that has not ticked yet."""
    fields: dict[str, Any] = {
        "template": {"source": "in", "out": "out/{interval_start}"}, "file": "job.yaml", "overlap": "queue",
        "cron": Cron("0 * * * *", "Europe/Berlin"), "catch_up": "all", "since": BEGIN,
    }  # fmt: skip
    return store.add(name, **{**fields, **changes})


def plan(store: ScheduleStore, schedule: Schedule, intervals: list[Interval], kind: str = "due") -> bool:
    """These intervals have come to their end."""
    kinds: dict[str, list[Interval]] = {"due": [], kind: intervals}
    return store.plan(schedule, until=intervals[-1].end, **kinds)


def claim(store: ScheduleStore, **more: Any) -> Run:
    """The next run; there has to be one."""
    run = store.claim("hourly", **more)
    assert run is not None
    return run


def finish(store: ScheduleStore, run: Run) -> None:
    store.finish(run.id, token(run))


def token(run: Run) -> str:
    assert run.token is not None
    return run.token


def set_run(store: ScheduleStore, run: Run, **values: Any) -> None:
    """Change the run's row behind the store's back."""
    with store.engine.begin() as connection:
        connection.execute(sa.update(schedule_runs).where(schedule_runs.c.id == run.id).values(**values))


def expire(store: ScheduleStore, run: Run) -> None:
    """The run's lease has run out, by the database's clock."""
    set_run(store, run, lease_until=now() - 1, owner_host="elsewhere")


def states(store: ScheduleStore) -> list[str]:
    """Of all runs, in the order of their intervals."""
    return [run.state for run in reversed(store.runs("hourly"))]


def process_that_ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class ScheduleStoreContract:
    @pytest.fixture
    def store(self) -> ScheduleStore:
        """An empty store."""
        raise NotImplementedError

    # -- schedules ---------------------------------------------------------------------------------

    def test_a_schedule_is_kept_as_it_was_added(self, store: ScheduleStore) -> None:
        added = add(store)
        assert store.get("hourly") == added == store.all()[0]
        assert added.template == {"source": "in", "out": "out/{interval_start}"}
        assert (added.cron, added.timezone, added.planned_until, added.paused) == (
            "0 * * * *", "Europe/Berlin", BEGIN, False,
        )  # fmt: skip

    def test_without_a_beginning_it_begins_now(self, store: ScheduleStore) -> None:
        added = add(store, since=None)
        assert added.created_at == pytest.approx(added.planned_until, abs=1)
        assert abs(store.clock() - added.planned_until) < 60

    def test_a_name_is_given_once(self, store: ScheduleStore) -> None:
        added = add(store)
        with pytest.raises(SpecError, match="there is a schedule 'hourly' already"):
            add(store, overlap="skip")
        assert store.get("hourly") == added

    def test_a_replaced_schedule_keeps_its_runs_and_its_place(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 3))
        store.pause("hourly", True)
        changed = add(store, since=None, overlap="skip", replace=True)
        assert (changed.overlap, changed.planned_until, changed.paused) == ("skip", BEGIN + 3 * HOUR, True)
        assert states(store) == ["pending"] * 3

    def test_an_unknown_name_is_told_with_the_nearest(self, store: ScheduleStore) -> None:
        add(store)
        with pytest.raises(SpecError, match="no schedule 'hourlie'; did you mean 'hourly'"):
            store.get("hourlie")

    def test_removing_forgets_its_runs(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 3))
        store.remove("hourly")
        assert (store.all(), store.runs("hourly")) == ([], [])

    def test_a_schedule_at_work_is_not_removed(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 1))
        run = claim(store)
        store.assign(run.id, token(run), job_id="abc")
        with pytest.raises(JobStateError, match="is running its interval of 2026-01-01 01:00 CET") as refused:
            store.remove("hourly")
        assert "tally jobs cancel abc" in str(refused.value)
        expire(store, run)
        store.remove("hourly")
        with pytest.raises(OwnershipLostError):
            finish(store, run)

    # -- planning ----------------------------------------------------------------------------------

    def test_of_two_loops_one_plans(self, store: ScheduleStore) -> None:
        seen = add(store)
        assert plan(store, seen, hours(0, 3))
        assert not plan(store, seen, hours(0, 3))
        assert states(store) == ["pending"] * 3
        assert store.get("hourly").planned_until == BEGIN + 3 * HOUR

    def test_an_interval_that_has_a_run_gets_no_other(self, store: ScheduleStore) -> None:
        schedule = add(store)
        store.backfill("hourly", hours(0, 2))
        finish(store, claim(store))
        assert plan(store, schedule, hours(0, 3))
        assert states(store) == ["finished", "pending", "pending"]

    def test_another_cron_expression_makes_intervals_of_its_own(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 1))
        finish(store, claim(store))
        day = Interval(BEGIN, BEGIN + 24 * HOUR)
        changed = add(store, cron=Cron("0 1 * * *", "Europe/Berlin"), since=None, replace=True)
        assert plan(store, changed, [day])
        assert claim(store).interval == day
        assert [run.interval for run in store.backfill("hourly", [day])] == [day]

    def test_missed_and_late_intervals_are_told_apart(self, store: ScheduleStore) -> None:
        schedule = add(store, catch_up="latest")
        store.plan(schedule, until=BEGIN + 3 * HOUR, due=[], missed=hours(0, 2), late=hours(2, 1))
        runs = list(reversed(store.runs("hourly")))
        assert [(run.state, run.reason) for run in runs] == [("skipped", "cron")] * 2 + [("pending", "catch-up")]
        assert "catch-up is latest" in str(runs[0].error)

    def test_skip_passes_over_what_comes_while_another_is_at_work(self, store: ScheduleStore) -> None:
        plan(store, add(store, overlap="skip"), hours(0, 1))
        run = claim(store)
        plan(store, store.get("hourly"), hours(1, 1))
        finish(store, run)
        plan(store, store.get("hourly"), hours(2, 1))
        assert states(store) == ["finished", "skipped", "pending"]
        assert "2026-01-01 01:00 CET was not finished" in str(store.runs("hourly")[1].error)

    def test_a_backfill_makes_no_tick_be_skipped(self, store: ScheduleStore) -> None:
        schedule = add(store, overlap="skip")
        store.backfill("hourly", hours(0, 2))
        claim(store)
        plan(store, schedule, hours(2, 1))
        assert claim(store).interval == hours(2, 1)[0]

    def test_a_paused_schedule_plans_nothing(self, store: ScheduleStore) -> None:
        seen = add(store)
        store.pause("hourly", True)
        assert not plan(store, seen, hours(0, 1))
        assert store.pause("hourly", False).planned_until == BEGIN

    # -- claiming ----------------------------------------------------------------------------------

    def test_runs_are_claimed_in_order_one_after_another(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 3))
        for interval in hours(0, 3):
            run = claim(store)
            assert (run.interval, run.state, run.attempts) == (interval, "running", 1)
            assert store.claim("hourly") is None
            finish(store, run)
        assert store.claim("hourly") is None
        assert states(store) == ["finished"] * 3

    def test_parallel_runs_are_bounded(self, store: ScheduleStore) -> None:
        plan(store, add(store, overlap="parallel"), hours(0, PARALLEL + 2))
        claimed = [claim(store) for _ in range(PARALLEL)]
        assert [run.interval for run in claimed] == hours(0, PARALLEL)
        assert store.claim("hourly") is None
        finish(store, claimed[2])
        assert claim(store).interval == hours(PARALLEL, 1)[0]

    def test_each_run_is_claimed_by_one(self, store: ScheduleStore) -> None:
        plan(store, add(store, overlap="parallel"), hours(0, 40))
        url = store.engine.url.render_as_string(hide_password=False)

        def work(number: int) -> list[int]:
            other = ScheduleStore(connect(url))
            found = []
            try:
                while other.unsettled(["hourly"]):
                    if (run := other.claim("hourly")) is not None:
                        found.append(run.interval_start)
                        finish(other, run)
            finally:
                other.engine.dispose()
            return found

        with ThreadPoolExecutor(4) as pool:
            counted = Counter(start for found in pool.map(work, range(4)) for start in found)
        assert counted == Counter(each.start for each in hours(0, 40))

    def test_backfills_and_ticks_do_not_hold_each_other_up(self, store: ScheduleStore) -> None:
        schedule = add(store)
        store.backfill("hourly", hours(0, 2))
        plan(store, schedule, hours(2, 2))
        assert {claim(store).interval_start for _ in range(2)} == {hours(0, 1)[0].start, hours(2, 1)[0].start}
        assert store.claim("hourly") is None

    def test_nothing_of_a_paused_schedule_is_claimed_unless_asked_for(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 3))
        store.pause("hourly", True)
        assert store.claim("hourly") is None
        assert store.unsettled(["hourly"]) == 0
        asked = Interval(BEGIN + HOUR, BEGIN + 2 * HOUR)
        assert store.unsettled(["hourly"], within=asked) == 1
        assert claim(store, within=asked).interval == asked

    # -- tokens and leases -------------------------------------------------------------------------

    def test_a_run_whose_lease_ran_out_is_taken_over(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 2))
        first = claim(store)
        store.assign(first.id, token(first), job_id="job")
        expire(store, first)
        second = claim(store)
        assert (second.id, second.attempts, second.job_id) == (first.id, 2, "job")
        assert second.token != first.token

    def test_a_run_whose_process_is_gone_is_taken_over_at_once(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 1))
        first = claim(store)
        set_run(store, first, owner_pid=process_that_ended())
        assert claim(store).id == first.id

    def test_whoever_lost_a_run_changes_nothing(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 1))
        first = claim(store)
        expire(store, first)
        second = claim(store)
        before = store.run(first.id)
        for change in (
            lambda: store.begin(first.id, token(first)),
            lambda: store.renew(first.id, token(first)),
            lambda: store.assign(first.id, token(first), job_id="other"),
            lambda: store.finish(first.id, token(first)),
            lambda: store.fail(first.id, token(first), "no"),
            lambda: store.put_back(first.id, token(first), counted=False),
        ):
            with pytest.raises(OwnershipLostError):
                change()
        assert store.run(first.id) == before
        finish(store, second)
        with pytest.raises(OwnershipLostError):
            finish(store, second)

    def test_a_renewed_lease_holds(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 1))
        run = claim(store)
        expire(store, run)
        store.renew(run.id, token(run))
        assert store.claim("hourly") is None

    # -- how runs end ------------------------------------------------------------------------------

    def test_a_failed_run_is_tried_again_later_and_holds_up_those_behind_it(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 2))
        run = claim(store)
        for failures in range(1, TRIES):
            store.fail(run.id, token(run), "the disk is full")
            waiting = store.run(run.id)
            assert (waiting.state, waiting.failures, waiting.error) == ("pending", failures, "the disk is full")
            assert waiting.next_at is not None
            assert waiting.next_at - store.clock() == pytest.approx(BACK_OFF * 6 ** (failures - 1), abs=5)
            assert store.claim("hourly") is None
            set_run(store, run, next_at=now() - 1)
            run = claim(store)
        store.fail(run.id, token(run), "the disk is full")
        assert store.run(run.id).state == "failed"
        assert claim(store).interval == hours(1, 1)[0]

    def test_what_may_overlap_is_not_held_up_by_a_failed_run(self, store: ScheduleStore) -> None:
        plan(store, add(store, overlap="parallel"), hours(0, 2))
        run = claim(store)
        store.fail(run.id, token(run), "no")
        assert claim(store).interval == hours(1, 1)[0]

    def test_a_run_may_fail_for_good(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 1))
        run = claim(store)
        store.fail(run.id, token(run), "there is no \0 file", for_good=True)
        assert states(store) == ["failed"]
        assert store.retry("hourly") == 1
        again = claim(store)
        assert (again.attempts, again.failures, again.error, again.job_id) == (1, 0, None, None)

    def test_a_clean_stop_is_not_counted(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 1))
        for counted, attempts in ((False, 1), (True, 1), (True, 2)):
            run = claim(store)
            assert run.attempts == attempts
            store.put_back(run.id, token(run), counted=counted)

    def test_what_kills_its_process_each_time_fails_at_last(self, store: ScheduleStore) -> None:
        plan(store, add(store), hours(0, 2))
        run = claim(store)
        set_run(store, run, attempts=BEGINNINGS)
        expire(store, run)
        store.claim("hourly")
        assert store.run(run.id).state == "failed"
        assert f"begun {BEGINNINGS} times" in str(store.run(run.id).error)
        assert claim(store).interval == hours(1, 1)[0]

    # -- backfills ---------------------------------------------------------------------------------

    def test_a_backfill_runs_what_is_not_finished(self, store: ScheduleStore) -> None:
        plan(store, add(store, overlap="skip"), hours(0, 1))
        first = claim(store)
        plan(store, store.get("hourly"), hours(1, 1))  # skipped
        finish(store, first)
        plan(store, store.get("hourly"), hours(2, 1))
        third = claim(store)
        store.fail(third.id, token(third), "no", for_good=True)
        runs = store.backfill("hourly", hours(0, 4))
        assert [run.interval for run in runs] == hours(0, 4)
        assert states(store) == ["finished", "pending", "pending", "pending"]
        assert [run.reason for run in runs] == ["cron", "backfill", "backfill", "backfill"]
        assert store.backfill("hourly", hours(0, 4)) == runs

    def test_finished_intervals_are_done_again_only_if_asked(self, store: ScheduleStore) -> None:
        add(store)
        store.backfill("hourly", hours(0, 2))
        for _ in range(2):
            finish(store, claim(store))
        assert [run.state for run in store.backfill("hourly", hours(0, 2))] == ["finished"] * 2
        assert [(run.state, run.again) for run in store.backfill("hourly", hours(0, 2), again=True)] == [
            ("pending", True)
        ] * 2  # fmt: skip
        finish(store, claim(store))
        # The same command goes on, and does not begin from the start.
        assert [run.state for run in store.backfill("hourly", hours(0, 2), again=True)] == ["finished", "pending"]

    def test_counts_are_those_of_the_range(self, store: ScheduleStore) -> None:
        add(store)
        store.backfill("hourly", hours(0, 5))
        finish(store, claim(store))
        assert store.counts("hourly") == {"finished": 1, "pending": 4}
        assert store.counts("hourly", within=Interval(BEGIN, BEGIN + 2 * HOUR)) == {"finished": 1, "pending": 1}
