"""Trainings and clean-ups on a schedule: one run and one version for each interval, and what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.conftest import Ran
from tests.server import lengths, running

import tally
from tally.database.clock import now
from tally.database.tables import jobs as job_rows
from tally.database.tables import pipeline_runs as pipeline_rows
from tally.database.tables import runs as run_rows
from tally.database.tables import schedule_runs
from tally.jobs.facade import Jobs
from tally.models.registry import open_registry
from tally.pipelines.facade import Pipelines
from tally.pipelines.store import PipelineStore, RunState
from tally.training.promotion import Promotion
from tally.training.runs.store import RunStore
from tally.training.sweeps.store import SweepStore
from tally.triggers.cron import Interval
from tally.triggers.drive import drive
from tally.triggers.store import Run, ScheduleStore

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'tally-scoring[sklearn]'")

HOURS = 3
ANOMALY = {
    "train": "anomaly", "source": "readings.csv", "by": "device", "value": "value", "register": "pumps",
    "where": "ts >= '{interval_start}' and ts < '{interval_end}'", "workers": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Readings of three hours of a day, of two devices; one in the second hour."""
    lines = ["ts,device,value"]
    for hour in range(HOURS):
        for device in range(1 if hour == 1 else 2):
            lines += [f"2026-01-01T0{hour}:{minute:02}:00Z,{device},{minute % (7 + hour)}" for minute in range(60)]
    (tmp_path / "readings.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def add(folder: Path, cli: Callable[..., Ran]) -> Callable[..., ScheduleStore]:
    """Adds a schedule of this name with these fields."""

    def add(name: str, fields: dict[str, Any], *more: str) -> ScheduleStore:
        (folder / f"{name}.yaml").write_text(json.dumps(fields))
        ran = cli("schedule", "add", name, folder / f"{name}.yaml", "--cron", "0 * * * *", *more)
        assert ran.code == 0, ran.err
        return ScheduleStore(Jobs().store.engine)

    return add


def backfill(store: ScheduleStore, name: str, hours: int = 1, *, first: int = 0) -> list[Run]:
    """Runs these hours of the first of January one after another, in this process; returns their runs."""
    begin = datetime(2026, 1, 1, first, tzinfo=UTC).timestamp()
    intervals = store.get(name).clock().starting(begin, begin + hours * 3600)
    store.backfill(name, intervals)
    for _ in intervals:
        _drive(store, name)
    return list(reversed(store.runs(name)))[-hours:]


def _drive(store: ScheduleStore, name: str) -> Run:
    run = store.claim(name, within=Interval(0, 2**33))
    assert run is not None
    assert run.token is not None
    return drive(Jobs(), run.id, run.token)


def test_each_interval_has_a_run_and_a_version_and_the_gate_decides(
    folder: Path, add: Callable[..., ScheduleStore], cli: Callable[..., Ran]
) -> None:
    store = add("train", {**ANOMALY, "gate": "keys >= champion"})
    done = backfill(store, "train", HOURS + 1)
    assert [each.state for each in done] == ["finished", "finished", "finished", "empty"]
    assert done[3].error == (
        "there are no rows to train with for which ts >= '2026-01-01T03:00:00+00:00' and "
        "ts < '2026-01-01T04:00:00+00:00' holds"
    )
    assert [each.outcome for each in done[:3]] == [
        "models:/pumps/1 is champion: keys is 2, and there is no champion yet",
        "models:/pumps/2 does not become champion: keys is 1, and not >= 2, from 2 of models:/pumps/1",
        "models:/pumps/3 is champion: keys is 2, and >= 2, from 2 of models:/pumps/1",
    ]
    versions = open_registry().show("pumps").versions
    assert [each.aliases for each in versions] == [(), (), ("champion",)]
    records = [RunStore.open().get(each.training_id or "") for each in done[:3]]
    assert [list(each.models) for each in records] == [[str(each)] for each in versions]
    assert records[1].tags["gate"] == done[1].outcome
    assert records[0].tags["interval"] == "2026-01-01 00:00 UTC to 01:00 UTC"
    assert records[0].command[:3] == ["tally", "train", "anomaly"]

    shown = cli("schedule", "show", "train").out
    assert f"run {done[1].training_id}  models:/pumps/2 does not become champion: keys is 1, and not >= 2" in shown
    assert "train        anomaly" in shown
    assert "train  train anomaly  0 * * * *" in cli("schedule", "list").out
    # Scored with the champion, as any other schedule's job.
    job = {"source": "readings.csv", "model": "models:/pumps@champion", "out": "out/{interval_start_utc:%Y%m%d%H}",
           "where": ANOMALY["where"], "workers": 1}  # fmt: skip
    (scored,) = backfill(add("score", job), "score")
    assert Jobs().get(scored.job_id or "").done == 120


def test_an_interval_that_is_done_again_takes_no_alias_from_a_later_one(add: Callable[..., ScheduleStore]) -> None:
    store = add("train", {**ANOMALY, "alias": "in-use"})
    backfill(store, "train", 2)

    def again(hour: int) -> str | None:
        begin = datetime(2026, 1, 1, hour, tzinfo=UTC).timestamp()
        store.backfill("train", store.get("train").clock().starting(begin, begin + 3600), again=True)
        return _drive(store, "train").outcome

    assert again(0) == (
        "models:/pumps/1 does not become in-use: a later interval, 2026-01-01 01:00 UTC to 02:00 UTC, has set it to "
        "models:/pumps/2"
    )
    assert open_registry().get("models:/pumps@in-use").version == 2
    open_registry().alias("pumps", "in-use", 1)  # by a person: no interval's any more
    assert again(1) == "models:/pumps/2 is in-use"


def test_what_was_lost_late_changes_nothing_when_it_is_repeated(
    add: Callable[..., ScheduleStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = add("train", {**ANOMALY, "gate": "keys >= 2"})
    with monkeypatch.context() as patch:  # lost after it was registered, before the gate
        patch.setattr(Promotion, "decide", lambda *given: os.fspath(None))  # type: ignore[arg-type]
        (lost,) = backfill(store, "train")
    assert (lost.state, lost.failures, RunStore.open().get(lost.training_id or "").state) == ("pending", 1, "failed")
    with store.engine.begin() as connection:
        connection.execute(sa.update(schedule_runs).values(next_at=None))
    done = _drive(store, "train")
    assert (done.state, done.training_id) == ("finished", lost.training_id)
    with store.engine.begin() as connection:  # lost after the run had ended
        connection.execute(
            sa.update(schedule_runs).values(state="running", owner="lost", owner_host="gone", lease_until=now() - 1)
        )
    again = _drive(store, "train")
    assert (again.state, again.training_id, again.outcome) == ("finished", lost.training_id, done.outcome)
    assert len(RunStore.open().list().runs) == len(open_registry().show("pumps").versions) == 1
    assert [each.who for each in open_registry().show("pumps").history] == [f"run {lost.training_id}"]


def test_a_script_that_is_begun_again_leaves_what_it_registered_last(
    folder: Path, add: Callable[..., ScheduleStore], cli: Callable[..., Ran]
) -> None:
    (folder / "train.py").write_text(
        "import pathlib, sys, tally\n"
        "with tally.training.run() as run:\n"
        "    run.log('accuracy', 0.9)\n"
        "    (run.folder / 'weights.txt').write_text(run.id)\n"
        "    run.register(run.folder / 'weights.txt', 'weights', as_files=True)\n"
        f"    first = pathlib.Path({str(folder / 'first')!r})\n"
        "    if not first.exists():\n"
        "        first.touch()\n"
        "        sys.exit('the disk is full')\n"
    )
    store = add("train", {"train": "script", "script": "train.py", "register": "weights", "gate": "accuracy > 0.5"})
    (failed,) = backfill(store, "train")
    assert (failed.state, failed.failures) == ("pending", 1)
    assert "the disk is full" in str(failed.error)
    assert len(open_registry().show("weights").versions) == 1
    with store.engine.begin() as connection:
        connection.execute(sa.update(schedule_runs).values(next_at=None))
    done = _drive(store, "train")
    (version,) = open_registry().show("weights").versions
    assert (done.state, done.outcome) == ("finished", f"{version} is champion: accuracy is 0.9, and > 0.5")
    assert version.metadata["run"] == done.training_id != failed.training_id
    # A script that registers nothing of this name has failed.
    (folder / "other.py").write_text("print('nothing')")
    ran = cli("train", "script", folder / "other.py", "--register", "weights")
    assert ran.code == 1
    assert "the script registered no model 'weights'" in ran.err


def test_a_sweep_is_scheduled(folder: Path, add: Callable[..., ScheduleStore]) -> None:
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'tally-scoring[sweep]'")
    (folder / "train.py").write_text(
        "import sys, tally\n"
        "with tally.training.run() as run:\n"
        "    run.log('loss', float(sys.argv[2]))\n"
        "    (run.folder / 'weights.txt').write_text(sys.argv[2])\n"
        "    run.register(run.folder / 'weights.txt', 'tried', as_files=True)\n"
    )
    fields = {
        "sweep": "script", "script": "train.py", "param": {"lr": [0.25, 0.5]}, "sampler": "grid", "metric": "loss",
        "lowest": True, "register": "best", "gate": "loss < 0.3", "parallel": 1,
    }  # fmt: skip
    (done,) = backfill(add("night", fields), "night")
    assert (done.state, done.outcome) == ("finished", "models:/best/1 is champion: loss is 0.25, and < 0.3")
    record = SweepStore.open().get(done.sweep_id or "")
    assert (record.state, record.model) == ("finished", "models:/best/1")


def test_what_ended_long_ago_is_cleaned_up(folder: Path, add: Callable[..., ScheduleStore]) -> None:
    (folder / "scorer.py").write_text(lengths())
    for out in ("out/a", "out/b", "out-of-the-way"):
        tally.score(folder / "readings.csv", folder / "scorer.py", folder / out, media="image", workers=1, quiet=True)
    for name in ("night", "day", "night"):
        with tally.training.run(name):
            pass
    pipelines = Pipelines(PipelineStore(Jobs().store.engine))
    states: tuple[RunState, ...] = ("succeeded", "error", "waiting")
    for state in states:
        lease = pipelines.store.create(name=f"night-{state}", folder="/f", spec={"options": {}}, parameters={})
        pipelines.store.finish(lease, state)
    night = datetime(2026, 1, 1, 4, tzinfo=UTC).timestamp()
    store = ScheduleStore(Jobs().store.engine)
    with store.engine.begin() as connection:
        for table in (job_rows, run_rows, pipeline_rows):
            connection.execute(sa.update(table).values(finished_at=night))
    fields = {"clean": "jobs, runs", "older_than": "2h", "out": "out", "results": True, "keep": 1, "name": "night"}
    (early,) = backfill(add("early", fields), "early", first=4)
    assert early.outcome == "forgot 0 jobs, 0 runs"  # its interval ended an hour after them
    (dry,) = backfill(add("dry", {**fields, "dry_run": True}), "dry", first=6)
    assert dry.outcome == "would forget 1 job, 1 run"
    (done,) = backfill(add("clean", fields), "clean", first=6)
    assert done.outcome == "forgot 1 job, 1 run"
    assert sorted(Path(each.spec["out"]).name for each in Jobs().store.newest()) == ["b", "out-of-the-way"]
    assert [each.name for each in (folder / "out").iterdir()] == ["b"]
    assert (folder / "out-of-the-way" / "_SUCCESS").exists()
    assert sorted(each.name for each in RunStore.open().list().runs) == ["day", "night"]
    (last,) = backfill(add("last", {"clean": "pipelines", "older_than": "2h", "name": "night-"}), "last", first=6)
    assert last.outcome == "forgot 2 pipelines"
    assert [each.name for each in pipelines.store.list().runs] == ["night-waiting"]


def test_what_is_wrong_with_a_file_is_told_when_it_is_added(folder: Path, cli: Callable[..., Ran]) -> None:
    def refused(**fields: Any) -> str:
        (folder / "wrong.yaml").write_text(json.dumps(fields))
        ran = cli("schedule", "add", "wrong", folder / "wrong.yaml", "--cron", "0 * * * *")
        assert ran.code in (1, 2)
        assert not ScheduleStore(Jobs().store.engine).all()
        return ran.err

    told = refused(**{**ANOMALY, "where": "{interval_strt}", "nu": 2, "gate": "kyes > 1"})
    for problem in ("no placeholder 'interval_strt'", "nu: more than 0", "'kyes' is not measured"):
        assert problem in told
    told = refused(**{**ANOMALY, "gate": "keys >= champoin"})
    assert "model 'pumps' has no alias 'champoin'; did you mean 'champion'" in told
    assert "clean: should be jobs, runs, sweeps or pipelines" in refused(clean="job", older_than="soon")
    assert "older_than: should be a duration" in refused(clean="job", older_than="soon")
    assert "name: is about runs and sweeps and pipelines, and clean is jobs" in refused(
        clean="jobs", older_than="1d", name="x"
    )
    assert "train, clean: a schedule does one of them" in refused(train="anomaly", clean="jobs")
    assert "there is no script" in refused(train="script", script="nowhere.py")
    assert "no model 'nowhere'" in refused(train="retrain", image_dir=".", backbone="models:/nowhere", register="x")


def test_a_server_takes_them_from_those_who_may(folder: Path) -> None:
    fields = {**ANOMALY, "source": str(folder / "readings.csv")}
    wanted = {"name": "train", "cron": "0 * * * *", "job": fields}
    with running("--root", folder, "--no-schedules") as server, server.client() as admin:
        text = admin.post("/keys", json={"name": "ben", "role": "operator"}).json()["text"]
        with server.client(text) as operator:
            outside = {**wanted, "job": {**fields, "source": "/etc/passwd"}}
            assert "not under a folder" in operator.post("/schedules", json=outside).text
            assert "nu: more than 0" in operator.post("/schedules", json={**wanted, "job": {**fields, "nu": 3}}).text
            added = operator.post("/schedules", json=wanted)
            assert (added.status_code, added.json()["template"]["train"]) == (201, "anomaly")
            clean = {"name": "clean", "cron": "40 * * * *", "job": {"clean": "jobs", "older_than": "1d"}}
            assert operator.post("/schedules", json=clean).status_code == 403
        assert admin.post("/schedules", json=clean).status_code == 201
