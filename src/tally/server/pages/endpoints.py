"""The pages of kept endpoints: what each serves and how it does, its changes, and a picture to try it with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, File, Form, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ValidationError

from tally.errors import EndpointNotFoundError, SpecError, TallyError
from tally.jobs.facade import Jobs
from tally.jobs.pictures import MAX_BYTES
from tally.server.api import endpoints
from tally.server.api.endpoints import Deployments, Finder, Name
from tally.server.api.jobs import AllJobs, feed_of
from tally.server.api.models import open_registry
from tally.server.api.views import EndpointView, RecentFigures
from tally.server.auth.guard import Admin, GuardedRoute, Operator, Viewer
from tally.server.feed import Feed
from tally.server.pages.render import changed, form_page, page, render, stream
from tally.server.trial import Trial, try_out
from tally.serving.deployments import PORT, DeploymentStore
from tally.serving.settings import replicas_from
from tally.text import visible

router = APIRouter(include_in_schema=False, route_class=GuardedRoute)

LOG_LINES = 100
Line = Annotated[str, Form(max_length=4000)]
M = TypeVar("M", bound=BaseModel)
SHARE, SHADOW = "share:", "shadow:"
"""How fields of the form begin that shares out requests; the number of a version follows."""


@router.get("/endpoints", response_class=HTMLResponse)
def endpoints_page(request: Request, who: Viewer, store: Deployments) -> HTMLResponse:
    return page(request, "endpoints.html", found=[_shown(each) for each in endpoints.list_endpoints(who, store)])


@router.get("/new/endpoint", response_class=HTMLResponse)
def new_endpoint(request: Request, who: Operator, jobs: AllJobs, model: str = "") -> HTMLResponse:
    return _new(request, jobs, {"model": model} if model else {})


def _new(request: Request, jobs: Jobs, given: dict[str, str], error: TallyError | None = None) -> HTMLResponse:
    names = [each.name for each in open_registry(jobs).list()]
    return form_page(request, "new_endpoint.html", given, error, names=sorted(set(names)), port=PORT)


@router.post("/new/endpoint", response_class=HTMLResponse)
def add_endpoint(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    store: Deployments,
    find: Finder,
    name: Line = "",
    model: Line = "",
    replicas: Line = "",
    port: Line = "",
) -> Response:
    given = {"name": name.strip(), "model": model.strip(), "replicas": replicas.strip(), "port": port.strip()}
    try:
        filled: dict[str, Any] = {field: text for field, text in given.items() if text}
        if "replicas" in filled:
            filled["replicas"] = _range(filled["replicas"])
        wanted = _valid(endpoints.NewEndpoint, filled)
        endpoints.add_endpoint(request, who, store, find, wanted)
    except TallyError as error:
        return _new(request, jobs, given, error)
    return RedirectResponse(f"/endpoints/{wanted.name}", status_code=303)


@router.get("/endpoints/{name}", response_class=HTMLResponse)
def endpoint_page(request: Request, who: Viewer, store: Deployments, name: Name) -> HTMLResponse:
    return _page(request, store, name)


def _page(
    request: Request, store: DeploymentStore, name: str, *, trial: Trial | None = None, problem: str | None = None
) -> HTMLResponse:
    now = _shown(EndpointView.of(store.get(name)))
    return page(request, "endpoint.html", now=now, trial=trial, problem=problem, status=409 if problem else 200)


@router.get("/endpoints/{name}/live", response_class=EventSourceResponse)
async def endpoint_live(
    request: Request, who: Viewer, store: Deployments, feed: Annotated[Feed, Depends(feed_of)], name: Name
) -> AsyncIterator[ServerSentEvent]:
    await run_in_threadpool(store.get, name)

    def look() -> dict[str, Any] | None:
        try:
            return _shown(EndpointView.of(store.get(name)))
        except EndpointNotFoundError:
            return None

    async for each in stream(
        request, feed, f"endpoint:{name}", look, "_endpoint.html", gone="This endpoint was deleted."
    ):
        yield each


@router.get("/endpoints/{name}/log", response_class=HTMLResponse)
def endpoint_log(who: Viewer, store: Deployments, name: Name) -> HTMLResponse:
    return HTMLResponse(render("_endpoint_log.html", endpoint=name, lines=store.printed(name, lines=LOG_LINES)))


@router.post("/endpoints/try", response_class=HTMLResponse)
def try_endpoint(
    request: Request,
    who: Operator,
    store: Deployments,
    name: Annotated[str, Form(max_length=100)],
    file: Annotated[UploadFile | None, File()] = None,
) -> HTMLResponse:
    """Has the endpoint score a file, and shows what it answers."""
    trial, problem = None, None
    try:
        content = b"" if file is None else file.file.read(MAX_BYTES + 1)
        trial = try_out(store.get(name), (file and file.filename) or "", content, request.app.state.aside)
    except EndpointNotFoundError:
        raise
    except TallyError as error:
        problem = str(error)
    if "hx-request" in request.headers:
        return HTMLResponse(render("_trial.html", trial=trial, problem=problem))
    return _page(request, store, name, trial=trial, problem=problem)


@router.post("/endpoints/{name}/scale")
def scale_endpoint(
    request: Request, who: Operator, store: Deployments, name: Name, replicas: Annotated[str, Form(max_length=100)]
) -> Response:
    return changed(
        request,
        lambda: store.scale(name, _range(replicas), who=who.name),
        "It is being scaled.",
        back=f"/endpoints/{name}",
    )


@router.post("/endpoints/{name}/versions")
def serve_version(
    request: Request,
    who: Operator,
    store: Deployments,
    find: Finder,
    name: Name,
    model: Line = "",
    share: Line = "",
) -> Response:
    def change() -> object:
        wanted: dict[str, Any] = {"model": model.strip()}
        if share.strip():
            wanted["share"] = _numbers({"share": share}, "share", 100).popitem()[1]
        return endpoints.serve_version(request, who, store, find, name, _valid(endpoints.NextVersion, wanted))

    return changed(
        request, change, "It is served once it is loaded; until then, what there was.", back=f"/endpoints/{name}"
    )


def _range(text: str) -> tuple[int, int]:
    """Replicas, least and most. Raises SpecError."""
    try:
        least, most = replicas_from(text)
    except ValueError:
        raise SpecError(f"replicas: {text!r} is neither a number nor a range such as 0..4") from None
    if most > endpoints.MOST_REPLICAS:
        raise SpecError(f"replicas: at most {endpoints.MOST_REPLICAS}, not {most}")
    return least, most


def _valid(kind: type[M], fields: Mapping[str, Any]) -> M:
    """What the API takes, of a form's fields. Raises SpecError."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise SpecError([f"{each['loc'][0]}: {each['msg']}" for each in error.errors()]) from None


