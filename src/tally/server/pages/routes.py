"""The pages: rendered here, kept up to date by server-sent events, usable without a mouse.

A page shows what the API answers with. Its forms work without scripts, too: each change is a POST that carries the
session's CSRF token, and answers with a message for the page, or leads back to it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from fastapi import APIRouter, Depends, FastAPI, Form, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.exceptions import HTTPException

import tally
from tally.errors import JobNotFoundError, RefusedError, SpecError, TallyError
from tally.jobs.spec import make
from tally.jobs.states import ENDED, STATES, State
from tally.server.api.jobs import AllJobs, JobId, feed_of
from tally.server.api.keys import Keys, audit_of
from tally.server.api.models import all_models, open_registry
from tally.server.api.views import DeadItem, JobDetail, JobView
from tally.server.auth.audit import AuditLog
from tally.server.auth.guard import COOKIE, Admin, Operator, Viewer, address_of
from tally.server.auth.keys import SESSION_SECONDS, csrf_token
from tally.server.auth.roles import ROLES, Principal, Role
from tally.server.feed import Feed
from tally.server.pages import format as formats
from tally.server.places import check as check_places
from tally.server.results import Results

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent
NEWEST = 25
"""Jobs on the overview."""
SHOWN_DEAD = 20
SHOWN_ROWS = 50

_templates = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=select_autoescape(default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals |= {"version": tally.__version__, "states": STATES, "roles": ROLES}
_templates.filters |= formats.FILTERS


def render(name: str, **values: Any) -> str:
    """The template, filled in; everything is escaped."""
    return _templates.get_template(name).render(**values)


def page(request: Request, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A whole page."""
    cookie = request.cookies.get(COOKIE, "")
    who: Principal | None = getattr(request.state, "principal", None)
    text = render(name, who=who, csrf=csrf_token(cookie), path=request.url.path, **values)
    return HTMLResponse(text, status_code=status)


def said(request: Request, text: str, *, back: str, problem: bool = False, status: int = 200) -> Response:
    """What a form is answered with: a message for the page that sent it, or, without scripts, the page ``back``."""
    if "hx-request" in request.headers:
        return HTMLResponse(render("_message.html", text=text, problem=problem), status_code=status)
    return RedirectResponse(back, status_code=303)


# -- logging in --------------------------------------------------------------------------------------------------------


@router.get("/login", response_class=HTMLResponse)
def login_page(request: Request, then: str = "/") -> HTMLResponse:
    return page(request, "login.html", then=then, problem=None)


@router.post("/login", response_class=HTMLResponse)
def log_in(request: Request, key: Annotated[str, Form(max_length=200)], then: Annotated[str, Form()] = "/") -> Response:
    """A session for the browser that shows a key. Other sites cannot log a browser in here: see ``same_origin``."""
    same_origin(request)
    guard = request.app.state.guard
    try:
        principal = guard.with_key(key.strip(), address_of(request))
    except RefusedError as error:
        return page(request, "login.html", then=then, problem=str(error), status=error.status)
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
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
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
        now=_summary(request, jobs) | {"jobs": [JobView.of(each) for each in found.jobs]},
        next=found.next,
        text=text,
        state=state,
        filtered=filtered,
    )


@router.get("/live", response_class=EventSourceResponse)
async def overview_live(
    request: Request, who: Viewer, jobs: AllJobs, feed: Annotated[Feed, Depends(feed_of)]
) -> AsyncIterator[ServerSentEvent]:
    def look() -> dict[str, Any]:
        newest = [JobView.of(each) for each in jobs.list(limit=NEWEST).jobs]
        return _summary(request, jobs) | {"jobs": newest}

    async for each in _stream(feed, "overview", look, "_overview.html"):
        yield each


def _summary(request: Request, jobs: AllJobs) -> dict[str, Any]:
    price, currency = _price(request)
    return {"counts": jobs.store.counts_by_state(), "price": price, "currency": currency}


# -- a job -------------------------------------------------------------------------------------------------------------


@router.get("/jobs/new", response_class=HTMLResponse)
def new_job(request: Request, who: Operator, again: str | None = None) -> HTMLResponse:
    jobs = request.app.state.jobs
    spec = jobs.get(again).spec if again is not None else {}
    models = [f"models:/{each.name}" for each in all_models(jobs)]
    roots = request.app.state.settings.roots
    return page(request, "new.html", spec=spec, models=models, roots=roots, problems=[], hint=None)


@router.post("/jobs/new", response_class=HTMLResponse)
async def start_job(request: Request, who: Operator, jobs: AllJobs) -> Response:
    form = await request.form()
    fields = {name: str(value).strip() for name, value in form.items() if name != "csrf" and str(value).strip()}
    return await asyncio.to_thread(_start, request, who, jobs, fields)


