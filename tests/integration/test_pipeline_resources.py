"""Templates that act on a Kubernetes cluster; a stand-in for its API is on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from tests import apiserver
from tests.apiserver import ApiServer
from tests.conftest import Ran
from tests.objectstores import Service
from tests.workflows import newest, written

from tally.demo import pictures
from tally.models.resolve import resolve
from tally.storage import buckets, open_store

pytest.importorskip("lightkube")

Cli = Callable[..., Ran]

RETRAINING = Path(__file__).resolve().parents[2] / "deploy" / "argo" / "image-retraining.yaml"

WORKFLOW = """
  entrypoint: main
  onExit: remove
  arguments: {parameters: [{name: replicas, value: 2}]}
  templates:
  - name: main
    steps:
    - - {name: board, template: board}
    - - {name: train, template: train}
    - - name: tell
        template: tell
        arguments:
          parameters:
          - name: what
            value: "{{steps.train.outputs.parameters.ready}} of {{steps.train.outputs.parameters.image}}"
  - name: board
    resource:
      action: apply
      manifest: |
        apiVersion: v1
        kind: Service
        metadata: {name: board}
        spec: {ports: [{port: 80, targetPort: 6006}], selector: {app: board}, madeUp: kept}
        ---
        apiVersion: apps/v1
        kind: Deployment
        metadata: {name: board}
        spec:
          template: {metadata: {labels: {app: board}}, spec: {containers: [{name: board, image: "board:1"}]}}
  - name: train
    resource:
      action: create
      successCondition: status.readyReplicas == {{workflow.parameters.replicas}}
      failureCondition: status.unavailableReplicas > 0
      manifest: |
        apiVersion: apps/v1
        kind: Deployment
        metadata: {name: train}
        spec:
          replicas: {{workflow.parameters.replicas}}
          template: {metadata: {labels: {app: train}}, spec: {containers: [{name: main, image: "train:1"}]}}
    outputs:
      parameters:
      - {name: ready, valueFrom: {jsonPath: "{.status.readyReplicas}"}}
      - {name: image, valueFrom: {jqFilter: ".spec.template.spec.containers[0].image"}}
      - {name: other, valueFrom: {jsonPath: "{.status.nothing}", default: none}}
  - name: tell
    inputs: {parameters: [{name: what}]}
    container: {image: busybox, command: [echo], args: ["{{inputs.parameters.what}}"]}
  - name: remove
    resource:
      action: delete
      manifest: |
        apiVersion: apps/v1
        kind: Deployment
        metadata: {name: train}
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[ApiServer]:
    with apiserver.running() as (server, url):
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig", url)))
        yield server


def when_there(server: ApiServer, **status: int) -> Thread:
    """As a controller would: sets the status of the Deployment once it is there."""

    def look() -> None:
        deadline = time.monotonic() + 60
        while server.get("deployments", "train") is None and time.monotonic() < deadline:
            time.sleep(0.02)
        server.set_status("train", **status)

    thread = Thread(target=look)
    thread.start()
    return thread


def test_objects_are_applied_made_waited_for_and_removed(server: ApiServer, tmp_path: Path, cli: Cli) -> None:
    controller = when_there(server, readyReplicas=2)
    ran = cli("pipeline", "run", "-q", written(tmp_path, WORKFLOW), "--context", "test")
    controller.join()
    assert ran.code == 0, ran.err
    pipelines, record, nodes = newest()
    assert {nodes[name].phase for name in ("board", "train", "tell")} == {"Succeeded"}
    assert nodes["train"].outputs["parameters"] == {"ready": "2", "image": "train:1", "other": "none"}
    [(_, [log])] = list(pipelines.logs(record.id, "tell"))
    assert log.read_text() == "2 of train:1\n"
    assert server.names("deployments") == ["board"]  # the exit handler has removed the other
    service = server.get("services", "board")
    assert service is not None
    assert service["spec"]["madeUp"] == "kept"  # no field is dropped that a library does not know


def test_a_failure_condition_fails_and_what_is_there_is_not_made_again(
    server: ApiServer, tmp_path: Path, cli: Cli
) -> None:
    controller = when_there(server, unavailableReplicas=1)
    ran = cli(
        "pipeline", "run", "-q", written(tmp_path, WORKFLOW.replace("  onExit: remove\n", "")), "--context", "test"
    )
    controller.join()
    assert ran.code == 1
    assert newest()[2]["train"].message == "failureCondition 'status.unavailableReplicas > 0' evaluated true"
    again = cli("pipeline", "run", "-q", written(tmp_path, WORKFLOW), "--context", "test")  # another run
    assert again.code == 1
    assert "train" in newest()[2]["train"].message
    assert "exists" in newest()[2]["train"].message