@router.post("/endpoints/{name}/split")
async def split_endpoint(request: Request, who: Operator, store: Deployments, name: Name) -> Response:
    fields = {key: value for key, value in (await request.form()).items() if isinstance(value, str)}

    def change() -> object:
        wanted = [_numbers(fields, begin, percent) for begin, percent in ((SHARE, 1), (SHADOW, 100))]
        return store.share_out(name, *wanted, who=who.name)

    return await run_in_threadpool(
        changed, request, change, "Its requests are being shared out anew.", back=f"/endpoints/{name}"
    )


def _numbers(fields: dict[str, str], begin: str, parts: int) -> dict[str, float]:
    """The numbers of fields whose names begin so, of so many parts; those that are empty are left out."""
    found = {}
    for field, text in fields.items():
        if not field.startswith(begin) or not text.strip():
            continue
        try:
            number = float(text) / parts
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1e9:
            what = f"version {field.removeprefix(begin)}" if field != begin else field
            raise SpecError(f"{what}: {text!r} is no number of 0 or more")
        found[field.removeprefix(begin)] = number
    return found


@router.post("/endpoints/{name}/reload")
def reload_endpoint(request: Request, who: Operator, store: Deployments, find: Finder, name: Name) -> Response:
    return changed(
        request,
        lambda: endpoints.reload_endpoint(who, store, find, name),
        "Its model was looked up again; what that is now takes over once it is loaded.",
        back=f"/endpoints/{name}",
    )


@router.post("/endpoints/{name}/rollback")
def roll_back_endpoint(request: Request, who: Operator, store: Deployments, name: Name) -> Response:
    return changed(
        request,
        lambda: endpoints.roll_back_endpoint(who, store, name),
        "It goes back to what it served before.",
        back=f"/endpoints/{name}",
    )


@router.post("/endpoints/{name}/remove")
def remove_endpoint(who: Admin, store: Deployments, name: Name) -> Response:
    endpoints.remove_endpoint(who, store, name)
    return RedirectResponse("/endpoints", status_code=303)


def _shown(found: EndpointView) -> dict[str, Any]:
    """An endpoint as pages show it: with the figures of all its versions together."""
    observed = found.observed
    pools = observed.pools if observed is not None and found.alive else []
    figures = [each.figures for each in pools if each.figures is not None]
    total = sum(each.share for each in found.versions.values())
    return {
        "endpoint": found,
        "error": found.error and visible(found.error, lines=True),
        "pools": {each.version: each for each in pools},
        "percent": {number: 100 * each.share / total for number, each in found.versions.items()},
        "replicas": _replicas(found.limits.replicas),
        "ready": sum(each.ready for each in pools),
        "wanted": sum(each.wanted for each in pools),
        "waiting": sum(each.waiting for each in pools),
        "rate": sum(each.rate for each in figures),
        "rates": _rates(figures),
        "per": figures[0].per if figures else 0,
        "sizes": [sum(each) for each in zip_longest(*(one.sizes for one in figures), fillvalue=0)],
    }


def _rates(figures: Sequence[RecentFigures]) -> list[float]:
    """Requests per second of all versions together, oldest first."""
    return [sum(each) for each in zip_longest(*(reversed(one.rates) for one in figures), fillvalue=0.0)][::-1]


def _replicas(replicas: tuple[int, int]) -> str:
    """``2``, or ``0..4``."""
    least, most = replicas
    return str(least) if least == most else f"{least}..{most}"
