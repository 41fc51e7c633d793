"""Container groups of Azure, by the schema that its documentation gives, and applied with a stand-in for ``az``."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result

from tally.cli.main import cli
from tally.cli.serve import serve
from tally.deploy import aci
from tally.deploy.aci import AciSpec, AciTarget
from tally.deploy.spec import Environment
from tally.errors import DeployError, SpecError

PLASTIC: dict[str, Any] = {
    "name": "plastic",
    "model": "image:/opt/tally/model",
    "environment": Environment("image", "reg.example.com/plastic:1"),
    "location": "westeurope",
    "resource_group": "models",
}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": properties}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
PORT = _object("port", protocol={"enum": ["TCP", "UDP"]}, port=WHOLE)
PROBE = _object(
    "httpGet",
    httpGet=_object("port", path=TEXT, port=WHOLE, scheme={"enum": ["http", "https"]}),
    initialDelaySeconds=WHOLE,
    periodSeconds=WHOLE,
    failureThreshold=WHOLE,
    successThreshold=WHOLE,
    timeoutSeconds=WHOLE,
)
SIZE = _object("memoryInGB cpu", memoryInGB=NUMBER, cpu=NUMBER)
SCHEMA = _object(
    "name apiVersion location properties type",
    name=TEXT,
    apiVersion={"const": "2021-10-01"},
    location=TEXT,
    tags={"type": "object", "additionalProperties": {"type": "string", "maxLength": 256}},
    type={"const": "Microsoft.ContainerInstance/containerGroups"},
    properties=_object(
        "containers osType",
        containers=_list(
            _object(
                "name properties",
                name=TEXT,
                properties=_object(
                    "image resources",
                    image=TEXT,
                    command=_list(TEXT),
                    ports=_list(PORT),
                    environmentVariables=_list(_object("name", name=TEXT, value=TEXT, secureValue=TEXT)),
                    resources=_object("requests", requests=SIZE, limits=SIZE),
                    livenessProbe=PROBE,
                    readinessProbe=PROBE,
                ),
            )
        ),
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        ipAddress=_object("ports type", ports=_list(PORT), type={"enum": ["Public", "Private"]}, dnsNameLabel=TEXT),
        osType={"enum": ["Windows", "Linux"]},
    ),
)
"""What of Azure's reference of container groups in YAML (REST API 2021-10-01) is used."""

AZ = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path

import yaml

words, home = sys.argv[1:], Path(__file__).parent
with open(home / "calls", "a") as calls:
    print(json.dumps(words), file=calls)
kept = home / "group.json"
if (home / "fails").exists():
    sys.exit("ERROR: " + (home / "fails").read_text())
if words[:2] == ["container", "create"]:
    file = Path(words[words.index("--file") + 1])
    group = yaml.safe_load(file.read_text())
    (home / "mode").write_text(oct(file.stat().st_mode & 0o777))
    (home / "applied.yaml").write_text(file.read_text())
    inner = group["properties"]
    shown = {{"name": group["name"], "location": group["location"], "tags": group["tags"], "containers": []}}
    for each in inner["containers"]:
        found = each["properties"]
        size = found["resources"]["requests"]
        variables = [
            {{"name": one["name"], "value": one.get("value"), "secureValue": None}}
            for one in found["environmentVariables"]
        ]
        shown["containers"].append({{
            "name": each["name"], "image": found["image"], "command": found["command"],
            "environmentVariables": variables,
            "resources": {{"requests": {{"cpu": size["cpu"], "memoryInGb": size["memoryInGB"]}}}},
            "instanceView": {{"currentState": {{"state": "Waiting", "detailStatus": ""}}}},
        }})
    kept.write_text(json.dumps(shown))
elif words[:2] == ["container", "logs"]:
    print("loading\\nerror: no model")
