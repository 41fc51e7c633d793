"""The store of schedules: what runs when, and the state of each interval.

Each interval of a schedule has one row, so that no interval is run twice at a time. A run is ``pending``, ``running``,
``finished``, ``empty`` (there was nothing to score), ``failed`` or ``skipped``. To claim a pending run is to take its
lease (:mod:`tally.database.lease`), and every change names the lease's token. A run whose lease is lost is taken over.
Waiting times go by the database's clock; statements are portable between SQLite and PostgreSQL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tally.database import lease
from tally.database.clock import now
from tally.database.tables import schedule_runs as runs
from tally.database.tables import schedules
from tally.errors import JobStateError, OwnershipLostError, SpecError, TriggerNotFoundError
from tally.text import did_you_mean, storable
from tally.triggers import template
from tally.triggers.cron import Cron, Interval
from tally.triggers.works.base import Work

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a schedule may be called."""

LEASE_SECONDS = 30.0
PARALLEL = 4
"""Runs of one schedule at the same time, at most, where they may overlap."""
TRIES = 3
"""A run that ended with an error this often stays failed."""
BACK_OFF = 10.0
"""Seconds until a failed run's second try; six times that until its third."""
BEGINNINGS = 20
"""A run that was started this often without ending stays failed: it may be what kills its process."""
_LANES = ("cron", "backfill")
"""Backfills and scheduled runs do not wait for each other."""
_ROWS = 500
_RESET: dict[str, Any] = {
    "state": "pending", "job_id": None, "training_id": None, "sweep_id": None, "pipeline_id": None, "outcome": None,
    "attempts": 0, "failures": 0, "error": None, "next_at": None, "started_at": None, "finished_at": None,
}  # fmt: skip
"""The columns of a run that is to start over, because a user asked for it."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One schedule. Times are seconds since the epoch; ticks up to ``planned_until`` are dealt with."""

    name: str
    template: dict[str, Any]
    file: str
    cron: str
    timezone: str
    overlap: str
    catch_up: str
    paused: bool
    created_at: float
    planned_until: float

    def clock(self) -> Cron:
        """Its ticks."""
        return Cron(self.cron, self.timezone)


@dataclass(frozen=True, slots=True)
class Run:
    """One interval of a schedule, and its state. Times are seconds since the epoch.

    reason: cron (on time), catch-up or backfill. again: it overwrites the results of an earlier run.
    job_id, training_id, sweep_id, pipeline_id: what does it: a job, a training's run (see ``tally runs``), a sweep or a
    run of a pipeline. outcome: what came of it, or how it stands, in a sentence; not of a job.
    attempts: how often it was started; failures: how often it ended with an error.
    token: of the lease, if the run has just been claimed; None otherwise.
    """

    id: int
    schedule: str
    interval_start: int
    interval_end: int
    state: str
    reason: str
    again: bool
    job_id: str | None
    training_id: str | None
    sweep_id: str | None
    pipeline_id: str | None
    attempts: int
    failures: int
    error: str | None
    outcome: str | None
    created_at: float
    next_at: float | None
    started_at: float | None
    finished_at: float | None
    token: str | None = None

    @property
    def interval(self) -> Interval:
        return Interval(self.interval_start, self.interval_end)

    @property
    def by(self) -> str | None:
        """What does it, in words: ``job ID``, ``run ID``, ``sweep ID`` or ``pipeline ID``."""
        known = (("job", self.job_id), ("run", self.training_id), ("sweep", self.sweep_id),
                 ("pipeline", self.pipeline_id))  # fmt: skip
        return next((f"{what} {each}" for what, each in known if each), None)


