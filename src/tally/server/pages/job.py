"""The pages of jobs: start one, see how it goes, change it."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BeforeValidator
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from tally.errors import JobNotFoundError, ModelNotFoundError, SpecError, TallyError
from tally.jobs.facade import Jobs
from tally.jobs.spec import make
from tally.jobs.states import ENDED
from tally.jobs.store import JobRecord
from tally.server.api.jobs import AllJobs, JobId, feed_of
from tally.server.api.models import all_models, open_registry
from tally.server.api.results import send_file
from tally.server.api.uploads import keep
from tally.server.api.views import DeadItem, JobDetail, JobView, Rows
from tally.server.auth.guard import GuardedRoute, Operator, Viewer
from tally.server.auth.roles import Principal
from tally.server.feed import Feed, seldom
from tally.server.gallery import Gallery
from tally.server.middleware import POLICY_OF_FILES
from tally.server.pages.asked import filled, with_more
from tally.server.pages.labels import Labels
from tally.server.pages.render import (
    Changes,
    changed,
    chosen,
    filled_in,
    form_page,
    page,
    price_of,
    render,
    stream,
)
from tally.server.places import check as check_places
from tally.server.places import new_output
from tally.server.results import MOST_DOWNLOADED, Ask
from tally.server.uploads import MAX_FILES

router = APIRouter(include_in_schema=False, route_class=GuardedRoute)

SHOWN_DEAD = 20
SHOWN_ROWS, EXPLORED_ROWS = 50, 200
LAST_WORDS_SECONDS = 10.0
"""A job's processes may print for so long after its state says that it has ended."""
LOG_LINES = 100
USUAL = f"from results limit {SHOWN_ROWS}"
"""What is asked of a job's results until somebody asks something else."""
CELLS, STRETCHES = 240, 60
"""Of the map of chunks, and of the chart of the rate."""
GLANCE_SECONDS = 2.0
"""Seconds between two looks at all chunks of a job."""

PageNumber = Annotated[int, Query(ge=1, le=10**9, alias="page")]
Sql = Annotated[str, Query(max_length=20_000)]
Label = Annotated[str, Query(max_length=1000)]


@router.get("/jobs/new", response_class=HTMLResponse)
def new_job(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    again: str | None = None,
    model: Annotated[str, Query(max_length=1000)] = "",
) -> HTMLResponse:
    return _form(request, jobs, filled(jobs.get(again).spec) if again is not None else {"model": model})


@router.post("/jobs/new", response_class=HTMLResponse)
async def start_job(request: Request, who: Operator, jobs: AllJobs) -> Response:
    form = await request.form(max_files=MAX_FILES)
    return await run_in_threadpool(_start, request, who, jobs, *filled_in(form))


def _start(request: Request, who: Principal, jobs: Jobs, fields: dict[str, Any], files: list[UploadFile]) -> Response:
    once = _once(fields, files, who)
    overwrite, unpack = (fields.pop(name, None) is not None for name in ("overwrite", "unpack"))
    fields["source"] = [line.strip() for line in fields.get("source", "").splitlines() if line.strip()]
    try:
        if files:
            upload = keep(request.app.state.uploads, jobs, files, unpack=unpack)
            fields["source"].append(upload.place)  # it stays in the form where something else is wrong
        spec = make(**{"out": new_output(), **with_more(fields)})
        check_places(spec, request.app.state.settings.roots, who)
        if spec.model.startswith("models:/") and "{" not in spec.model:
            open_registry(jobs).get(spec.model)  # told here, and not by a job that has failed
    except (SpecError, ModelNotFoundError) as error:
        return _form(request, jobs, fields, error)
    record = jobs.enqueue(spec, who=who.name, overwrite=overwrite, request=once)
    request.app.state.supervisor.wake()
    return RedirectResponse(f"/jobs/{record.id}", status_code=303)


def _once(fields: dict[str, Any], files: list[UploadFile], who: Principal) -> str | None:
    """What names the form as it was filled in: sent twice, by a double click, it starts one job."""
    if not (drawn := fields.pop("once", None)):
        return None
    named = [(each.filename, each.size) for each in files]
    return json.dumps([who.key_id, drawn, sorted(fields.items()), named])


def _form(request: Request, jobs: Jobs, given: dict[str, Any], error: TallyError | None = None) -> HTMLResponse:
    """The form of a new job, with what was given, and what is wrong with that."""
    models = [
        name
        for model in all_models(jobs)
        for name in (
            f"models:/{model.name}",
            *(f"models:/{model.name}@{alias}" for version in model.versions for alias in version.aliases),
        )
    ]
    most, once = request.app.state.settings.max_upload, secrets.token_urlsafe()
    return form_page(request, "new.html", given, error, models=models, most=most, once=once)


