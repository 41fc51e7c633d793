"""Kept endpoints over the server's API, from Python and from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest
from click.testing import CliRunner
from tests.endpoints import echo
from tests.server import PATIENCE, Server, running

pytest.importorskip("msgspec")

import tally
from tally.cli.main import cli
from tally.errors import EndpointError, EndpointNotFoundError, SpecError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for mark in ("first", "second"):
        echo(folder / f"{mark}.py", mark=mark)
        package = folder / mark
        package.mkdir()
        echo(package / "echo.py", mark=mark)
        (package / "tally.yaml").write_text(f"name: {mark}\nentry: echo.py:Echo\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder) as server:
            yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tally.Client]:
    with tally.Client(server.url, key=server.key) as client:
        yield client


@pytest.fixture
def typed(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command on the server, and returns what it printed; what goes wrong is raised."""
    monkeypatch.setenv("TALLY_SERVER", server.url)
    monkeypatch.setenv("TALLY_KEY", server.key)

    def run(*words: object) -> str:
        done = CliRunner().invoke(cli, [*map(str, words)], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.output

    return run


def settled(client: tally.Client, name: str) -> Any:
    """The endpoint, once its last change is served or has failed."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = client.endpoint(name)
        now = found.observed
        if now is not None and now.revision == found.revision and (now.ready or now.state == "failed"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def mark(client: tally.Client, name: str, **headers: str) -> Any:
    url = client.endpoint(name).url
    assert url is not None
    return httpx2.post(f"{url}/score", content=b"x", headers=headers, timeout=PATIENCE).json().get("mark")


def test_an_endpoint_from_its_beginning_to_its_end(client: tally.Client, folder: Path) -> None:
    made = client.add_endpoint("plastic", f"{folder}/first.py", port=0, replicas=[1, 2], max_delay=0.001)
    assert (made.state, made.alive, made.url, made.observed) == ("starting", False, None, None)
    assert (made.limits.replicas, made.limits.max_delay, made.versions["1"].share) == ((1, 2), 0.001, 100.0)
    ready = settled(client, "plastic")
    assert (ready.state, ready.error, [each.ready for each in ready.observed.pools]) == ("ready", None, [1])
    assert [each.name for each in client.endpoints()] == ["plastic"]
    assert mark(client, "plastic") == "first"

    client.serve_version("plastic", f"{folder}/second.py", share=0.5, max_queue=99)
    assert (client.endpoint("plastic").limits.max_queue, client.endpoint("plastic").limits.max_delay) == (99, 0.001)
    settled(client, "plastic")
    assert {mark(client, "plastic") for _ in range(40)} == {"first", "second"}
    client.split_endpoint("plastic", {"2": 1}, shadows={"1": 1})
    now = settled(client, "plastic")
    assert (now.versions["1"].share, now.versions["1"].shadow, now.versions["2"].share) == (0, 1, 1)
    assert mark(client, "plastic") == "second"
    client.scale_endpoint("plastic", 2)
    assert settled(client, "plastic").limits.replicas == (2, 2)
    assert [each.replicas for each in client.endpoint("plastic").history] == [(1, 2)] * 3
    client.roll_back_endpoint("plastic")
    client.roll_back_endpoint("plastic")
    client.roll_back_endpoint("plastic")
    back = settled(client, "plastic")
    assert (back.history, list(back.versions), back.revision) == ([], ["1"], 7)
    assert mark(client, "plastic") == "first"
    with pytest.raises(EndpointError, match="has served nothing before"):
        client.roll_back_endpoint("plastic")

    echo(folder / "first.py", mark="mended")
    client.reload_endpoint("plastic")
    settled(client, "plastic")
    assert mark(client, "plastic") == "mended"
    assert any("is served" in line for line in client.endpoint_log("plastic"))
    deadline = time.monotonic() + PATIENCE
    while not (figures := settled(client, "plastic").observed.pools[0].figures).requests:
        assert time.monotonic() < deadline  # its process says twice a second how it does
        time.sleep(0.1)
    assert (figures.requests, figures.failed) == (1, 0)
    assert len(figures.seconds) == 3
    with pytest.raises(EndpointError, match="there is an endpoint 'plastic' already"):
        client.add_endpoint("plastic", f"{folder}/first.py")
    url = back.url
    client.remove_endpoint("plastic")
    with pytest.raises(EndpointNotFoundError, match="no endpoint 'plastic'"):
        client.endpoint("plastic")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            httpx2.get(f"{url}/healthz")
        except httpx2.HTTPError:
            break
    else:
        raise AssertionError("its process goes on")


def test_a_model_of_the_registry_and_its_alias(client: tally.Client, folder: Path) -> None:
    client.add_model("echo", str(folder / "first"), alias="champion")
    client.add_endpoint("aliased", "models:/echo@champion", port=0)
    found = settled(client, "aliased")
    assert (found.versions["1"].name, found.versions["1"].version) == ("echo", 1)
    client.add_model("echo", str(folder / "second"))
    client.serve_version("aliased", "models:/echo/2", share=0.25)
    assert settled(client, "aliased").versions["1"].share == 75
    chosen = {"X-Tally-Version": "champion"}
    assert mark(client, "aliased", **chosen) == "first"
    client.set_alias("echo", "champion", 2)  # the canary has won
    client.reload_endpoint("aliased")
    found = settled(client, "aliased")
    assert (list(found.versions), found.versions["2"].model) == (["2"], "models:/echo@champion")
    assert mark(client, "aliased") == mark(client, "aliased", **chosen) == "second"
    client.remove_endpoint("aliased")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model": "/etc/passwd"}, "not under a folder that requests may name"),
        ({"model": "os:system"}, "names code of the server's own environment"),
        ({"model": "http://127.0.0.1/m.onnx#sha256=0"}, "is a private address"),
        ({"model": "file:///etc/passwd"}, "file URLs are not taken"),
        ({"labels": "/etc/passwd"}, "labels: '/etc/passwd' is not under"),
        ({"artifacts": "/etc"}, "artifacts: '/etc' is not under"),
        ({"payloads": "/etc"}, "out: '/etc' is not under"),
        ({"replicas": [3, 2]}, "replicas: from 0 or more"),
        ({"replicas": [0, 5000]}, "less than or equal to 1000"),
        ({"name": "No Name"}, "name"),
        ({"host": "0.0.0.0"}, "host"),
        ({"timeout": 0}, "timeout: more than 0"),
    ],
)
def test_what_an_endpoint_may_not_be(client: tally.Client, folder: Path, wrong: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"name": "wrong", "model": f"{folder}/second.py", **wrong}
    with pytest.raises(SpecError, match=said):
        client.add_endpoint(**given)
    assert "wrong" not in [each.name for each in client.endpoints()]


def test_a_model_that_cannot_be_looked_up_changes_nothing(client: tally.Client, folder: Path) -> None:
    (folder / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(tally.TallyError, match=r"bad\.onnx"):
        client.add_endpoint("bad", f"{folder}/bad.onnx")
    assert "bad" not in [each.name for each in client.endpoints()]


def test_roles_once_and_the_audit_log(server: Server, client: tally.Client, folder: Path) -> None:
    roles = {role: client.add_key(f"{role}-e", role).text for role in ("viewer", "operator")}
    asked = {"name": "roles", "model": f"{folder}/second.py", "port": 0}
    with server.client(roles["viewer"]) as viewer, server.client(roles["operator"]) as operator:
        assert viewer.post("/endpoints", json=asked).status_code == 403
        first = operator.post("/endpoints", json=asked, headers={"Idempotency-Key": "make"})
        assert first.status_code == 201
        again = operator.post("/endpoints", json=asked, headers={"Idempotency-Key": "make"})
        assert (again.status_code, again.json()) == (201, first.json())
        settled(client, "roles")
        for path in ("/endpoints", "/endpoints/roles", "/endpoints/roles/log"):
            assert viewer.get(path).status_code == 200, path
        changes: dict[str, Any] = {"scale": {"replicas": [2, 2]}, "split": {"split": {"1": 1}}, "rollback": None}
        for action, body in changes.items():
            assert viewer.post(f"/endpoints/roles/{action}", json=body).status_code == 403, action
            assert operator.post(f"/endpoints/roles/{action}", json=body).status_code == 200, action
        wrong = operator.post("/endpoints/roles/split", json={"split": {"7": 1}})
        assert (wrong.status_code, "there is no version '7'" in wrong.text) == (422, True)
        assert viewer.post("/endpoints/roles/reload").status_code == 403
        for path, body in (("", {"name": "code"}), ("/roles/versions", {})):
            brought = operator.post(f"/endpoints{path}", json={**body, "model": "s3://bucket/package"})
            assert (brought.status_code, "may hold code" in brought.text) == (403, True)
        assert operator.delete("/endpoints/roles").status_code == 403
        assert settled(client, "roles").changed_by == "operator-e"
        missing = operator.get("/endpoints/role")
        assert (missing.status_code, "did you mean" in missing.text) == (404, True)
    client.remove_endpoint("roles")
    done = {(each.action, each.status) for each in client.audit(limit=100) if each.who == "operator-e"}
    assert {("add_endpoint", 201), ("scale_endpoint", 200), ("remove_endpoint", 403)} <= done


def test_from_the_command_line(client: tally.Client, typed: Callable[..., str], folder: Path, home: Path) -> None:
    base = ("deploy", f"{folder}/second.py", "--name", "typed", "--target", "local", "--port", "0")
    made = typed(*base, "--wait", "--drain", "5s")
    assert "create endpoint typed" in made
    assert f"scoring_uri: {client.endpoint('typed').url}/score" in made
    assert client.endpoint("typed").drain == 5
    assert "nothing has changed" in typed(*base, "--drain", "5s")
    assert "-drain: 5.0" in typed(*base, "--wait", "--max-batch", "4")
    assert client.endpoint("typed").limits.max_batch == 4
    with pytest.raises(SpecError, match="is not under a folder that requests may name"):
        typed("deploy", "/etc/passwd", *base[2:])
    with pytest.raises(click.UsageError, match="works from this machine"):
        typed("deploy", "image:/m", "--name", "typed", "--target", "kubernetes", "--env", "image:a/b")
    assert "ready" in typed("endpoints", "list")
    assert "ready, 1: 100%, revision 3" in typed("endpoints", "scale", "typed", "2")
    shown = typed("endpoints", "show", "typed")
    assert f"version 1: {folder}/second.py (100 %)" in shown
    assert shown.count("  replica ") == 2
    assert json.loads(typed("endpoints", "show", "typed", "--json"))["replicas"] == [2, 2]
    assert "revision 4" in typed("endpoints", "split", "typed", "1=5", "--shadow", "1=0.5")
    assert "revision 5" in typed("endpoints", "rollback", "typed")
    assert "revision 5" in typed("endpoints", "reload", "typed")  # it is what it was
    assert "is served" in typed("endpoints", "logs", "typed", "-n", "20")
    with pytest.raises(SpecError, match="there is no version '9'"):
        typed("endpoints", "split", "typed", "9=1")
    assert "is served no more" in typed("endpoints", "delete", "typed", "--yes")
    with pytest.raises(EndpointNotFoundError, match="no endpoint 'typed'"):
        typed("endpoints", "show", "typed")
    assert not (home / "tally.db").exists(), "nothing of that happened here"