class ScheduleStore:
    """Reads and changes schedules and runs. Safe to use from several threads; holds no state but the engine."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    # -- reading -----------------------------------------------------------------------------------

    def clock(self) -> float:
        """The time by the database."""
        with self._read() as connection:
            return float(connection.scalar(sa.select(now())) or 0)

    def all(self) -> list[Schedule]:
        """Every schedule, by name."""
        with self._read() as connection:
            rows = connection.execute(sa.select(schedules).order_by(schedules.c.name)).mappings().all()
        return [_schedule(row) for row in rows]

    def get(self, name: str) -> Schedule:
        """The schedule. Raises SpecError."""
        with self._read() as connection:
            row = connection.execute(sa.select(schedules).where(schedules.c.name == name)).mappings().first()
            if row is None:
                raise _unknown(name, connection.scalars(sa.select(schedules.c.name)).all())
        return _schedule(row)

    def run(self, run_id: int) -> Run:
        """The run by its id. Raises OwnershipLostError if it was removed."""
        with self._read() as connection:
            row = connection.execute(sa.select(runs).where(runs.c.id == run_id)).mappings().first()
        if row is None:
            raise OwnershipLostError("the schedule was removed")
        return _run(row)

    def runs(self, name: str, *, within: Interval | None = None, limit: int | None = None) -> list[Run]:
        """Runs of the schedule, newest interval first; of those that begin within an interval."""
        query = sa.select(runs).where(runs.c.schedule == name).order_by(runs.c.interval_start.desc()).limit(limit)
        with self._read() as connection:
            return [_run(row) for row in connection.execute(_within(query, within)).mappings()]

    def counts(self, name: str, *, within: Interval | None = None) -> dict[str, int]:
        """Number of runs per state."""
        query = _within(sa.select(runs.c.state, sa.func.count()).where(runs.c.schedule == name), within)
        with self._read() as connection:
            return {str(state): int(n) for state, n in connection.execute(query.group_by(runs.c.state)).all()}

    def unsettled(self, names: Iterable[str], *, within: Interval | None = None) -> int:
        """How many runs are pending or running; of paused schedules, only those that ``within`` names."""
        query = (
            sa.select(sa.func.count())
            .join(schedules, schedules.c.name == runs.c.schedule)
            .where(runs.c.schedule.in_(list(names)), runs.c.state.in_(("pending", "running")))
        )
        if within is None:
            query = query.where(schedules.c.paused == 0)
        with self._read() as connection:
            return int(connection.scalar(_within(query, within)) or 0)

    # -- a user's changes --------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *,
        template: Mapping[str, Any],
        file: str,
        cron: Cron,
        overlap: str,
        catch_up: str,
        since: float | None = None,
        replace: bool = False,
    ) -> Schedule:
        """A new schedule; its first tick is the first one after ``since`` (by default, now).

        replace: change the schedule of that name; its runs stay, and it continues where it was, or at ``since``.
        Raises SpecError if there is one by that name.
        """
        values: dict[str, Any] = {
            "template": dict(template), "file": storable(file), "cron": cron.expression, "timezone": cron.zone.key,
            "overlap": overlap, "catch_up": catch_up,
        }  # fmt: skip
        if since is not None:
            values["planned_until"] = since
        with self.engine.begin() as connection:
            changed = connection.execute(sa.update(schedules).where(schedules.c.name == name).values(**values)).rowcount
            if changed and not replace:
                connection.rollback()
                raise SpecError(
                    f"there is a schedule {name!r} already", hint="Change it with --replace, or choose another name."
                )
            if not changed:
                new = {"planned_until": now(), **values, "paused": 0, "created_at": now()}
                connection.execute(sa.insert(schedules).values(name=name, **new))
        return self.get(name)

    def define(
        self,
        name: str,
        read: Callable[[], Mapping[str, Any]],
        *,
        file: str,
        cron: str | None = None,
        timezone: str | None = None,
        overlap: str | None = None,
        catch_up: str | None = None,
        since: str | None = None,
        replace: bool = False,
        allow: Callable[[Work], None] = lambda work: None,
    ) -> Schedule:
        """As :meth:`add`, from what a user wrote. Raises SpecError with every problem, ModelNotFoundError.

        read: returns the fields of the file. What is None is what the file says itself, if it does; otherwise it is
        UTC, ``queue`` and ``all``. since: a time on the zone's clock. allow: raises SpecError for what is done in the
        next interval, where this user may not have it done.
        """
        problems: list[str] = []
        hints: list[str | None] = []

        @contextmanager
        def collected() -> Iterator[None]:
            try:
                yield
            except SpecError as error:
                problems.extend(error.problems)
                hints.append(error.hint)

        clock, begin, fields, at = None, None, None, self.clock()
        asked = {"cron": cron, "timezone": timezone, "overlap": overlap, "catch_up": catch_up}
        when: dict[str, Any] = {name: each for name, each in asked.items() if each is not None}
        if not NAME.fullmatch(name):
            problems.append(f"name: {name!r} is not made of letters, digits, '.', '_' and '-'")
        with collected():
            fields = read()
        with collected():
            if fields is not None:
                when = {**template.timing(fields, when), **when}
            if "cron" not in when:
                raise SpecError("cron: is needed: '0 * * * *' is every full hour")
            clock = Cron(when["cron"], when.get("timezone", "UTC"))
            begin = clock.after(clock.moment(since, "--from") - 1) if since else None
        if fields is not None:
            problems += template.check(fields, clock, at)
        work = None
        if clock is not None and fields is not None and not problems:
            with collected():
                work = template.fill(fields, clock.next(at, 1)[0], clock)
                allow(work)
        if problems or clock is None or fields is None or work is None:
            raise SpecError(problems, hint="\n  ".join(hint for hint in hints if hint) or None)
        if work.job is not None or template.is_the_same(fields):
            work.check_there()
        work.check_named()
        added = self.add(
            name, template=fields, file=file, cron=clock, overlap=when.get("overlap", "queue"),
            catch_up=when.get("catch_up", "all"), since=begin, replace=replace,
        )  # fmt: skip
        return self.pause(added.name, when["paused"]) if "paused" in when else added

    def pause(self, name: str, paused: bool) -> Schedule:
        """Start no more runs, or start them again; what is running continues."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(schedules).where(schedules.c.name == name).values(paused=int(paused)))
        return self.get(name)

    def remove(self, name: str) -> None:
        """Delete the schedule and its runs; jobs, trainings and results stay. Raises JobStateError while one runs."""
        schedule = self.get(name)
        with self.engine.begin() as connection:
            self._lock(connection, name)
            rows = connection.execute(
                sa.select(runs, now().label("clock")).where(runs.c.schedule == name, runs.c.state == "running")
            )
            for row in rows.mappings():
                if lease.is_held(row):
                    cancel = f"Stop it first: tally jobs cancel {row['job_id']}" if row["job_id"] else None
                    raise JobStateError(
                        f"schedule {name!r} is running its interval of {schedule.clock().text(row['interval_start'])}",
                        hint=cancel or "Wait for its end, or stop what runs schedules first.",
                    )
            connection.execute(sa.delete(runs).where(runs.c.schedule == name))
            connection.execute(sa.delete(schedules).where(schedules.c.name == name))

    def backfill(self, name: str, intervals: Sequence[Interval], *, again: bool = False) -> list[Run]:
        """Give each of these intervals a run, unless it is finished; returns their runs.

        Failed and skipped runs start over. again: finished and empty ones too; but if an earlier such backfill of the
        same intervals has not ended, that one is continued.
        """
        if not intervals:
            return []
        within = Interval(intervals[0].start, intervals[-1].start + 1)
        with self.engine.begin() as connection:
            self._lock(connection, name)
            query = sa.select(runs).where(runs.c.schedule == name)
            rows = connection.execute(_within(query, within)).mappings().all()
            known = {Interval(row["interval_start"], row["interval_end"]): row for row in rows}
            going_on = any(row["again"] and row["state"] in ("pending", "running") for row in known.values())
            redo = ["failed", "skipped", "pending", *(["finished", "empty"] if again and not going_on else [])]
            missing = [each for each in intervals if each not in known]
            self._insert(connection, name, missing, state="pending", reason="backfill", again=again)
            for state in redo:
                values: dict[str, Any] = {"reason": "backfill"}
                if state != "pending":
                    values |= _RESET
                if state in ("finished", "empty"):
                    values |= {"again": 1}
                ids = [known[each]["id"] for each in intervals if each in known]
                for begin in range(0, len(ids), _ROWS):
                    some = runs.c.id.in_(ids[begin : begin + _ROWS])
                    connection.execute(sa.update(runs).where(some, runs.c.state == state).values(**values))
        wanted = set(intervals)
        return [run for run in reversed(self.runs(name, within=within)) if run.interval in wanted]

    def retry(self, name: str) -> int:
        """Start the failed runs of the schedule over; returns how many there are."""
        with self.engine.begin() as connection:
            it = (runs.c.schedule == name, runs.c.state == "failed")
            return connection.execute(sa.update(runs).where(*it).values(**_RESET)).rowcount

    # -- the loop's changes ------------------------------------------------------------------------

    def plan(
        self,
        schedule: Schedule,
        *,
        until: float,
        due: Sequence[Interval],
        missed: Sequence[Interval] = (),
        late: Sequence[Interval] = (),
    ) -> bool:
        """Make runs of the ticks up to ``until``; False if another loop was faster.

        due: they run now; if the schedule's overlap is ``skip``, only if none is at work. late: they were missed, and
        run now. missed: they are only noted.
        """
        with self.engine.begin() as connection:
            moved = connection.execute(
                sa.update(schedules)
                .where(
                    schedules.c.name == schedule.name,
                    schedules.c.planned_until == schedule.planned_until,
                    schedules.c.paused == 0,
                )
                .values(planned_until=until)
            )
            if moved.rowcount == 0:
                return False
            insert = self._insert
            insert(
                connection, schedule.name, missed, state="skipped", reason="cron",
                error=f"missed: nothing ran schedules then, and catch-up is {schedule.catch_up}",
            )  # fmt: skip
            insert(connection, schedule.name, late, state="pending", reason="catch-up")
            for interval in due:
                busy = self._busy(connection, schedule) if schedule.overlap == "skip" else None
                if busy is None:
                    insert(connection, schedule.name, [interval], state="pending", reason="cron")
                else:
                    text = schedule.clock().text(busy)
                    error = f"the run of the interval that began at {text} was not finished, and overlap is skip"
                    insert(connection, schedule.name, [interval], state="skipped", reason="cron", error=error)
        return True

    def claim(self, name: str, *, within: Interval | None = None) -> Run | None:
        """Take the schedule's next run that may be started, or one whose process is gone; None if there is none.

        Runs are started in the order of their intervals. If they may not overlap, one follows another, and one that
        waits for its next attempt holds up those behind it.
        within: only runs that begin within this interval, even if the schedule is paused.
        """
        if not self.unsettled([name], within=within):
            return None  # avoids a transaction that others would have to wait for
        with self.engine.begin() as connection:
            row = self._lock(connection, name)
            if row is None:
                return None
            parallel = row["overlap"] == "parallel"
            query = sa.select(runs, now().label("clock")).where(runs.c.schedule == name)
            query = query.order_by(runs.c.interval_start)
            running = connection.execute(query.where(runs.c.state == "running")).mappings().all()
            idle = row["paused"] and within is None
            for each in running:
                lost = not lease.is_held(each) and _is_within(each["interval_start"], within)
                if lost and not idle and (taken := self._take(connection, each)) is not None:
                    return taken
            for lane in _LANES:
                if idle or sum(_lane(each) == lane for each in running) >= (PARALLEL if parallel else 1):
                    continue
                pending = _within(query.where(runs.c.state == "pending", _in_lane(lane)), within)
                if parallel:
                    pending = pending.where(sa.func.coalesce(runs.c.next_at, 0) <= now())
                first = connection.execute(pending.limit(1)).mappings().first()
                if first is None or (first["next_at"] or 0) > first["clock"]:
                    continue
                if (taken := self._take(connection, first)) is not None:
                    return taken
        return None

    # -- changes by the process that has a run's lease ---------------------------------------------

    def begin(self, run_id: int, token: str) -> Run:
        """This process takes the claimed run. Raises OwnershipLostError if another one has it."""
        self._change(run_id, token, **lease.granted(token, LEASE_SECONDS), started_at=now())
        return self.run(run_id)

    def renew(self, run_id: int, token: str) -> None:
        """Extend the lease. Raises OwnershipLostError."""
        self._change(run_id, token, **lease.granted(token, LEASE_SECONDS))

    def assign(
        self,
        run_id: int,
        token: str,
        *,
        job_id: str | None = None,
        training_id: str | None = None,
        sweep_id: str | None = None,
        pipeline_id: str | None = None,
    ) -> None:
        """Note what does the run: a job, a training's run, a sweep, a pipeline. Raises OwnershipLostError."""
        self._change(run_id, token, job_id=job_id, training_id=training_id, sweep_id=sweep_id, pipeline_id=pipeline_id)

    def note(self, run_id: int, token: str, outcome: str | None) -> None:
        """Say how the run stands, in a sentence. Raises OwnershipLostError."""
        self._change(run_id, token, outcome=None if outcome is None else storable(outcome))

    def finish(self, run_id: int, token: str, *, outcome: str | None = None) -> None:
        """The interval is done. Raises OwnershipLostError."""
        outcome = None if outcome is None else storable(outcome)
        self._change(run_id, token, **_free("finished"), error=None, outcome=outcome, finished_at=now())

    def leave_empty(self, run_id: int, token: str, why: str) -> None:
        """The interval is done: there was nothing to score in it. Raises OwnershipLostError."""
        self._change(run_id, token, **_free("empty"), error=storable(why), finished_at=now())

    def fail(self, run_id: int, token: str, error: str, *, for_good: bool = False) -> None:
        """The run ended with an error: there is another attempt later, unless that was the last one or ``for_good``.

        Raises OwnershipLostError.
        """
        failures = self.run(run_id).failures + 1
        values: dict[str, Any] = {"failures": failures, "error": storable(error)}
        if for_good or failures >= TRIES:
            values |= {**_free("failed"), "finished_at": now()}
        else:
            values |= {**_free("pending"), "next_at": now() + BACK_OFF * 6 ** (failures - 1)}
        self._change(run_id, token, **values)

    def put_back(self, run_id: int, token: str, *, counted: bool) -> None:
        """The run was stopped before its end, and is pending again. counted: the attempt counts, as nobody stopped it
        on purpose. Raises OwnershipLostError."""
        attempts = runs.c.attempts if counted else runs.c.attempts - 1
        self._change(run_id, token, **_free("pending"), attempts=attempts)

    # -- inside transactions -----------------------------------------------------------------------

    def _change(self, run_id: int, token: str, /, **values: Any) -> None:
        with self.engine.begin() as connection:
            running = (runs.c.id == run_id, runs.c.state == "running")
            if not lease.change(connection, runs, *running, token=token, **values):
                raise OwnershipLostError("the run of this interval has been taken over by another process")

    def _lock(self, connection: sa.Connection, name: str) -> sa.RowMapping | None:
        """Keep others from planning or claiming runs of this schedule until the transaction ends."""
        it = schedules.c.name == name
        connection.execute(sa.update(schedules).where(it).values(paused=schedules.c.paused))
        return connection.execute(sa.select(schedules).where(it)).mappings().first()

    def _busy(self, connection: sa.Connection, schedule: Schedule) -> int | None:
        """The start of the oldest interval whose run is pending or running."""
        query = sa.select(runs.c.interval_start).where(
            runs.c.schedule == schedule.name, runs.c.state.in_(("pending", "running")), _in_lane("cron")
        )
        found = connection.scalar(query.order_by(runs.c.interval_start).limit(1))
        return None if found is None else int(found)

    def _take(self, connection: sa.Connection, row: sa.RowMapping) -> Run | None:
        if row["attempts"] >= BEGINNINGS:
            error = f"it was begun {row['attempts']} times, and each time its process was lost"
            connection.execute(
                sa.update(runs)
                .where(runs.c.id == row["id"])
                .values(**_free("failed"), error=error, finished_at=now())
            )  # fmt: skip
            return None
        token, seen = lease.new_token(), {"state": "running", "attempts": row["attempts"] + 1}
        acquired = lease.acquire(
            connection, runs, runs.c.id == row["id"],
            token=token, seconds=LEASE_SECONDS, instead_of=row["owner"], **seen,
        )  # fmt: skip
        if not acquired:
            return None
        return _run({**row, **seen}, token)

    def _insert(
        self,
        connection: sa.Connection,
        name: str,
        intervals: Sequence[Interval],
        *,
        state: str,
        reason: str,
        error: str | None = None,
        again: bool = False,
    ) -> None:
        """Add runs for those of the intervals that have none."""
        known: set[Interval] = set()
        for begin in range(0, len(intervals), _ROWS):
            starts = [each.start for each in intervals[begin : begin + _ROWS]]
            query = sa.select(runs.c.interval_start, runs.c.interval_end)
            query = query.where(runs.c.schedule == name, runs.c.interval_start.in_(starts))
            known.update(Interval(start, end) for start, end in connection.execute(query))
        new = [each for each in intervals if each not in known]
        if new:
            clock = connection.scalar(sa.select(now()))
            ended = clock if state == "skipped" else None
            connection.execute(
                sa.insert(runs),
                [
                    {
                        "schedule": name, "interval_start": each.start, "interval_end": each.end, "state": state,
                        "reason": reason, "again": int(again), "attempts": 0, "failures": 0, "error": error,
                        "created_at": clock, "finished_at": ended,
                    }
                    for each in new
                ],
            )  # fmt: skip

    def _read(self) -> sa.Connection:
        return self.engine.connect().execution_options(reading=True)


