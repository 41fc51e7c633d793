"""The store of runs keeps its promises on every database: one process trains a run, and what it logged is there."""

from __future__ import annotations

import math

import pytest
import sqlalchemy as sa
from tests.contracts.conftest import lose

from tally.database.tables import runs, sweeps
from tally.errors import OwnershipLostError, RunNotFoundError, RunStateError, SpecError
from tally.training.runs.store import RunStore, Value
from tally.training.sweeps.store import SweepStore, best_of

ENVIRONMENT = {"packages": {"numpy": "2"}}


@pytest.fixture
def store(engine: sa.Engine) -> RunStore:
    return RunStore(engine)


def test_values_are_kept_by_name_and_step(store: RunStore) -> None:
    lease = store.create(
        name="a\0b", kind="script", folder="/f", parameters={"lr": float("inf"), "on": True, "n": None}
    )
    values = [Value("loss", step, 1 / (1 + step), 10.0 + step) for step in range(1200)]
    store.write(lease, [*values, Value("mAP@0.5:0.95", 0, math.nan, 1.0), Value("big", 2**40, math.inf, 2.0)])
    store.write(lease, [Value("loss", 3, 7.0, 99.0), Value("loss", 3, 8.0, 100.0)])  # the last one counts
    curves = store.values(lease.id)
    assert sorted(curves) == ["big", "loss", "mAP@0.5:0.95"]
    assert curves["loss"].steps == list(range(1200))
    assert (curves["loss"].values[3], curves["loss"].times[3], curves["loss"].values[4]) == (8.0, 100.0, 0.2)
    assert math.isnan(curves["mAP@0.5:0.95"].values[0])
    assert (curves["big"].steps, curves["big"].values) == ([2**40], [math.inf])
    thin = store.values(lease.id, ["big"], most=5) | {"loss": curves["loss"].thinned(5)}
    assert (thin["loss"].steps, thin["big"].steps) == ([0, 300, 600, 899, 1199], [2**40])
    record = store.get(lease.id[:6])
    assert (record.name, record.parameters, record.state) == ("a\\0b", {"lr": "inf", "on": True, "n": None}, "running")


def test_a_run_whose_process_died_is_interrupted_and_another_goes_on(store: RunStore) -> None:
    lease = store.create(name="one", kind="retrain", folder="/f")
    with pytest.raises(RunStateError, match="is running, by another process"):
        store.resume(lease.id)
    with pytest.raises(RunStateError, match="is being trained"):
        store.remove(store.get(lease.id))
    lose(store.engine, runs, lease.id)
    assert [each.state for each in store.list(state="interrupted").runs] == ["interrupted"]
    assert store.list(state="running").runs == []
    later = store.resume(lease.id)
    assert store.get(lease.id).state == "running"
    for change in (lambda: store.write(lease, [Value("x", 0, 1.0, 0.0)]), lambda: store.finish(lease, "finished")):
        with pytest.raises(OwnershipLostError, match=lease.id):
            change()
    assert store.values(lease.id) == {}
    store.finish(later, "failed", error="it broke")
    again = store.resume(lease.id)
    assert store.get(lease.id).error is None
    store.finish(again, "finished", cost={"seconds": 3.5})
    record = store.get(lease.id)
    assert (record.state, record.cost, record.alive, record.owner_host is not None) == (
        "finished", {"seconds": 3.5}, False, True,
    )  # fmt: skip
    with pytest.raises(RunStateError, match="is finished"):
        store.resume(lease.id)


def test_runs_are_listed_in_pages_and_deleted(store: RunStore) -> None:
    made = [
        store.create(
            name=f"Run {n}", kind="style" if n % 2 else "script", folder="/f", sweep="s", environment=ENVIRONMENT
        )
        for n in range(5)
    ]
    for lease in made:
        store.write(lease, [Value("x", 0, 1.0, 0.0)])
        store.finish(lease, "finished")
    pages, page = [], store.list(limit=2)
    pages += page.runs
    while page.next is not None:
        page = store.list(limit=2, after=page.next)
        pages += page.runs
    assert {each.id for each in pages} == {each.id for each in made}
    assert len(pages) == 5
    assert {each.name for each in store.list(kind="style").runs} == {"Run 1", "Run 3"}
    assert [each.name for each in store.list(text="rUN 4", sweep="s").runs] == ["Run 4"]
    assert (pages[0].environment, store.get(pages[0].id).environment) == ({}, {"packages": {"numpy": "2"}})
    store.remove(store.get(made[0].id))
    with pytest.raises(RunNotFoundError, match=made[0].id):
        store.values(made[0].id)
    with pytest.raises(SpecError, match="no metric 'y'"):
        store.values(made[1].id, ["y"])
    with pytest.raises(SpecError, match="--after"):
        store.list(after="x")