@router.get("/jobs/{job}", response_class=HTMLResponse)
def job_page(
    request: Request, who: Viewer, jobs: AllJobs, job: JobId, number: PageNumber = 1, label: Label = ""
) -> HTMLResponse:
    record = jobs.store.get(job)
    now = _job(jobs, record.id, _glance(jobs, record.id))
    detail = JobDetail.of(record, pushes=jobs.store.pushes(record.id))
    return page(
        request, "job.html", detail=detail, now=now, price=price_of(request), number=number, label=label, usual=USUAL
    )


@router.get("/jobs/{job}/results", response_class=HTMLResponse)
def job_results(who: Viewer, jobs: AllJobs, job: JobId) -> HTMLResponse:
    record = jobs.store.get(job)
    kind = "none" if record.state in ENDED else None  # a waiting job that was cancelled will write nothing
    return HTMLResponse(render("_results.html", job=record.id, kind=record.output.get("kind", kind), usual=USUAL))


@router.get("/jobs/{job}/live", response_class=EventSourceResponse)
async def job_live(
    request: Request, who: Viewer, jobs: AllJobs, feed: Annotated[Feed, Depends(feed_of)], job: JobId
) -> AsyncIterator[ServerSentEvent]:
    job_id = (await asyncio.to_thread(jobs.store.get, job)).id
    price = price_of(request)
    glance = seldom(lambda: _glance(jobs, job_id), seconds=GLANCE_SECONDS)

    def look() -> dict[str, Any] | None:
        try:
            return _job(jobs, job_id, glance())
        except JobNotFoundError:
            return None

    topic = f"page:{job_id}"
    async for each in stream(request, feed, topic, look, "_job.html", gone="This job was deleted.", price=price):
        yield each


def _glance(jobs: Jobs, job_id: str) -> dict[str, Any]:
    """The map of a job's chunks, and the chart of its rate."""
    running = jobs.store.get(job_id).state == "running"
    return {
        "cells": jobs.store.cells(job_id, limit=CELLS),
        "pace": jobs.store.pace(job_id, running=running, limit=STRETCHES),
    }


def _job(jobs: Jobs, job_id: str, glance: dict[str, Any]) -> dict[str, Any]:
    """What changes about a job while it runs."""
    view = JobView.of(jobs.store.get(job_id))
    dead = [DeadItem.of(each) for each in itertools.islice(jobs.dead(job_id), SHOWN_DEAD)] if view.dead else []
    return {"job": view, "dead": dead, "ended": view.state in ENDED, "parts": jobs.parts(job_id), **glance}


@router.post("/jobs/{job}/{action}")
def change_job(request: Request, who: Operator, jobs: AllJobs, job: JobId, action: str) -> Response:
    record = jobs.store.get(job)
    back = f"/jobs/{record.id}"
    changes: Changes = {
        "pause": (lambda: jobs.pause(record.id), "It pauses once what runs is saved."),
        "resume": (lambda: jobs.ask_to_start(record.id, "resume", who=who.name), "It goes on."),
        "retry": (lambda: jobs.ask_to_start(record.id, "retry", who=who.name), "The dead items are replayed."),
        "cancel": (lambda: jobs.cancel(record.id), "It is being cancelled, unless it was just finishing."),
    }
    answer = changed(request, *chosen(changes, action), back=back)
    request.app.state.supervisor.wake()
    return answer


@router.get("/jobs/{job}/rows", response_class=HTMLResponse)
def job_rows(request: Request, who: Viewer, jobs: AllJobs, job: JobId, sql: Sql = "") -> Response:
    record, results = jobs.store.get(job), request.app.state.results
    asked = sql.strip() or USUAL
    again = record.id if asked == USUAL and not _settled(record) else None
    try:
        rows = results.query(record.id, asked, limit=SHOWN_ROWS)
    except TallyError as error:  # of a job that is just beginning, it passes
        return HTMLResponse(render("_rows.html", problem=str(error), again=again))
    return HTMLResponse(render("_rows.html", rows=rows, again=again))


@router.get("/jobs/{job}/sql", response_class=HTMLResponse)
def explorer(request: Request, who: Viewer, jobs: AllJobs, job: JobId, sql: Sql = "") -> HTMLResponse:
    record, results = jobs.store.get(job), request.app.state.results
    asked = sql.strip() or f"from results limit {EXPLORED_ROWS}"
    try:
        views, rows, problem = results.run(record.id, partial(_explored, asked))
    except TallyError as error:
        views, rows, problem = {}, None, str(error)
    return page(
        request, "sql.html", job=record.id, sql=asked, views=views, rows=rows, problem=problem, most=MOST_DOWNLOADED
    )


