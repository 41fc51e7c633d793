"""Endpoints over gRPC: what is asked and answered, and what happens to requests that nobody waits for any more."""

from __future__ import annotations

import gzip
import io
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.endpoints import MIRROR, PATIENCE, SUMS, Serving, echo, serving
from tests.ports import free_ports

grpc = pytest.importorskip("grpc")

from tests.grpc_client import OIP, PREDICTION, Client, outputs, tensor  # noqa: E402

import tally  # noqa: E402
from tally import demo  # noqa: E402
from tally.serving import protobuf  # noqa: E402
from tally.serving.messages import Call  # noqa: E402
from tally.serving.protocols.base import RequestError  # noqa: E402
from tally.serving.protocols.tfserving_grpc import TensorFlowServingGrpc  # noqa: E402

SHAPES = demo.model("shapes")
CLASSES = (SHAPES / "labels.txt").read_text().split()
MODEL = "tensorflow.serving.ModelService"

SLOW = """
import time
import tally
from tally import demo

class Slow(tally.Scorer):
    input = "bytes"
    batch_size = 1

    def score(self, batch):
        open(FOLDER + "/" + batch[0].decode(), "w").close()
        while not __import__("os").path.exists(FOLDER + "/go"):
            time.sleep(0.01)
        return [{"text": each.decode()} for each in batch]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    (folder / "scorers.py").write_text(SUMS + MIRROR)
    (folder / "slow.py").write_text(SLOW.replace("FOLDER", repr(str(folder))))
    models = [SHAPES, f"echo={echo(folder / 'echo.py')}"]
    models += [f"slow={folder}/slow.py:Slow"]
    models += [f"{name.lower()}={folder}/scorers.py:{name}" for name in ("Sums", "Mirror")]
    options = ("--grpc-port", 0, "--max-body", 2, "--max-queue", 64)
    with serving(folder, *models, *options, environment={"TALLY_HOME": str(folder / "home")}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Client]:
    found = Client(grpc.insecure_channel(server.grpc))
    yield found
    found.close()


def picture(width: int = 64, height: int = 48) -> np.ndarray[Any, Any]:
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    return np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def text(value: str) -> dict[str, Any]:
    """Fields of a request to the echo."""
    return {"inputs": [tensor("body", "BYTES", [1], bytes_contents=[value.encode()])]}


# ------------------------------------------------------------------------------- Open Inference Protocol


def test_inference_answers_as_it_is_asked(server: Serving, client: Client) -> None:
    content = png(picture())
    single = server.ask("/api/v1/service/shapes/score", content).json()
    sent = tensor("image", "BYTES", [2], bytes_contents=[content] * 2)
    said = client.call(OIP, "ModelInfer", model_name="shapes", id="seven", inputs=[sent])
    assert (said.id, said.model_name, said.model_version) == ("seven", "shapes", "1")
    assert not said.raw_output_contents
    assert outputs(said)["label"] == [single["label"].encode()] * 2
    assert outputs(said)["score"] == pytest.approx([single["score"]] * 2)
    raw = b"".join(len(each).to_bytes(4, "little") + each for each in [content] * 2)
    said = client.call(
        OIP, "ModelInfer", model_name="shapes", inputs=[tensor("image", "BYTES", [2])], raw_input_contents=[raw],
        outputs=[{"name": "index"}, {"name": "label"}],
    )  # fmt: skip
    assert [(each.name, each.datatype, list(each.shape)) for each in said.outputs] == [
        ("index", "INT64", [2]), ("label", "BYTES", [2])
    ]  # fmt: skip
    assert np.frombuffer(said.raw_output_contents[0], "<i8").tolist() == [single["index"]] * 2
    label = single["label"].encode()
    assert said.raw_output_contents[1] == (len(label).to_bytes(4, "little") + label) * 2


def test_pictures_of_pixels_come_back_as_pixels(client: Client) -> None:
    pixels = picture(8, 4)[None]
    sent = tensor("image", "UINT8", list(pixels.shape), uint_contents=pixels.reshape(-1).tolist())
    said = client.call(OIP, "ModelInfer", model_name="mirror", inputs=[sent])
    assert list(said.outputs[0].shape) == list(pixels.shape)
    assert outputs(said)["image"] == pixels[:, :, ::-1].reshape(-1).tolist()
    said = client.call(
        OIP, "ModelInfer", model_name="mirror", inputs=[tensor("image", "UINT8", list(pixels.shape))],
        raw_input_contents=[pixels.tobytes()],
    )  # fmt: skip
    assert said.raw_output_contents[0] == pixels[:, :, ::-1].tobytes()


@pytest.mark.parametrize(
    ("datatype", "field"),
    [
        ("INT8", "int_contents"), ("INT16", "int_contents"), ("INT32", "int_contents"), ("INT64", "int64_contents"),
        ("UINT8", "uint_contents"), ("UINT16", "uint_contents"), ("UINT32", "uint_contents"),
        ("UINT64", "uint64_contents"), ("FP32", "fp32_contents"), ("FP64", "fp64_contents"), ("FP16", None),
    ],
)  # fmt: skip
def test_rows_of_every_type(client: Client, datatype: str, field: str | None) -> None:
    from tally.serving.protocols.openinference import TYPES

    a, b = [1, 2], [3, 100]
    if field is not None:
        sent = [tensor(name, datatype, [2], **{field: each}) for name, each in (("a", a), ("b", b))]
        said = client.call(OIP, "ModelInfer", model_name="sums", inputs=sent)
        assert outputs(said) == {"sum": [4.0, 102.0]}
    said = client.call(
        OIP, "ModelInfer", model_name="sums", inputs=[tensor("a", datatype, [2, 1]), tensor("b", datatype, [2])],
        raw_input_contents=[np.array(each, TYPES[datatype]).tobytes() for each in (a, b)],
    )  # fmt: skip
    assert np.frombuffer(said.raw_output_contents[0], "<f8").tolist() == [4.0, 102.0]


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({}, "INVALID_ARGUMENT", "the request names no model"),
        ({"model_name": "ech"}, "NOT_FOUND", "there is no model 'ech'; did you mean 'echo'?"),
        ({"model_version": "7"}, "NOT_FOUND", "echo has no version '7'"),
        ({"inputs": []}, "INVALID_ARGUMENT", "inputs: there is none"),
        ({"inputs": [tensor("", "BYTES", [1], bytes_contents=[b"x"])]}, "INVALID_ARGUMENT", "inputs[0].name"),
        ({"inputs": [tensor("body", "TEXT", [1])]}, "INVALID_ARGUMENT", "inputs[0].datatype: 'TEXT'"),
        ({"inputs": [tensor("body", "BYTES", [-1])]}, "INVALID_ARGUMENT", "inputs[0].shape"),
        ({"inputs": [tensor("body", "BYTES", [1 << 62, 1 << 62])]}, "INVALID_ARGUMENT", "inputs[0].shape"),
        ({"inputs": [tensor("body", "BYTES", [2], bytes_contents=[b"x"])]}, "INVALID_ARGUMENT", "1 values"),
        ({"inputs": [tensor("body", "INT8", [1], int_contents=[300])]}, "INVALID_ARGUMENT", "300 is no INT8"),
        ({"inputs": [tensor("body", "UINT8", [2], uint_contents=[7, 256])]}, "INVALID_ARGUMENT", "256 is no UINT8"),
        ({"inputs": [tensor("body", "FP16", [1], fp32_contents=[1])]}, "INVALID_ARGUMENT", "raw_input_contents"),
        ({"raw_input_contents": [b"", b""]}, "INVALID_ARGUMENT", "raw_input_contents: has 2, and there are 1"),
        ({"raw_input_contents": [b"\1\0\0\0x"]}, "INVALID_ARGUMENT", "inputs[0].contents: should be empty"),
        ({"outputs": [{"name": "nothing"}]}, "INVALID_ARGUMENT", "outputs[0].name: there is no 'nothing'"),
        ({"inputs": [tensor("body", "BYTES", [1], bytes_contents=[b"bad"])]}, "INVALID_ARGUMENT", "a bad item"),
    ],
)
def test_what_is_wrong_is_named(client: Client, fields: dict[str, Any], code: str, said: str) -> None:
    request: dict[str, Any] = text("x") | ({"model_name": "echo"} if fields else {}) | fields
    found = client.refused(OIP, "ModelInfer", **request)
    assert found[0] == code
    assert said in found[1]


def test_bytes_that_are_no_message(client: Client) -> None:
    for path in (f"/{OIP}/ModelInfer", f"/{PREDICTION}/Predict", "/grpc.health.v1.Health/Check"):
        for body in (b"\xff\xff garbage", b"\x0a\x04\xff\xfe\xff\xfe", b"\x0a\x7f"):
            with pytest.raises(grpc.RpcError) as error:
                client.channel.unary_unary(path)(body, timeout=PATIENCE)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "it is not the message that this method takes" in error.value.details()
    # The server finds the model in it, and the replica cannot read the rest.
    with pytest.raises(grpc.RpcError) as error:
        client.channel.unary_unary(f"/{OIP}/ModelInfer")(b"\x0a\x04echo\x2a\x02\xff\xff", timeout=PATIENCE)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as error:
        client.channel.unary_unary(f"/{OIP}/ModelStreamInfer")(b"", timeout=PATIENCE)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_repository_as_both_clients_ask_it(client: Client) -> None:
    index = client.call(OIP, "RepositoryIndex").models
    assert {(each.name, each.state) for each in index} == {
        (name, "READY") for name in ("shapes", "echo", "sums", "mirror", "slow")
    }
    unloaded = client.call(OIP, "RepositoryModelUnload", model_name="mirror")
    assert (unloaded.model_name, unloaded.isUnloaded) == ("mirror", True)
    assert not client.call(OIP, "ModelReady", name="mirror").ready
    assert not client.call(OIP, "ServerReady").ready
    assert "mirror" not in [each.name for each in client.call(OIP, "RepositoryIndex", ready=True).models]
    assert client.refused(OIP, "ModelInfer", model_name="mirror", **text("x"))[0] == "UNAVAILABLE"
    loaded = client.call(OIP, "RepositoryModelLoad", repository_name="mirror")  # as KServe's clients send a name
    assert (loaded.model_name, loaded.isLoaded) == ("mirror", True)
    assert client.call(OIP, "ModelReady", name="mirror").ready
    assert client.refused(OIP, "RepositoryModelLoad", model_name="mirrors")[0] == "NOT_FOUND"


# ------------------------------------------------------------------------------------ TensorFlow Serving


def spec(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, **fields}


def numbers(kind: str, values: list[float], *, content: bool = False, shape: tuple[int, ...] | None = None) -> Any:
    """A tensor of numbers. content: as bytes."""
    from tally.serving.protocols.tfserving_grpc import TYPES

    numpy_kind, field = TYPES[kind]
    array = np.array(values, numpy_kind)
    found = protobuf.message("tensorflow.TensorProto")(dtype=protobuf.enum("tensorflow.DataType")[kind])
    for size in array.shape if shape is None else shape:
        found.tensor_shape.dim.add(size=size)
    if content:
        found.tensor_content = array.tobytes()
    else:
        getattr(found, field).extend((array.view("<u2") if kind == "DT_HALF" else array).tolist())
    return found


@pytest.mark.parametrize("content", [False, True], ids=["values", "content"])
@pytest.mark.parametrize(
    "kind",
    ["DT_FLOAT", "DT_DOUBLE", "DT_HALF", "DT_INT8", "DT_INT16", "DT_INT32", "DT_INT64", "DT_UINT8", "DT_UINT16",
     "DT_UINT32", "DT_UINT64"],
)  # fmt: skip
def test_predictions_of_rows(client: Client, kind: str, content: bool) -> None:
    given = {name: numbers(kind, values, content=content) for name, values in (("a", [1, 2]), ("b", [3, 4]))}
    said = client.call(PREDICTION, "Predict", model_spec=spec("sums"), inputs=given)
    assert (said.model_spec.name, said.model_spec.version.value) == ("sums", 1)
    assert said.model_spec.signature_name == "serving_default"
    assert list(said.outputs["sum"].double_val) == [4.0, 6.0]
    assert [dim.size for dim in said.outputs["sum"].tensor_shape.dim] == [2]


def test_a_prediction_that_cannot_be_made(client: Client) -> None:
    def refused(**inputs: Any) -> tuple[str, str]:
        return client.refused(PREDICTION, "Predict", model_spec=spec("sums"), inputs=inputs)

    a = numbers("DT_FLOAT", [1])
    assert "'b'" in refused(a=a)[1]
    for wrong, said in (
        (numbers("DT_FLOAT", [1], shape=(3,)), "inputs.b: 1 values, and the shape [3] has 3"),
        (numbers("DT_FLOAT", [1], shape=(-1,)), "inputs.b.tensor_shape"),
        (numbers("DT_FLOAT", [1], shape=(1,) * 40), "inputs.b.tensor_shape"),
        (numbers("DT_INT32", [300]), "inputs.b.int_val: 300 is no DT_UINT8"),
    ):
        if "UINT8" in said:
            wrong.dtype = protobuf.enum("tensorflow.DataType")["DT_UINT8"]
        code, told = refused(a=a, b=wrong)
        assert code == "INVALID_ARGUMENT"
        assert said in told
    cut = numbers("DT_FLOAT", [1], content=True)
    cut.tensor_content = cut.tensor_content[:3]
    assert "inputs.b.tensor_content: 3 bytes" in refused(a=a, b=cut)[1]


def test_status_and_metadata(client: Client) -> None:
    [status] = client.call(MODEL, "GetModelStatus", model_spec=spec("shapes")).model_version_status
    states = protobuf.enum("tensorflow.serving.ModelVersionStatus.State")
    assert (status.version, status.state, status.status.error_code) == (1, states["AVAILABLE"], 0)
    one = client.call(MODEL, "GetModelStatus", model_spec=spec("shapes", version={"value": 1}))
    assert [each.version for each in one.model_version_status] == [1]
    code, said = client.refused(MODEL, "GetModelStatus", model_spec=spec("shape"))
    assert (code, said.partition(";")[0]) == ("NOT_FOUND", "there is no model 'shape'")
    assert client.refused(MODEL, "GetModelStatus", model_spec=spec("shapes", version={"value": 0}))[0] == "NOT_FOUND"
    assert client.refused(PREDICTION, "GetModelMetadata", model_spec=spec("shapes")) == (
        "INVALID_ARGUMENT", "metadata_field: should name 'signature_def'"
    )  # fmt: skip
    assert client.refused(PREDICTION, "GetModelMetadata", model_spec=spec("shapes"), metadata_field=["x"]) == (
        "INVALID_ARGUMENT", "metadata_field: there is no 'x'; there is 'signature_def'"
    )  # fmt: skip
    found = client.call(PREDICTION, "GetModelMetadata", model_spec=spec("sums"), metadata_field=["signature_def"])
    signatures = protobuf.message("tensorflow.serving.SignatureDefMap")()
    assert found.metadata["signature_def"].Unpack(signatures)
    assert set(signatures.signature_def["serving_default"].inputs) == {"a", "b"}


def test_columns_without_an_order_are_no_answer_where_the_model_needs_one() -> None:
    """A message's map has none: sorted by name, a client's columns would be given to others' places."""

    class Places(tally.Scorer):
        input = "table"
        features = 2

        def score(self, batch: Any) -> Any:
            return [{"first": each} for each in batch.column(0).to_pylist()]

    def asked(name: str, **fields: Any) -> Call:
        body = protobuf.message(name)(model_spec=spec("places"), **fields).SerializeToString()
        return Call(1, "tfserving-grpc", body, {"request": name}, 0.0)

    predict, regress = (f"tensorflow.serving.{each}Request" for each in ("Predict", "Regression"))
    feature = {"float_list": {"value": [1.5]}}
    example = {"features": {"feature": {"width": feature, "height": feature}}}
    for call in (
        asked(predict, inputs={name: numbers("DT_FLOAT", [1]) for name in ("width", "height")}),
        asked(regress, input={"example_list": {"examples": [example]}}),
    ):
        with pytest.raises(RequestError, match=r"order.*of the shape \[rows, 2\]"):
            TensorFlowServingGrpc().decode(call, Places())
    call = asked(predict, inputs={"x": numbers("DT_FLOAT", [3, 1], shape=(1, 2))})
    table: Any = TensorFlowServingGrpc().decode(call, Places()).items
    assert [column.to_pylist() for column in table.columns] == [[3.0], [1.0]]


