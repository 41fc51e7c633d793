"""The pages of pipelines: runs of workflows, the tree of one while it goes on, logs, and what waits for a person."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as InPath
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from tally.errors import PipelineNotFoundError
from tally.jobs.printed import tail
from tally.jobs.spec import shown
from tally.masking import mask
from tally.pipelines.facade import Pipelines
from tally.pipelines.store import ENDED, RUN_STATES, RunRecord
from tally.pipelines.tree import drawn, duration
from tally.server.api import pipelines as api
from tally.server.api.jobs import feed_of
from tally.server.api.pipelines import AllPipelines, Answer, PipelineId
from tally.server.auth.guard import Admin, GuardedRoute, Operator, Viewer
from tally.server.feed import Feed, seldom
from tally.server.pages.render import Changes, changed, chosen, filled_in, page, stream
from tally.server.pages.runs import LOOK_SECONDS

router = APIRouter(include_in_schema=False, route_class=GuardedRoute)

NEWEST, ROWS, LINES = 50, 1000, 1000
"""Runs in the list, rows of the tree of one, and lines of a step's log, at most."""
VALUE = "value."
"""What the fields of a form begin with that hold values for a step."""


_FIXED: dict[str, Any] = {"ended": ENDED, "value": VALUE}


@router.get("/pipelines", response_class=HTMLResponse)
def pipelines_page(
    request: Request,
    who: Viewer,
    pipelines: AllPipelines,
    text: str = "",
    state: str = "",
    after: str | None = None,
) -> HTMLResponse:
    wanted = state if state in RUN_STATES else None
    found = pipelines.store.list(text=text or None, state=wanted, after=after, limit=NEWEST)
    runs = [replace(each, parameters=shown(each.parameters)) for each in found.runs]
    return page(
        request, "pipelines.html", found=runs, next=found.next, text=text, state=state, run_states=RUN_STATES,
        filtered=bool(text or wanted or after),
    )  # fmt: skip


@router.get("/pipelines/{run}", response_class=HTMLResponse)
def pipeline_page(request: Request, who: Viewer, pipelines: AllPipelines, run: PipelineId) -> HTMLResponse:
    now = _shown(pipelines, pipelines.store.get(run))
    return page(request, "pipeline.html", now=now, **_FIXED)


@router.get("/pipelines/{run}/live", response_class=EventSourceResponse)
async def pipeline_live(
    request: Request, who: Viewer, pipelines: AllPipelines, feed: Annotated[Feed, Depends(feed_of)], run: PipelineId
) -> AsyncIterator[ServerSentEvent]:
    run_id = (await run_in_threadpool(pipelines.store.get, run)).id

    def look() -> dict[str, Any] | None:
        try:
            return _shown(pipelines, pipelines.store.get(run_id))
        except PipelineNotFoundError:
            return None

    async for each in stream(
        request, feed, f"pipeline:{run_id}", seldom(look, seconds=LOOK_SECONDS), "_pipeline.html",
        gone="This run was deleted.", **_FIXED,
    ):  # fmt: skip
        yield each


@router.get("/pipelines/{run}/steps/{step}", response_class=HTMLResponse)
def step_page(
    request: Request,
    who: Viewer,
    pipelines: AllPipelines,
    run: PipelineId,
    step: Annotated[str, InPath(max_length=100)],
) -> HTMLResponse:
    """One node: what went in, what came out, and what it has printed. Raises PipelineNotFoundError."""
    record = pipelines.store.get(run)
    node = next((each for each in pipelines.store.nodes(record.id) if each.id == step), None)
    if node is None:
        raise PipelineNotFoundError(f"pipeline {record.id} has no step {step!r}")
    here = pipelines.store.has_made(record)
    lines: list[str] = []
    if here and node.kind == "Pod":
        lines = [
            line for _, files in pipelines.logs(record.id, node.id) for each in files for line in tail(each, LINES)
        ]
    outputs = dict(node.outputs.get("parameters") or {})
    if node.outputs.get("result") is not None:
        outputs["result"] = node.outputs["result"]
    now = {
        "inputs": shown(node.inputs.get("parameters") or {}),
        "supplied": shown(node.supplied or {}),
        "outputs": shown(outputs),
        "lines": lines[-LINES:],
    }
    node = replace(node, display=mask(node.display))
    return page(request, "pipeline_step.html", run=record, node=node, here=here, now=now, most=LINES)


@router.post("/pipelines/{run}/remove")
def remove_pipeline(who: Admin, pipelines: AllPipelines, run: PipelineId) -> Response:
    pipelines.delete(run)
    return RedirectResponse("/pipelines", status_code=303)


@router.post("/pipelines/{run}/answer")
async def answer_pipeline(request: Request, who: Operator, pipelines: AllPipelines, run: PipelineId) -> Response:
    """Let a step that waits go on, with the values of the form."""
    fields, _ = filled_in(await request.form())
    values = {name.removeprefix(VALUE): value for name, value in fields.items() if name.startswith(VALUE)}
    answer = Answer(step=fields.get("step"), values=values)
    return await run_in_threadpool(
        changed,
        request,
        lambda: api.resume_pipeline(who, pipelines, run, answer),
        "It goes on.",
        back=f"/pipelines/{run}",
    )


@router.post("/pipelines/{run}/{action}")
def change_pipeline(request: Request, who: Operator, pipelines: AllPipelines, run: PipelineId, action: str) -> Response:
    changes: Changes = {
        "cancel": (
            lambda: api.cancel_pipeline(who, pipelines, run),
            "It is being stopped; its exit handler is run.",
        ),
        "resume": (lambda: api.resume_pipeline(who, pipelines, run, Answer(step=None)), "It goes on."),
    }
    return changed(request, *chosen(changes, action), back=f"/pipelines/{run}")


def _shown(pipelines: Pipelines, record: RunRecord) -> dict[str, Any]:
    """A run as its page shows it."""
    nodes = pipelines.store.nodes(record.id)
    rows = [
        (
            replace(node, display=mask(node.display)),
            tree.removesuffix(node.display),
            duration(node) if node.done or record.alive else "",
        )
        for node, tree in drawn(nodes[:ROWS])
    ]
    top = next((each for each in nodes if not each.parent), None)
    return {
        "run": replace(record, spec={}, parameters=shown(record.parameters)),
        "seconds": (record.finished_at or (time.time() if record.alive else 0)) - record.created_at
        if record.alive or record.finished_at
        else 0,
        "outputs": shown((top.outputs.get("parameters") or {}) if top is not None else {}),
        "rows": rows,
        "more": max(0, len(nodes) - ROWS),
        "questions": pipelines.questions(record.id),
        "here": pipelines.store.has_made(record),
    }