def _start(request: Request, who: Principal, jobs: Any, fields: dict[str, Any]) -> Response:
    overwrite = fields.pop("overwrite", None) is not None
    fields["source"] = fields.get("source", "").split()
    try:
        spec = make(**fields)
        check_places(spec, request.app.state.settings.roots)
    except SpecError as error:
        models = [f"models:/{each.name}" for each in all_models(jobs)]
        roots = request.app.state.settings.roots
        return page(
            request, "new.html", status=422, spec=fields, models=models, roots=roots, problems=error.problems,
            hint=error.hint,
        )  # fmt: skip
    record = jobs.enqueue(spec, who=who.name, overwrite=overwrite)
    request.app.state.supervisor.wake()
    return RedirectResponse(f"/jobs/{record.id}", status_code=303)


@router.get("/jobs/{job}", response_class=HTMLResponse)
def job_page(request: Request, who: Viewer, jobs: AllJobs, job: JobId) -> HTMLResponse:
    record = jobs.store.get(job)
    return page(request, "job.html", detail=JobDetail.of(record), now=_job(jobs, record.id), price=_price(request))


@router.get("/jobs/{job}/live", response_class=EventSourceResponse)
async def job_live(
    request: Request, who: Viewer, jobs: AllJobs, feed: Annotated[Feed, Depends(feed_of)], job: JobId
) -> AsyncIterator[ServerSentEvent]:
    job_id = (await asyncio.to_thread(jobs.store.get, job)).id
    price = _price(request)

    def look() -> dict[str, Any] | None:
        try:
            return _job(jobs, job_id)
        except JobNotFoundError:
            return None

    csrf = csrf_token(request.cookies.get(COOKIE, ""))
    async for each in _stream(feed, f"page:{job_id}", look, "_job.html", price=price, who=who, csrf=csrf):
        yield each


def _job(jobs: Any, job_id: str) -> dict[str, Any]:
    """What changes about a job while it runs."""
    view = JobView.of(jobs.store.get(job_id))
    dead = [DeadItem.of(each) for each in itertools.islice(jobs.dead(job_id), SHOWN_DEAD)] if view.dead else []
    return {"job": view, "dead": dead, "ended": view.state in ENDED}


def _price(request: Request) -> tuple[float, str]:
    asked = request.app.state.settings
    return asked.price_per_hour, asked.currency


@router.post("/jobs/{job}/{action}")
def change_job(request: Request, who: Operator, jobs: AllJobs, job: JobId, action: str) -> Response:
    record = jobs.store.get(job)
    back = f"/jobs/{record.id}"
    changes: dict[str, tuple[Callable[[], object], str]] = {
        "pause": (lambda: jobs.pause(record.id), "It pauses once what runs is saved."),
        "resume": (lambda: jobs.ask_to_start(record.id, "resume", who=who.name), "It goes on."),
        "retry": (lambda: jobs.ask_to_start(record.id, "retry", who=who.name), "The dead items are replayed."),
        "cancel": (lambda: jobs.cancel(record.id), "It is cancelled."),
    }
    if action not in changes:
        raise RefusedError(404, f"there is no action {action!r}")
    change, text = changes[action]
    try:
        change()
    except TallyError as error:
        return said(request, str(error), back=back, problem=True)
    request.app.state.supervisor.wake()
    return said(request, text, back=back)


@router.get("/jobs/{job}/rows", response_class=HTMLResponse)
def job_rows(request: Request, who: Viewer, job: JobId, sql: Annotated[str, Query(max_length=20_000)] = "") -> Response:
    results: Results = request.app.state.results
    asked = sql.strip() or "from results"
    try:
        rows = results.query(job, asked, limit=SHOWN_ROWS)
    except TallyError as error:
        return HTMLResponse(render("_message.html", text=str(error), problem=True))
    return HTMLResponse(render("_rows.html", rows=rows))


# -- models, keys ------------------------------------------------------------------------------------------------------


@router.get("/models", response_class=HTMLResponse)
def models_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    return page(request, "models.html", models=all_models(jobs))


@router.get("/models/{name}", response_class=HTMLResponse)
def model_page(request: Request, who: Viewer, jobs: AllJobs, name: str) -> HTMLResponse:
    return page(request, "model.html", model=open_registry(jobs).show(name))


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


# -- streams -----------------------------------------------------------------------------------------------------------


async def _stream(
    feed: Feed, topic: str, look: Callable[[], dict[str, Any] | None], template: str, **values: Any
) -> AsyncIterator[ServerSentEvent]:
    """The template anew whenever what ``look`` returns has changed; ends where it returns None."""

    def event(state: dict[str, Any] | None) -> ServerSentEvent:
        if state is None:
            return ServerSentEvent(raw_data=render("_message.html", text="This job was deleted.", problem=True))
        return ServerSentEvent(raw_data=render(template, now=state, **values))

    async for each in feed.stream(topic, look, event, is_last=lambda state: state is None):
        yield each


# -- installing --------------------------------------------------------------------------------------------------------


def install(app: FastAPI) -> None:
    """Add the pages, and have browsers get pages for errors, too; a browser without a session gets to log in."""
    app.mount("/static", StaticFiles(directory=FOLDER / "static"))
    app.include_router(router)
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