def test_examples_are_classified_and_regressed(client: Client) -> None:
    def examples(*rows: dict[str, Any], context: dict[str, Any] | None = None) -> dict[str, Any]:
        made = [{"features": {"feature": row}} for row in rows]
        if context is None:
            return {"example_list": {"examples": made}}
        return {"example_list_with_context": {"examples": made, "context": {"features": {"feature": context}}}}

    shown = {"image": {"bytes_list": {"value": [png(picture())]}}}
    said = client.call(PREDICTION, "Classify", model_spec=spec("shapes"), input=examples(shown, shown))
    assert [[each.label for each in one.classes] for one in said.result.classifications] == [CLASSES] * 2
    assert sum(each.score for each in said.result.classifications[0].classes) == pytest.approx(1)
    assert said.model_spec.version.value == 1
    a, b = {"float_list": {"value": [1.5]}}, {"int64_list": {"value": [2]}}
    rows = examples({"a": a, "b": b}, {"a": a, "b": {"int64_list": {"value": [5]}}})
    said = client.call(PREDICTION, "Regress", model_spec=spec("sums"), input=rows)
    assert [each.value for each in said.result.regressions] == [3.5, 6.5]
    shared = client.call(PREDICTION, "Regress", model_spec=spec("sums"), input=examples({"a": a}, context={"b": b}))
    assert [each.value for each in shared.result.regressions] == [3.5]
    for model, method, given, why in (
        ("shapes", "Classify", {}, "input: there is no example"),
        ("shapes", "Classify", examples({"picture": shown["image"]}), "example 0: should have 'image' alone"),
        ("shapes", "Classify", examples({"image": a}), "example 0: image should be one value of bytes"),
        ("sums", "Classify", rows, "does not tell classes apart"),
    ):
        code, told = client.refused(PREDICTION, method, model_spec=spec(model), input=given)
        assert code == "INVALID_ARGUMENT"
        assert why in told


