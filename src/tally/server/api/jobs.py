"""Jobs over HTTP: look, follow, stop, continue, retry, delete; their rows and dead items."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field

from tally.errors import JobNotFoundError
from tally.jobs.facade import Jobs
from tally.jobs.spec import make
from tally.jobs.states import ENDED, State
from tally.server.api.views import DeadItem, DeadList, JobDetail, JobList, JobView, Rows
from tally.server.auth.guard import Admin, Operator, Viewer
from tally.server.errors import answers
from tally.server.feed import Feed
from tally.server.places import check as check_places
from tally.server.results import Results

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=answers(401, 403, 422, 429, 503))

_EXAMPLE = {"source": ["s3://bucket/photos"], "model": "models:/classifier@champion", "out": "s3://bucket/predictions"}


class SqlQuery(BaseModel):
    """A question. limit: rows of the answer, at most."""

    sql: str = Field(min_length=1, max_length=20_000)
    limit: int = Field(1000, ge=1, le=10_000)


def facade(request: Request) -> Jobs:
    """The jobs of the server's database."""
    found: Jobs = request.app.state.jobs
    return found


def feed_of(request: Request) -> Feed:
    found: Feed = request.app.state.feed
    return found


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
    """Have a new job started: it waits until the server has room for it. The fields are those of a job file."""
    spec = make(**wanted)
    check_places(spec, request.app.state.settings.roots)
    record = jobs.enqueue(spec, who=who.name, overwrite=overwrite)
    request.app.state.supervisor.wake()
    return JobView.of(record)


@router.get("/{job}", responses=answers(404))
def get_job(who: Viewer, jobs: AllJobs, job: JobId) -> JobDetail:
    """Everything about a job."""
    return JobDetail.of(jobs.store.get(job))


@router.get("/{job}/events", response_class=EventSourceResponse, responses=answers(404))
async def job_events(
    who: Viewer, jobs: AllJobs, feed: Annotated[Feed, Depends(feed_of)], job: JobId
) -> AsyncIterator[ServerSentEvent]:
    """The job (as in ``GET /jobs``) whenever something about it changes, until it ends, as server-sent events."""
    job_id = (await asyncio.to_thread(jobs.store.get, job)).id

    def look() -> JobView | None:
        try:
            return JobView.of(jobs.store.get(job_id))
        except JobNotFoundError:
            return None

    def event(view: JobView | None) -> ServerSentEvent:
        if view is None:
            return ServerSentEvent(event="deleted", data={"id": job_id})
        return ServerSentEvent(event="job", data=view.model_dump())

    def is_last(view: JobView | None) -> bool:
        return view is None or (view.state in ENDED and not view.alive)

    async for each in feed.stream(f"job:{job_id}", look, event, is_last=is_last):
        yield each


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


@router.post("/{job}/query", responses=answers(404, 409))
def query_job(request: Request, who: Viewer, jobs: AllJobs, job: JobId, asked: SqlQuery) -> Rows:
    """One SELECT in DuckDB's SQL over the views ``results`` and ``dead``. Nothing else can be read."""
    results: Results = request.app.state.results
    return results.query(jobs.store.get(job).id, asked.sql, limit=asked.limit)


@router.post("/{job}/pause", responses=answers(404, 409))
def pause_job(who: Operator, jobs: AllJobs, job: JobId) -> JobView:
    """Hand out nothing more until the job is resumed. What runs is finished and saved."""
    return JobView.of(jobs.pause(jobs.store.get(job).id))


@router.post("/{job}/resume", responses=answers(404, 409))
def resume_job(request: Request, who: Operator, jobs: AllJobs, job: JobId) -> JobView:
    """Go on with a job that was paused or interrupted, or that has failed."""
    record = jobs.ask_to_start(jobs.store.get(job).id, "resume", who=who.name)
    request.app.state.supervisor.wake()
    return JobView.of(record)


@router.post("/{job}/retry", responses=answers(404, 409))
def retry_job(request: Request, who: Operator, jobs: AllJobs, job: JobId) -> JobView:
    """Replay the dead items of a job that has ended."""
    record = jobs.ask_to_start(jobs.store.get(job).id, "retry", who=who.name)
    request.app.state.supervisor.wake()
    return JobView.of(record)


@router.post("/{job}/cancel", responses=answers(404, 409))
def cancel_job(who: Operator, jobs: AllJobs, job: JobId) -> JobView:
    """Stop the job for good, and remove what it had not finished writing."""
    return JobView.of(jobs.cancel(jobs.store.get(job).id))


@router.delete("/{job}", status_code=204, responses=answers(404, 409))
def delete_job(who: Admin, jobs: AllJobs, job: JobId) -> None:
    """Forget a job that nobody drives; finished results stay where they are."""
    jobs.delete(jobs.store.get(job).id)
