"""The pages of what starts jobs by itself: schedules, watches, queues."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from tally.errors import TallyError
from tally.jobs.facade import Jobs
from tally.jobs.states import ENDED
from tally.masking import mask
from tally.server.api import queues, schedules, watches
from tally.server.api.jobs import AllJobs
from tally.server.auth.guard import Operator, Viewer
from tally.server.pages.render import Changes, changed, chosen, page, render
from tally.sources.queues.factory import is_queue
from tally.triggers.store import ScheduleStore
from tally.triggers.watch import WatchStore

router = APIRouter(include_in_schema=False)

SHOWN_RUNS = 25
LOOKED_THROUGH = 1000
"""Newest jobs that read from somewhere with a URL, in which queues are looked for."""
SHOWN_QUEUES = 50


# -- schedules ---------------------------------------------------------------------------------------------------------


@router.get("/schedules", response_class=HTMLResponse)
def schedules_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    found = schedules.list_schedules(who, ScheduleStore(jobs.store.engine))
    return page(request, "schedules.html", found=found)


@router.get("/schedules/{name}", response_class=HTMLResponse)
def schedule_page(request: Request, who: Viewer, jobs: AllJobs, name: schedules.Name) -> HTMLResponse:
    found = schedules.show_schedule(who, ScheduleStore(jobs.store.engine), name, SHOWN_RUNS)
    return page(request, "schedule.html", found=found)


@router.post("/schedules/{name}/{action}")
def change_schedule(request: Request, who: Operator, jobs: AllJobs, name: schedules.Name, action: str) -> Response:
    store = ScheduleStore(jobs.store.engine)
    changes: Changes = {
        "pause": (lambda: schedules.pause_schedule(who, store, name), "It starts no new runs."),
        "resume": (lambda: schedules.resume_schedule(who, store, name), "It starts runs again."),
        "run": (lambda: schedules.run_now(who, store, name), "The newest interval that is over is run."),
    }
    return changed(request, *chosen(changes, action), back=f"/schedules/{name}")


# -- watches -----------------------------------------------------------------------------------------------------------


@router.get("/watches", response_class=HTMLResponse)
def watches_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    return page(request, "watches.html", found=watches.list_watches(who, WatchStore(jobs.store.engine)))


@router.post("/watches/{name}/{action}")
def change_watch(request: Request, who: Operator, jobs: AllJobs, name: watches.Name, action: str) -> Response:
    store = WatchStore(jobs.store.engine)
    changes: Changes = {
        "pause": (lambda: watches.pause_watch(who, store, name), "It takes nothing more for now."),
        "resume": (lambda: watches.resume_watch(who, store, name), "It goes on, with what has come meanwhile."),
    }
    return changed(request, *chosen(changes, action), back="/watches")


# -- queues ------------------------------------------------------------------------------------------------------------


@router.get("/queues", response_class=HTMLResponse)
def queues_page(request: Request, who: Viewer, jobs: AllJobs) -> HTMLResponse:
    return page(request, "queues.html", found=_queues(jobs))


@router.get("/queues/depth", response_class=HTMLResponse)
def queue_depth(
    request: Request, who: Viewer, url: Annotated[str, Query(min_length=1, max_length=2000)]
) -> HTMLResponse:
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
