"""How a model gets into a container: what ``tally serve`` is told there finds it, with nothing else of this machine."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.ports import free_ports

from tally.cli.main import cli
from tally.deploy import container
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.kubernetes.target import KubernetesTarget
from tally.deploy.shipping import PLACE, shipped
from tally.deploy.spec import Environment
from tally.errors import ModelNotFoundError, SpecError
from tally.models.registry import open_registry
from tally.models.resolve import resolve

SCORE = """
import os

import helper


def init():
    global model
    model = open(os.path.join(os.environ["AZUREML_MODEL_DIR"], "weights.txt")).read()


def run(raw_data):
    os.makedirs("tmp", exist_ok=True)  # scripts write to their working directory
    with open("tmp/last", "w") as file:
        file.write(raw_data)
    return [helper.shout(raw_data), model]
"""

PICTURES = ("--pages", "all", "--background", "#ff8000", "--max-pixels", "200M")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A scoring script of Azure ML's kind, with a module beside it, and weights."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "score.py").write_text(SCORE)
    (folder / "helper.py").write_text("def shout(text):\n    return text.upper()\n")
    (folder / "weights.txt").write_text("heavy")
    (folder / "tally.yaml").write_text("entry: score.py\nname: shouting\n")
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "home"))


def spec(model: str, environment: str = "image:a/b", **values: Any) -> KubernetesSpec:
    return KubernetesSpec(name="shouting", model=model, environment=Environment.parse(environment), **values)


def tally(*words: str) -> Result:
    return CliRunner().invoke(
        cli, ["deploy", *words, "--name", "shouting", "--target", "kubernetes"], standalone_mode=False
    )


def test_a_registered_model_of_a_bucket_is_fixed_and_needs_no_database(
    script: Path, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TALLY_REGISTRY", f"{s3}/registry")
    registry = open_registry()
    first = registry.add("shouting", resolve(script), alias="champion")
    found = shipped(spec("models:/shouting@champion"))
    assert found.served == registry.mirror(first)
    assert "models:/shouting/1" in found.text
    assert found.fixed
    (script / "weights.txt").write_text("heavier")
    registry.add("shouting", resolve(script), alias="champion")
    again = shipped(spec("models:/shouting@champion"))
    assert again.served != found.served  # an alias that has moved is a difference, which an update rolls out
    for name in ("TALLY_REGISTRY", "TALLY_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "elsewhere"))
    assert resolve(found.served).hash == first.hash


def test_a_registered_model_of_a_folder_is_refused_with_what_to_do(script: Path) -> None:
    open_registry().add("shouting", resolve(script))
    with pytest.raises(SpecError, match="is kept in a folder of this machine") as caught:
        shipped(spec("models:/shouting"))
    assert "TALLY_REGISTRY" in str(caught.value)
    assert shipped(spec("models:/shouting", "pip:r.txt", image="a/b")).served == PLACE


def test_a_model_in_a_bucket_is_fetched_from_there(script: Path, s3: str) -> None:
    from tally.storage import open_store

    store = open_store(f"{s3}/model")
    for path in script.iterdir():
        store.upload(path.name, path)
    found = shipped(spec(f"{s3}/model"))
    assert found.served == f"{s3}/model"
    assert not found.fixed
    notes = KubernetesTarget(spec(f"{s3}/model")).plan().notes
    assert any("takes what is there when it starts" in note for note in notes)
    with pytest.raises(ModelNotFoundError):
        shipped(spec(f"{s3}/nothing"))


def test_a_model_of_this_machine_is_refused_with_what_to_do(script: Path) -> None:
    for environment in ("image:a/b", f"containerfile:{script / 'score.py'}"):
        image = None if environment.startswith("image") else "a/b"
        with pytest.raises(SpecError, match="is on this machine, and no container sees it") as caught:
            shipped(spec(str(script), environment, image=image))
        assert "image:/path" in str(caught.value)
    with pytest.raises(ModelNotFoundError):
        shipped(spec(str(script / "missing.onnx")))
    with pytest.raises(SpecError, match="is on this machine"):
        shipped(spec(f"file://{script}"))


def test_labels_and_artifacts_are_where_containers_see_them(script: Path, s3: str, tmp_path: Path) -> None:
    found = shipped(spec("image:/m", labels="image:/opt/labels.txt", artifacts=f"{s3}/weights"))
    assert (found.labels, found.artifacts, found.fixed) == ("/opt/labels.txt", f"{s3}/weights", False)
    command = container.command(spec("image:/m"), found, port=1, grpc_port=None)
    assert command[-4:] == ["--labels", "/opt/labels.txt", "--artifacts", f"{s3}/weights"]
    for values, said in (
        ({"labels": "labels.txt"}, "labels: labels.txt is on this machine, and no container sees it"),
        ({"artifacts": "image:relative"}, "artifacts: image:relative is no absolute path"),
        ({"artifacts": "s3://key:hunter2@b/w"}, "artifacts: .* has a secret in it"),
    ):
        with pytest.raises(SpecError, match=said):
            shipped(spec("image:/m", **values))
    with pytest.raises(SpecError, match="labels: image:/l is in an image, and the package"):
        shipped(spec(str(script), "pip:r.txt", image="a/b", labels="image:/l"))


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a/", "//a", "/a\nb"])
def test_a_path_in_the_image_is_a_plain_one(path: str) -> None:
    with pytest.raises(SpecError, match="no absolute path in the image"):
        shipped(spec(f"image:{path}"))


@pytest.mark.parametrize(
    "model",
    ["https://ana:hunter2@example.com/m.onnx#sha256=" + "0" * 64, "https://b.example.com/m.onnx?sig=hunter2#sha256="],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(model: str) -> None:
    with pytest.raises(SpecError, match="would stand in the clear") as caught:
        shipped(spec(model))
    assert "hunter2" not in str(caught.value)


def test_the_kind_of_a_model_says_what_its_image_needs(s3: str) -> None:
    from tally.storage import open_store

    open_store(s3).write("model.skops", b"")
    assert shipped(spec(f"{s3}/model.skops")).requirement == "tally-scoring[sklearn]"
    notes = KubernetesTarget(spec(f"{s3}/model.skops")).plan().notes
    assert "the image a/b has to have tally-scoring[sklearn] installed" in notes


# -- images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "name"), [("pip", "requirements.txt"), ("conda", "environment.yml")])
def test_what_an_image_is_built_from_is_written_with_the_commands(
    script: Path, tmp_path: Path, form: str, name: str
) -> None:
    file = tmp_path / "my file"
    file.write_text("requests\n")
    out = tmp_path / "out"
    words = (str(script), "--env", f"{form}:{file}", "--image", "reg.example.com/shouting:1", "--out", str(out))
    weights = tmp_path / "heavy"
    weights.mkdir()
    (weights / "weights.txt").write_text("heavier")
    words += ("--artifacts", str(weights))
    result = tally(*words, "--cpu", "2", "--max-delay", "10ms", "--variable", "A=b c", "--grpc-port", "8500", *PICTURES)
    assert result.exception is None, result.exception
    assert sorted(each.name for each in out.iterdir()) == sorted(["Containerfile", name, "model", "shouting.yaml"])
    text = (out / "Containerfile").read_text()
    assert text.startswith("FROM docker.io/")
    copied = [line.split() for line in text.splitlines() if line.startswith("COPY")]
    assert [(out / source).exists() for _, source, _ in copied] == [True, True]
    assert copied[-1][2] == PLACE
    assert "'tally-scoring[server,grpc]==0.1.0'" in text
    packed = resolve(out / "model")
    assert packed.entry == "score.py"
    assert (packed.location / packed.artifacts / "weights.txt").read_text() == "heavier"
    assert "Tally builds no images" in result.stdout
    steps = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("  ")]
    assert ["docker", "build", "-f", str(out / "Containerfile"), "-t", "reg.example.com/shouting:1", str(out)] in steps
    assert ["docker", "push", "reg.example.com/shouting:1"] in steps
    # The last command deploys the very same from the image.
    (deploy,) = [each for each in steps if each[:2] == ["tally", "deploy"]]
    again = CliRunner().invoke(cli, [*deploy[1:], "--dry-run"], standalone_mode=False)
    assert again.exception is None, again.exception
    now, then = ([*yaml.safe_load_all(text)] for text in ((out / "shouting.yaml").read_text(), again.stdout))
    assert then[2]["metadata"]["annotations"]["tally/model"] == f"image:{PLACE}"
    for each in (now, then):
        del each[2]["metadata"]["annotations"]
    assert now == then
    command = now[2]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--pages") :][:6] == [*PICTURES[:5], "200000000"]
    assert tally(*words).exception is None  # written again over what was there


def test_an_image_that_has_to_be_built_is_not_deployed(script: Path, tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("")
    words = (str(script), "--env", f"pip:{tmp_path / 'r.txt'}", "--image", "a/b")
    assert "has to be built first, and Tally builds none" in str(tally(*words).exception)
    printed = tally(*words, "--dry-run")
    assert printed.exception is None
    assert "FROM docker.io/library/python" in printed.stderr
    assert len([*yaml.safe_load_all(printed.stdout)]) == 3
    missing = tally(str(script), "--env", f"pip:{tmp_path / 'none.txt'}", "--image", "a/b", "--dry-run")
    assert "there is no file" in str(missing.exception)


def test_a_containerfile_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text("FROM mine\n")
    words = ("image:/m", "--env", f"containerfile:{tmp_path / 'Containerfile'}", "--image", "a/b")
    result = tally(*words, "--out", str(tmp_path / "out"))
    assert result.exception is None
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["shouting.yaml"]
    assert f"docker build -f {tmp_path / 'Containerfile'} -t a/b {tmp_path}" in result.stdout


# -- the container ---------------------------------------------------------------------------------------


@contextmanager
def container_of(target: KubernetesTarget, folder: Path, **moved: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The container of a plan, as a process of this machine: its command, variables and working directory, with the
    paths of its volumes moved to a folder, and its port to a free one."""
    deployment = next(each for each in target.plan().documents if each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (port,) = free_ports(1)
    work = folder / "work"
    work.mkdir()
    replace = {"8080": str(port), "0.0.0.0": "127.0.0.1", **moved}
    command = [replace.get(word, word) for word in container["command"]]
    command = [word.replace(PLACE, moved.get(PLACE, PLACE)) for word in command]
    variables = {
        each["name"]: each["value"].replace("/work", str(work)) for each in container["env"] if "value" in each
    }
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}  # of --secret
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=work,
            env=kept | variables | {"TALLY_ENDPOINT_KEY": "hunter2"},
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def ask(url: str, body: bytes | None = None, key: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, data=body, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if ask(f"{url}/readyz")[0] == 200:
                return
        except (URLError, ConnectionError):
            pass
        time.sleep(0.1)
    pytest.fail(f"it is not ready: {log.read_text()}")


@pytest.mark.parametrize("place", ["image", "bucket"])
def test_the_container_of_a_deployment_answers_clients_and_ends_when_told(
    script: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    moved = {}
    if place == "image":
        target = KubernetesTarget(spec(f"image:{PLACE}"))
        moved[PLACE] = str(script)
    else:
        monkeypatch.setenv("TALLY_REGISTRY", f"{s3}/registry")
        open_registry().add("shouting", resolve(script))
        target = KubernetesTarget(spec("models:/shouting", secrets=("bucket",)))
    folder = tmp_path / "pod"
    folder.mkdir()
    with container_of(target, folder, **moved) as (url, process):
        until_ready(url, process, folder / "log")
        assert ask(f"{url}/healthz")[0] == 200
        scoring = f"{url}/api/v1/service/shouting/score"
        assert ask(scoring, b"hello")[0] == 401
        assert ask(scoring, b"hello", "hunter2") == (200, '["HELLO", "heavy"]')
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "hunter2" not in (folder / "log").read_text()


def test_a_container_without_its_model_ends_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "pod"
    folder.mkdir()
    with container_of(KubernetesTarget(spec(f"image:{PLACE}")), folder) as (_, process):
        assert process.wait(120) == 1
    said = (folder / "log").read_text()
    assert said.startswith(f"error: there is no model at '{PLACE}'")  # what Kubernetes keeps as the pod's message
    assert "Traceback" not in said
