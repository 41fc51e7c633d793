"""What a page sends to an endpoint, and what it makes of the answer."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tally.database import lease
from tally.errors import EndpointError, SpecError
from tally.models.reference import ModelRef
from tally.server.aside import Aside
from tally.server.trial import SHOWN_ROWS, try_out
from tally.serving.deployments import Deployment, EndpointSpec, Version


class Endpoint(BaseHTTPRequestHandler):
    """Answers with what it is told to."""

    answer: tuple[int, str, bytes] = (200, "application/json", b"[]")
    asked: tuple[str, str | None, str | None, bytes] | None = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked = (self.path, self.headers["Authorization"], self.headers["Content-Type"], body)
        status, kind, content = self.answer
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Tally-Version", "3")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Deployment]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    spec = EndpointSpec({"3": Version("m", ModelRef("onnx", "m", Path(), "", "sha256:0"))}, {"3": 1.0})
    observed = {"state": "ready", "revision": 1, "url": f"http://127.0.0.1:{server.server_port}"}
    yield Deployment("plastic", spec, [], 1, 0.0, 0.0, "", observed, True, 0, lease.host())
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def aside() -> Iterator[Aside]:
    found = Aside()
    yield found
    found.close()


def picture(size: tuple[int, int] = (64, 48)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(content, "PNG")
    return content.getvalue()


def said(status: int, value: Any, kind: str = "application/json") -> None:
    Endpoint.answer = status, kind, value if isinstance(value, bytes) else json.dumps(value).encode()


def test_rows_are_shown_and_drawn(endpoint: Deployment, aside: Aside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_ENDPOINT_KEY", " first ,second")
    odd = {"label": ["no", "text"], "xmin": "nothing"}  # is shown and not drawn
    said(200, [{"label": "a", "score": 0.5}, odd, *[{"label": "b"}] * 99])
    trial = try_out(endpoint, "street.jpg", picture(), aside)
    assert Endpoint.asked == ("/score", "Bearer first", "application/octet-stream", picture())
    assert (trial.status, trial.version, len(trial.rows), trial.count) == (200, "3", SHOWN_ROWS, 101)
    assert trial.columns == ["label", "score", "xmin"]
    assert trial.before is not None
    assert trial.before.startswith("data:image/jpeg;base64,")
    assert trial.after is None


def test_a_picture_that_was_made_of_one(endpoint: Deployment, aside: Aside) -> None:
    said(200, picture((32, 32)), "image/png")
    trial = try_out(endpoint, "street.jpg", picture(), aside)
    assert (trial.rows, trial.text, trial.before is None, trial.after is None) == ([], "", False, False)


@pytest.mark.parametrize(
    ("status", "value", "text"),
    [(422, {"message": "no picture"}, "no picture"), (200, "plain", "plain"), (500, b"\x1b[31mred", "\\x1b[31mred")],
)
def test_an_answer_that_is_no_rows(endpoint: Deployment, aside: Aside, status: int, value: Any, text: str) -> None:
    said(status, value)
    trial = try_out(endpoint, "rows.csv", b"a,b\n1,2\n", aside)
    assert (trial.status, trial.text, trial.rows, trial.before) == (status, text, [], None)
    assert Endpoint.asked is not None
    assert Endpoint.asked[2] == "text/csv"


def test_an_answer_that_is_long_is_cut(endpoint: Deployment, aside: Aside) -> None:
    said(200, b"x" * 100_000, "text/plain")
    assert try_out(endpoint, "a.bin", b"a", aside).text == "x" * 5000 + "…"


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1:80", "http://metadata.internal:80", "http://127.0.0.1", "http://[::2]:1"]
)
def test_only_loopback_addresses_are_asked(endpoint: Deployment, aside: Aside, url: str) -> None:
    with pytest.raises(EndpointError, match="not served at a loopback address"):
        try_out(replace(endpoint, observed={**endpoint.observed, "url": url}), "a.jpg", b"a", aside)


def test_what_cannot_be_asked(endpoint: Deployment, aside: Aside) -> None:
    with pytest.raises(EndpointError, match="on another machine"):
        try_out(replace(endpoint, host="elsewhere (1)"), "a.jpg", b"a", aside)
    with pytest.raises(EndpointError, match="plastic is down"):
        try_out(replace(endpoint, alive=False), "a.jpg", b"a", aside)
    with pytest.raises(SpecError, match="no file was chosen"):
        try_out(endpoint, "", b"", aside)
    with pytest.raises(SpecError, match="has 3 bytes: too many"):
        try_out(replace(endpoint, spec=replace(endpoint.spec, max_body=2)), "a.jpg", b"abc", aside)
    gone = replace(endpoint, observed={**endpoint.observed, "url": "http://127.0.0.1:9"})
    with pytest.raises(EndpointError, match="does not answer"):
        try_out(gone, "a.jpg", b"a", aside)
