"""How much the server has to do, and what it costs."""

from __future__ import annotations

from fastapi import APIRouter, Request

from tally.jobs.store import JobRecord
from tally.server.api.jobs import AllJobs
from tally.server.api.views import Figures, RunningJob
from tally.server.auth.guard import GuardedRoute, Viewer
from tally.server.errors import answers
from tally.triggers.store import ScheduleStore

router = APIRouter(tags=["figures"], route_class=GuardedRoute, responses=answers(401, 403, 422, 429, 503))

_MOST = 1000


@router.get("/figures")
def figures(request: Request, who: Viewer, jobs: AllJobs) -> Figures:
    """Jobs by state, items of the last hour, and what running jobs have cost so far."""
    settings = request.app.state.settings
    minutes = jobs.store.throughput()
    driven = jobs.list(state="running", limit=_MOST).jobs
    return Figures(
        at=ScheduleStore(jobs.store.engine).clock(),
        jobs=jobs.store.counts_by_state(),
        waiting=len(jobs.starts.waiting()),
        minutes=minutes,
        items=sum(minutes),
        price_per_hour=settings.price_per_hour,
        currency=settings.currency,
        running=[running_job(each, settings.price_per_hour) for each in driven],
    )


def running_job(record: JobRecord, price_per_hour: float) -> RunningJob:
    """How a job runs, and what that has cost so far."""
    seconds, busy = (float(record.usage.get(name, 0.0)) for name in ("seconds", "worker_seconds"))
    return RunningJob(
        id=record.id,
        rate=record.done / seconds if seconds else 0.0,
        workers=busy / seconds if seconds else 0.0,
        cost=price_per_hour * busy / 3600,
    )
