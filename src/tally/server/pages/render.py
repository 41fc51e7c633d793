"""What all pages are made with: templates, messages for forms, and streams of what has changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias, get_args

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.sse import ServerSentEvent
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.datastructures import FormData, UploadFile

from tally import version
from tally.errors import RefusedError, SpecError, TallyError
from tally.jobs.spec import Task
from tally.jobs.states import STATES
from tally.server.auth.guard import COOKIE, still_signed_in
from tally.server.auth.keys import csrf_token
from tally.server.auth.roles import ROLES, Principal
from tally.server.feed import Feed
from tally.server.pages import format as formats
from tally.triggers.works.kinds import does

FOLDER = Path(__file__).parent
_templates = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=select_autoescape(default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals |= {"version": version.shown(), "states": STATES, "roles": ROLES, "tasks": get_args(Task)}
_templates.globals["does"] = does
_templates.filters |= formats.FILTERS


def render(name: str, **values: Any) -> str:
    """The template, filled in; everything is escaped."""
    return _templates.get_template(name).render(**values)


def page(request: Request, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A whole page."""
    text = render(name, **_asked_by(request), path=request.url.path, **values)
    return HTMLResponse(text, status_code=status)


def _asked_by(request: Request) -> dict[str, Any]:
    """Who asks, as templates know it, and the token of their forms."""
    who: Principal | None = getattr(request.state, "principal", None)
    return {"who": who, "csrf": csrf_token(request.cookies.get(COOKIE, ""))}


def form_page(
    request: Request, template: str, given: Any, error: TallyError | None = None, **values: Any
) -> HTMLResponse:
    """A page with a form: what was given, and what is wrong with that."""
    problems = [] if error is None else error.problems if isinstance(error, SpecError) else [error.message]
    return page(
        request, template, status=200 if error is None else 422, given=given, problems=problems,
        hint=None if error is None else error.hint, roots=request.app.state.settings.roots, **values,
    )  # fmt: skip


def filled_in(form: FormData) -> tuple[dict[str, Any], list[UploadFile]]:
    """The fields of a form that were filled in, and its files."""
    files = [each for each in form.getlist("files") if isinstance(each, UploadFile) and each.filename]
    fields = {
        name: value.strip()
        for name, value in form.items()
        if name != "csrf" and isinstance(value, str) and value.strip()
    }
    return fields, files


def said(request: Request, text: str, *, back: str, problem: bool = False, status: int = 200) -> Response:
    """What a form is answered with: a message for the page that sent it, or, without scripts, the page ``back``;
    a problem is then a page of its own."""
    if "hx-request" in request.headers:
        # For what the page shows of it; of what did not work, a form keeps what was typed into it.
        headers = {} if problem else {"HX-Trigger": "changed"}
        return HTMLResponse(render("_message.html", text=text, problem=problem), status_code=status, headers=headers)
    if problem:
        return page(request, "problem.html", status=409, title="That did not work", text=text, back=back)
    return RedirectResponse(back, status_code=303)


Changes: TypeAlias = dict[str, tuple[Callable[[], object], str]]
"""What can be done with a thing, by the last part of the address: what does it, and what is said then; ``{now}`` in
that is what the former has returned."""


def chosen(changes: Changes, action: str) -> tuple[Callable[[], object], str]:
    """Raises RefusedError where there is no such action."""
    if action not in changes:
        raise RefusedError(404, f"there is no action {action!r}")
    return changes[action]


def changed(request: Request, change: Callable[[], object], text: str, *, back: str) -> Response:
    """Make the change, and say the text, or what was wrong."""
    try:
        now = change()
    except TallyError as error:
        return said(request, str(error), back=back, problem=True)
    return said(request, text.format(now=now), back=back)


def price_of(request: Request) -> tuple[float, str]:
    """What an hour of a worker costs, and in which currency."""
    asked = request.app.state.settings
    return asked.price_per_hour, asked.currency


async def stream(
    request: Request,
    feed: Feed,
    topic: str,
    look: Callable[[], dict[str, Any] | None],
    template: str,
    *,
    gone: str = "This was deleted.",
    **values: Any,
) -> AsyncIterator[ServerSentEvent]:
    """The template anew whenever what ``look`` returns has changed; ends where it returns None, with ``gone``."""

    def event(state: dict[str, Any] | None) -> ServerSentEvent:
        if state is None:
            return ServerSentEvent(raw_data=render("_message.html", text=gone, problem=True))
        return ServerSentEvent(raw_data=render(template, now=state, **values))

    values = _asked_by(request) | values
    may_see = still_signed_in(request)
    async for each in feed.stream(topic, look, event, is_last=lambda state: state is None, may_see=may_see):
        yield each
