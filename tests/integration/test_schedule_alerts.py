"""Schedules and alerts together: an hour without data tells the webhook, and what was left over is sent later."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import tally
from tally.alerts import delivery
from tally.alerts.alert import alerts_of
from tally.jobs.facade import Jobs

Cli = Callable[..., Any]
DEADLINE = 60.0


@contextmanager
def receiver(port: int = 0) -> Iterator[tuple[str, queue.SimpleQueue[dict[str, Any]]]]:
    """A server on this machine: its address, and the messages that it gets."""
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", messages
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_WEBHOOK_SECRET", "whsec_" + "c2VjcmV0" * 6)


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    path = tmp_path / "scorer.py"
    path.write_text(
        "import tally\n\n\nclass Twice(tally.Scorer):\n    input = 'table'\n\n"
        "    def score(self, table):\n        return table.select(['Value'])\n"
    )
    return path


def test_an_interval_without_data_is_told(cli: Cli, scorer: Path, tmp_path: Path) -> None:
    with receiver() as (address, messages):
        job = tmp_path / "job.yaml"
        job.write_text(
            f"source: readings/{{interval_start_utc:%H}}.csv\nmodel: {scorer}\n"
            "out: out/{interval_start_utc:%Y-%m-%dT%H}\n"
            f"alerts: [no_data, rows > 1]\nwebhook: {address}\n"
        )
        (tmp_path / "readings").mkdir()
        (tmp_path / "readings" / "01.csv").write_text("Value\n1\n2\n")
        assert cli("schedule", "add", "hourly", job, "--cron", "0 * * * *").code == 0
        ran = cli("schedule", "backfill", "hourly", "--from", "2026-01-01T00:00", "--to", "2026-01-01T02:00")
        assert ran.code == 0, ran.err  # an interval without data is empty, which is no failure
        told = [messages.get(timeout=DEADLINE)["data"] for _ in range(2)]
        assert messages.empty()
    assert sorted((each["rule"], each["job"]["state"]) for each in told) == [
        ("no_data", "failed"),
        ("rows > 1", "finished"),
    ]
    failed = next(each for each in Jobs().store.newest() if each.state == "failed")
    assert "00.csv" in (failed.error or "")
    assert failed.id in cli("schedule", "show", "hourly").out


def test_what_was_not_delivered_is_sent_later(scorer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PATIENCE", 0.1)
    monkeypatch.setattr(delivery, "FIRST_DELAY", 0.1)
    with socket.socket() as held:  # nobody listens
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        (tmp_path / "readings.csv").write_text("Value\n1\n2\n")
        job = tally.score(
            tmp_path / "readings.csv",
            scorer,
            tmp_path / "out",
            alerts=["rows == 2"],
            webhook=f"http://127.0.0.1:{port}/hook",
            quiet=True,
        )
    store = Jobs().store
    [alert] = alerts_of(store.engine, job.id)
    assert (alert.state, alert.value) == ("pending", 2.0)
    with receiver(port) as (_, messages), delivery.delivering(store.engine):
        message = messages.get(timeout=DEADLINE)
    assert message["id"] == alert.message_id
    assert message["data"]["value"] == 2.0