elif kept.exists():
    shown = json.loads(kept.read_text())
    states = json.loads((home / "states").read_text()) if (home / "states").exists() else []
    if states:
        shown["containers"][0]["instanceView"]["currentState"] = states.pop(0)
        (home / "states").write_text(json.dumps(states))
    print(json.dumps(shown))
else:
    sys.exit("ERROR: (ResourceNotFound) The Resource 'plastic' under resource group 'models' was not found.")
"""


@pytest.fixture
def az(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an ``az`` on the PATH, and of what it keeps."""
    folder = tmp_path / "az"
    folder.mkdir()
    program = folder / "az"
    program.write_text(AZ)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TALLY_ENDPOINT_KEY", "hunter2")
    monkeypatch.setattr(aci, "PAUSE", 0.0)
    return folder


def target(**values: Any) -> AciTarget:
    return AciTarget(AciSpec(**(PLASTIC | values)))


def calls(az: Path) -> list[list[str]]:
    return [json.loads(line) for line in (az / "calls").read_text().splitlines()]


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"cpu": "500m", "memory": "1.5Gi"},
        {"variables": {"AWS_REGION": "eu-west-1"}, "secrets": ("AWS_SECRET_ACCESS_KEY",)},
        {"grpc_port": 8500},
        {"pages": "all", "background": (255, 255, 255), "max_pixels": 1_000_000},
        {"max_batch": 8, "max_delay": 0.0, "drain": 5.0, "task": "detect", "settings": ("top=5",), "trust": True},
    ],
    ids=str,
)
def test_a_file_is_as_azure_documents_it(values: dict[str, Any]) -> None:
    (group,) = yaml.safe_load_all(target(**values).plan().text)
    jsonschema.Draft202012Validator(SCHEMA).validate(group)
    (container,) = (each["properties"] for each in group["properties"]["containers"])
    port, *others = (each["port"] for each in container["ports"])
    assert group["properties"]["ipAddress"]["ports"] == container["ports"]
    assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {port}
    with serve.make_context("serve", container["command"][2:]) as context:
        assert context.params["port"] == port
        assert [context.params["grpc_port"]] == (others or [None])
    assert target(**values).uris().get("grpc", ":8500").endswith(":8500")


def test_a_replica_is_never_given_less_memory_than_asked_for() -> None:
    (group,) = yaml.safe_load_all(target(memory="1Gi").plan().text)
    size = group["properties"]["containers"][0]["properties"]["resources"]["requests"]
    assert size == {"cpu": 1.0, "memoryInGB": 1.1}