def test_the_original_workflow_trains_into_a_bucket_and_serves(
    server: ApiServer, s3: str, s3_server: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """What its Job would do in the cluster is done here, as the manifest says it."""
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("S3_ENDPOINT", s3_server.url.removeprefix("http://"))
    monkeypatch.setenv("S3_USE_HTTPS", "false")
    monkeypatch.setattr(buckets, "_clients", {})
    store = open_store(s3)
    for shape, number in pictures.pictures(80):
        store.write(f"photos/{shape}/{number}.jpg", pictures.draw_picture(shape, number, 7))
    secrets = {"awsAccessKeyID": os.environ["AWS_ACCESS_KEY_ID"]}
    secrets["awsSecretAccessKey"] = os.environ["AWS_SECRET_ACCESS_KEY"]
    told: list[str] = []

    def controller() -> None:
        deadline = time.monotonic() + 60
        while (job := server.get("jobs", "night")) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert job is not None
        [container] = job["spec"]["template"]["spec"]["containers"]
        environment = dict(os.environ) | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for each in container["env"]:
            reference = each.get("valueFrom", {}).get("secretKeyRef")
            environment[each["name"]] = each["value"] if reference is None else secrets[reference["key"]]
        environment["TALLY_HOME"] = str(tmp_path / "pod")
        script = re.sub(r"(?<=[ \"])/(out|export)\b", rf"{tmp_path}/\1", container["command"][-1])  # its own files
        (tmp_path / "out").mkdir()
        command = [*container["command"][:-1], script]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        told.append(done.stdout + done.stderr)
        server.set_status("night", plural="jobs", **({"failed": 3} if done.returncode else {"succeeded": 1}))

    thread = Thread(target=controller)
    thread.start()
    given = {"s3-data-url": f"{s3}/photos", "s3-train-base-url": f"{s3}/models", "job-name": "night"}
    given |= {
        "model-backbone": "tally:shapes",
        "model-cut": "features",
        "model-train-steps": 40,
        "model-serving-servicetype": "ClusterIP",
    }
    given |= {"s3-endpoint": os.environ["S3_ENDPOINT"], "s3-use-https": "false"}
    words = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    ran = cli("pipeline", "run", "-q", RETRAINING, "--context", "test", *words)
    thread.join()
    assert ran.code == 0, ran.err + "".join(told)
    written_there = {entry.name for entry in store.list("models/night")}
    start = "models/night/"
    assert {f"{start}retrained_graph.onnx", f"{start}retrained_labels.txt"} < written_there
    assert {f"{start}export/inception/1/tally.yaml"} < written_there
    assert any(name.startswith(f"{start}training_summaries/") for name in written_there)
    assert server.names("deployments") == ["inception-night", "tensorboard-night"]
    service = server.get("services", "inception-night")
    assert service is not None
    assert service["spec"]["type"] == "ClusterIP"
    assert server.names("jobs") == []  # the exit handler has removed it
    command = server.get("deployments", "inception-night")["spec"]["template"]["spec"]["containers"][0]["command"]  # type: ignore[index]
    assert command[2] == f"inception={s3}/models/night/export/inception/1"
    assert resolve(command[2].partition("=")[2]).kind == "onnx"
    used = RETRAINING.read_text("utf-8")
    for name in re.findall(r"^    - \{name: ([\w-]+)", used, re.MULTILINE):
        assert f"workflow.parameters.{name}}}}}" in used or f"parameters['{name}']" in used, f"{name} does nothing"


def test_without_a_cluster_it_is_refused_by_name(tmp_path: Path, cli: Cli, home: Path) -> None:
    ran = cli("pipeline", "run", written(tmp_path, WORKFLOW))
    assert ran.code == 2
    for name in ("board", "train", "remove"):
        assert f"template '{name}', resource: it needs a Kubernetes cluster: --context names" in ran.err
    wrong = (
        WORKFLOW.replace("action: create", "action: patch")
        .replace("status.unavailableReplicas > 0", "status.x in (1)")
        .replace("{.status.nothing}", "{range .items[*]}")
    )
    ran = cli("pipeline", "check", written(tmp_path, wrong), "--context", "test")
    assert "'patch' is not done here: apply, create, get, delete are" in ran.out
    assert "'status.x in (1)' is no condition" in ran.out
    assert "the path '{range .items[*]}' is not understood here" in ran.out
