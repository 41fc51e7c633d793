"""Sweeps over HTTP: their spaces and trials. They are begun from the command line; each trial is a run."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query

from tally.server.api.jobs import AllJobs
from tally.server.api.views import SweepDetail, SweepList, SweepView
from tally.server.auth.guard import Admin, Viewer
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.training.sweeps.store import SweepStore

router = APIRouter(
    prefix="/sweeps", tags=["sweeps"], route_class=OnceRoute, responses=answers(400, 401, 403, 404, 409, 422, 429, 503)
)


def open_sweeps(jobs: AllJobs) -> SweepStore:
    """The sweeps of the server's database."""
    return SweepStore(jobs.store.engine)


Sweeps = Annotated[SweepStore, Depends(open_sweeps)]
SweepId = Annotated[str, Path(max_length=100)]


@router.get("")
def list_sweeps(
    who: Viewer,
    store: Sweeps,
    after: Annotated[str | None, Query(max_length=1000)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> SweepList:
    """A page of the sweeps, newest first."""
    page = store.list(after=after, limit=limit)
    return SweepList(sweeps=[SweepView.of(each) for each in page.sweeps], next=page.next)


@router.get("/{sweep}")
def show_sweep(who: Viewer, store: Sweeps, sweep: SweepId) -> SweepDetail:
    """All that is known of a sweep, and its trials."""
    record = store.get(sweep)
    return SweepDetail.of_one(record, store.trials(record.id), has_made=store.has_made(record))


@router.delete("/{sweep}", status_code=204)
def delete_sweep(who: Admin, store: Sweeps, sweep: SweepId) -> None:
    """Forget a sweep that nobody drives, with the runs of its trials and all files. What was registered stays."""
    store.remove(store.get(sweep))
