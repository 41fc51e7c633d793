"""Jobs over HTTP: look, follow, stop, continue, retry, delete; their rows and dead items."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from tally.alerts.alert import Alert
from tally.errors import JobNotFoundError, SpecError
from tally.jobs.facade import Jobs
from tally.jobs.printed import Printed
from tally.jobs.spec import make
from tally.jobs.states import ENDED, State
from tally.jobs.store import JobRecord
from tally.server.api.views import DeadItem, DeadList, JobDetail, JobList, JobView
from tally.server.auth.guard import Admin, Operator, Viewer, still_signed_in
from tally.server.errors import answers, answers_beside
from tally.server.feed import Feed
from tally.server.once import OnceRoute, name_of
from tally.server.places import check as check_places
from tally.server.places import new_output

router = APIRouter(
    prefix="/jobs", tags=["jobs"], route_class=OnceRoute, responses=answers(400, 401, 403, 409, 413, 422, 429, 503)
)

_CHANGEABLE = {"device", "workers", "timeout", "memory", "max_dead", "min_dead", "batch_size"}
_EXAMPLE = {"source": ["s3://bucket/photos"], "model": "models:/classifier@champion", "out": "s3://bucket/predictions"}


def facade(request: Request) -> Jobs:
    """The jobs of the server's database."""
    found: Jobs = request.app.state.jobs
    return found


def feed_of(request: Request) -> Feed:
    found: Feed = request.app.state.feed
    return found


