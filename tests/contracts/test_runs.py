"""The store of runs keeps its promises on every database: one process trains a run, and what it logged is there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

from tally.database.connect import connect
from tally.database.tables import metadata, runs, sweeps
from tally.errors import OwnershipLostError, RunNotFoundError, RunStateError, SpecError
from tally.training.runs.store import RunLease, RunStore, Value
from tally.training.sweeps.store import SweepStore

ENVIRONMENT = {"packages": {"numpy": "2"}}
NOBODY = 2**22 + 1
"""No process has this id."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunStore]:
    sqlite = f"sqlite:///{tmp_path / 'tally.db'}"
    engine = connect(sqlite if request.param == "sqlite" else request.getfixturevalue("postgres"))
    yield RunStore(engine)
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(sa.delete(table))
    engine.dispose()


def lose(store: RunStore, lease: RunLease) -> None:
    """As if the run's process had died."""
    with store.engine.begin() as connection:
        connection.execute(sa.update(runs).where(runs.c.id == lease.run_id).values(owner_pid=NOBODY))


def test_values_are_kept_by_name_and_step(store: RunStore) -> None:
    lease = store.create(
        name="a\0b", kind="script", folder="/f", parameters={"lr": float("inf"), "on": True, "n": None}
    )
    values = [Value("loss", step, 1 / (1 + step), 10.0 + step) for step in range(1200)]
    store.write(lease, [*values, Value("mAP@0.5:0.95", 0, math.nan, 1.0), Value("big", 2**40, math.inf, 2.0)])
    store.write(lease, [Value("loss", 3, 7.0, 99.0), Value("loss", 3, 8.0, 100.0)])  # the last one counts
    curves = store.values(lease.run_id)
    assert sorted(curves) == ["big", "loss", "mAP@0.5:0.95"]
    assert curves["loss"].steps == list(range(1200))
    assert (curves["loss"].values[3], curves["loss"].times[3], curves["loss"].values[4]) == (8.0, 100.0, 0.2)
    assert math.isnan(curves["mAP@0.5:0.95"].values[0])
    assert (curves["big"].steps, curves["big"].values) == ([2**40], [math.inf])
    thin = store.values(lease.run_id, ["big"], most=5) | {"loss": curves["loss"].thinned(5)}
    assert (thin["loss"].steps, thin["big"].steps) == ([0, 300, 600, 899, 1199], [2**40])
    record = store.get(lease.run_id[:6])
    assert (record.name, record.parameters, record.state) == ("a\\0b", {"lr": "inf", "on": True, "n": None}, "running")


def test_a_run_whose_process_died_is_interrupted_and_another_goes_on(store: RunStore) -> None:
    lease = store.create(name="one", kind="retrain", folder="/f")
    with pytest.raises(RunStateError, match="is running, by another process"):
        store.resume(lease.run_id)
    with pytest.raises(RunStateError, match="is being trained"):
        store.delete(lease.run_id)
    lose(store, lease)
    assert [each.state for each in store.list(state="interrupted").runs] == ["interrupted"]
    assert store.list(state="running").runs == []
    later = store.resume(lease.run_id)
    assert store.get(lease.run_id).state == "running"
    for change in (lambda: store.write(lease, [Value("x", 0, 1.0, 0.0)]), lambda: store.finish(lease, "finished")):
        with pytest.raises(OwnershipLostError, match=lease.run_id):
            change()
    assert store.values(lease.run_id) == {}
    store.finish(later, "failed", error="it broke")
    again = store.resume(lease.run_id)
    assert store.get(lease.run_id).error is None
    store.finish(again, "finished", cost={"seconds": 3.5})
    record = store.get(lease.run_id)
    assert (record.state, record.cost, record.alive, record.owner_host is not None) == (
        "finished", {"seconds": 3.5}, False, True,
    )  # fmt: skip
    with pytest.raises(RunStateError, match="is finished"):
        store.resume(lease.run_id)


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
    assert {each.id for each in pages} == {each.run_id for each in made}
    assert len(pages) == 5
    assert {each.name for each in store.list(kind="style").runs} == {"Run 1", "Run 3"}
    assert [each.name for each in store.list(text="rUN 4", sweep="s").runs] == ["Run 4"]
    assert (pages[0].environment, store.get(pages[0].id).environment) == ({}, {"packages": {"numpy": "2"}})
    store.delete(made[0].run_id)
    with pytest.raises(RunNotFoundError, match=made[0].run_id):
        store.values(made[0].run_id)
    with pytest.raises(SpecError, match="no metric 'y'"):
        store.values(made[1].run_id, ["y"])
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
    first, second = kept.trials(lease.sweep_id)
    assert (first.state, first.value, first.step, first.attempts) == ("finished", 1e-300, 2**40, 1)
    assert (second.run_id, second.parameters, second.attempts) == ("run2", {"lr": 0.25, "on": True}, 2)
    with pytest.raises(RunStateError, match="is running, by another process"):
        kept.resume(lease.sweep_id)
    with store.engine.begin() as connection:
        connection.execute(sa.update(sweeps).values(owner_pid=NOBODY))
    assert kept.get(lease.sweep_id[:6]).state == "interrupted"
    taken = kept.resume(lease.sweep_id)
    for change in (
        lambda: kept.renew(lease),
        lambda: kept.begin_trial(lease, 2, "run3", {}),
        lambda: kept.end_trial(lease, 0, "failed"),
        lambda: kept.finish(lease, "finished"),
    ):
        with pytest.raises(OwnershipLostError, match="was taken over"):
            change()
    kept.finish(taken, "finished", best=0, model="models:/m/1")
    [record], more = kept.list(1)
    assert (record.state, record.best, record.model, record.alive, more) == ("finished", 0, "models:/m/1", False, False)
    assert [each.state for each in kept.trials(lease.sweep_id)] == ["finished", "failed"]
    with pytest.raises(RunStateError, match="is finished"):
        kept.resume(lease.sweep_id)
    with pytest.raises(RunNotFoundError, match="no sweep 'no-such'"):
        kept.get("no-such")
