"""``/metrics``: what Prometheus reads, without a key. It says how much running jobs have done, not what they score.

Only running jobs have labels of their own, so there are never many. Numbers of a job are those that its row holds; they
go down when dead items are replayed, which Prometheus takes for a counter that began anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tally.database.lease import host
from tally.engines.spawn import workers_of
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.server.supervisor import Supervisor
from tally.sources.base import STAGES

router = APIRouter(tags=["health"])

MOST_JOBS = 1000
"""Running jobs that have numbers of their own: the newest."""


class _State(Collector):
    """What the store knows at this moment."""

    def __init__(self, jobs: Jobs, supervisor: Supervisor) -> None:
        self._jobs, self._supervisor = jobs, supervisor

    def collect(self) -> Iterator[Metric]:
        states = GaugeMetricFamily("tally_jobs", "Jobs by state.", labels=["state"])
        for state, count in self._jobs.store.counts_by_state().items():
            states.add_metric([state], count)
        yield states
        for name, text, value in (
            ("", "Coordinators of this server that have a job.", self._supervisor.running),
            ("_resting", "Those that wait, with their workers, for the next one.", self._supervisor.resting),
        ):
            yield GaugeMetricFamily(f"tally_coordinators{name}", text, value=value)
        yield from _of_jobs(self._jobs.list(state="running", limit=MOST_JOBS).jobs)


def _of_jobs(running: Iterable[JobRecord]) -> Iterator[Metric]:
    done, dead, rows, chunks, seconds = (
        CounterMetricFamily(f"tally_job_{name}", text, labels=["job"])
        for name, text in (
            ("items_done", "Items of a running job that are done, dead ones among them."),
            ("items_dead", "Items of a running job that failed for good."),
            ("rows", "Rows that a running job has written."),
            ("chunks", "Chunks of a running job that are done."),
            ("chunk_seconds", "Seconds that workers took for them; its rate is how many workers are busy."),
        )
    )
    stages = CounterMetricFamily(
        "tally_job_stage_seconds", "Seconds that workers spent in a stage, over all threads.", labels=["job", "stage"]
    )
    queued = GaugeMetricFamily("tally_job_items_queued", "Items that are planned and not done.", labels=["job"])
    workers = GaugeMetricFamily("tally_job_workers", "Workers alive on this machine.", labels=["job"])
    here = {}
    for record in running:
        values = (record.done, record.dead, record.rows, record.usage.get("chunks", 0))
        busy = record.usage.get("worker_seconds", 0.0)
        for family, value in zip((done, dead, rows, chunks, seconds), (*values, busy), strict=True):
            family.add_metric([record.id], value)
        for stage in STAGES:
            stages.add_metric([record.id, stage], record.usage.get(stage, 0.0))
        queued.add_metric([record.id], record.items - record.done)
        if record.owner_host == host() and record.owner_pid is not None:
            here[record.id] = record.owner_pid
    counts = workers_of(set(here.values()))
    for job, pid in here.items():
        workers.add_metric([job], counts[pid])
    yield from (done, dead, rows, chunks, seconds, stages, queued, workers)


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(_State(request.app.state.jobs, request.app.state.supervisor))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
