"""Clients that others publish ask endpoints, and are answered as the servers that they were written for do."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.endpoints import Serving, serving
from tests.environments import asked
from tests.extent import FULL

from tally import demo

SHAPES = demo.model("shapes")
CLASSES = (SHAPES / "labels.txt").read_text().split()


pytestmark = pytest.mark.skipif(not FULL, reason="each client is installed into a venv of its own: TALLY_TEST_FULL=1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    pytest.importorskip("grpc")
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, SHAPES, "--grpc-port", 0, environment={"TALLY_HOME": str(folder / "home")}) as found:
        yield found


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "half.jpg"
    image = Image.new("RGB", (96, 80), (250, 240, 230))
    image.paste((20, 40, 160), (24, 16, 72, 64))
    image.save(file)
    return file


@pytest.fixture(scope="module")
def scored(server: Serving, picture: Path) -> dict[str, Any]:
    """What ``/score`` says of the picture."""
    answer = server.ask("/score", picture.read_bytes())
    assert answer.status == 200
    found: dict[str, Any] = answer.json()
    return found


def same(outputs: dict[str, Any], scored: dict[str, Any], count: int = 2) -> bool:
    """Whether an answer of the Open Inference Protocol says of so many times this picture what ``/score`` says."""
    return {name: outputs[name] for name in ("label", "index")} == {
        name: [scored[name]] * count for name in ("label", "index")
    } and outputs["score"] == pytest.approx([scored["score"]] * count)


def test_tritons_client(server: Serving, picture: Path, scored: dict[str, Any], pytestconfig: pytest.Config) -> None:
    said = asked("triton", pytestconfig, server.grpc, ":".join(map(str, server.address)), picture)
    for how, one in said.items():
        assert one["live"] is True
        assert one["ready"] == [True, True, True]
        assert one["server"]["name"] == "tally"
        assert one["metadata"]["name"] == "shapes"
        assert [each["name"] for each in one["metadata"]["inputs"]] == ["image"]
        index = one["index"]["models"] if how == "grpc" else one["index"]
        assert [(each["name"], each["version"], each["state"]) for each in index] == [("shapes", "1", "READY")]
        assert one["names"] == ["seven", "shapes", "1"]
        assert one["all"] == ["index", "label", "score"]
        model, version, output = one["refused"]
        assert "no model 'shape'; did you mean 'shapes'?" in model[1]
        assert "no version '9'" in version[1]
        assert "outputs[0].name: there is no 'nothing'" in output[1]
        ready, gone = one["unloaded"]
        assert ready is False
        assert [each["state"] for each in (gone["models"] if how == "grpc" else gone)] == ["UNAVAILABLE"]
        assert one["loaded"] is True
    assert [status for status, _ in said["grpc"]["refused"]] == [
        "StatusCode.NOT_FOUND", "StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT"
    ]  # fmt: skip
    assert same(said["grpc"]["outputs"], scored)
    assert said["binary"]["outputs"] == said["grpc"]["outputs"]
    assert said["json"]["outputs"]["label"][0] in CLASSES


def test_kserves_client(server: Serving, picture: Path, scored: dict[str, Any], pytestconfig: pytest.Config) -> None:
    said = asked("kserve", pytestconfig, server.grpc, server.url, picture)
    for one in said.values():
        assert one["ready"] == [True, True, True]
        assert same(one["bytes"]["outputs"], scored)
        assert one["bytes"]["names"][:2] == ["seven", "shapes"]  # this client forgets the version
    assert said["grpc"]["pixels"]["outputs"]["label"] == said["rest"]["pixels"]["outputs"]["label"]
    assert said["grpc"]["pixels"]["outputs"]["score"] == pytest.approx(said["rest"]["pixels"]["outputs"]["score"])


def test_the_stubs_of_tensorflow_serving(
    server: Serving, picture: Path, scored: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    said = asked("tensorflow_serving", pytestconfig, server.grpc, picture)
    for key, shape, count in (("scalar", [8], 1), ("one", [1, 8], 1), ("three", [3, 8], 3)):
        assert said[key]["spec"] == ["shapes", 1, "serving_default"]
        prediction, classes = said[key]["outputs"]["prediction"], said[key]["outputs"]["classes"]
        assert (prediction["dtype"], prediction["shape"]) == ("DT_FLOAT", [count, 8])
        assert (classes["dtype"], classes["shape"]) == ("DT_STRING", shape)
        assert classes["values"] == CLASSES * count
        assert prediction["values"] == pytest.approx(said["scalar"]["outputs"]["prediction"]["values"] * count)
    values = said["scalar"]["outputs"]["prediction"]["values"]
    assert CLASSES[values.index(max(values))] == scored["label"]
    assert max(values) == pytest.approx(scored["score"])
    assert list(said["filtered"]["outputs"]) == ["prediction"]
    assert said["refused"] == {
        "model": ["NOT_FOUND", "there is no model 'shape'; did you mean 'shapes'?; there is shapes"],
        "no model": ["INVALID_ARGUMENT", "model_spec.name: the request names no model"],
        "version": ["NOT_FOUND", "shapes has no version '9'; there are 1"],
        "label": ["NOT_FOUND", "shapes has no version 'canary'; there are 1"],
        "signature": ["INVALID_ARGUMENT", "model_spec.signature_name: there is no 'other'; there is 'serving_default'"],
        "input": ["INVALID_ARGUMENT", "inputs: the model takes 'image' alone, not 'picture'"],
        "no input": ["INVALID_ARGUMENT", "inputs: the model takes 'image' alone, not nothing"],
        "output": ["INVALID_ARGUMENT", "output_filter[0]: there is no 'nothing'; there are prediction, classes"],
        "shape": ["INVALID_ARGUMENT", "inputs.image: 1 values, and the shape [2] has 2"],
        "type": said["refused"]["type"],
        "picture": ["INVALID_ARGUMENT", "not an image: cannot identify the format (starts with b'no picture')"],
    }
    assert said["refused"]["type"][0] == "INVALID_ARGUMENT"
    assert said["refused"]["type"][1].startswith("inputs.image.dtype: 8 is none of DT_STRING, ")
    version, signatures = said["metadata"]
    signature = signatures["signatureDef"]["serving_default"]
    assert version == 1
    assert signature["methodName"] == "tensorflow/serving/predict"
    assert signature["inputs"]["image"]["dtype"] == "DT_STRING"
    assert {name: each["dtype"] for name, each in signature["outputs"].items()} == {
        "prediction": "DT_FLOAT", "classes": "DT_STRING"
    }  # fmt: skip
    assert [list(one) for one in said["classified"]] == [CLASSES] * 2
    assert list(said["classified"][0].values()) == pytest.approx(values)


MODULES = {
    "triton": ["tritonclient.grpc.service_pb2"],
    "kserve": ["kserve.protocol.grpc.grpc_predict_v2_pb2"],
    "tensorflow_serving": [
        *(f"tensorflow_serving.apis.{name}_pb2" for name in ("predict", "classification", "regression")),
        "tensorflow_serving.apis.get_model_metadata_pb2",
    ],
}
DIFFERENT = {"inference.RepositoryModelLoadRequest", "inference.RepositoryModelUnloadRequest"}
"""Where the clients of Triton and of KServe do not agree with each other, and both are answered."""


def test_messages_are_those_of_the_clients(pytestconfig: pytest.Config) -> None:
    """Every field of ours is one of theirs: number, name, type, and whether it is repeated."""
    from google.protobuf import descriptor_pb2

    from tally.serving import protobuf

    theirs: list[dict[tuple[str, int], Any]] = []
    for client, modules in MODULES.items():
        theirs.append({})
        for text in asked(client, pytestconfig, *modules, script="descriptors"):
            file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text))
            theirs[-1] |= _declared(file.package, file.message_type, file.enum_type)
    files = descriptor_pb2.FileDescriptorSet.FromString(protobuf.DESCRIPTORS.read_bytes()).file
    ours: dict[tuple[str, int], Any] = {}
    for file in files:
        if file.package in ("inference", "tensorflow", "tensorflow.serving"):
            ours |= _declared(file.package, file.message_type, file.enum_type)
    unknown = []
    for key, field in ours.items():
        said = [one[key] for one in theirs if key in one]
        assert (field in said) if key[0] in DIFFERENT else all(each == field for each in said), key
        if not said:
            unknown.append(key[0])
    # tensorflow-protobuf lacks what the module of these imports.
    assert set(unknown) <= {f"tensorflow.serving.{name}" for name in STATUS}


STATUS = (
    "GetModelStatusRequest", "GetModelStatusResponse", "ModelVersionStatus", "ModelVersionStatus.State", "StatusProto",
    "StatusProto.Code",
)  # fmt: skip


def _declared(scope: str, messages: Any, enums: Any) -> dict[tuple[str, int], Any]:
    """The fields of messages and the values of enums, by full name and number."""
    found: dict[tuple[str, int], Any] = {}
    for each in enums:
        found |= {(f"{scope}.{each.name}", value.number): value.name for value in each.value}
    for each in messages:
        name = f"{scope}.{each.name}"
        for field in each.field:
            found[name, field.number] = (field.name, field.type, field.label == field.LABEL_REPEATED, field.type_name)
        found |= _declared(name, each.nested_type, each.enum_type)
    return found