def given_fields(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job file, absolute and checked. Raises SpecError."""
    return make(**job).model_dump(mode="json", exclude_unset=True)


def seen(jobs: Jobs, record: JobRecord) -> JobView:
    """The job as the API shows it."""
    return JobView.of(record, starting=jobs.starts.is_waiting(record.id))


AllJobs = Annotated[Jobs, Depends(facade)]
JobId = Annotated[str, Path(description="A job's id, or the beginning of it.", pattern="^[0-9a-z]{1,32}$")]


@router.get("")
def list_jobs(
    who: Viewer,
    jobs: AllJobs,
    state: State | None = None,
    model: Annotated[str | None, Query(description="The model's name.", max_length=1000)] = None,
    out: Annotated[str | None, Query(description="The place that it writes to.", max_length=4000)] = None,
    text: Annotated[str | None, Query(description="Part of id, model, source or place.", max_length=1000)] = None,
    since: Annotated[float | None, Query(description="Created then or later.", allow_inf_nan=False)] = None,
    until: Annotated[float | None, Query(description="Created before.", allow_inf_nan=False)] = None,
    after: Annotated[str | None, Query(description="``next`` of the page before.", max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> JobList:
    """A page of jobs, newest first: those that match all given filters."""
    page = jobs.list(state=state, model=model, place=out, text=text, since=since, until=until, after=after, limit=limit)
    return JobList(jobs=[JobView.of(each) for each in page.jobs], next=page.next)


@router.post("", status_code=202, responses=answers(409))
def start_job(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    wanted: Annotated[dict[str, Any], Body(description="The fields of a job file.", examples=[_EXAMPLE])],
    overwrite: Annotated[bool, Query(description="Score again, over the results of the same job.")] = False,
) -> JobView:
    """Have a new job started: it waits until the server has room for it. The fields are those of a job file.

    Without ``out``, the results are kept by the server, and are fetched from it.
    """
    spec = make(**{"out": new_output(), **wanted})
    check_places(spec, request.app.state.settings.roots, who)
    record = jobs.enqueue(spec, who=who.name, overwrite=overwrite, request=name_of(request))
    request.app.state.supervisor.wake()
    return seen(jobs, record)


@router.get("/{job}", responses=answers(404))
def get_job(who: Viewer, jobs: AllJobs, job: JobId) -> JobDetail:
    """Everything about a job."""
    record = jobs.store.get(job)
    starting, pushes = jobs.starts.is_waiting(record.id), jobs.store.pushes(record.id)
    return JobDetail.of(record, starting=starting, pushes=pushes, parts=jobs.parts(record.id))


@router.get(
    "/{job}/events",
    response_class=EventSourceResponse,
    responses=answers_beside(400, 401, 403, 404, 409, 413, 422, 429, 503),
)
async def job_events(
    request: Request, who: Viewer, jobs: AllJobs, feed: Annotated[Feed, Depends(feed_of)], job: JobId
) -> AsyncIterator[ServerSentEvent]:
    """The job (as in ``GET /jobs``) whenever something about it changes, until it ends, as server-sent events."""
    job_id = (await asyncio.to_thread(jobs.store.get, job)).id

    def look() -> JobView | None:
        try:
            return seen(jobs, jobs.store.get(job_id))
        except JobNotFoundError:
            return None

    def event(view: JobView | None) -> ServerSentEvent:
        if view is None:
            return ServerSentEvent(event="deleted", data={"id": job_id})
        return ServerSentEvent(event="job", data=view.model_dump())

    def is_last(view: JobView | None) -> bool:
        return view is None or (view.state in (*ENDED, "failed") and not view.alive and not view.starting)

    may_see = still_signed_in(request)
    async for each in feed.stream(f"job:{job_id}", look, event, is_last=is_last, may_see=may_see):
        yield each


@router.get("/{job}/log", responses=answers(404))
def job_log(who: Viewer, jobs: AllJobs, job: JobId, lines: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Printed:
    """The last lines that the job's coordinator and its workers wrote; none where another machine ran them."""
    return jobs.printed(job, lines=lines)


@router.get("/{job}/dead", responses=answers(404))
def list_dead(
    who: Viewer,
    jobs: AllJobs,
    job: JobId,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> DeadList:
    """The dead items, in the source's order."""
    found = [DeadItem.of(each) for each in itertools.islice(jobs.dead(job), offset, offset + limit + 1)]
    return DeadList(dead=found[:limit], next=offset + limit if len(found) > limit else None)


@router.get("/{job}/alerts", responses=answers(404))
def job_alerts(who: Viewer, jobs: AllJobs, job: JobId) -> list[Alert]:
    """The rules of a job that has ended, what was measured, and whether the webhook was told."""
    return jobs.alerts(jobs.store.get(job).id)


@router.post("/{job}/alerts/send", responses=answers(404))
def send_alerts(who: Operator, jobs: AllJobs, job: JobId) -> list[Alert]:
    """Send those that are not delivered, also those that were given up."""
    return jobs.send_alerts(jobs.store.get(job).id)


@router.post("/{job}/pause", responses=answers(404, 409))
def pause_job(who: Operator, jobs: AllJobs, job: JobId) -> JobView:
    """Hand out nothing more until the job is resumed. What runs is finished and saved."""
    return JobView.of(jobs.pause(jobs.store.get(job).id))


@router.post("/{job}/resume", responses=answers(404, 409))
def resume_job(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    job: JobId,
    options: Annotated[
        dict[str, Any] | None, Body(description="Fields to change before: workers, device, limits.")
    ] = None,
) -> JobView:
    """Go on with a job that was paused or interrupted, or that has failed."""
    job_id = jobs.store.get(job).id
    if options:
        if unknown := sorted(set(options) - _CHANGEABLE):
            raise SpecError([f"{each}: cannot be changed in a job that has begun" for each in unknown])
        jobs.change(job_id, **options)
    record = jobs.ask_to_start(job_id, "resume", who=who.name)
    request.app.state.supervisor.wake()
    return seen(jobs, record)


@router.post("/{job}/retry", responses=answers(404, 409))
def retry_job(request: Request, who: Operator, jobs: AllJobs, job: JobId) -> JobView:
    """Replay the dead items of a job that has ended."""
    record = jobs.ask_to_start(jobs.store.get(job).id, "retry", who=who.name)
    request.app.state.supervisor.wake()
    return seen(jobs, record)


@router.post("/{job}/cancel", responses=answers(404, 409))
def cancel_job(who: Operator, jobs: AllJobs, job: JobId) -> JobView:
    """Stop the job for good, and remove what it had not finished writing."""
    return JobView.of(jobs.cancel(jobs.store.get(job).id))


@router.delete("/{job}", status_code=204, responses=answers(404, 409))
def delete_job(who: Admin, jobs: AllJobs, job: JobId) -> None:
    """Forget a job that nobody drives; finished results stay where they are."""
    jobs.delete(jobs.store.get(job).id)