# -------------------------------------------------------------------------------- limits, keys and the end


def test_health_is_told_and_watched(folder: Path, server: Serving, client: Client) -> None:
    health, statuses = "grpc.health.v1.Health", protobuf.enum("grpc.health.v1.HealthCheckResponse.ServingStatus")
    for name in ("", OIP, PREDICTION, MODEL, health, "shapes"):
        assert client.call(health, "Check", service=name).status == statuses["SERVING"]
    assert client.refused(health, "Check", service="nobody")[0] == "NOT_FOUND"
    request = protobuf.message("grpc.health.v1.HealthCheckRequest")(service="mirror").SerializeToString()
    watching = client.channel.unary_stream(f"/{health}/Watch")(request, timeout=PATIENCE)
    answer = protobuf.message("grpc.health.v1.HealthCheckResponse").FromString
    assert answer(next(watching)).status == statuses["SERVING"]
    client.call(OIP, "RepositoryModelUnload", model_name="mirror")
    assert answer(next(watching)).status == statuses["NOT_SERVING"]
    client.call(OIP, "RepositoryModelLoad", model_name="mirror")
    assert answer(next(watching)).status == statuses["SERVING"]
    watching.cancel()


def test_messages_that_are_too_large(client: Client) -> None:
    code, said = client.refused(OIP, "ModelInfer", model_name="echo", **text("x" * (3 << 20)))
    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in said
    # Small on the way, and large when it is unpacked.
    request = protobuf.message("inference.ModelInferRequest")(model_name="echo", **text("x" * (16 << 20)))
    assert len(gzip.compress(request.SerializeToString())) < 1 << 20
    with pytest.raises(grpc.RpcError) as error:
        client.channel.unary_unary(f"/{OIP}/ModelInfer")(
            request.SerializeToString(), timeout=PATIENCE, compression=grpc.Compression.Gzip
        )
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert outputs(client.call(OIP, "ModelInfer", model_name="echo", **text("y")))["text"] == [b"y"]


