"""Schedules: ticks on clocks that are set, job files with intervals in them, and the loop that runs what is due."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from cronsim import CronSim
from tests.conftest import Ran
from tests.waiting import wait_for

from tally.database.clock import now
from tally.database.tables import schedule_runs
from tally.errors import SpecError
from tally.jobs.facade import Jobs
from tally.jobs.spec import JobSpec
from tally.jobs.store import JobStore
from tally.triggers import template
from tally.triggers.cron import Cron, Interval, zone
from tally.triggers.drive import drive
from tally.triggers.loop import Loop
from tally.triggers.store import Run, ScheduleStore

BERLIN = "Europe/Berlin"
FORWARD, BACK = "2026-03-29", "2026-10-25"
"""When clocks are set in Berlin: 02:00 becomes 03:00, and 03:00 becomes 02:00."""
DAY = 86_400
SCORERS = Path(__file__).parents[1] / "faults" / "scorers"


def filled(fields: dict[str, Any], interval: Interval, cron: Cron) -> JobSpec:
    """The job for this interval."""
    job = template.fill(fields, interval, cron).job
    assert job is not None
    return job


def local(cron: Cron, moments: list[int]) -> list[str]:
    return [f"{cron.local(moment):%d %H:%M %Z}" for moment in moments]


def ticks_on(expression: str, day: str, *, days: int = 1) -> list[str]:
    """The ticks of a day in Berlin, as its clock shows them."""
    cron = Cron(expression, BERLIN)
    begin = cron.local(cron.moment(day, "day"))
    end = begin.replace(day=begin.day + days)
    return local(cron, cron.ticks(begin.timestamp(), end.timestamp()))


# -- ticks ---------------------------------------------------------------------------------------------


def test_hourly_ticks_are_an_hour_apart_when_the_clock_is_set() -> None:
    cron = Cron("0 * * * *", BERLIN)
    forward, back = ticks_on(cron.expression, FORWARD), ticks_on(cron.expression, BACK)
    assert (len(forward), len(back)) == (23, 25)
    assert forward[:4] == ["29 00:00 CET", "29 01:00 CET", "29 03:00 CEST", "29 04:00 CEST"]
    assert back[1:5] == ["25 01:00 CEST", "25 02:00 CEST", "25 02:00 CET", "25 03:00 CET"]
    for day in (FORWARD, BACK):
        begin = cron.moment(day, "day")
        assert {each.end - each.start for each in cron.starting(begin, begin + DAY)} == {3600}


def test_a_nightly_time_that_is_skipped_ticks_after_the_gap() -> None:
    cron = Cron("30 2 * * *", BERLIN)
    begin = cron.moment("2026-03-28", "day")
    intervals = cron.starting(begin, begin + 3 * DAY)
    assert local(cron, [each.start for each in intervals]) == ["28 02:30 CET", "29 03:00 CEST", "30 02:30 CEST"]
    assert [(each.end - each.start) / 3600 for each in intervals] == [23.5, 23.5, 24]


def test_a_nightly_time_that_comes_twice_ticks_the_first_time() -> None:
    cron = Cron("30 2 * * *", BERLIN)
    begin = cron.moment("2026-10-24", "day")
    intervals = cron.starting(begin, begin + 3 * DAY)
    assert local(cron, [each.start for each in intervals]) == ["24 02:30 CEST", "25 02:30 CEST", "26 02:30 CET"]
    assert [(each.end - each.start) / 3600 for each in intervals] == [24, 25, 24]
    # Asked for in the hour that comes again, it is over and not to come.
    again = cron.moment("2026-10-25T02:10+01:00", "time")
    assert local(cron, [cron.before(again), cron.after(again)]) == ["25 02:30 CEST", "26 02:30 CET"]


def test_every_quarter_of_an_hour_goes_on_evenly() -> None:
    forward, back = ticks_on("*/15 * * * *", FORWARD), ticks_on("*/15 * * * *", BACK)
    assert (len(forward), len(back)) == (92, 100)
    assert forward[7:9] == ["29 01:45 CET", "29 03:00 CEST"]
    assert back[11:13] == ["25 02:45 CEST", "25 02:00 CET"]


def test_hours_that_are_listed_tick_once_each_and_hours_of_a_star_as_the_clock_shows_them() -> None:
    assert ticks_on("0 1-4 * * *", FORWARD) == ["29 01:00 CET", "29 03:00 CEST", "29 04:00 CEST"]
    assert ticks_on("0 1-4 * * *", BACK) == ["25 01:00 CEST", "25 02:00 CEST", "25 03:00 CET", "25 04:00 CET"]
    assert ticks_on("0 */2 * * *", FORWARD)[:2] == ["29 00:00 CET", "29 04:00 CEST"]
    assert ticks_on("0 */2 * * *", BACK)[:4] == ["25 00:00 CEST", "25 02:00 CEST", "25 02:00 CET", "25 04:00 CET"]


@pytest.mark.parametrize("timezone", [BERLIN, "America/Havana", "Australia/Lord_Howe", "Asia/Kolkata", "UTC"])
@pytest.mark.parametrize("expression", ["0 * * * *", "30 2 * * *", "*/15 * * * *", "0,30 0-4 * * *", "0 */2 * * SUN"])
def test_intervals_tile_time_however_they_are_asked_for(expression: str, timezone: str) -> None:
    cron = Cron(expression, timezone)
    for month in (3, 4, 9, 11):
        begin = int(datetime(2026, month, 1, tzinfo=UTC).timestamp())
        end = begin + 35 * DAY
        whole = cron.starting(begin, end)
        assert all(one.end == other.start and one.start < one.end for one, other in pairwise(whole))
        cuts = [begin, begin + 1, begin + 7 * DAY + 5000, whole[len(whole) // 2].start, end - 1, end]
        assert [each for one, other in pairwise(cuts) for each in cron.starting(one, other)] == whole
        assert [each for one, other in pairwise(cuts) for each in cron.ending(one, other)] == cron.ending(begin, end)
        for each in whole[:: len(whole) // 7 or 1]:
            assert (cron.after(each.start), cron.before(each.end)) == (each.end, each.start)
            assert cron.after(each.start + 0.5) == each.end


@pytest.mark.parametrize("expression", ["0 * * * *", "30 2 * * *", "*/7 3 * * *", "0 0 29 2 *", "0 6 * * MON-FRI"])
def test_ticks_are_those_of_cron(expression: str) -> None:
    berlin = ZoneInfo(BERLIN)
    begin, end = (datetime(2026, month, 20, tzinfo=UTC).timestamp() for month in (3, 4))
    expected = set()
    for tick in CronSim(expression, datetime.fromtimestamp(begin - DAY, berlin)):
        if tick.timestamp() >= end:
            break
        expected.add(int(tick.timestamp()))
    assert Cron(expression, BERLIN).ticks(begin, end) == sorted(each for each in expected if each >= begin)


def test_rare_ticks_are_found() -> None:
    cron = Cron("0 0 29 2 *", "UTC")
    assert cron.text(cron.after(cron.moment("2026-01-01", "day"))) == "2028-02-29 00:00 UTC"
    assert cron.text(cron.before(cron.moment("2026-01-01", "day"))) == "2024-02-29 00:00 UTC"


def test_times_are_on_the_zones_clock() -> None:
    cron = Cron("0 * * * *", BERLIN)
    for text, utc in (
        ("2026-01-01", "2025-12-31T23:00"),
        ("2026-07-01T06:30", "2026-07-01T04:30"),
        ("2026-07-01T06:30Z", "2026-07-01T06:30"),
        ("2026-03-29T02:30", "2026-03-29T01:00"),  # skipped
        ("2026-10-25T02:30", "2026-10-25T00:30"),  # the first of two
    ):
        assert datetime.fromtimestamp(cron.moment(text, "--from"), UTC).isoformat()[:16] == utc
    with pytest.raises(SpecError, match=r"--from: 'yesterday' is neither a date nor a time"):
        cron.moment("yesterday", "--from")


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "it has 0 fields"),
        ("* * * * * *", "it has 6 fields"),
        ("61 * * * *", "bad minute"),
        ("0 0 30 2 *", "bad day-of-month"),
        ("@daily", "it has 1 fields"),
    ],
)
def test_what_is_no_cron_expression_is_refused(expression: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as refused:
        Cron(expression, BERLIN)
    assert repr(expression) in str(refused.value)


@pytest.mark.parametrize("name", ["", "Europe", "../../etc/passwd", "Mars/Base", "/etc/localtime", "a\0b"])
def test_what_is_no_zone_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"there is no time zone {name!r}")):
        zone(name)


def test_a_mistyped_zone_and_a_wrong_expression_are_told_together() -> None:
    with pytest.raises(SpecError, match=r"did you mean 'Europe/Berlin'\?\n- cron: '0 25 \* \* \*'"):
        Cron("0 25 * * *", "Europe/Berln")


# -- job files -----------------------------------------------------------------------------------------


def fields(**more: object) -> dict[str, object]:
    return {"source": "/in", "model": "/m.onnx", "out": "/out/{interval_start}", **more}


def problems(cron: str = "0 * * * *", timezone: str = BERLIN, **more: object) -> list[str]:
    clock = Cron(cron, timezone)
    return template.check(fields(**more), clock, clock.moment("2026-01-01", "now"))


def test_an_interval_is_filled_in_and_other_braces_stay() -> None:
    cron = Cron("0 * * * *", BERLIN)
    begin = cron.moment("2026-06-01T08:00", "begin")
    spec = filled(
        fields(
            source=["/in/{interval_start:%Y/%m/%d/%H}", "/more/{interval_end_utc:%H%M}"],
            model="/models/{Device}.skops",
            by="Device",
            where="ts >= '{interval_start}' and ts < '{interval_end_utc}'",
            settings={"nested": {"at": ["{interval_end:%s}", 7]}},
        ),
        Interval(begin, begin + 3600),
        cron,
    )
    assert spec.source == ("/in/2026/06/01/08", "/more/0700")
    assert spec.model == "/models/{Device}.skops"
    assert spec.out == "/out/2026-06-01T08:00:00+02:00"
    assert spec.where == "ts >= '2026-06-01T08:00:00+02:00' and ts < '2026-06-01T07:00:00+00:00'"
    assert spec.settings == {"nested": {"at": [str(begin + 3600), 7]}}


def test_a_job_file_is_read_with_places_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text(
        "source: in/{interval_start:%H}\nmodel: 'm/{Device}.skops'\nby: Device\nout: o\n"
    )
    monkeypatch.chdir("/")
    read = template.read(str(tmp_path / "job.yaml"))
    assert read["source"] == [f"{tmp_path}/in/{{interval_start:%H}}"]
    assert (read["model"], read["out"]) == (f"{tmp_path}/m/{{Device}}.skops", f"{tmp_path}/o")
    assert "workers" not in read


def test_a_brace_without_quotes_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("source: in\nmodel: m\nout: {interval_start}\n")
    with pytest.raises(SpecError, match="needs quotes"):
        template.read(str(tmp_path / "job.yaml"))


def test_an_output_without_an_interval_is_refused() -> None:
    (problem,) = problems(out="/out")
    assert problem.startswith("out: names no interval (/out): each run would write where the one before it did")


def test_a_mistyped_placeholder_is_refused() -> None:
    assert problems(where="{interval_strat} < {Device}") == [
        "where: there is no placeholder 'interval_strat'; did you mean 'interval_start'?"
    ]


def test_problems_of_the_job_are_told() -> None:
    found = problems(batch_size=0, device="{interval_start}")
    assert [problem.partition(":")[0] for problem in found] == ["batch_size", "device"]


def test_alerts_and_a_webhook_belong_together() -> None:
    webhook = "env:ALERT_URL"  # known where runs are started: here it may be not set
    assert problems(alerts=["failed"], webhook=webhook) == []
    assert problems(alerts=["failed"]) == [
        "alerts: there is no webhook to send them to; add webhook: https://..., or webhook: env:NAME"
    ]
    assert problems(webhook=webhook) == [
        "webhook: there is no alert to send to it; add a rule, such as alerts: [failed]"
    ]


@pytest.mark.parametrize(
    ("out", "cron", "why"),
    [
        ("{interval_start:%Y%m%d}", "0 * * * *", "the format has to tell them apart"),
        ("{interval_start:%H}", "0 * * * *", "the format has to tell them apart"),
        ("{interval_start:%d}", "0 3 * * *", "the format has to tell them apart"),
        ("{interval_start:%m-%d}", "0 3 * * *", "the format has to tell them apart"),
        ("{interval_start:%Y%m%d-%I%M}", "*/5 * * * *", "the format has to tell them apart"),
        ("{interval_start:%Y%m%d%H}", "0 * * * *", "when the clock is set back"),
    ],
)
def test_outputs_that_meet_are_refused(out: str, cron: str, why: str) -> None:
    (problem,) = problems(cron, out=f"/out/{out}")
    assert problem.startswith("out: two intervals would write to /out/")
    assert why in problem


@pytest.mark.parametrize(
    ("out", "cron", "timezone"),
    [
        ("{interval_start}", "*/15 * * * *", BERLIN),
        ("{interval_start_utc:%Y%m%d%H}", "0 * * * *", BERLIN),
        ("{interval_start:%Y%m%d%H%z}", "0 * * * *", BERLIN),
        ("{interval_start:%Y%m%d%H}", "0 * * * *", "Asia/Kolkata"),
        ("{interval_end:%Y/%m/%d}", "30 2 * * *", BERLIN),
        ("{interval_start:%G-W%V}", "0 0 * * MON", BERLIN),
    ],
)
def test_outputs_that_never_meet_are_fine(out: str, cron: str, timezone: str) -> None:
    assert problems(cron, timezone, out=f"/out/{out}") == []


# -- running -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job file that scores two small files, whatever the interval, and what it needs."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / name).write_text(name)
    shutil.copy(SCORERS / "steady.py", tmp_path / "model.py")
    job(tmp_path)
    return tmp_path


def job(folder: Path, **more: str) -> Path:
    values = {
        "source": "in", "model": "model.py", "out": "out/{interval_start_utc:%Y%m%dT%H%M}", "workers": "1", **more
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text("".join(f"{name}: '{value}'\n" for name, value in values.items()))
    return path


@pytest.fixture
def add(folder: Path, cli: Callable[..., Ran]) -> Callable[..., ScheduleStore]:
    """Adds a schedule that ticks every new year, and has missed so many; or, if none, one that ticks every hour."""

    def add(*more: object, missed: int = 1) -> ScheduleStore:
        begin = ("--cron", "0 0 1 1 *", "--from", f"{datetime.now(UTC).year - missed}-01-01")
        ran = cli(
            "schedule", "add", "readings", folder / "job.yaml", *(begin if missed else ("--cron", "0 * * * *")), *more
        )
        assert (ran.code, ran.out[:8]) == (0, "schedule"), ran.err
        return ScheduleStore(Jobs().store.engine)

    return add


def runs(store: ScheduleStore) -> list[Run]:
    return list(reversed(store.runs("readings")))


def claimed(store: ScheduleStore) -> tuple[Run, str]:
    """The next run, in the hands of this process."""
    Loop(store, names=["readings"])._plan(store.get("readings"), store.get("readings").clock(), store.clock())
    run = store.claim("readings")
    assert run is not None
    assert run.token is not None
    return run, run.token


def test_missed_intervals_are_made_up_for(add: Callable[..., ScheduleStore], cli: Callable[..., Ran]) -> None:
    store = add(missed=3)
    ran = cli("schedule", "run", "readings")
    assert ran.code == 0
    assert len(re.findall(r"UTC begins", ran.err)) == 3
    assert [run.state for run in runs(store)] == ["finished"] * 3
    jobs = JobStore(store.engine).newest()
    assert [(each.state, each.done) for each in jobs] == [("finished", 2)] * 3
    assert [run.job_id for run in store.runs("readings")] == [each.id for each in jobs]
    again = cli("schedule", "run")
    assert (again.code, again.err[:14]) == (0, "nothing is due")
    assert len(JobStore(store.engine).newest()) == 3


@pytest.mark.parametrize("catch_up", ["latest", "none"])
def test_missed_intervals_are_passed_over_if_asked(
    add: Callable[..., ScheduleStore], cli: Callable[..., Ran], catch_up: str
) -> None:
    store = add("--catch-up", catch_up, missed=3)
    ran = cli("schedule", "run")
    assert f"catch-up is {catch_up}" in ran.err
    last = "finished" if catch_up == "latest" else "skipped"
    assert [run.state for run in runs(store)] == ["skipped", "skipped", last]


def test_what_is_seen_in_time_runs_whatever_catch_up_says(folder: Path, cli: Callable[..., Ran]) -> None:
    begin = f"{datetime.fromtimestamp(datetime.now(UTC).timestamp() - 300, UTC):%Y-%m-%dT%H:%M}"
    cli(
        "schedule", "add", "readings", folder / "job.yaml", "--cron", "* * * * *", "--catch-up", "none", "--from", begin
    )
    cli("schedule", "run")
    store = ScheduleStore(Jobs().store.engine)
    early, last = runs(store)[:3], runs(store)[-1]
    assert {run.state for run in early} == {"skipped"}
    assert (last.state, last.reason) == ("finished", "cron")


def test_two_loops_share_the_work(add: Callable[..., ScheduleStore]) -> None:
    store = add("--overlap", "parallel", missed=5)
    processes = [
        subprocess.Popen([sys.executable, "-m", "tally", "schedule", "run"], stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [(run.state, run.attempts) for run in runs(store)] == [("finished", 1)] * 5
    assert len(JobStore(store.engine).newest()) == 5


def test_a_loop_sees_what_is_added_and_stops_cleanly(
    folder: Path, add: Callable[..., ScheduleStore], home: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tally", "schedule", "run", "--forever"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "running what will be added; Ctrl-C stops\n"
    for number in range(120):
        (folder / "in" / f"{number}").write_text(f"{number}")
    store = add()
    jobs = JobStore(store.engine)
    wait_for(lambda: any(record.done for record in jobs.newest()), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.stderr.close()
    (run,) = runs(store)
    record = jobs.get(run.job_id or "")
    assert (run.state, run.attempts, record.state) == ("pending", 0, "interrupted")
    assert 0 < record.done < 122
    assert jobs.counts(record.id)["running"] == 0
    # The next loop goes on with the same job.
    loop = Loop(store)
    loop.run()
    assert [each.state for each in jobs.newest()] == ["finished"]
    assert runs(store)[0].job_id == record.id


def test_a_loop_that_is_told_twice_kills_what_runs(folder: Path, add: Callable[..., ScheduleStore]) -> None:
    for number in range(120):
        (folder / "in" / f"{number}").write_text(f"{number}")
    store = add()
    jobs = JobStore(store.engine)
    loop = Loop(store)

    def listen() -> None:
        if loop.begun:
            loop.stop()
            loop.stop()

    loop._listen = listen
    loop.run()
    assert runs(store)[0].state == "pending"
    assert not [record for record in jobs.newest() if record.alive]


def test_a_job_that_was_done_by_hand_is_not_done_again(
    folder: Path, add: Callable[..., ScheduleStore], cli: Callable[..., Ran]
) -> None:
    store = add()
    schedule = store.get("readings")
    interval = schedule.clock().ending(schedule.planned_until, store.clock())[0]
    jobs = JobStore(store.engine)
    by_hand = Jobs(jobs).submit(filled(schedule.template, interval, schedule.clock()))
    Jobs(jobs).run(by_hand.id)
    assert cli("schedule", "run").code == 0
    assert [(run.state, run.job_id) for run in runs(store)] == [("finished", by_hand.id)]
    assert len(jobs.newest()) == 1


def test_a_run_that_lost_its_process_after_its_job_was_done_is_finished(
    add: Callable[..., ScheduleStore], cli: Callable[..., Ran]
) -> None:
    store = add()
    cli("schedule", "run")
    (done,) = runs(store)
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(schedule_runs).values(state="running", owner="lost", owner_host="gone", lease_until=now() - 1)
        )
    cli("schedule", "run")
    (again,) = runs(store)
    assert (again.state, again.job_id, again.attempts) == ("finished", done.job_id, 2)
    assert len(JobStore(store.engine).newest()) == 1


def test_an_interval_without_data_is_empty_and_is_done_again_when_asked(
    folder: Path, add: Callable[..., ScheduleStore], cli: Callable[..., Ran]
) -> None:
    job(folder, source="in/{interval_start_utc:%H}")
    store = add()
    assert cli("schedule", "run").code == 0
    (run,) = runs(store)
    assert (run.state, run.failures) == ("empty", 0)
    assert str(run.error).startswith(f"there is no file or folder {folder}/in/")
    assert "there is no file or folder" in cli("schedule", "show", "readings").out
    # The data has come late.
    at = datetime.fromtimestamp(run.interval_start, UTC)
    (folder / "in" / f"{at:%H}").mkdir()
    (folder / "in" / f"{at:%H}" / "a").write_text("a")
    assert cli("schedule", "run").err.startswith("nothing is due")
    interval = ("--from", f"{at:%Y-%m-%d %H:%M}", "--to", datetime.fromtimestamp(run.interval_end, UTC).isoformat())
    assert cli("schedule", "backfill", "readings", *interval, "--again").code == 0
    assert runs(store)[0].state == "finished"


def test_a_job_that_fails_is_tried_again_later(folder: Path, add: Callable[..., ScheduleStore]) -> None:
    shutil.copy(SCORERS / "failing.py", folder / "model.py")
    store = add()
    jobs = JobStore(store.engine)
    run = drive(Jobs(jobs), *_both(claimed(store)))
    assert (run.state, run.failures) == ("pending", 1)
    assert "the model server is away" in str(run.error)
    assert jobs.get(run.job_id or "").state == "failed"
    with store.engine.begin() as connection:
        connection.execute(sa.update(schedule_runs).values(next_at=None))
    again = drive(Jobs(jobs), *_both(claimed(store)))
    assert (again.failures, again.job_id) == (2, run.job_id)


def test_a_cancelled_job_fails_its_run(add: Callable[..., ScheduleStore]) -> None:
    store = add()
    jobs = JobStore(store.engine)
    run, token = claimed(store)
    schedule = store.get("readings")
    record = Jobs(jobs).submit(filled(schedule.template, run.interval, schedule.clock()))
    store.assign(run.id, token, job_id=record.id)
    lease = jobs.acquire(record.id, seconds=30)
    assert lease is not None
    jobs.release(lease, "cancelled")
    assert (ended := drive(Jobs(jobs), run.id, token)).state == "failed"
    assert ended.error == "its job was cancelled"


def test_a_database_that_fails_does_not_end_a_loop_that_runs_forever(
    add: Callable[..., ScheduleStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tally.errors import StorageError

    store = add()
    loop = Loop(store)
    clock, failed = store.clock, []

    def failing() -> float:
        if not failed:
            failed.append(True)
            loop._wake.set()  # the next turn at once
            raise StorageError("the database is away")
        loop.stop()
        return clock()

    monkeypatch.setattr(store, "clock", failing)
    loop.run(forever=True)
    assert loop.stopped
    failed.clear()
    with pytest.raises(StorageError):
        Loop(store).run()


# -- commands ------------------------------------------------------------------------------------------


def test_a_backfill_goes_on_where_it_was_and_says_how_far_it_is(
    add: Callable[..., ScheduleStore], cli: Callable[..., Ran]
) -> None:
    store = add(missed=0)
    first = cli("schedule", "backfill", "readings", "--from", "2026-01-01T05:00", "--to", "2026-01-01T06:00")
    assert (first.code, first.out) == (0, "1 of 1 intervals are finished\n")
    assert re.fullmatch(r"\[1/1\] 2026-01-01 05:00 UTC to 06:00 UTC finished: 2 items done \(job \w+\)\n", first.err)
    second = cli("schedule", "backfill", "readings", "--from", "2026-01-01T04:00", "--to", "2026-01-01T07:00")
    assert (second.code, second.out) == (0, "3 of 3 intervals are finished\n")
    assert second.err.startswith("1 of 3 intervals are finished already\n[2/3] 2026-01-01 04:00 UTC")
    before = runs(store)
    again = cli("schedule", "backfill", "readings", "--from", "2026-01-01T04:00", "--to", "2026-01-01T05:00", "--again")
    assert (again.code, again.out) == (0, "1 of 1 intervals are finished\n")
    after = runs(store)
    assert [one.job_id == other.job_id for one, other in zip(before, after, strict=True)] == [False, True, True]
    assert after[0].reason == "backfill"


def test_backfills_of_nothing_are_refused(add: Callable[..., ScheduleStore], cli: Callable[..., Ran]) -> None:
    add(missed=0)
    backfill = ("schedule", "backfill", "readings", "--from")
    assert "is not after --from" in cli(*backfill, "2026-01-02", "--to", "2026-01-01").err
    assert "no interval of readings begins then" in cli(*backfill, "2026-01-01T00:10", "--to", "2026-01-01T00:20").err
    assert "no interval of readings is over yet" in cli(*backfill, "2099-01-01", "--to", "2099-01-02").err
    assert "'soon' is neither a date nor a time" in cli(*backfill, "soon").err
    assert cli("schedule", "backfill", "reading", "--from", "2026-01-01").code == 2


def test_adding_tells_all_problems_together(folder: Path, cli: Callable[..., Ran]) -> None:
    job(folder, out="out", where="{interval}")
    ran = cli(
        "schedule", "add", "my schedule", folder / "job.yaml", "--cron", "0 25 * * *", "--timezone", "Europe/Berln"
    )
    assert ran.code == 2
    for problem in ("name: 'my schedule'", "Europe/Berlin", "cron: '0 25 * * *'", "no placeholder 'interval'"):
        assert problem in ran.err
    assert cli("schedule", "add", "x", folder / "nowhere.yaml", "--cron", "0 * * * *").code == 1
    assert cli("schedule", "list").err.startswith("no schedules yet")


def test_a_schedule_is_shown_with_what_the_clock_does(folder: Path, cli: Callable[..., Ran]) -> None:
    ran = cli("schedule", "add", "night", folder / "job.yaml", "--cron", "30 2 * * *", "--timezone", BERLIN)
    assert re.search(r"schedule night runs next at \d{4}-\d\d-\d\d 02:30 CES?T, for ", ran.out)
    shown = cli("schedule", "show", "night").out
    assert "cron         30 2 * * *   on the clock of Europe/Berlin" in shown
    assert re.search(r"clock change on \d{4}-\d\d-\d\d 0[23]:00 CES?T becomes 0[23]:00 CES?T; runs around it: ", shown)
    assert len(re.findall(r"^\d{4}-\d\d-\d\d 0[23]:\d\d CES?T  ", shown, re.MULTILINE)) == 5
    listed = cli("schedule", "list").out.splitlines()
    assert listed[0].split() == ["NAME", "DOES", "CRON", "ZONE", "NEXT", "RUN", "LAST", "INTERVAL", "RUNS"]
    assert listed[1].startswith("night  job   30 2 * * *  Europe/Berlin")
    facts = json.loads(cli("schedule", "show", "night", "--json").out)
    assert [each["end"] - each["start"] > 80_000 for each in facts["next"]] == [True] * 5
    assert json.loads(cli("schedule", "list", "--json").out)["runs"] == {}


def test_pausing_resuming_and_removing(add: Callable[..., ScheduleStore], cli: Callable[..., Ran]) -> None:
    store = add(missed=2)
    cli("schedule", "pause", "readings")
    assert cli("schedule", "run").err == "nothing is due: all is paused\n"
    assert "paused" in cli("schedule", "list").out
    assert (
        cli("schedule", "resume", "readings").out
        == "schedule readings is resumed; intervals missed meanwhile: 2; catch-up is all\n"
    )
    assert runs(store) == []
    assert cli("schedule", "remove", "readings").code == 0
    assert cli("schedule", "remove", "readings").code == 2
    assert cli("schedule", "run").err == "nothing is due: there are no schedules\n"


def _both(claim: tuple[Run, str]) -> tuple[int, str]:
    return claim[0].id, claim[1]
