"""The pages: rendered here, kept up to date by server-sent events, usable without a mouse.

A page shows what the API answers with. Its forms work without scripts, too: each change is a POST that carries the
session's CSRF token, and answers with a message for the page, or leads back to it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from tally.errors import RefusedError, SpecError, TallyError
from tally.jobs.facade import Jobs
from tally.jobs.states import STATES, State
from tally.server.api import models
from tally.server.api.figures import running_job
from tally.server.api.jobs import AllJobs, feed_of
from tally.server.api.keys import Keys, audit_of
from tally.server.api.models import all_models, open_registry
from tally.server.api.uploads import keep
from tally.server.api.views import JobView
from tally.server.auth.audit import AuditLog
from tally.server.auth.guard import COOKIE, Admin, GuardedRoute, Operator, Viewer, address_of
from tally.server.auth.keys import SESSION_SECONDS
from tally.server.auth.roles import Principal, Role
from tally.server.feed import Feed, seldom
from tally.server.machine import Machine
from tally.server.pages import endpoints, job, pipelines, runs, sweeps, triggers
from tally.server.pages.render import (
    FOLDER,
    Changes,
    changed,
    chosen,
    filled_in,
    form_page,
    page,
    price_of,
    stream,
)
from tally.server.uploads import MAX_FILES

router = APIRouter(include_in_schema=False, route_class=GuardedRoute)

NEWEST, MOST_RUNNING = 25, 50
"""Jobs on the overview, and those of them that run."""
LOAD_SECONDS = 2.0
"""Seconds between two looks at workers, and at what was done in the last hour."""


# -- logging in --------------------------------------------------------------------------------------------------------


@router.get("/login", response_class=HTMLResponse)
def login_page(request: Request, then: str = "/") -> HTMLResponse:
    return page(request, "login.html", then=then, problem=None, logins=request.app.state.logins)


@router.post("/login", response_class=HTMLResponse)
def log_in(request: Request, key: Annotated[str, Form(max_length=200)], then: Annotated[str, Form()] = "/") -> Response:
    """A session for the browser that shows a key. Other sites cannot log a browser in here: see ``same_origin``."""
    same_origin(request)
    guard = request.app.state.guard
    try:
        principal = guard.with_key(key.strip(), address_of(request))
    except RefusedError as error:
        return page(
            request, "login.html", then=then, problem=str(error), status=error.status, logins=request.app.state.logins
        )
    request.state.principal = principal
    answer = RedirectResponse(then if _is_ours(then) else "/", status_code=303)
    answer.set_cookie(
        COOKIE,
        guard.keys.log_in(principal),
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@router.post("/logout")
def log_out(request: Request, who: Viewer) -> Response:
    request.app.state.guard.keys.log_out(request.cookies.get(COOKIE, ""))
    answer = RedirectResponse("/login", status_code=303)
    answer.delete_cookie(COOKIE)
    return answer


def same_origin(request: Request) -> None:
    """Raises RefusedError unless the request comes from a page of this server."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise RefusedError(403, f"requests from {origin} are not taken here")


def _is_ours(path: str) -> bool:
    """Whether this is a path on this server, rather than another site's address."""
    return path.startswith("/") and not path.startswith(("//", "/\\"))


# -- the overview ------------------------------------------------------------------------------------------------------


@router.get("/", response_class=HTMLResponse)
def overview(
    request: Request, who: Viewer, jobs: AllJobs, text: str = "", state: str = "", after: str | None = None
) -> HTMLResponse:
    wanted: State | None = state if state in STATES else None
    found = jobs.list(text=text or None, state=wanted, after=after, limit=NEWEST)
    filtered = bool(text or wanted or after)
    return page(
        request,
        "overview.html",
        now=_summary(request, jobs, _load(request, jobs)) | {"jobs": [JobView.of(each) for each in found.jobs]},
        next=found.next,
        text=text,
        state=state,
        filtered=filtered,
    )


@router.get("/live", response_class=EventSourceResponse)
async def overview_live(
    request: Request, who: Viewer, jobs: AllJobs, feed: Annotated[Feed, Depends(feed_of)]
) -> AsyncIterator[ServerSentEvent]:
    load = seldom(lambda: _load(request, jobs), seconds=LOAD_SECONDS)

    def look() -> dict[str, Any]:
        newest = [JobView.of(each) for each in jobs.list(limit=NEWEST).jobs]
        return _summary(request, jobs, load()) | {"jobs": newest}

    async for each in stream(request, feed, "overview", look, "_overview.html"):
        yield each


def _summary(request: Request, jobs: AllJobs, load: dict[str, Any]) -> dict[str, Any]:
    price, currency = price_of(request)
    return {"counts": jobs.store.counts_by_state(), "price": price, "currency": currency, **load}


def _load(request: Request, jobs: AllJobs) -> dict[str, Any]:
    """What the server's jobs do, and with what."""
    running = [each for each in jobs.list(state="running", limit=MOST_RUNNING).jobs if each.alive]
    machine: Machine = request.app.state.machine
    driven = machine.driven(running)
    costs = {each.id: running_job(each, request.app.state.settings.price_per_hour) for each in running}
    return {
        "minutes": jobs.store.throughput(),
        "running": [(each, costs[each.job]) for each in driven],
        "workers": sum(len(each.workers or ()) for each in driven),
    }


