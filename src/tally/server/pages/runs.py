"""The pages of runs: what is trained and was, live curves, pictures, and a comparison."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from tally.errors import RunNotFoundError, SourceNotFoundError, TallyError
from tally.jobs.pictures import MAX_BYTES
from tally.jobs.printed import tail
from tally.server.api.jobs import feed_of
from tally.server.api.runs import RunId, Runs
from tally.server.auth.guard import Admin, GuardedRoute, Viewer
from tally.server.feed import Feed, seldom
from tally.server.middleware import POLICY_OF_FILES
from tally.server.pages.curves import AXES_TALL, AXES_WIDE, TALL, WIDE, Column, Parallel, figure, parallel, shown
from tally.server.pages.render import page, price_of, stream
from tally.training.runs.compare import best_first, differing, has_result
from tally.training.runs.store import RUN_STATES, Curve, RunRecord, RunStore
from tally.training.runs.tracking import artifacts, logged_pictures
from tally.training.scripts.script import OUTPUT

router = APIRouter(include_in_schema=False, route_class=GuardedRoute)

NEWEST = 50
LOOK_SECONDS = 1.5
"""Seconds between two looks at a run's values."""
POINTS = 300
"""Of a curve, at most."""
FIGURES, FILES, PICTURES, COMPARED = 24, 100, 24, 200
"""The most curves, files and pictures on a run's page, and runs that are compared."""
LOG_LINES = 100
SIZES = {"wide": WIDE, "tall": TALL, "axes_wide": AXES_WIDE, "axes_tall": AXES_TALL}


@router.get("/runs", response_class=HTMLResponse)
def runs_page(
    request: Request,
    who: Viewer,
    store: Runs,
    text: str = "",
    state: str = "",
    kind: str = "",
    after: str | None = None,
) -> HTMLResponse:
    wanted = state if state in RUN_STATES else None
    found = store.list(text=text or None, state=wanted, kind=kind or None, after=after, limit=NEWEST)
    return page(
        request, "runs.html", found=found.runs, next=found.next, text=text, state=state, kind=kind,
        run_states=RUN_STATES, filtered=bool(text or wanted or kind or after),
    )  # fmt: skip


@router.get("/runs/compare", response_class=HTMLResponse)
def compare_page(
    request: Request,
    who: Viewer,
    store: Runs,
    run: Annotated[list[str], Query(max_length=COMPARED)] = [],  # noqa: B006 - FastAPI copies it
    sweep: str = "",
    metric: str = "",
    lowest: bool = False,
) -> HTMLResponse:
    """Runs side by side: those that are named, the trials of a sweep, or the newest."""
    records = [store.get(each) for each in run]
    if sweep or not records:
        records += store.list(sweep=sweep or None, limit=COMPARED if sweep else NEWEST).runs
    parameters, metrics = differing(records)
    problem = None
    if metric:
        try:
            records = best_first(records, metric, lowest=lowest)
        except TallyError as error:
            problem, metric = str(error), ""
    best = records[0].id if metric and records and has_result(records[0], metric) else None
    drawn = [metric] if metric else metrics[:3]
    curves = [
        (f"{each.name} {each.id}", number, store.values(each.id, [metric], most=POINTS)[metric])
        for number, each in enumerate(records[:20])
        if metric in each.metrics
    ]
    return page(
        request, "compare_runs.html", records=records, parameters=parameters, metrics=metrics, best=best,
        asked={"run": run, "sweep": sweep, "metric": metric, "lowest": lowest}, problem=problem,
        drawing=_across(records, parameters, drawn, best), figure=figure(metric, curves) if curves else None, **SIZES,
    )  # fmt: skip


@router.get("/runs/{run}", response_class=HTMLResponse)
def run_page(request: Request, who: Viewer, store: Runs, run: RunId) -> HTMLResponse:
    record = store.get(run)
    now = _shown(store, record, store.values(record.id, most=POINTS))
    return page(request, "run.html", now=now, price=price_of(request), **SIZES)


@router.get("/runs/{run}/live", response_class=EventSourceResponse)
async def run_live(
    request: Request, who: Viewer, store: Runs, feed: Annotated[Feed, Depends(feed_of)], run: RunId
) -> AsyncIterator[ServerSentEvent]:
    run_id = (await run_in_threadpool(store.get, run)).id
    look = seldom(_Watched(store, run_id), seconds=LOOK_SECONDS)
    values = {"price": price_of(request), **SIZES}
    async for each in stream(request, feed, f"run:{run_id}", look, "_run.html", gone="This run was deleted.", **values):
        yield each


@router.get("/runs/{run}/picture")
def run_picture(
    request: Request, who: Viewer, store: Runs, run: RunId, name: Annotated[str, Query(max_length=250)], step: int
) -> Response:
    """A picture that was logged. Raises SourceNotFoundError."""
    record = store.get(run)
    found = _pictures(store, record).get(name, {}).get(step)
    if found is None or found.is_symlink() or not found.is_file() or found.stat().st_size > MAX_BYTES:
        raise SourceNotFoundError(f"run {record.id} has no picture {name!r} of step {step} on this machine")
    headers = {"Cache-Control": "private, max-age=600", "Content-Security-Policy": POLICY_OF_FILES}
    return FileResponse(found, media_type="image/png", headers=headers)


@router.post("/runs/{run}/remove")
def remove_run(who: Admin, store: Runs, run: RunId) -> Response:
    store.remove(store.get(run))
    return RedirectResponse("/runs", status_code=303)


def _across(
    records: Sequence[RunRecord], parameters: Sequence[str], metrics: Sequence[str], best: str | None
) -> Parallel | None:
    columns = [Column(name, [each.parameters.get(name) for each in records]) for name in parameters]
    columns += [
        Column(name, [each.metrics[name].last if name in each.metrics else None for each in records], is_metric=True)
        for name in metrics
    ]
    return parallel(
        [(f"{each.name} {each.id}", "best" if each.id == best else each.state) for each in records], columns
    )


class _Watched:
    """Looks at a run; its values are read again only when there are others."""

    def __init__(self, store: RunStore, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._metrics: Any = None
        self._curves: dict[str, Curve] = {}

    def __call__(self) -> dict[str, Any] | None:
        try:
            record = self._store.get(self._run_id)
            if record.metrics != self._metrics:
                self._curves = self._store.values(record.id, most=POINTS)
                self._metrics = record.metrics
        except RunNotFoundError:
            return None
        return _shown(self._store, record, self._curves)


def _shown(store: RunStore, record: RunRecord, curves: dict[str, Curve]) -> dict[str, Any]:
    """A run as its page shows it."""
    figures, further = shown({n: c for n, c in curves.items() if len(c.steps) > 1}, most=FIGURES)
    folder = Path(record.folder)
    here = store.has_made(record)  # what lies elsewhere is not shown
    files = artifacts(folder)[: FILES + 1] if here else []
    pictures = [(name, step) for name, steps in _pictures(store, record).items() for step in sorted(steps)]
    return {
        "run": record,
        "figures": figures,
        "further": further,
        "files": files[:FILES],
        "more_files": len(files) > FILES,
        "here": here,
        "pictures": pictures[-PICTURES:],
        "more_pictures": max(0, len(pictures) - PICTURES),
        "printed": tail(folder / OUTPUT, LOG_LINES) if here else [],
    }


def _pictures(store: RunStore, record: RunRecord) -> dict[str, dict[int, Path]]:
    return logged_pictures(Path(record.folder)) if store.has_made(record) else {}
