"""Jobs as OpenTelemetry traces, sent to a receiver of OTLP/HTTP on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tally
from tally.errors import JobError

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

SCORER = """
import os
import tally

class Lengths(tally.Scorer):
    input = "bytes"
    columns = {"length": "int64", "told": "string"}

    def score(self, batch):
        if b"bad" in batch:
            raise ValueError("password=hunter2")
        return [{"length": len(each), "told": os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")} for each in batch]
"""

Spans = dict[str, list[Any]]


@contextmanager
def receiver() -> Iterator[tuple[str, list[Any], list[str]]]:
    """A collector: its address, the resources with their spans that it gets, and the keys that were sent along."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[Any] = []
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            got.extend(ExportTraceServiceRequest.FromString(content).resource_spans)
            keys.append(self.headers.get("x-collector-key", ""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got, keys
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def by_name(got: list[Any]) -> Spans:
    found: Spans = {}
    for span in (span for resource in got for scope in resource.scope_spans for span in scope.spans):
        found.setdefault(span.name, []).append(span)
    return found


def told(having: Any) -> dict[str, Any]:
    """The attributes, as plain values."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in having.attributes}


@pytest.fixture
def folder(tmp_path: Path, home: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number:02}.txt").write_text("x" * number)
    (tmp_path / "scorer.py").write_text(SCORER)
    return tmp_path


def score(folder: Path, **options: Any) -> tally.Job:
    return tally.score(
        folder / "in", folder / "scorer.py", folder / "out", workers=1, batch_size=4, quiet=True, **options
    )


def test_a_job_is_a_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "in" / "bad.txt").write_text("bad")
    with receiver() as (address, got, keys):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=hunter2")
        job = score(folder)
    assert {told(each.resource)["service.name"] for each in got} == {"tally"}
    spans = by_name(got)
    (drive,), (plan,), (finalize,) = (spans[f"tally.{name}"] for name in ("drive", "plan", "finalize"))
    chunks = spans["tally.chunk"]
    assert {span.trace_id for each in spans.values() for span in each} == {drive.trace_id}
    assert {span.parent_span_id for span in (plan, finalize, *chunks)} == {drive.span_id}
    assert told(drive) == {"tally.job": job.id, "tally.state": "finished"}
    assert told(plan) == {"tally.items": 13}
    attributes = [told(each) for each in chunks]
    assert sum(each["tally.items"] for each in attributes) == 13
    assert sum(each["tally.rows"] for each in attributes) == 12
    assert sum(each["tally.dead"] for each in attributes) == 1
    assert min(each["tally.first"] for each in attributes) == 0
    for span, each in zip(chunks, attributes, strict=True):
        assert each["tally.score_seconds"] > 0
        assert {f"tally.{stage}_seconds" for stage in ("read", "decode", "score", "write")} <= set(each)
        assert span.start_time_unix_nano < span.end_time_unix_nano <= drive.end_time_unix_nano
    assert drive.start_time_unix_nano <= plan.start_time_unix_nano
    assert finalize.end_time_unix_nano <= drive.end_time_unix_nano
    assert set(keys) == {"hunter2"}
    assert set(job.results()["told"].to_pylist()) == {""}, "workers are not told the headers"


def test_a_drive_that_failed_says_so_without_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "in" / "00.txt").write_text("bad")
    with receiver() as (address, got, _):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{address}/v1/traces")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
        with pytest.raises(JobError):
            score(folder, strict=True)
    assert {told(each.resource)["service.name"] for each in got} == {"ours"}
    (drive,) = by_name(got)["tally.drive"]
    assert told(drive)["tally.state"] == "failed"
    assert drive.status.code == drive.status.STATUS_CODE_ERROR
    assert "password=***" in drive.status.message
    assert "tally.finalize" not in by_name(got)


def test_a_collector_that_is_away_fails_no_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as (address, _, _):
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    assert score(folder).record.state == "finished"


def test_nothing_is_imported_where_nobody_receives_it(folder: Path) -> None:
    program = (
        "import sys, tally\n"
        "tally.score('in', 'scorer.py', 'out', workers=1, quiet=True)\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["[]"]
