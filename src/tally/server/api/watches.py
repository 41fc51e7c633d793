"""Watches over HTTP: which places start a job for each upload."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, Field

from tally.jobs.spec import absolute, shown
from tally.server.api.jobs import AllJobs, given_fields
from tally.server.api.views import AddedWatch, WatchDetail
from tally.server.auth.guard import Admin, Operator, Viewer
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.server.places import check as check_spec
from tally.server.places import check_places
from tally.triggers.watch import NAME, PARALLEL, SEEN, Watch, WatchStore, fill, job_fields

router = APIRouter(
    prefix="/watches",
    tags=["watches"],
    route_class=OnceRoute,
    responses=answers(400, 401, 403, 404, 409, 422, 429, 503),
)


class NewWatch(BaseModel):
    """A watch to add. place: a folder or a bucket. job: the fields of a job file, whose source is ``{url}``."""

    name: str = Field(pattern=NAME)
    place: str = Field(min_length=1, max_length=4000, examples=["s3://bucket/in"])
    job: dict[str, Any]
    pattern: str = Field("*", min_length=1, max_length=1000)
    exclude: str | None = Field(None, min_length=1, max_length=1000)
    parallel: int = Field(PARALLEL, ge=1, le=1_000_000)
    existing: bool = Field(False, description="Take what is there already, too.")
    file: str = Field("", max_length=4000, description="Where the job file was, for people.")


def _store(jobs: AllJobs) -> WatchStore:
    return WatchStore(jobs.store.engine)


Watches = Annotated[WatchStore, Depends(_store)]
Name = Annotated[str, Path(pattern=NAME)]


@router.get("")
def list_watches(who: Viewer, store: Watches) -> list[WatchDetail]:
    """All watches, by name."""
    return [_detail(store, each, seen=0) for each in store.all()]


@router.post("", status_code=201)
def add_watch(request: Request, who: Operator, store: Watches, wanted: NewWatch) -> AddedWatch:
    """Start a job for each new object in a place."""
    roots = request.app.state.settings.roots
    place = absolute(wanted.place)
    check_places([("place", place)], roots)
    fields = job_fields(given_fields(wanted.job))
    check_spec(fill(fields, place, "some/name.ext"), roots, who)
    added, there = store.add(
        wanted.name, place, pattern=wanted.pattern, exclude=wanted.exclude, template=fields, file=wanted.file,
        parallel=wanted.parallel, existing=wanted.existing,
    )  # fmt: skip
    return AddedWatch(watch=_masked(added), there=there)


@router.get("/{name}")
def show_watch(
    who: Viewer, store: Watches, name: Name, limit: Annotated[int, Query(ge=1, le=1000)] = SEEN
) -> WatchDetail:
    """A watch, what it has seen, and the jobs that it has started."""
    return _detail(store, store.get(name), seen=limit)


@router.post("/{name}/pause")
def pause_watch(who: Operator, store: Watches, name: Name) -> Watch:
    """Take nothing more, for a while."""
    return _masked(store.pause(store.get(name).name, True))


@router.post("/{name}/resume")
def resume_watch(who: Operator, store: Watches, name: Name) -> Watch:
    """Go on; what has come meanwhile is taken."""
    return _masked(store.pause(store.get(name).name, False))


@router.delete("/{name}", status_code=204)
def remove_watch(who: Admin, store: Watches, name: Name) -> None:
    """Forget a watch; its jobs stay."""
    store.delete(store.get(name).name)


def _detail(store: WatchStore, found: Watch, *, seen: int) -> WatchDetail:
    newest = store.seen(found.name, limit=seen) if seen else []
    return WatchDetail(watch=_masked(found), objects=store.counts(found.name), seen=newest)


def _masked(found: Watch) -> Watch:
    return replace(found, template=shown(found.template))
