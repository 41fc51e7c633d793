"""A job as an OpenTelemetry trace: a span for its drive, and in it one for planning, each chunk, and the output's end.

Spans are sent over OTLP/HTTP where the environment says to (``OTEL_EXPORTER_OTLP_ENDPOINT``, and what else is
OpenTelemetry's own) and the extra ``otel`` is installed. Otherwise nothing of it is even imported. They are made of the
job's events, so workers know nothing of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import tally
from tally.jobs.events import ChunkDone, Event, Events, Finalizing, Finished, Planned, WorkerLost
from tally.masking import mask

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NAMED_BY = ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES")


@contextmanager
def traced(job_id: str, events: Events) -> Iterator[None]:
    """Meanwhile, this process drives the job: make a trace of its events, if somebody receives it.

    In the end, waits until all is sent, or for half a minute.
    """
    if not any(map(os.environ.get, _ENDPOINTS)):
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        yield
        return
    named = any(map(os.environ.get, _NAMED_BY))
    # Not the process's own provider: that is the caller's, who may trace something else.
    provider = TracerProvider(
        resource=Resource.create({} if named else {SERVICE_NAME: "tally"}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    spans = _Spans(provider.get_tracer("tally", tally.__version__), job_id)
    events.subscribe(spans)
    try:
        yield
    finally:
        spans.end()
        provider.shutdown()


class _Spans:
    """The spans of one drive; called with each event."""

    def __init__(self, tracer: Tracer, job_id: str) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._drive = tracer.start_span("tally.drive", attributes={"tally.job": job_id})
        self._inside = set_span_in_context(self._drive)
        self._plan: Span | None = tracer.start_span("tally.plan", self._inside)
        self._finalize: Span | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Planned(items):
                if self._plan is not None:
                    self._plan.set_attribute("tally.items", items)
                    self._plan.end()
                    self._plan = None
            case ChunkDone():
                self._chunk(event)
            case WorkerLost(first, count, error):
                self._drive.add_event("worker lost", {"tally.first": first, "tally.items": count, "error": mask(error)})
            case Finalizing():
                self._finalize = self._tracer.start_span("tally.finalize", self._inside)
            case Finished(_, state, failure):
                self._drive.set_attribute("tally.state", state)
                if failure is not None:
                    self._fail(failure)
            case _:
                pass

    def _chunk(self, done: ChunkDone) -> None:
        """The worker's own clock may differ, so the span ends when its commit is known."""
        now = time.time_ns()
        stages = {f"tally.{stage}_seconds": seconds for stage, seconds in done.stages.items()}
        span = self._tracer.start_span(
            "tally.chunk",
            self._inside,
            start_time=now - int(done.seconds * 1e9),
            attributes={
                "tally.first": done.first,
                "tally.items": done.count,
                "tally.dead": done.dead,
                "tally.rows": done.rows,
                **stages,
            },
        )
        span.end(now)

    def _fail(self, error: Exception) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._drive.set_status(Status(StatusCode.ERROR, mask(str(error))))

    def end(self) -> None:
        """The process has put the job down."""
        for span in (self._plan, self._finalize, self._drive):
            if span is not None:
                span.end()
