"""Trainings, sweeps and pipelines of a server, with the methods of those of this machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from tally.cli.remote import absent
from tally.client import Client
from tally.pipelines.facade import Pipelines
from tally.pipelines.store import Node, PipelineStore
from tally.pipelines.store import RunPage as PipelinePage
from tally.pipelines.store import RunRecord as PipelineRecord
from tally.server.api.views import NodeView, PipelineView, RunView, SweepView
from tally.training.runs.store import Curve, Figures, RunPage, RunRecord, RunStore
from tally.training.sweeps.store import SweepPage, SweepRecord, SweepStore, TrialRecord

_PAGE, _POINTS, _LINES = 1000, 100_000, 10_000
"""What the API gives at once, at most: of a list, of a metric, and of a log."""


class RemoteRuns(RunStore):
    """The trainings of a server."""

    engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, row_id: str) -> RunRecord:
        return _run(self._client.run(row_id))

    def values(self, run_id: str, names: Sequence[str] | None = None, *, most: int | None = None) -> dict[str, Curve]:
        found = self._client.run_values(run_id, names or (), most=most or _POINTS)
        return {name: Curve(each.steps, [_number(value) for value in each.values], each.times)
                for name, each in found.items()}  # fmt: skip

    def has_made(self, record: RunRecord) -> bool:
        return self._client.run(record.id).has_made

    def remove(self, record: RunRecord, *, keep_files: bool = False) -> None:
        self._client.delete_run(record.id, keep_files=keep_files)

    def list(
        self,
        *,
        state: str | None = None,
        kind: str | None = None,
        sweep: str | None = None,
        text: str | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> RunPage:
        found: list[RunRecord] = []
        while True:
            page = self._client.runs(
                state=cast(Any, state),
                kind=kind,
                sweep=sweep,
                text=text,
                after=after,
                limit=min(limit - len(found), _PAGE),
            )
            found += map(_run, page.runs)
            after = page.next
            if after is None or len(found) >= limit:
                return RunPage(found, after)


class RemoteSweeps(SweepStore):
    """The sweeps of a server."""

    engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, row_id: str) -> SweepRecord:
        return _sweep(self._client.sweep(row_id))

    def trials(self, sweep_id: str) -> Sequence[TrialRecord]:
        return [TrialRecord(**each.model_dump()) for each in self._client.sweep(sweep_id).trials]

    def has_made(self, record: SweepRecord) -> bool:
        return self._client.sweep(record.id).has_made

    def remove(self, record: SweepRecord) -> None:
        self._client.delete_sweep(record.id)

    def list(self, *, after: str | None = None, limit: int = 50) -> SweepPage:
        found: list[SweepRecord] = []
        while True:
            page = self._client.sweeps(after=after, limit=min(limit - len(found), _PAGE))
            found += map(_sweep, page.sweeps)
            after = page.next
            if after is None or len(found) >= limit:
                return SweepPage(found, after)


class RemotePipelineStore(PipelineStore):
    """The runs of pipelines of a server."""

    engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, row_id: str) -> PipelineRecord:
        return _pipeline(self._client.pipeline(row_id))

    def nodes(self, run_id: str) -> list[Node]:
        return [_node(each) for each in self._client.pipeline(run_id).nodes]

    def list(self, *, after: str | None = None, limit: int = 50, **wanted: Any) -> PipelinePage:
        found: list[PipelineRecord] = []
        while True:
            page = self._client.pipelines(after=after, limit=min(limit - len(found), _PAGE), **wanted)
            found += map(_pipeline, page.runs)
            after = page.next
            if after is None or len(found) >= limit:
                return PipelinePage(found, after)


class RemotePipelines(Pipelines):
    """The pipelines of a server, which drives those that go on."""

    def __init__(self, client: Client) -> None:
        super().__init__(RemotePipelineStore(client))
        self._client = client

    def answer(self, run_id: str, values: Mapping[str, str], step: str | None = None) -> list[Node]:
        return [_node(each) for each in self._client.resume_pipeline(run_id, values, step=step)]

    def resume(self, run_id: str) -> None:
        """The server does."""

    def cancel(self, run_id: str) -> None:
        self._client.cancel_pipeline(run_id)

    def delete(self, run_id: str) -> None:
        self._client.delete_pipeline(run_id)

    def printed(self, run_id: str, step: str | None = None) -> Iterator[tuple[Node, Iterable[str]]]:
        detail = self._client.pipeline(run_id)
        nodes = {each.id: _node(each) for each in detail.nodes}
        for each in self._client.pipeline_logs(detail.id, step, lines=_LINES):
            yield nodes[each.node], each.lines


def _pipeline(view: PipelineView) -> PipelineRecord:
    return PipelineRecord(spec={}, **{name: getattr(view, name) for name in PipelineView.model_fields})


def _node(view: NodeView) -> Node:
    return Node(**{name: getattr(view, name) for name in Node.__slots__})


def _run(view: RunView) -> RunRecord:
    """The training as this machine's are. What a list does not tell of it is empty."""
    empty: dict[str, Any] = {"command": [], "code": {}, "environment": {}, "data": {}}
    values = {**empty, **{name: getattr(view, name) for name in RunRecord.__slots__ if hasattr(view, name)}}
    values["metrics"] = {
        name: Figures(_number(each.last), each.step, _number(each.least), _number(each.most), each.count)
        for name, each in view.metrics.items()
    }
    return RunRecord(**{"owner_host": None, **values})


def _sweep(view: SweepView) -> SweepRecord:
    return SweepRecord(owner_host=None, **{name: getattr(view, name) for name in SweepView.model_fields})


def _number(value: float | None) -> float:
    """JSON has no NaN."""
    return math.nan if value is None else value
