"""The pages of what starts jobs by itself: schedules, watches, queues."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias, get_args
from urllib.parse import quote, urlencode
from zoneinfo import available_timezones

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import ValidationError

from tally.errors import SpecError, TallyError
from tally.jobs.facade import Jobs
from tally.jobs.spec import parsed
from tally.jobs.states import ENDED
from tally.masking import mask
from tally.server.api import queues, schedules, watches
from tally.server.api.jobs import AllJobs, JobId
from tally.server.api.views import MessageView
from tally.server.auth.guard import Admin, GuardedRoute, Operator, Viewer
from tally.server.pages.asked import scheduled
from tally.server.pages.render import Changes, changed, chosen, form_page, page, render
from tally.sources.queues.base import REASON
from tally.sources.queues.factory import is_queue
from tally.text import visible
from tally.triggers.store import ScheduleStore
from tally.triggers.watch import PARALLEL, WatchStore

router = APIRouter(include_in_schema=False, route_class=GuardedRoute)

SHOWN_RUNS, SHOWN_OBJECTS = 25, 50
LOOKED_THROUGH = 1000
"""Newest jobs that read from somewhere with a URL, in which queues are looked for."""
SHOWN_QUEUES = 50
SHOWN_DEAD, SHOWN_CHARACTERS = 50, 500
"""Dead messages of a queue, and characters of each text of them."""

QueueUrl = Annotated[str, Query(min_length=1, max_length=2000)]
Line = Annotated[str, Form(max_length=4000)]
JobFile = Annotated[str, Form(max_length=100_000)]
Overlap: TypeAlias = Literal["queue", "skip", "parallel"]
CatchUp: TypeAlias = Literal["all", "latest", "none"]


# -- schedules ---------------------------------------------------------------------------------------------------------


@router.get("/schedules", response_class=HTMLResponse)
def schedules_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    found = schedules.list_schedules(who, ScheduleStore(jobs.store.engine))
    return page(request, "schedules.html", found=found)


@router.get("/schedules/{name}", response_class=HTMLResponse)
def schedule_page(request: Request, who: Viewer, jobs: AllJobs, name: schedules.Name) -> HTMLResponse:
    found = schedules.show_schedule(who, ScheduleStore(jobs.store.engine), name, SHOWN_RUNS)
    return page(request, "schedule.html", found=found)


@router.post("/schedules/{name}/remove")
def remove_schedule(request: Request, who: Admin, jobs: AllJobs, name: schedules.Name) -> Response:
    schedules.remove_schedule(who, ScheduleStore(jobs.store.engine), name)
    return RedirectResponse("/schedules", status_code=303)


@router.post("/schedules/{name}/{action}")
def change_schedule(request: Request, who: Operator, jobs: AllJobs, name: schedules.Name, action: str) -> Response:
    store = ScheduleStore(jobs.store.engine)
    changes: Changes = {
        "pause": (lambda: schedules.pause_schedule(who, store, name), "It starts no new runs."),
        "resume": (lambda: schedules.resume_schedule(who, store, name), "It starts runs again."),
        "run": (lambda: schedules.run_now(who, store, name), "The newest interval that is over is run."),
    }
    return changed(request, *chosen(changes, action), back=f"/schedules/{name}")


@router.get("/new/schedule", response_class=HTMLResponse)
def new_schedule(request: Request, who: Operator, jobs: AllJobs, like: JobId | None = None) -> HTMLResponse:
    """The form of a schedule; like: of jobs like this one."""
    return _schedule_form(request, {} if like is None else scheduled(jobs.store.get(like).spec))


@router.post("/new/schedule", response_class=HTMLResponse)
def add_schedule(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    name: Line = "",
    cron: Line = "",
    timezone: Line = "",
    overlap: Annotated[Overlap, Form()] = "queue",
    catch_up: Annotated[CatchUp, Form()] = "all",
    since: Line = "",
    job: JobFile = "",
) -> Response:
    given = {
        "name": name.strip(), "cron": cron.strip(), "timezone": timezone.strip() or "UTC", "overlap": overlap,
        "catch_up": catch_up, "since": since.strip() or None,
    }  # fmt: skip
    try:
        added = schedules.define(
            request, who, ScheduleStore(jobs.store.engine), lambda: parsed(job, "what it does"), file="", **given
        )
    except SpecError as error:
        return _schedule_form(request, {**given, "job": job}, error)
    return RedirectResponse(f"/schedules/{added.name}", status_code=303)


def _schedule_form(request: Request, given: dict[str, Any], error: SpecError | None = None) -> HTMLResponse:
    return form_page(
        request, "new_schedule.html", given, error, overlaps=get_args(Overlap), catch_ups=get_args(CatchUp),
        zones=sorted(available_timezones()),
    )  # fmt: skip


# -- watches -----------------------------------------------------------------------------------------------------------


@router.get("/watches", response_class=HTMLResponse)
def watches_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    return page(request, "watches.html", found=watches.list_watches(who, WatchStore(jobs.store.engine)))


@router.get("/watches/{name}", response_class=HTMLResponse)
def watch_page(request: Request, who: Viewer, jobs: AllJobs, name: watches.Name) -> HTMLResponse:
    found = watches.show_watch(who, WatchStore(jobs.store.engine), name, SHOWN_OBJECTS)
    return page(request, "watch.html", found=found)


@router.post("/watches/{name}/remove")
def remove_watch(request: Request, who: Admin, jobs: AllJobs, name: watches.Name) -> Response:
    change = partial(watches.remove_watch, who, WatchStore(jobs.store.engine), name)
    return changed(request, change, "It is forgotten; its jobs stay.", back="/watches")


@router.post("/watches/{name}/{action}")
def change_watch(request: Request, who: Operator, jobs: AllJobs, name: watches.Name, action: str) -> Response:
    store = WatchStore(jobs.store.engine)
    changes: Changes = {
        "pause": (lambda: watches.pause_watch(who, store, name), "It takes nothing more for now."),
        "resume": (lambda: watches.resume_watch(who, store, name), "It goes on, with what has come meanwhile."),
    }
    return changed(request, *chosen(changes, action), back="/watches")


@router.get("/new/watch", response_class=HTMLResponse)
def new_watch(request: Request, who: Operator) -> HTMLResponse:
    return form_page(request, "new_watch.html", {}, None)


@router.post("/new/watch", response_class=HTMLResponse)
def add_watch(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    name: Line = "",
    place: Line = "",
    pattern: Line = "",
    exclude: Line = "",
    parallel: Line = "",
    existing: Annotated[bool, Form()] = False,
    job: JobFile = "",
) -> Response:
    given = {
        "name": name.strip(), "place": place.strip(), "pattern": pattern.strip() or "*",
        "exclude": exclude.strip() or None, "parallel": parallel.strip() or PARALLEL, "existing": existing,
    }  # fmt: skip
    try:
        try:
            wanted = watches.NewWatch.model_validate({**given, "job": parsed(job)})
        except ValidationError as error:
            raise SpecError([f"{each['loc'][0]}: {each['msg']}" for each in error.errors()]) from None
        watches.add_watch(request, who, WatchStore(jobs.store.engine), wanted)
    except TallyError as error:
        return form_page(request, "new_watch.html", {**given, "job": job}, error)
    return RedirectResponse(f"/watches/{quote(wanted.name)}", status_code=303)


# -- queues ------------------------------------------------------------------------------------------------------------


@router.get("/queues", response_class=HTMLResponse)
def queues_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    return page(request, "queues.html", found=_queues(jobs))


@router.get("/queues/dead", response_class=HTMLResponse)
def dead_messages(request: Request, who: Viewer, url: QueueUrl) -> HTMLResponse:
    try:
        found, problem = queues.peek_queue(request, who, url, limit=SHOWN_DEAD + 1, dead=True), None
    except TallyError as error:
        found, problem = [], str(error)
    dead = [Dead.of(each) for each in found[:SHOWN_DEAD]]
    return page(
        request, "queue.html", url=url, shown=mask(url), dead=dead, more=len(found) > SHOWN_DEAD, problem=problem
    )


@router.post("/queues/replay")
def replay_queue(
    request: Request,
    who: Operator,
    url: Annotated[str, Form(min_length=1, max_length=2000)],
    limit: Annotated[int, Form(ge=1, le=100_000)] = 1000,
) -> Response:
    change = partial(queues.replay_queue, request, who, queues.Replay(url=url, limit=limit))
    return changed(
        request, change, "Back in the queue: {now.replayed:,}.", back=f"/queues/dead?{urlencode({'url': url})}"
    )


@dataclass(frozen=True, slots=True)
class Dead:
    """A dead message as the page shows it: nothing of it is longer than a screen, or controls how text is shown.

    left_out: characters of the body that are not shown. headers: what the sender added.
    """

    reason: str
    body: str
    left_out: int
    headers: dict[str, str]

    @classmethod
    def of(cls, message: MessageView) -> Dead:
        headers = {_shown(name): _shown(value) for name, value in message.headers.items() if name != REASON}
        left_out = max(0, len(message.body) - SHOWN_CHARACTERS)
        return cls(_shown(message.headers.get(REASON, "")), _shown(message.body), left_out, headers)


def _shown(text: str) -> str:
    return visible(mask(text[:SHOWN_CHARACTERS]), lines=True) + ("…" if len(text) > SHOWN_CHARACTERS else "")


@router.get("/queues/depth", response_class=HTMLResponse)
def queue_depth(request: Request, who: Viewer, url: QueueUrl) -> HTMLResponse:
    try:
        depth, problem = queues.queue_depth(request, who, url), None
    except TallyError as error:
        depth, problem = None, str(error)
    return HTMLResponse(render("_depth.html", depth=depth, problem=problem))


def _queues(jobs: Jobs) -> list[dict[str, Any]]:
    """The queues that jobs read from, those of the newest jobs first, each with its newest job."""
    found: dict[str, dict[str, Any]] = {}
    for record in jobs.list(text="://", limit=LOOKED_THROUGH).jobs:
        for url in record.spec.get("source") or ():
            if len(found) < SHOWN_QUEUES and _is_queue(url):
                known = found.setdefault(url, {"url": url, "shown": mask(url), "job": record, "open": 0})
                known["open"] += record.state not in ENDED
    return list(found.values())


def _is_queue(url: str) -> bool:
    try:
        return is_queue(url)
    except ValueError:
        return False
