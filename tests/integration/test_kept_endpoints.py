"""Endpoints that are kept: their processes follow what is wanted, and are replaced when they die."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from tests import server as servers
from tests.conftest import Ran
from tests.endpoints import echo

pytest.importorskip("msgspec")
from tally.config import settings
from tally.database.connect import connect
from tally.errors import EndpointError
from tally.models.resolve import resolve
from tally.serving.deployments import Deployment, DeploymentStore, EndpointSpec, Version
from tally.serving.launch import launch, settled
from tally.serving.settings import Limits

SECONDS = 60.0


class Kept:
    """An endpoint of this test's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = DeploymentStore(connect(settings().database))

    def version(self, mark: str) -> Version:
        """A version whose answers carry this mark."""
        model = echo(self.folder / f"{mark}.py", mark=mark)
        return Version(model, resolve(model))

    def make(self, mark: str = "first") -> Deployment:
        """Have one served by a process of its own."""
        spec = EndpointSpec({"1": self.version(mark)}, {"1": 100.0}, Limits(), port=0)
        self.store.create("plastic", spec)
        return settled(self.store, "plastic", 1, SECONDS, launch("plastic"))

    def change(self, changed: Callable[[EndpointSpec], EndpointSpec]) -> Deployment:
        found = self.store.change("plastic", changed)
        return settled(self.store, "plastic", found.revision, SECONDS)

    def mark(self, **headers: str) -> Any:
        """The mark of one answer."""
        status, body = self.asked("/score", headers)
        return body["mark"] if status == 200 else body["message"]

    def asked(self, path: str, headers: Mapping[str, str] = {}) -> tuple[int, Any]:
        """Status and JSON of an answer to a POST."""
        url = urlsplit(self.store.get("plastic").url or "")
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=SECONDS)
        connection.request("POST", path, b"x", headers)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        return answer.status, body

    @property
    def pid(self) -> int:
        return int(self.store.get("plastic").observed["pid"])


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    found = Kept(tmp_path)
    yield found
    pids = [each.observed.get("pid") for each in found.store.list()]
    for each in found.store.list():
        found.store.delete(each.name)
    for pid in pids:
        if pid is not None and psutil.pid_exists(pid):
            psutil.Process(pid).wait(SECONDS)


def test_versions_shares_and_the_way_back(kept: Kept, cli: Callable[..., Ran]) -> None:
    kept.make("first")
    assert kept.mark() == "first"
    second = kept.version("second")
    kept.change(lambda spec: spec.with_model(second, share=0.25))
    marks = [kept.mark() for _ in range(80)]
    assert set(marks) == {"first", "second"}
    assert marks.count("second") < 45
    assert kept.mark(**{"X-Tally-Version": "2"}) == "second"
    assert "no version '3'" in kept.mark(**{"azureml-model-deployment": "3"})
    for what, status in (("load", 200), ("unload", 400)):  # no client changes what the row says
        assert kept.asked(f"/v2/repository/models/plastic/{what}")[0] == status
    assert kept.mark(**{"X-Tally-Version": "2"}) == "second"
    assert cli("endpoints", "split", "plastic", "1=0", "2=100").code == 0
    assert {kept.mark() for _ in range(10)} == {"second"}
    assert "no version '1'" in kept.mark(**{"X-Tally-Version": "1"})
    assert cli("endpoints", "rollback", "plastic").code == 0
    assert kept.mark(**{"X-Tally-Version": "1"}) == "first"
    assert cli("endpoints", "scale", "plastic", "2").code == 0
    shown = cli("endpoints", "show", "plastic")
    assert shown.out.count("  replica ") == 4  # two of each version
    assert "4 of 4" in cli("endpoints", "list").out
    wrong = cli("endpoints", "split", "plastic", "7=100")
    assert wrong.code == 2
    assert "there is no version '7'" in wrong.err
    assert "plastic" in cli("endpoints", "list").out


def test_a_shadow_gets_copies_and_answers_nobody(kept: Kept, cli: Callable[..., Ran]) -> None:
    kept.make("first")
    second = kept.version("second")
    kept.change(lambda spec: EndpointSpec({**spec.versions, "2": second}, {"1": 100.0}, shadows={"2": 1.0}, port=0))
    assert {kept.mark() for _ in range(20)} == {"first"}
    assert "1: 100%, 2: a copy of 100%" in cli("endpoints", "list").out
    url = urlsplit(kept.store.get("plastic").url or "")
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=SECONDS)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        if 'tally_endpoint_stage_seconds_count{model="plastic",stage="scoring",version="2"}' in text:
            break
    else:
        raise AssertionError(text)
    connection.close()


def test_a_change_that_cannot_be_served_is_told_and_changes_nothing(kept: Kept, cli: Callable[..., Ran]) -> None:
    kept.make("first")
    (kept.folder / "first.py").write_text("import no_such_module\n")
    failed = cli("endpoints", "reload", "plastic")
    assert failed.code == 1
    assert "no_such_module" in failed.err
    assert kept.mark() == "first"
    bad = kept.version("bad")
    (kept.folder / "bad.py").write_text("changed since")
    with pytest.raises(EndpointError, match="cannot be served"):
        kept.change(lambda spec: spec.with_model(bad))
    assert kept.mark() == "first"
    assert kept.store.get("plastic").state == "failed"
    assert cli("endpoints", "rollback", "plastic").code == 0
    assert kept.store.get("plastic").state == "ready"


def test_one_process_serves_it(kept: Kept) -> None:
    kept.make()
    other = launch("plastic")
    assert other.wait(SECONDS) == 0
    assert "served by another process" in settings().endpoint_log_of("plastic").read_text()
    assert kept.mark() == "first"


def test_a_server_keeps_a_process_for_each_endpoint(kept: Kept) -> None:
    spec = EndpointSpec({"1": kept.version("kept")}, {"1": 100.0}, Limits(), port=0)
    kept.store.create("plastic", spec)
    with servers.running():
        settled(kept.store, "plastic", 1, SECONDS)
        assert kept.mark() == "kept"
        before = kept.pid
        os.kill(before, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while not ((found := kept.store.get("plastic")).settled and found.alive and found.observed["pid"] != before):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert kept.mark() == "kept"
        last = kept.pid
    assert not psutil.pid_exists(last)  # it ended with its server, and another server will start it again
    assert kept.store.get("plastic").state == "down"


def test_an_endpoint_that_is_deleted_ends(kept: Kept, cli: Callable[..., Ran]) -> None:
    kept.make()
    process = psutil.Process(kept.pid)
    assert cli("endpoints", "delete", "plastic", "--yes").code == 0
    process.wait(SECONDS)
    missing = cli("endpoints", "show", "plastic")
    assert missing.code == 1
    assert "there is no endpoint 'plastic'" in missing.err


def test_a_port_that_is_taken_is_told(kept: Kept) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        spec = EndpointSpec({"1": kept.version("first")}, {"1": 100.0}, port=taken.getsockname()[1])
        kept.store.create("plastic", spec)
        process: subprocess.Popen[bytes] = launch("plastic")
        with pytest.raises(EndpointError, match="is in use"):
            settled(kept.store, "plastic", 1, SECONDS, process)
        assert process.wait(SECONDS) == 1
    assert kept.store.get("plastic").failures == 1