def _unknown(name: str, known: Iterable[str]) -> SpecError:
    return TriggerNotFoundError(
        f"there is no schedule {name!r}{did_you_mean(name, known)}", hint="See them all with: tally schedule list"
    )


def _within(query: sa.Select[Any], within: Interval | None) -> sa.Select[Any]:
    if within is None:
        return query
    return query.where(runs.c.interval_start >= within.start, runs.c.interval_start < within.end)


def _is_within(start: int, within: Interval | None) -> bool:
    return within is None or within.start <= start < within.end


def _in_lane(lane: str) -> sa.ColumnElement[bool]:
    return runs.c.reason == "backfill" if lane == "backfill" else runs.c.reason != "backfill"


def _lane(row: sa.RowMapping) -> str:
    return "backfill" if row["reason"] == "backfill" else "cron"


def _free(state: str) -> dict[str, Any]:
    """The columns of a run that nobody works on."""
    return {
        "state": state, **lease.RETURNED, "next_at": None,
    }  # fmt: skip


def _schedule(row: sa.RowMapping) -> Schedule:
    values = {name: row[name] for name in Schedule.__slots__}
    return Schedule(**values | {"paused": bool(row["paused"])})


def _run(row: Mapping[Any, Any], token: str | None = None) -> Run:
    values = {name: row[name] for name in Run.__slots__ if name != "token"}
    return Run(**values | {"again": bool(row["again"]), "token": token})