def test_requests_that_nobody_waits_for(folder: Path, server: Serving, client: Client) -> None:
    """A deadline that passes and a call that is cancelled: the replica does not score them, and others are answered."""
    first = client.begin(OIP, "ModelInfer", model_name="slow", **text("first"))
    server.until(lambda _: (folder / "first").exists())
    late = client.begin(OIP, "ModelInfer", model_name="slow", timeout=0.2, **text("late"))
    cancelled = client.begin(OIP, "ModelInfer", model_name="slow", **text("cancelled"))
    kept = client.begin(OIP, "ModelInfer", model_name="slow", **text("kept"))
    assert late.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.until(lambda it: sum(each["requests"] for each in it.replicas("slow")) >= 2)
    cancelled.cancel()
    storm = [client.begin(OIP, "ModelInfer", model_name="slow", **text(f"storm {n}")) for n in range(200)]
    codes = Counter()
    for each in storm:
        each.cancel()
        codes[each.code().name] += 1
    assert set(codes) <= {"CANCELLED", "RESOURCE_EXHAUSTED"}
    server.until(lambda it: next(iter(it.ask("/readyz").json()["models"]["slow"]))["waiting"] <= 1)
    (folder / "go").touch()
    assert outputs(first.result())["text"] == [b"first"]
    assert outputs(kept.result())["text"] == [b"kept"]
    assert not (folder / "late").exists()
    assert not (folder / "cancelled").exists()
    assert not list(folder.glob("storm*"))