# -- models, keys ------------------------------------------------------------------------------------------------------


@router.get("/models", response_class=HTMLResponse)
def models_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    return _models(request, jobs)


@router.post("/models")
async def add_model(request: Request, who: Operator, jobs: AllJobs) -> Response:
    form = await request.form(max_files=MAX_FILES)
    return await run_in_threadpool(_add_model, request, who, jobs, *filled_in(form))


def _add_model(
    request: Request, who: Principal, jobs: Jobs, fields: dict[str, Any], files: list[UploadFile]
) -> Response:
    name, alias, task = fields.get("name", ""), fields.get("alias"), fields.get("task")
    try:
        if not files:
            raise SpecError("no file was chosen", hint="Choose the model's file, or all files of its folder.")
        upload = keep(request.app.state.uploads, jobs, files, unpack=False)
        place = str(Path(upload.place, upload.files[0].name)) if len(upload.files) == 1 else upload.place
        wanted = models.NewVersion(model=place, alias=alias, task=task, labels=None, artifacts=None)
        added = models.add_version(request, who, open_registry(jobs), name, wanted)
    except TallyError as error:
        return _models(request, jobs, fields, error)
    return RedirectResponse(f"/models/{added.name}", status_code=303)


def _models(
    request: Request, jobs: Jobs, given: dict[str, Any] | None = None, error: TallyError | None = None
) -> HTMLResponse:
    """All models, with the form for a new version: what was given, and what is wrong with that."""
    return form_page(request, "models.html", given or {}, error, models=all_models(jobs))


@router.get("/models/{name}", response_class=HTMLResponse)
def model_page(request: Request, who: Viewer, jobs: AllJobs, name: str) -> HTMLResponse:
    return page(request, "model.html", model=open_registry(jobs).show(name))


@router.post("/models/{name}/aliases")
def set_alias(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    name: models.Name,
    alias: Annotated[str, Form(max_length=1000)],
    version: Annotated[int, Form(ge=1, le=2**31 - 1)],
) -> Response:
    alias = alias.strip()
    change = partial(models.open_registry(jobs).alias, name, alias, version, who=who.name)
    return changed(request, change, f"{alias} points at version {version}.", back=f"/models/{name}")


@router.post("/models/{name}/aliases/{alias}/{action}")
def change_alias(
    request: Request, who: Operator, jobs: AllJobs, name: models.Name, alias: models.Alias, action: str
) -> Response:
    registry = open_registry(jobs)
    changes: Changes = {
        "rollback": (lambda: models.roll_back(who, registry, name, alias), alias + " points at version {now.version}."),
        "remove": (lambda: models.remove_alias(who, registry, name, alias), f"{alias} is removed."),
    }
    return changed(request, *chosen(changes, action), back=f"/models/{name}")


@router.get("/keys", response_class=HTMLResponse)
def keys_page(request: Request, who: Admin, keys: Keys, log: Annotated[AuditLog, Depends(audit_of)]) -> HTMLResponse:
    return page(request, "keys.html", keys=keys.list(), entries=log.page(limit=50), made=None, problem=None)


@router.post("/keys", response_class=HTMLResponse)
def make_key(
    request: Request,
    who: Admin,
    keys: Keys,
    log: Annotated[AuditLog, Depends(audit_of)],
    name: Annotated[str, Form()],
    role: Annotated[Role, Form()],
    days: Annotated[str, Form()] = "",
) -> HTMLResponse:
    made, problem = None, None
    try:
        made = keys.add(name, role, days=float(days) if days.strip() else None)[1]
    except (SpecError, ValueError) as error:
        problem = str(error)
    return page(request, "keys.html", keys=keys.list(), entries=log.page(limit=50), made=made, problem=problem)


@router.post("/keys/{key}/revoke")
def revoke_key(request: Request, who: Admin, keys: Keys, key: str) -> Response:
    keys.revoke(key)
    return RedirectResponse("/keys", status_code=303)


# -- installing --------------------------------------------------------------------------------------------------------


def install(app: FastAPI) -> None:
    """Add the pages, and have browsers get pages for errors, too; a browser without a session gets to log in."""
    app.mount("/static", StaticFiles(directory=FOLDER / "static"))
    app.include_router(router)
    app.include_router(job.router)
    app.include_router(triggers.router)
    app.include_router(endpoints.router)
    app.include_router(runs.router)
    app.include_router(sweeps.router)
    app.include_router(pipelines.router)
    for kind in (TallyError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _for_browsers(app.exception_handlers[kind]))


def _for_browsers(plain: Callable[..., Any]) -> Callable[[Request, Any], Awaitable[Response]]:
    async def handle(request: Request, error: Any) -> Response:
        answer: Response = await plain(request, error)
        if request.url.path.startswith("/api/") or "text/html" not in request.headers.get("accept", ""):
            return answer
        if answer.status_code == 401 and request.method == "GET":
            there = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?then={quote(there)}", status_code=303)
        problem = json.loads(bytes(answer.body))["error"]
        text = problem["message"] + (f"\n{problem['hint']}" if problem.get("hint") else "")
        title = _TITLES.get(answer.status_code, "That did not work")
        return page(request, "problem.html", status=answer.status_code, title=title, text=text)

    return handle


_TITLES = {401: "Log in first", 403: "You may not do that", 404: "There is no such page", 503: "Something is away"}