def _explored(asked: str, ask: Ask) -> tuple[dict[str, dict[str, str]], Rows | None, str | None]:
    """The columns of each view, the answer, and what is wrong with the question."""
    views = {view: ask(f"from {view} limit 0", 0).columns for view in ("results", "dead")}
    try:
        return views, ask(asked, EXPLORED_ROWS), None
    except TallyError as error:
        return views, None, str(error)


@router.get("/jobs/{job}/download")
def download(
    request: Request, who: Viewer, jobs: AllJobs, job: JobId, sql: Sql, form: Literal["csv", "parquet"] = "csv"
) -> Response:
    job_id = jobs.store.get(job).id
    with tempfile.NamedTemporaryFile(prefix="tally-answer-", delete=False) as file:
        path = Path(file.name)
    try:
        request.app.state.results.download(job_id, sql, path, form=form)
    except BaseException:
        path.unlink()
        raise
    kind = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet"}[form]
    return FileResponse(path, media_type=kind, filename=f"{job_id}.{form}", background=BackgroundTask(path.unlink))


@router.get("/jobs/{job}/labels", response_class=HTMLResponse)
def job_labels(request: Request, who: Viewer, jobs: AllJobs, job: JobId) -> HTMLResponse:
    record, found, problem = jobs.store.get(job), None, None
    if record.output.get("kind") == "rows":
        try:
            labels: Labels = request.app.state.labels
            found = labels.of(record)
        except TallyError as error:
            problem = str(error)
    return HTMLResponse(
        render("_labels.html", job=record.id, unit=record.unit, ended=_settled(record), found=found, problem=problem)
    )


@router.get("/jobs/{job}/log", response_class=HTMLResponse)
def job_log(who: Viewer, jobs: AllJobs, job: JobId) -> HTMLResponse:
    record = jobs.store.get(job)
    printed = jobs.printed(record.id, lines=LOG_LINES)
    ended = _settled(record) and time.time() - (record.finished_at or 0.0) > LAST_WORDS_SECONDS
    return HTMLResponse(render("_log.html", job=record.id, ended=ended, printed=printed))


# -- pictures and videos -----------------------------------------------------------------------------------------------


def gallery_of(request: Request) -> Gallery:
    found: Gallery = request.app.state.gallery
    return found


@router.get("/jobs/{job}/pictures", response_class=HTMLResponse)
def job_pictures(
    request: Request, who: Viewer, jobs: AllJobs, job: JobId, number: PageNumber = 1, label: Label = ""
) -> HTMLResponse:
    record, found, problem = jobs.store.get(job), None, None
    if record.output:
        try:
            found = gallery_of(request).page(record.id, number=number, label=label or None)
        except TallyError as error:
            problem = str(error)
    return HTMLResponse(
        render(
            "_pictures.html", job=record.id, ended=_settled(record), found=found, number=number, label=label,
            problem=problem, images=record.output.get("kind") == "images", published=record.manifest is not None,
        )
    )  # fmt: skip


@router.get("/jobs/{job}/picture")
def job_picture(
    request: Request,
    who: Viewer,
    job: JobId,
    key: Annotated[str, Query(max_length=4000)] = "",
    file: Annotated[str, Query(max_length=4000)] = "",
    rows: Annotated[str, Query(max_length=20_000)] = "[]",
    size: Annotated[Literal[320, 1280], BeforeValidator(int)] = 320,
) -> Response:
    """A picture, made small: the item ``key`` with ``rows`` drawn onto it, or the ``file`` that was made of one.

    What cannot be shown is a picture, too, that says why: a page that holds many is none the worse for it.
    """
    gallery = gallery_of(request)
    try:
        if file:
            data = gallery.made(job, file, size=size)
        else:
            data = gallery.item(job, key, size=size, rows=rows)
    except TallyError as error:
        return Response(render("_nothing.svg", text=error.message), media_type="image/svg+xml")
    headers = {"Cache-Control": "private, max-age=600", "Content-Security-Policy": POLICY_OF_FILES}
    return Response(data, media_type="image/jpeg", headers=headers)


@router.get("/jobs/{job}/original")
def job_original(
    request: Request,
    who: Viewer,
    job: JobId,
    key: Annotated[str, Query(max_length=4000)],
    range_: Annotated[str | None, Header(alias="Range", max_length=1000)] = None,
    if_range: Annotated[str | None, Header(alias="If-Range", max_length=1000)] = None,
) -> Response:
    """The video that the job has made another of, or a part of it."""
    store, name = gallery_of(request).video(job, key)
    return send_file(store, name, store.size(name), range_, if_range)


def _settled(record: JobRecord) -> bool:
    """Whether its results stay as they are for now."""
    return record.state in (*ENDED, "failed") and not record.alive
