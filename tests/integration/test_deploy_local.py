"""``tally deploy --target local``: an endpoint that outlives the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tests.conftest import Ran
from tests.endpoints import echo

pytest.importorskip("msgspec")
grpc = pytest.importorskip("grpc")
from tests.grpc_client import OIP, Client  # noqa: E402

from tally.config import settings  # noqa: E402
from tally.database.connect import connect  # noqa: E402
from tally.serving.deployments import DeploymentStore  # noqa: E402


@pytest.fixture
def store() -> Iterator[DeploymentStore]:
    found = DeploymentStore(connect(settings().database))
    yield found
    pids = [each.observed.get("pid") for each in found.list()]
    for each in found.list():
        found.delete(each.name)
    for pid in pids:
        if pid is not None and psutil.pid_exists(pid):
            psutil.Process(pid).wait(60)


def test_it_is_made_changed_and_shared(
    tmp_path: Path, cli: Callable[..., Ran], store: DeploymentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (echo(tmp_path / f"{mark}.py", mark=mark) for mark in ("first", "second"))
    base = ("deploy", "--name", "plastic", "--target", "local", "--port", "0", "--wait")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    made = cli(*base, "first.py:Echo", "--artifacts", "weights")
    assert made.code == 0, made.err
    kept = store.get("plastic").spec.versions["1"]  # the same from every folder
    assert (kept.model, kept.options["artifacts"]) == (first, str(tmp_path / "weights"))
    url = store.get("plastic").url
    assert f"scoring_uri: {url}/score" in made.out
    assert "one replica" in made.out
    again = cli(*base, first, "--artifacts", tmp_path / "weights")
    assert again.code == 0
    assert "nothing to change" in again.out
    changed = cli(*base, second, "--share", "10%")
    assert changed.code == 0, changed.err
    assert "+" in changed.out
    spec = store.get("plastic").spec
    assert spec.split == {"1": 90.0, "2": 10.0}
    # It listens for gRPC, too, from now on: its process starts again.
    pid = store.get("plastic").observed["pid"]
    spoken = cli(*base, second, "--profile", "production", "--grpc-port", "0", "--drain", "5s")
    assert spoken.code == 0, spoken.err
    found = store.get("plastic")
    assert (found.spec.split, found.observed["pid"], found.state) == ({"2": 100.0}, pid, "ready")
    assert f"grpc: {found.grpc}" in spoken.out
    assert f"grpc: {found.grpc}" in cli("endpoints", "show", "plastic").out
    client = Client(grpc.insecure_channel(found.grpc))
    assert client.call(OIP, "ModelReady", name="plastic").ready
    client.close()
    assert sum(pool["ready"] for pool in store.get("plastic").observed["pools"]) == 2


def test_what_is_not_for_this_machine_is_refused(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    model = echo(tmp_path / "echo.py")
    local = ("deploy", "--name", "plastic", "--target", "local")
    wrong = cli(*local, "--env", "image:x", "--namespace", "n", "--port", "99999", model)
    assert wrong.code == 2
    for said in ("runs in this Python", "namespace", "99999"):
        assert said in wrong.err
    missing = cli(*local, tmp_path / "nothing.onnx")
    assert missing.code == 1
    assert "nothing.onnx" in missing.err


def test_a_dry_run_prints_and_makes_nothing(tmp_path: Path, cli: Callable[..., Ran], store: DeploymentStore) -> None:
    pictures = ("--pages", "all", "--background", "white", "--max-pixels", "200M")
    words = ("--name", "plastic", "--target", "local", "--dry-run", *pictures)
    printed = cli("deploy", echo(tmp_path / "echo.py"), *words)
    assert printed.code == 0
    assert "port: 8890" in printed.out
    found = yaml.safe_load(printed.out)
    assert [found[name] for name in ("pages", "background", "max_pixels")] == ["all", [255, 255, 255], 200_000_000]
    assert store.list() == []


def test_an_endpoint_that_cannot_be_served_says_why(
    tmp_path: Path, cli: Callable[..., Ran], store: DeploymentStore
) -> None:
    script = "def init():\n    raise RuntimeError('no weights')\n\ndef run(data):\n    pass\n"
    (tmp_path / "score.py").write_text(script)
    failed = cli("deploy", "--name", "plastic", "--target", "local", "--port", "0", "--wait", tmp_path / "score.py")
    assert failed.code == 1
    assert "no weights" in failed.err
    assert store.get("plastic").state == "failed"
