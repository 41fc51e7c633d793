"""Trainings over HTTP: what they were given and have measured. They are begun from the command line, or a program."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query

from tally.server.api.jobs import AllJobs
from tally.server.api.views import CurveView, RunDetail, RunList, RunView
from tally.server.auth.guard import Admin, Viewer
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.training.runs.store import RunState, RunStore

router = APIRouter(
    prefix="/runs", tags=["runs"], route_class=OnceRoute, responses=answers(400, 401, 403, 404, 409, 422, 429, 503)
)


def open_runs(jobs: AllJobs) -> RunStore:
    """The runs of the server's database."""
    return RunStore(jobs.store.engine)


Runs = Annotated[RunStore, Depends(open_runs)]
RunId = Annotated[str, Path(max_length=100)]
Text = Annotated[str | None, Query(max_length=1000)]


@router.get("")
def list_runs(
    who: Viewer,
    store: Runs,
    state: RunState | None = None,
    kind: Text = None,
    sweep: Text = None,
    text: Text = None,
    after: Text = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> RunList:
    """A page of the runs, newest first. `text`: part of the id or name."""
    page = store.list(state=state, kind=kind, sweep=sweep, text=text, after=after, limit=limit)
    return RunList(runs=[RunView.of(each) for each in page.runs], next=page.next)


@router.get("/{run}")
def show_run(who: Viewer, store: Runs, run: RunId) -> RunDetail:
    """All that is known of a run."""
    record = store.get(run)
    return RunDetail.of_one(record, has_made=store.has_made(record))


@router.get("/{run}/values")
def run_values(
    who: Viewer,
    store: Runs,
    run: RunId,
    metric: Annotated[list[str], Query(max_length=100)] = [],  # noqa: B006 - FastAPI copies it
    most: Annotated[int, Query(ge=2, le=100_000)] = 1000,
) -> dict[str, CurveView]:
    """The values of its metrics by step: of those that are named, or of all; at most so many of each."""
    curves = store.values(run, metric or None, most=most)
    return {name: CurveView(**each._asdict()) for name, each in curves.items()}


@router.delete("/{run}", status_code=204)
def delete_run(who: Admin, store: Runs, run: RunId, keep_files: bool = False) -> None:
    """Forget a run that nobody trains, with its files if Tally has made their folder. Its models stay."""
    store.remove(store.get(run), keep_files=keep_files)
