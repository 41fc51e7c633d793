"""The workflow that is shipped: trained, judged, registered, served and tried on this machine, from one file."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import httpx2
import jsonschema
import pytest
import yaml
from tests.ports import free_ports
from tests.waiting import wait_for
from tests.workflows import kill, newest, printed, start

from tally.config import settings
from tally.database.connect import connect
from tally.demo import pictures
from tally.models.registry import open_registry
from tally.serving.deployments import DeploymentStore
from tally.training.runs.store import RunStore

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOW = REPOSITORY / "deploy" / "argo" / "train-and-serve.yaml"
SCHEMA = REPOSITORY.parent / "shared" / "schemas" / "argo" / "schema.json"
STEPS = ("info", "train", "evaluate", "register", "deploy", "smoke-test")
pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    for shape, number in pictures.pictures(96):
        folder = tmp_path / "photos" / shape
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(pictures.draw_picture(shape, number, 7))
    port, board = free_ports(2)
    given = {"image-dir": tmp_path / "photos", "backbone": "tally:shapes", "cut": "features", "training-steps": 60}
    given |= {"port": port, "tensorboard-port": board}
    flags = [f"{name}={value}" for name, value in given.items()]
    return [WORKFLOW, *(word for flag in flags for word in ("-p", flag)), "--share", tmp_path]


def board(arguments: list[object]) -> str:
    [port] = [str(each).partition("=")[2] for each in arguments if str(each).startswith("tensorboard-port=")]
    return f"http://127.0.0.1:{port}/data/runs"


def test_from_pictures_to_an_endpoint_that_answers(tmp_path: Path, arguments: list[object]) -> None:
    log = tmp_path / "log"
    process = start("run", *arguments, "-p", "gate=0.5", "-p", "learning-rate=0.1", log=log)

    def shown() -> list[str]:
        try:
            return list(httpx2.get(board(arguments), timeout=5).json())
        except (httpx2.HTTPError, ValueError):
            return []

    wait_for(lambda: any(each.endswith("/train") for each in shown()), process, 120, log.read_text)  # while it runs
    assert process.wait(timeout=120) == 0, log.read_text()
    _, record, nodes = newest()
    assert {name: nodes[name].phase for name in (*STEPS, "tensorboard", "sweep")} == {
        **dict.fromkeys((*STEPS, "tensorboard"), "Succeeded"), "sweep": "Skipped"
    }  # fmt: skip
    [run] = RunStore.open().list(text=record.name).runs
    assert (run.parameters["learning_rate"], run.parameters["how_many_training_steps"]) == (0.1, 60)
    version = open_registry().get("models:/classifier@champion")
    assert version.metadata["metrics"] == {"test_accuracy": run.metrics["test_accuracy"].last}
    endpoint = DeploymentStore(connect(settings().database)).get("classifier")
    assert [each.ref.hash for each in endpoint.spec.versions.values()] == [version.hash]
    assert f"{record.name} ended: Succeeded" in printed()

    assert start("run", *arguments, "-p", "gate=0.999999", "-p", "tensorboard=false", log=log).wait(120) == 1
    _, record, nodes = newest()
    assert "and 0.999999 is needed" in printed("evaluate")
    assert nodes["evaluate"].phase == "Failed"
    assert "register" not in nodes
    assert f"{record.name} ended: Failed" in printed()
    assert len(open_registry().list()) == 1


@pytest.mark.skipif("TALLY_TEST_FULL" not in os.environ, reason="takes some minutes; TALLY_TEST_FULL=1 runs it")
def test_its_driver_is_killed_in_every_step_and_in_the_exit_handler(tmp_path: Path, arguments: list[object]) -> None:
    log = tmp_path / "log"
    process = start("run", *arguments, "-p", "gate=0.5", log=log)
    for step in (*STEPS, f"{'*'}.onExit"):

        def runs(step: str = step) -> bool:
            try:
                nodes = newest()[2]
            except IndexError:
                return False
            found = [each for name, each in nodes.items() if name == step or (step[0] == "*" and "onExit" in name)]
            return any(each.phase != "Pending" for each in found)

        wait_for(runs, process, 120, log.read_text)
        if process.poll() is None:
            kill(process)
            process = start("resume", newest()[1].id, log=log)
    assert process.wait(timeout=120) == 0, log.read_text()
    _, record, nodes = newest()
    assert record.state == "succeeded"
    assert Counter(each.phase for each in nodes.values() if each.kind == "Pod") == {"Succeeded": len(STEPS) + 2}
    assert len(RunStore.open().list(text=record.name).runs) == 1
    assert len(open_registry().list()) == 1
    assert printed().count(f"{record.name} ended: Succeeded") == 1


def test_argo_takes_the_files() -> None:
    """By Argo's own schema, with unknown fields refused, as its command line does."""
    if not SCHEMA.exists():
        pytest.skip("Argo's schema is not here (../shared/schemas)")
    schema = yaml.safe_load(SCHEMA.read_text("utf-8"))
    definitions = schema["definitions"]
    for each in definitions.values():
        if each.get("properties"):
            each.setdefault("additionalProperties", False)
    validator = jsonschema.Draft7Validator(
        {"$ref": "#/definitions/io.argoproj.workflow.v1alpha1.Workflow", "definitions": definitions}
    )
    document = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    for each in document["spec"]["arguments"]["parameters"]:  # Argo takes bare numbers for text, too
        each |= {"value": str(each["value"])} if "value" in each else {}
    validator.validate(document)
    used = WORKFLOW.read_text("utf-8")
    for parameter in document["spec"]["arguments"]["parameters"]:
        name = parameter["name"]
        assert f"workflow.parameters.{name}" in used or f"workflow.parameters['{name}']" in used, f"{name} does nothing"