def test_one_process_drives_a_sweep(store: RunStore) -> None:
    kept = SweepStore(store.engine)
    lease = kept.create(name="night\0", kind="retrain", folder="/f", spec={"texts": ["lr=1..2"], "x": float("inf")})
    kept.begin_trial(lease, 0, "run0", {"lr": 0.5})
    kept.begin_trial(lease, 1, "run1", {"lr": 0.25, "on": True})
    kept.begin_trial(lease, 1, "run2", {"lr": 9})  # once more, in another run: the parameters stay
    kept.end_trial(lease, 0, "finished", value=1e-300, step=2**40)
    kept.end_trial(lease, 1, "failed", error="a\0b")
    first, second = kept.trials(lease.id)
    assert (first.state, first.value, first.step, first.attempts) == ("finished", 1e-300, 2**40, 1)
    assert (second.run_id, second.parameters, second.attempts) == ("run2", {"lr": 0.25, "on": True}, 2)
    with pytest.raises(RunStateError, match="is running, by another process"):
        kept.resume(lease.id)
    lose(store.engine, sweeps, lease.id)
    assert kept.get(lease.id[:6]).state == "interrupted"
    taken = kept.resume(lease.id)
    for change in (
        lambda: kept.renew(lease),
        lambda: kept.begin_trial(lease, 2, "run3", {}),
        lambda: kept.end_trial(lease, 0, "failed"),
        lambda: kept.finish(lease, "finished"),
    ):
        with pytest.raises(OwnershipLostError, match="was taken over"):
            change()
    kept.finish(taken, "finished", best=0, model="models:/m/1")
    [record], next_ = kept.list(limit=1)
    assert (record.state, record.best, record.model, record.alive, next_) == ("finished", 0, "models:/m/1", False, None)
    assert (record.counts, record.best_value) == ({"finished": 1, "failed": 1}, 1e-300)
    assert [each.state for each in kept.trials(lease.id)] == ["finished", "failed"]
    with pytest.raises(RunStateError, match="is finished"):
        kept.resume(lease.id)
    with pytest.raises(RunNotFoundError, match="no sweep 'no-such'"):
        kept.get("no-such")


def test_sweeps_are_listed_in_pages_and_deleted(store: RunStore) -> None:
    kept = SweepStore(store.engine)
    leases = [kept.create(name=None, kind="retrain", folder="/f", spec={"lowest": True}) for _ in range(3)]
    page = kept.list(limit=2)
    newest = sorted((kept.get(each.id) for each in leases), key=lambda each: (each.created_at, each.id), reverse=True)
    assert page.sweeps + kept.list(after=page.next).sweeps == newest
    mine, other = leases[:2]
    of_other = store.create(name="stays", kind="retrain", folder="/f", sweep=other.id)
    running = store.create(name="of a trial", kind="retrain", folder="/f", sweep=mine.id)
    kept.begin_trial(mine, 0, running.id, {})
    with pytest.raises(RunStateError, match="is running"):
        kept.remove(kept.get(mine.id))
    kept.end_trial(mine, 0, "finished", value=0.5, step=1)
    assert best_of(kept.get(mine.id), kept.trials(mine.id)) == kept.trials(mine.id)[0]
    kept.finish(mine, "finished")
    with pytest.raises(RunStateError, match="is being trained"):  # by somebody who has resumed it
        kept.remove(kept.get(mine.id))
    assert (kept.get(mine.id).state, kept.get(mine.id).alive) == ("finished", False)
    store.finish(running, "finished")
    kept.remove(kept.get(mine.id))
    with pytest.raises(RunNotFoundError):
        kept.get(mine.id)
    assert kept.trials(mine.id) == []
    assert [each.id for each in store.list().runs] == [of_other.id]
    assert len(kept.list().sweeps) == 2
