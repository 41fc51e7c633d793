"""Schedules over HTTP: what runs when, and what ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as InPath
from pydantic import BaseModel, Field

from tally.errors import JobStateError
from tally.server.api.jobs import AllJobs
from tally.server.api.views import ScheduleDetail
from tally.server.auth.guard import Admin, Operator, Viewer
from tally.server.auth.roles import Principal
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.server.places import check_kind, check_work
from tally.triggers import template
from tally.triggers.store import NAME, Run, Schedule, ScheduleStore
from tally.triggers.works.kinds import kind_of, told

router = APIRouter(
    prefix="/schedules",
    tags=["schedules"],
    route_class=OnceRoute,
    responses=answers(400, 401, 403, 404, 409, 422, 429, 503),
)


class NewSchedule(BaseModel):
    """A schedule to add. job: the fields of a file of a job, a training, a pipeline or a clean-up.

    cron is needed, but of a CronWorkflow, which says itself when it is run; timezone is UTC otherwise, overlap
    ``queue`` and catch_up ``all``. since: begin with the first interval from this time on, which is one on the zone's
    clock.
    """

    name: str = Field(pattern=f"^{NAME.pattern}$")
    job: dict[str, Any]
    cron: str | None = Field(None, min_length=1, max_length=255, examples=["0 * * * *"])
    timezone: str | None = Field(None, min_length=1, max_length=128)
    overlap: Literal["queue", "skip", "parallel"] | None = None
    catch_up: Literal["all", "latest", "none"] | None = None
    since: str | None = Field(None, max_length=100)
    replace: bool = False
    file: str = Field("", max_length=4000, description="Where the job file was, for people.")


def _store(jobs: AllJobs) -> ScheduleStore:
    return ScheduleStore(jobs.store.engine)


Schedules = Annotated[ScheduleStore, Depends(_store)]
Name = Annotated[str, InPath(pattern=f"^{NAME.pattern}$")]


@router.get("")
def list_schedules(who: Viewer, store: Schedules) -> list[ScheduleDetail]:
    """All schedules, by name, each with its next interval and its last run."""
    return [_detail(store, each, following=1, runs=1) for each in store.all()]


@router.post("", status_code=201)
def add_schedule(request: Request, who: Operator, store: Schedules, wanted: NewSchedule) -> Schedule:
    """Run a job, a training, a pipeline or a clean-up on time.

    Its values may hold ``{interval_start}`` and ``{interval_end}``; a job's ``out`` must.
    """
    return define(request, who, store, lambda: wanted.job, **wanted.model_dump(exclude={"job"}))


def define(
    request: Request, who: Principal, store: ScheduleStore, read: Callable[[], dict[str, Any]], **wanted: Any
) -> Schedule:
    """Add a schedule that may name what requests may name. read: the fields as they were sent. wanted: as of
    :meth:`ScheduleStore.define`."""
    roots = request.app.state.settings.roots

    def allowed() -> dict[str, Any]:
        fields = read()
        check_kind(kind_of(fields), who)  # before any file is read
        return template.settled(fields, Path.cwd())

    added = store.define(read=allowed, allow=lambda work: check_work(work, roots, who), **wanted)
    return _masked(added)


@router.get("/{name}")
def show_schedule(
    who: Viewer, store: Schedules, name: Name, limit: Annotated[int, Query(ge=1, le=1000)] = 10
) -> ScheduleDetail:
    """A schedule, the next five intervals, and its last runs."""
    return _detail(store, store.get(name), following=5, runs=limit)


@router.post("/{name}/pause")
def pause_schedule(who: Operator, store: Schedules, name: Name) -> Schedule:
    """Start no new runs; what is running continues."""
    return _masked(store.pause(store.get(name).name, True))


@router.post("/{name}/resume")
def resume_schedule(who: Operator, store: Schedules, name: Name) -> Schedule:
    """Start runs again; ``catch_up`` says which of the missed intervals are run."""
    return _masked(store.pause(store.get(name).name, False))


@router.post("/{name}/run", status_code=202)
def run_now(
    who: Operator,
    store: Schedules,
    name: Name,
    again: Annotated[bool, Query(description="Also if it is finished already; its results are replaced.")] = False,
) -> Run:
    """Run the newest interval that is over now."""
    found = store.get(name)
    if found.paused:
        raise JobStateError(f"schedule {name!r} is paused", hint="Resume it first.")
    clock = found.clock()
    begin = clock.before(clock.before(store.clock()))
    (run,) = store.backfill(name, clock.starting(begin, begin + 1), again=again)
    return run


@router.delete("/{name}", status_code=204)
def remove_schedule(who: Admin, store: Schedules, name: Name) -> None:
    """Forget a schedule and what it has run; jobs, trainings and results stay."""
    store.remove(store.get(name).name)


def _detail(store: ScheduleStore, found: Schedule, *, following: int, runs: int) -> ScheduleDetail:
    clock = found.clock()
    intervals = clock.next(max(store.clock(), found.planned_until), following)
    return ScheduleDetail(
        schedule=_masked(found),
        next=intervals,
        runs=store.runs(found.name, limit=runs),
        counts=store.counts(found.name),
    )


def _masked(found: Schedule) -> Schedule:
    return replace(found, template=told(found.template))
