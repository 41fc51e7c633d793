"""Runs of pipelines over HTTP: their steps, logs, and what waits for a person. They are begun from the command line, or
on a schedule."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, Field

from tally.jobs.printed import tail
from tally.pipelines.drive import check_here, launch
from tally.pipelines.facade import Pipelines
from tally.pipelines.store import PipelineStore, RunState
from tally.server.api.jobs import AllJobs
from tally.server.api.views import NodeView, PipelineDetail, PipelineList, PipelineView, StepLog
from tally.server.auth.guard import Admin, Operator, Viewer
from tally.server.errors import answers
from tally.server.once import OnceRoute

router = APIRouter(
    prefix="/pipelines",
    tags=["pipelines"],
    route_class=OnceRoute,
    responses=answers(400, 401, 403, 404, 409, 422, 429, 503),
)


def open_pipelines(jobs: AllJobs) -> Pipelines:
    """The pipelines of the server's database."""
    return Pipelines(PipelineStore(jobs.store.engine))


AllPipelines = Annotated[Pipelines, Depends(open_pipelines)]
PipelineId = Annotated[str, Path(max_length=200)]
Step = Annotated[str | None, Query(max_length=1000)]


class Answer(BaseModel):
    """What a person says to a run that waits. step: the one that it is for; by default, all that wait. values: by the
    name of an output."""

    step: str | None = Field(None, max_length=1000)
    values: dict[str, str] = Field(default_factory=dict)


@router.get("")
def list_pipelines(
    who: Viewer,
    pipelines: AllPipelines,
    state: RunState | None = None,
    text: Annotated[str | None, Query(description="Part of the id or name.", max_length=1000)] = None,
    since: Annotated[float | None, Query(description="Created then or later.", allow_inf_nan=False)] = None,
    until: Annotated[float | None, Query(description="Created before.", allow_inf_nan=False)] = None,
    after: Annotated[str | None, Query(max_length=1000)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> PipelineList:
    """A page of the runs, newest first: those that match all given filters."""
    page = pipelines.store.list(state=state, text=text, since=since, until=until, after=after, limit=limit)
    return PipelineList(runs=[PipelineView.of(each) for each in page.runs], next=page.next)


@router.get("/{run}")
def show_pipeline(who: Viewer, pipelines: AllPipelines, run: PipelineId) -> PipelineDetail:
    """All that is known of a run: its steps, and what waits for a person."""
    store = pipelines.store
    record = store.get(run)
    return PipelineDetail.of_one(
        record, store.nodes(record.id), pipelines.questions(record.id), has_made=store.has_made(record)
    )


@router.get("/{run}/logs")
def pipeline_logs(
    who: Viewer,
    pipelines: AllPipelines,
    run: PipelineId,
    step: Step = None,
    lines: Annotated[int, Query(ge=1, le=10_000)] = 100,
) -> list[StepLog]:
    """The last lines that each step has printed on the server's machine, or that one has, by a name of it or of its
    template. Of runs on other machines, there are none."""
    found: list[StepLog] = []
    record = pipelines.store.get(run)
    here = pipelines.store.has_made(record)
    for node, files in pipelines.logs(record.id, step):
        printed = [line for file in files for line in tail(file, lines)] if here else []
        found.append(StepLog(node=node.id, display=node.display, lines=printed[-lines:]))
    return found


@router.post("/{run}/resume", status_code=202)
def resume_pipeline(who: Operator, pipelines: AllPipelines, run: PipelineId, answer: Answer) -> list[NodeView]:
    """Go on with a run that waits or was interrupted, in a process of the server's machine.

    Answers with the steps that waited for a person and go on.
    """
    record = pipelines.store.get(run)
    check_here(pipelines, record)
    nodes = pipelines.answer(record.id, answer.values, answer.step)
    if not pipelines.store.get(record.id).alive:  # by now: one that only waits is put down
        launch(record)
    return [NodeView.of(each) for each in nodes]


@router.post("/{run}/cancel", status_code=202)
def cancel_pipeline(who: Operator, pipelines: AllPipelines, run: PipelineId) -> None:
    """Stop a run: its steps are ended, then its exit handler is run."""
    record = pipelines.store.get(run)
    check_here(pipelines, record)
    if not pipelines.tell_to_stop(record.id):
        launch(record)


@router.delete("/{run}", status_code=204)
def delete_pipeline(who: Admin, pipelines: AllPipelines, run: PipelineId) -> None:
    """Forget a run that nobody drives, with its logs and artifacts."""
    pipelines.delete(run)