def test_a_replica_that_dies(tmp_path: Path) -> None:
    """Only the requests that it had been given are refused; the others are answered by the next one."""
    scorer = tmp_path / "scorers.py"
    scorer.write_text(SLOW.replace("FOLDER", repr(str(tmp_path))))
    with serving(tmp_path, f"slow={scorer}:Slow", "--grpc-port", 0) as server:
        client = Client(grpc.insecure_channel(server.grpc))
        calls = [client.begin(OIP, "ModelInfer", model_name="slow", **text(str(n))) for n in range(5)]
        server.until(lambda it: it.replicas()[0]["requests"] == 2)
        os.kill(server.replicas()[0]["pid"], signal.SIGKILL)
        server.until(lambda _: sum(call.done() for call in calls) == 2)
        for call in [each for each in calls if each.done()]:
            assert call.code() == grpc.StatusCode.UNAVAILABLE
            assert call.details() == "the replica of slow that had this request died"
        (tmp_path / "go").touch()
        assert Counter(call.code().name for call in calls) == {"OK": 3, "UNAVAILABLE": 2}
        client.close()


def test_too_many_requests(tmp_path: Path) -> None:
    scorer = tmp_path / "scorers.py"
    scorer.write_text(SLOW.replace("FOLDER", repr(str(tmp_path))))
    with serving(tmp_path, f"slow={scorer}:Slow", "--grpc-port", 0, "--max-queue", 3) as server:
        client = Client(grpc.insecure_channel(server.grpc))
        calls = [client.begin(OIP, "ModelInfer", model_name="slow", **text(str(n))) for n in range(12)]
        server.until(lambda _: sum(call.done() for call in calls) == 7)  # two are with the replica, and three wait
        refused = [call for call in calls if call.done()]
        (tmp_path / "go").touch()
        assert Counter(call.code().name for call in calls) == {"OK": 5, "RESOURCE_EXHAUSTED": 7}
        for call in refused:
            assert "is busy: 3 requests wait already" in call.details()
            assert dict(call.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        client.close()


def test_keys_and_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    options = ("--grpc-port", 0, "--certificate", certificate, "--private-key", key)
    scorer = f"echo={echo(tmp_path / 'echo.py')}"
    with serving(tmp_path, scorer, *options, environment={"TALLY_ENDPOINT_KEY": "one,two"}) as server:
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        channel = grpc.secure_channel(server.grpc, credentials)
        anybody = Client(channel)
        assert anybody.call(OIP, "ServerLive").live
        assert anybody.call(OIP, "ServerReady").ready
        assert anybody.call("grpc.health.v1.Health", "Check").status == 1
        for method, fields in (("ModelInfer", {"model_name": "echo", **text("x")}), ("RepositoryIndex", {})):
            assert anybody.refused(OIP, method, **fields)[0] == "UNAUTHENTICATED"
        wrong = Client(channel, (("authorization", "Bearer three"),))
        assert wrong.refused(OIP, "RepositoryModelUnload", model_name="echo") == (
            "UNAUTHENTICATED", "this key is not valid"
        )  # fmt: skip
        for name in ("one", "two"):
            known = Client(channel, (("authorization", f"Bearer {name}"),))
            said = known.call(OIP, "ModelInfer", model_name="echo", **text("x"))
            assert outputs(said)["text"] == [b"x"]
        channel.close()
        plain = Client(grpc.insecure_channel(server.grpc))
        assert plain.refused(OIP, "ServerLive", timeout=5)[0] == "UNAVAILABLE"
        plain.close()


def test_the_end_loses_no_request(tmp_path: Path) -> None:
    """Clients that ask and wait: each request that was sent is answered, and then none reaches the server."""
    wrong: list[str] = []
    answered = Counter[str]()
    ended = threading.Event()
    with serving(tmp_path, f"echo={echo(tmp_path / 'echo.py')}", "--grpc-port", 0, "--replicas", 2) as server:

        def ask(number: int) -> None:
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
            with grpc.insecure_channel(server.grpc, options=options) as channel:
                client, count = Client(channel), 0
                while True:
                    count += 1
                    call = client.begin(OIP, "ModelInfer", model_name="echo", **text(f"{number}.{count}"))
                    answered[call.code().name] += 1
                    if call.code() == grpc.StatusCode.OK:
                        if outputs(call.result())["text"] != [f"{number}.{count}".encode()]:
                            wrong.append(f"{number}.{count}")
                    elif not ended.is_set() or "failed to connect" not in call.details():
                        wrong.append(f"{call.code()}: {call.details()}")
                        return
                    else:
                        return

        threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(16)]
        for thread in threads:
            thread.start()
        server.until(lambda _: answered["OK"] >= 200)
        ended.set()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert server.process.wait(PATIENCE) == 0
    assert wrong == []


def test_a_port_that_another_has(tmp_path: Path) -> None:
    [port] = free_ports(1)
    scorer = f"echo={echo(tmp_path / 'echo.py')}"
    with serving(tmp_path, scorer, "--grpc-port", port):
        command = [sys.executable, "-m", "tally", "serve", scorer, "--port", "0", "--grpc-port", str(port)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode != 0
    assert f"port {port} of 127.0.0.1 cannot be used for gRPC" in ran.stderr
    assert "--grpc-port 0" in ran.stderr


# ------------------------------------------------------------------------------------------- the messages


def test_descriptors_are_those_of_the_files() -> None:
    pytest.importorskip("grpc_tools")
    from google.protobuf import descriptor_pb2
    from tests.examples import script

    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(script("../scripts/protobuf.py").compiled()) == read(protobuf.DESCRIPTORS.read_bytes()), (
        "run scripts/protobuf.py"
    )


def test_a_clients_own_messages_of_the_same_names_are_no_trouble() -> None:
    """Generated code puts them into the pool that a process shares; ours are not there."""
    from google.protobuf import descriptor_pool

    protobuf.message("inference.ModelInferRequest")
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
