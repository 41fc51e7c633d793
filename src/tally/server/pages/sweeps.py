"""The pages of sweeps: what is swept and was, and the trials of one while they are trained."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from tally.errors import RunNotFoundError
from tally.server.api.jobs import feed_of
from tally.server.api.runs import Runs
from tally.server.api.sweeps import SweepId, Sweeps
from tally.server.auth.guard import Admin, GuardedRoute, Viewer
from tally.server.feed import Feed, seldom
from tally.server.pages.curves import Column, Parallel, parallel
from tally.server.pages.render import page, price_of, stream
from tally.server.pages.runs import LOOK_SECONDS, SIZES
from tally.training.runs.store import RunRecord, RunStore
from tally.training.sweeps.store import SweepRecord, SweepStore, TrialRecord, best_of

router = APIRouter(include_in_schema=False, route_class=GuardedRoute)

NEWEST, TRIALS = 50, 500
"""Sweeps in the list, and trials on the page of one, at most."""


@router.get("/sweeps", response_class=HTMLResponse)
def sweeps_page(request: Request, who: Viewer, store: Sweeps, after: str | None = None) -> HTMLResponse:
    found = store.list(after=after, limit=NEWEST)
    return page(request, "sweeps.html", found=found.sweeps, next=found.next, filtered=after is not None)


@router.get("/sweeps/{sweep}", response_class=HTMLResponse)
def sweep_page(request: Request, who: Viewer, store: Sweeps, runs: Runs, sweep: SweepId) -> HTMLResponse:
    now = _shown(store, runs, store.get(sweep))
    return page(request, "sweep.html", now=now, price=price_of(request), **SIZES)


@router.get("/sweeps/{sweep}/live", response_class=EventSourceResponse)
async def sweep_live(
    request: Request,
    who: Viewer,
    store: Sweeps,
    runs: Runs,
    feed: Annotated[Feed, Depends(feed_of)],
    sweep: SweepId,
) -> AsyncIterator[ServerSentEvent]:
    sweep_id = (await run_in_threadpool(store.get, sweep)).id

    def look() -> dict[str, Any] | None:
        try:
            return _shown(store, runs, store.get(sweep_id))
        except RunNotFoundError:
            return None

    values = {"price": price_of(request), **SIZES}
    async for each in stream(
        request, feed, f"sweep:{sweep_id}", seldom(look, seconds=LOOK_SECONDS), "_sweep.html",
        gone="This sweep was deleted.", **values,
    ):  # fmt: skip
        yield each


@router.post("/sweeps/{sweep}/remove")
def remove_sweep(who: Admin, store: Sweeps, sweep: SweepId) -> Response:
    store.remove(store.get(sweep))
    return RedirectResponse("/sweeps", status_code=303)


def _shown(store: SweepStore, runs: RunStore, record: SweepRecord) -> dict[str, Any]:
    """A sweep as its page shows it."""
    trials = list(store.trials(record.id))
    trained = {each.id: each for each in runs.list(sweep=record.id, limit=10 * TRIALS).runs}
    best = best_of(record, trials)
    trials = trials[-TRIALS:]
    metric = record.spec["metric"]
    names = list(dict.fromkeys(name for each in trials for name in each.parameters))
    values = [_value(each, trained.get(each.run_id), metric) for each in trials]
    return {
        "sweep": record,
        "best": best,
        "parameters": names,
        "trials": list(zip(trials, values, strict=True)),
        "seconds": sum(each.cost.get("seconds", 0.0) for each in trained.values()),
        "drawing": _across(trials, [value for value, _ in values], names, metric, best),
    }


def _value(trial: TrialRecord, run: RunRecord | None, metric: str) -> tuple[float | None, int | None]:
    """A trial's result, or what it measured last, and the step that it is of."""
    if trial.value is not None or run is None or metric not in run.metrics:
        return trial.value, trial.step
    return run.metrics[metric].last, run.metrics[metric].step


def _across(
    trials: Sequence[TrialRecord],
    values: Sequence[float | None],
    parameters: Sequence[str],
    metric: str,
    best: TrialRecord | None,
) -> Parallel | None:
    def kind(trial: TrialRecord) -> str:
        return "best" if best is not None and trial.number == best.number else trial.state

    columns = [Column(name, [each.parameters.get(name) for each in trials]) for name in parameters]
    columns.append(Column(metric, values, is_metric=True))
    return parallel([(f"trial {each.number}, {each.state}", kind(each)) for each in trials], columns)