def test_no_secret_is_in_what_is_printed(az: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    plan = target(secrets=("AWS_SECRET_ACCESS_KEY",)).plan()
    assert "hunter2" not in plan.text
    assert "swordfish" not in plan.text
    assert "secureValue: ${TALLY_ENDPOINT_KEY}" in plan.text
    assert "envsubst < plastic.aci.yaml" in "\n".join(plan.notes)
    assert "Not promised" in "\n".join(plan.notes)


def test_it_is_created_and_then_updated_in_place(az: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    found = target(secrets=("AWS_SECRET_ACCESS_KEY",))
    (change,) = found.difference()
    assert (change.action, change.what) == ("create", "container group plastic")
    found.apply(quiet)
    assert target(secrets=("AWS_SECRET_ACCESS_KEY",)).difference() == []
    (create,) = [each for each in calls(az) if each[1] == "create"]
    assert create[2:4] == ["--resource-group", "models"]
    file = Path(create[create.index("--file") + 1])
    assert not file.exists()  # it held the secrets, for nobody else to read
    assert (az / "mode").read_text() == "0o600"
    assert not any("hunter2" in word or "swordfish" in word for words in calls(az) for word in words)
    applied = yaml.safe_load((az / "applied.yaml").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(applied)
    variables = applied["properties"]["containers"][0]["properties"]["environmentVariables"]
    assert {"name": "TALLY_ENDPOINT_KEY", "secureValue": "hunter2"} in variables
    assert {"name": "AWS_SECRET_ACCESS_KEY", "secureValue": "swordfish"} in variables
    (change,) = target(cpu="2", variables={"A": "1"}).difference()
    assert change.action == "change"
    assert change.lines[2:4] == ["-cpu: 1", "+cpu: 2"]


def test_a_secret_that_is_not_there_is_said(az: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLY_ENDPOINT_KEY")
    with pytest.raises(SpecError) as caught:
        target(secrets=("MISSING",)).difference()
    assert len(caught.value.problems) == 2
    assert "MISSING is not set in the environment" in str(caught.value)


def test_without_az_the_next_step_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TALLY_ENDPOINT_KEY", "k")
    with pytest.raises(SpecError, match="there is no 'az' on the PATH") as caught:
        target().difference()
    assert "--out FOLDER" in str(caught.value)
    with pytest.raises(SpecError, match="needs --resource-group"):
        target(resource_group=None).difference()


def test_what_az_says_is_passed_on_without_secrets(az: Path) -> None:
    (az / "fails").write_text("Please run 'az login' to setup account. token=abcdefghijkl")
    with pytest.raises(DeployError, match="az container show failed") as caught:
        target().difference()
    assert "az login" in (caught.value.hint or "")
    assert "abcdefghijkl" not in str(caught.value)


def put_states(az: Path, *states: dict[str, Any]) -> None:
    (az / "states").write_text(json.dumps(states))


def test_it_is_waited_for(az: Path) -> None:
    found = target()
    found.apply(quiet)
    put_states(az, {"state": "Waiting", "detailStatus": "Pulling"}, {"state": "Running", "detailStatus": ""})
    told: list[str] = []
    found.wait(told.append, 60)
    assert told == ["Waiting (Pulling)", "Running"]
    put_states(az, {"state": "Running", "detailStatus": ""})
    now = found.status()
    assert (now.exists, now.ready, now.model) == (True, 1, "image:/opt/tally/model")


@pytest.mark.parametrize(
    "state",
    [
        {"state": "Terminated", "detailStatus": "Error", "exitCode": 2},
        {"state": "Waiting", "detailStatus": "CrashLoopBackOff"},
    ],
    ids=lambda state: state["state"],
)
def test_why_it_does_not_come_is_said(az: Path, state: dict[str, Any]) -> None:
    found = target()
    found.apply(quiet)
    put_states(az, state)
    with pytest.raises(DeployError) as caught:
        found.wait(quiet, 60)
    assert f"plastic does not come up: {state['state']} ({state['detailStatus']}" in str(caught.value)
    assert "Its last lines:\n    loading\n    error: no model" in str(caught.value)


def test_what_is_not_there_is_said(az: Path) -> None:
    assert target().status().exists is False
    with pytest.raises(DeployError, match="was removed"):
        target().wait(quiet, 1)


def tally(*words: str) -> Result:
    usual = ["image:/m", "--name", "plastic", "--target", "aci", "--env", "image:a/b", "--location", "westeurope"]
    return CliRunner().invoke(cli, ["deploy", *usual, *words], standalone_mode=False)


def test_the_command_applies_and_says_where_clients_find_it(az: Path) -> None:
    result = tally("--resource-group", "models")
    assert result.exception is None
    assert result.stdout.splitlines()[-4:] == [
        "create container group plastic",
        "applied container group plastic",
        "  scoring_uri: http://plastic.westeurope.azurecontainer.io/score",
        "  swagger_uri: http://plastic.westeurope.azurecontainer.io/swagger.json",
    ]
    assert "hunter2" not in result.output


def test_the_command_prints_and_writes_files(az: Path, tmp_path: Path) -> None:
    printed = tally("--dry-run")
    assert printed.exception is None
    jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load(printed.stdout))
    assert tally("--out", str(tmp_path / "out")).exception is None
    assert (tmp_path / "out" / "plastic.aci.yaml").read_text() == printed.stdout
    assert not (az / "calls").exists()
