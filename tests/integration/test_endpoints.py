"""Endpoints over HTTP: what clients of each protocol send, and what they are answered."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from tests.conftest import Ran
from tests.endpoints import MIRROR, SUMS, Serving, Storm, echo, serving

from tally import demo

SHAPES = demo.model("shapes")
CLASSES = ["arrow", "circle", "cross", "hexagon", "ring", "square", "star", "triangle"]

BOXES = """
import tally
from tally import demo

class Boxes(tally.Scorer):
    input = "image"
    columns = {"xmin": "float32", "label": "string"}

    def score(self, batch):
        return [[{"xmin": float(at), "label": "box"} for at in range(picture.shape[1] % 3)] for picture in batch]
"""

JSON_SCRIPT = """
import json, os

def init():
    global factor
    factor = json.load(open("factor.json"))["factor"]
    os.makedirs("tmp", exist_ok=True)
    assert os.environ["AZUREML_MODEL_DIR"]

def run(raw_data):
    try:
        open("tmp/last", "w").write(raw_data)
        return [factor * each for each in json.loads(raw_data)["data"]]
    except Exception as error:
        return str(error)
"""

RAW_SCRIPT = """
from azureml.contrib.services.aml_request import rawhttp
from azureml.contrib.services.aml_response import AMLResponse

def init():
    pass

@rawhttp
def run(request):
    if request.method != "POST":
        return AMLResponse("this takes pictures by POST", 405)
    body = request.get_data(False)
    if not body:
        return AMLResponse("there is no picture in the body", 400)
    return AMLResponse([len(body)], 200, json_str=True)
"""


def picture(width: int = 64, height: int = 48) -> np.ndarray[Any, Any]:
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    return np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "scorers.py").write_text(SUMS + MIRROR + BOXES)
    for name, script in (("plain", JSON_SCRIPT), ("raw", RAW_SCRIPT)):
        (folder / name).mkdir()
        (folder / name / "score.py").write_text(script)
    (folder / "plain" / "factor.json").write_text('{"factor": 3}')
    models = [SHAPES, f"echo={echo(folder / 'echo.py')}"]
    models += [f"{name.lower()}={folder}/scorers.py:{name}" for name in ("Sums", "Mirror", "Boxes")]
    models += [f"{name}={folder}/{name}/score.py" for name in ("plain", "raw")]
    with serving(folder, *models, "--max-body", 4, environment={"TALLY_HOME": str(folder / "home")}) as found:
        yield found


def score(name: str) -> str:
    return f"/api/v1/service/{name}/score"


# ------------------------------------------------------------------------------------------- /score


def test_a_picture_is_scored_as_in_a_job(server: Serving, tmp_path: Path) -> None:
    file = tmp_path / "in" / "ramp.png"
    file.parent.mkdir()
    file.write_bytes(png(picture()))
    import tally

    [row] = tally.score(file.parent, SHAPES, tmp_path / "out", quiet=True, workers=1).results().to_pylist()
    answer = server.ask(score("shapes"), file.read_bytes(), headers={"Content-Type": "image/png"})
    assert answer.status == 200
    assert answer.headers["x-tally-version"] == "1"
    said = answer.json()
    assert (said["label"], said["index"]) == (row["label"], row["index"])
    assert said["score"] == pytest.approx(row["score"])


def test_several_pictures_as_json(server: Serving) -> None:
    good, bad = b64(png(picture())), b64(b"no picture")
    both = server.post(score("shapes"), {"data": [good, good]})
    assert both.status == 200
    assert [each["label"] for each in both.json()] == [both.json()[0]["label"]] * 2
    mixed = server.post(score("shapes"), {"data": [good, bad]})
    assert mixed.status == 422
    assert "item 1" in mixed.json()["message"]
    assert mixed.json()["results"][0] == both.json()[0]
    assert mixed.json()["results"][1] is None


def test_rows_as_json_and_csv(server: Serving) -> None:
    rows = [{"a": 1, "b": 2}, {"a": 0.5, "b": 0.25}]
    assert server.post(score("sums"), {"data": rows}).json() == [{"sum": 3.0}, {"sum": 0.75}]
    csv = server.ask(score("sums"), b"b,a\n2,1\n", headers={"Content-Type": "text/csv"})
    assert csv.json() == [{"sum": 3.0}]
    lacking = server.post(score("sums"), [{"a": 1}])
    assert lacking.status == 422
    assert "'b'" in lacking.json()["message"]
    for body, kind in (
        (b"a,b,a\n1,2,3\n", "text/csv"), (b'{"columns": ["a", "b", "a"], "data": [[1, 2, 3]]}', "application/json"),
    ):  # fmt: skip
        twice = server.ask(score("sums"), body, headers={"Content-Type": kind})
        assert (twice.status, twice.json()["message"]) == (400, "several columns have the name 'a'")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (score("sums"), f'[{{"a": 1, "b": {2**70}}}]'),
        (score("sums"), "[" * 100_000),
        (score("shapes"), "[" * 100_000),
        (
            "/v2/models/sums/infer",
            '{"inputs": [{"name": "a", "shape": [1], "datatype": "FP32", "data": %s}]}' % ("[" * 900 + "1" + "]" * 900),
        ),
        (
            "/v2/models/shapes/infer",
            r'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["\ud800"]}]}',
        ),
        ("/v1/models/shapes:predict", r'{"instances": ["\ud800"]}'),
        ("/v1/models/sums:predict", f'{{"instances": [[1, {2**70}]]}}'),
    ],
    ids=["number", "depth", "depth of pictures", "depth of a tensor", "text in a tensor", "text", "number in a list"],
)
def test_what_nothing_can_hold_is_the_request_s_fault(server: Serving, path: str, body: str) -> None:
    answer = server.ask(path, body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status in (400, 422), answer.body
    assert len(answer.body) < 1000


def test_pictures_come_back_as_pictures(server: Serving) -> None:
    answer = server.ask(score("mirror"), png(picture()))
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.body))), picture()[:, ::-1])
    jpeg = server.ask(score("mirror"), png(picture()), headers={"Accept": "image/jpeg"})
    assert Image.open(io.BytesIO(jpeg.body)).format == "JPEG"


@pytest.mark.parametrize(
    ("path", "body", "method", "status", "said"),
    [
        ("shapes", b"", "POST", 400, "the body is empty: send the content of a picture"),
        ("shapes", None, "GET", 405, "the method GET is not supported"),
        ("shapes", b"x", "PUT", 405, "the method PUT is not supported"),
        ("shapes", b"no picture", "POST", 422, "not an image"),
        ("echo", b"bad", "POST", 422, "a bad item"),
        ("shape", b"x", "POST", 404, "there is no model 'shape'; did you mean 'shapes'?"),
    ],
)
def test_what_cannot_be_scored(
    server: Serving, path: str, body: bytes | None, method: str, status: int, said: str
) -> None:
    answer = server.ask(score(path), body, method=method)
    assert answer.status == status
    assert said in answer.json()["message"]


def test_a_script_that_takes_json(server: Serving) -> None:
    assert server.post(score("plain"), {"data": [1, 2]}).json() == [3, 6]
    failed = server.post(score("plain"), {"other": 1})
    assert (failed.status, failed.json()) == (200, "'data'")  # as the script answers


def test_a_script_that_takes_requests(server: Serving) -> None:
    assert server.ask(score("raw"), b"12345").json() == [5]
    assert server.ask(score("raw"), b"").status == 400
    assert server.ask(score("raw")).status == 405
    assert server.ask(score("raw")).body == b"this takes pictures by POST"


def test_health_swagger_and_page(server: Serving) -> None:
    assert server.ask("/api/v1/service/shapes/").body == b"Healthy"
    assert server.ask("/").body == b"Healthy"
    paths = server.ask("/swagger.json").json()["paths"]
    assert {score("shapes"), score("raw")} <= set(paths)
    page = server.ask("/ui")
    assert page.headers["content-type"].startswith("text/html")
    assert "shapes" in page.body.decode()
    assert server.ask("/nothing/here").status == 404
    ready = server.ask("/readyz").json()
    assert ready["status"] == "ready"
    assert set(ready["models"]) == {"shapes", "echo", "sums", "mirror", "boxes", "plain", "raw"}
    several = server.ask("/score", b"x")
    assert several.status == 404
    assert "name one" in several.json()["message"]


# --------------------------------------------------------------------------- Open Inference Protocol


def infer(server: Serving, model: str, *inputs: dict[str, Any], **fields: Any) -> Any:
    answer = server.post(f"/v2/models/{model}/infer", {"inputs": list(inputs), **fields})
    assert answer.status == 200, answer.body
    return answer.json()


def outputs(answer: Any) -> dict[str, Any]:
    return {each["name"]: each["data"] for each in answer["outputs"]}


def test_inference_of_pictures_and_rows(server: Serving) -> None:
    content = b64(png(picture()))
    tensor = {
        "name": "image", "shape": [2], "datatype": "BYTES", "parameters": {"content_type": "base64"},
        "data": [content, content],
    }  # fmt: skip
    said = infer(server, "shapes", tensor, id="seven")
    assert (said["id"], said["model_name"], said["model_version"]) == ("seven", "shapes", "1")
    single = server.ask(score("shapes"), png(picture())).json()
    assert outputs(said)["label"] == [single["label"]] * 2
    assert outputs(said)["score"] == pytest.approx([single["score"]] * 2)
    pixels = {"name": "image", "shape": [1, 48, 64, 3], "datatype": "UINT8", "data": picture().reshape(-1).tolist()}
    assert outputs(infer(server, "shapes", pixels))["label"] == [single["label"]]
    a = {"name": "a", "shape": [2], "datatype": "INT64", "data": [1, 2]}
    b = {"name": "b", "shape": [2, 1], "datatype": "FP32", "data": [[0.5], [1.5]]}
    assert outputs(infer(server, "sums", a, b)) == {"sum": [1.5, 3.5]}
    both = {"name": "x", "shape": [2, 2], "datatype": "FP64", "data": [[1, 2], [3, 4]]}
    assert outputs(infer(server, "sums", both)) == {"sum": [3.0, 7.0]}


def test_items_with_several_rows_or_none_say_how_many(server: Serving) -> None:
    contents = [b64(png(picture(width))) for width in (9, 11, 10)]
    tensor = {
        "name": "image", "shape": [3], "datatype": "BYTES", "parameters": {"content_type": "base64"}, "data": contents
    }  # fmt: skip
    assert outputs(infer(server, "boxes", tensor)) == {
        "xmin": [0.0, 1.0, 0.0], "label": ["box"] * 3, "count": [0, 2, 1]
    }  # fmt: skip
    none = tensor | {"shape": [1], "data": contents[:1]}
    assert outputs(infer(server, "boxes", none)) == {"xmin": [], "label": [], "count": [0]}


def test_binary_tensors(server: Serving) -> None:
    texts = [b"one", b"", "zwölf".encode()]
    raw = b"".join(struct.pack("<I", len(each)) + each for each in texts)
    tensor = {"name": "body", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    request = {"inputs": [tensor], "outputs": [{"name": "text", "parameters": {"binary_data": True}}, {"name": "pid"}]}
    head = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = server.ask("/v2/models/echo/infer", head + raw, headers=headers)
    assert answer.status == 200, answer.body
    length = int(answer.headers["inference-header-content-length"])
    said = json.loads(answer.body[:length])
    assert [each["name"] for each in said["outputs"]] == ["text", "pid"]
    assert said["outputs"][0]["parameters"]["binary_data_size"] == len(raw)
    assert answer.body[length:] == raw
    pixels = picture()[None]
    tensor: dict[str, Any] = {"name": "image", "shape": list(pixels.shape), "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": pixels.size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    answer = server.ask(
        "/v2/models/mirror/infer", head + pixels.tobytes(), headers={"Inference-Header-Content-Length": str(len(head))}
    )
    length = int(answer.headers["inference-header-content-length"])
    [output] = json.loads(answer.body[:length])["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("image", "UINT8", [1, 48, 64, 3])
    assert answer.body[length:] == pixels[:, :, ::-1].tobytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": "x"}, "inputs: should be a list of tensors"),
        ({"inputs": []}, "inputs: there is none"),
        ({"inputs": [{"shape": [1], "datatype": "BYTES", "data": ["x"]}]}, "inputs[0].name"),
        ({"inputs": [{"name": "body", "shape": [-1], "datatype": "BYTES", "data": ["x"]}]}, "inputs[0].shape"),
        ({"inputs": [{"name": "body", "shape": [1], "datatype": "TEXT", "data": ["x"]}]}, "inputs[0].datatype"),
        ({"inputs": [{"name": "body", "shape": [2], "datatype": "BYTES", "data": ["x"]}]}, "inputs[0].data: 1 values"),
        ({"inputs": [{"name": "body", "shape": [1], "datatype": "BYTES"}]}, "inputs[0].data: is missing"),
        ({"inputs": [{"name": "a", "shape": [1], "datatype": "UINT8", "data": [300]}]}, "inputs[0].data"),
        ({"inputs": [{"name": "a", "shape": [1], "datatype": "INT64", "data": [1.5]}]}, "1.5 is no INT64"),
        (
            {"inputs": [{"name": "a", "shape": [2, 3], "datatype": "INT64", "data": [[1, 4], [2, 5], [3, 6]]}]},
            "inputs[0].data: its lists have the shape [3, 2], and [2, 3] is declared",
        ),
        ({"outputs": [{"name": "nothing"}]}, "outputs[0].name: there is no 'nothing'"),
    ],
)
def test_fields_that_are_wrong_are_named(server: Serving, change: dict[str, Any], said: str) -> None:
    request = {"inputs": [{"name": "body", "shape": [1], "datatype": "BYTES", "data": ["x"]}]} | change
    answer = server.post("/v2/models/echo/infer", request)
    assert answer.status == 422
    assert said in answer.json()["error"]


def test_a_column_is_sent_once(server: Serving) -> None:
    columns = [{"name": name, "shape": [1], "datatype": "FP32", "data": [1.0]} for name in "aba"]
    answer = server.post("/v2/models/sums/infer", {"inputs": columns})
    assert (answer.status, answer.json()) == (422, {"error": "inputs.a: is there more than once"})


def test_binary_data_that_do_not_fit(server: Serving) -> None:
    def asked(size: Any, rest: bytes, length: str | None = None) -> Any:
        tensor = {"name": "body", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": length or str(len(head))}
        return server.ask("/v2/models/echo/infer", head + rest, headers=headers)

    good = struct.pack("<I", 1) + b"x"
    assert asked(5, good).status == 200
    for answer in (
        asked(50, good), asked(-1, good), asked(True, good), asked(5, good + b"more"), asked(5, good, "999999"),
        asked(5, good, "-1"), asked(5, struct.pack("<I", 9) + b"x"),
    ):  # fmt: skip
        assert answer.status in (400, 422), answer.body
        assert answer.json()["error"]


def test_metadata_readiness_and_repository(server: Serving) -> None:
    assert server.ask("/v2").json()["name"] == "tally"
    assert server.ask("/v2/health/live").json() == {"live": True}
    assert server.ask("/v2/health/ready").json() == {"ready": True}
    told = server.ask("/v2/models/shapes").json()
    assert told["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [(each["name"], each["datatype"]) for each in told["outputs"]] == [
        ("label", "BYTES"), ("index", "INT64"), ("score", "FP32")
    ]  # fmt: skip
    assert server.ask("/v2/models/shapes/versions/1/ready").json() == {"name": "shapes", "ready": True}
    assert server.ask("/v2/models/shapes/versions/9").status == 404
    assert server.ask("/v2/models/none").status == 404
    index = server.ask("/v2/repository/index", b"{}").json()
    assert {"name": "shapes", "version": "1", "state": "READY", "reason": ""} in index


# ---------------------------------------------------------------------------------- TensorFlow Serving


def test_a_classifier_answers_as_the_retrained_ones_do(server: Serving) -> None:
    content = {"b64": b64(png(picture()))}
    single = server.ask(score("shapes"), png(picture())).json()
    scalar = server.post("/v1/models/shapes:predict", {"inputs": {"image": content}}).json()["outputs"]
    assert scalar["classes"] == CLASSES
    [scores] = scalar["prediction"]
    assert CLASSES[int(np.argmax(scores))] == single["label"]
    assert max(scores) == pytest.approx(single["score"])
    rows = server.post("/v1/models/shapes/versions/1:predict", {"instances": [content, {"image": content}]}).json()
    assert [each["prediction"] for each in rows["predictions"]] == [pytest.approx(scores)] * 2
    listed = server.post("/v1/models/shapes:predict", {"inputs": {"image": [content, content]}}).json()["outputs"]
    assert len(listed["prediction"]) == len(listed["classes"]) == 2
    results = server.post("/v1/models/shapes:classify", {"examples": [{"image": content}]}).json()["results"]
    assert [name for name, _ in results[0]] == CLASSES
    # the next request is answered as it always was
    assert server.ask(score("shapes"), png(picture())).json() == single


def test_rows_by_tensorflow_serving(server: Serving) -> None:
    by_row = {"instances": [{"a": 1, "b": [2]}, {"a": 3, "b": 4}]}
    assert server.post("/v1/models/sums:predict", by_row).json() == {"predictions": [{"sum": 3.0}, {"sum": 7.0}]}
    by_column = {"inputs": {"a": [1, 3], "b": [2, 4]}}
    assert server.post("/v1/models/sums:predict", by_column).json() == {"outputs": [3.0, 7.0]}
    lists = {"instances": [[1, 2], [3, 4]]}
    assert server.post("/v1/models/sums:predict", lists).json()["predictions"] == [{"sum": 3.0}, {"sum": 7.0}]
    assert server.post("/v1/models/sums:regress", {"examples": by_row["instances"]}).json() == {"results": [3.0, 7.0]}


def test_status_metadata_and_what_is_wrong(server: Serving) -> None:
    status = server.ask("/v1/models/shapes").json()["model_version_status"]
    assert [(each["version"], each["state"]) for each in status] == [("1", "AVAILABLE")]
    signature = server.ask("/v1/models/shapes/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert signature["serving_default"]["inputs"]["image"]["dtype"] == "DT_STRING"
    for path, body, code in (
        ("/v1/models/none:predict", {"instances": [1]}, 404),
        ("/v1/models/shapes/versions/7:predict", {"instances": [1]}, 404),
        ("/v1/models/shapes/labels/blue:predict", {"instances": [1]}, 404),
        ("/v1/models/shapes:predict", {"instances": [1]}, 422),
        ("/v1/models/shapes:predict", {"instances": [{"b64": "?"}]}, 422),
        ("/v1/models/shapes:predict", {"signature_name": "other", "instances": ["x"]}, 404),
        ("/v1/models/shapes:predict", {}, 422),
        ("/v1/models/shapes:predict", [1], 400),
    ):
        answer = server.post(path, body)
        assert answer.status == code, (path, body, answer.body)
        assert answer.json()["error"]


# --------------------------------------------------------------------------------------------- HTTP


def test_requests_behind_each_other_are_answered_in_order(server: Serving) -> None:
    with socket.create_connection(server.address, timeout=30) as client:
        for at in range(100):
            text = f"number {at:3}".encode()
            client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n" % score("echo").encode() + text)
        client.shutdown(socket.SHUT_WR)
        answers = b""
        while more := client.recv(65536):
            answers += more
    answers = answers.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")  # is the client still there?
    bodies = [part.partition(b"\r\n\r\n")[2] for part in answers.split(b"HTTP/1.1 200 OK")[1:]]
    assert [json.loads(body)["text"] for body in bodies] == [f"number {at:3}" for at in range(100)]


def test_bodies_in_chunks_expectations_and_encodings(server: Serving) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.request("POST", score("echo"), iter([b"in ", b"chunks"]), encode_chunked=True)
    assert json.loads(connection.getresponse().read())["text"] == "in chunks"
    connection.close()
    with socket.create_connection(server.address, timeout=30) as client:
        head = f"POST {score('echo')} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"then")
        assert b'"then"' in client.recv(4096)
    unknown = server.ask(score("echo"), b"x", headers={"Content-Encoding": "br"})
    assert unknown.status == 415
    assert "gzip or deflate" in unknown.json()["error"]
    assert server.ask(score("echo"), b"x" * (5 << 20)).status == 413


@pytest.mark.parametrize(
    ("head", "body", "status", "said"),
    [
        # Java's client offers HTTP/2 with each request
        ("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 4", "body", 200, '"body"'),
        ("Transfer-Encoding: chunked", "4\r\nbody\r\n0\r\nX-Tally-Version: 7\r\n\r\n", 200, '"body"'),
        ("Transfer-Encoding: gzip, chunked", "4\r\nbody\r\n0\r\n\r\n", 501, "Transfer-Encoding gzip, chunked"),
    ],
    ids=["upgrade", "trailer", "transfer coding"],
)
def test_what_else_http_has(server: Serving, head: str, body: str, status: int, said: str) -> None:
    """An offer of another protocol is declined, trailers are no headers, and a URI may be absolute."""
    with socket.create_connection(server.address, timeout=30) as client:
        for target in (score("echo"), f"http://host:80{score('echo')}"):
            client.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body[:2].encode())
            client.sendall(body[2:].encode())
            answer = http.client.HTTPResponse(client, method="POST")
            answer.begin()
            assert (answer.status, said in answer.read().decode()) == (status, True)
            if status != 200:
                return


def test_compressed_bodies(server: Serving) -> None:
    """Small ones at once, large ones in a thread; in order, and no more than a body may have."""
    large = b"large" * 700_000  # of 4 MiB
    connection = http.client.HTTPConnection(*server.address, timeout=30)

    def send(body: bytes, encoding: str) -> tuple[int, Any]:
        connection.request("POST", score("echo"), body, {"Content-Encoding": encoding})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    raw = zlib.compressobj(wbits=-15)
    for body, encoding in (
        (gzip.compress(b"sm") + gzip.compress(b"all"), "gzip"),
        (zlib.compress(b"small"), "deflate"),
        (raw.compress(b"small") + raw.flush(), "Deflate"),
    ):
        status, said = send(body, encoding)
        assert (status, said["text"]) == (200, "small"), encoding
    status, said = send(gzip.compress(large), "gzip")
    assert (status, said["text"]) == (200, large.decode())
    for body, code, why in (
        (gzip.compress(bytes(5 << 20)), 413, "once it is unpacked"),  # a few thousand bytes
        (gzip.compress(os.urandom(3 << 20) + bytes(3 << 20)), 413, "once it is unpacked"),
        (gzip.compress(large)[:-9], 400, "it ends too early"),
        (b"no gzip", 400, "not what Content-Encoding gzip says"),
        (gzip.compress(b"small") + b"more", 400, "not what Content-Encoding gzip says"),
    ):
        status, said = send(body, "gzip")  # on the same connection: it has been read to its end
        assert (status, why in said["error"]) == (code, True), said
    assert send(json.dumps({"data": [1, 2]}).encode(), "identity")[0] == 200
    connection.close()
    with socket.create_connection(server.address, timeout=30) as client:
        for body, encoding in ((gzip.compress(large), b"gzip"), (b"small", b"identity")):
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n"
            client.sendall(head % (score("echo").encode(), encoding, len(body)) + body)
        client.shutdown(socket.SHUT_WR)
        answers = b""
        while more := client.recv(1 << 20):
            answers += more
    assert [b'"largelarge' in each for each in answers.split(b"HTTP/1.1 200 OK")[1:]] == [True, False]


def test_metrics_tell_what_happened(server: Serving) -> None:
    server.ask(score("boxes"), png(picture()))
    figures = server.ask("/metrics").body.decode()
    assert 'tally_endpoint_requests_total{model="boxes",protocol="azureml",status="200",version="1"}' in figures
    assert 'tally_endpoint_replicas{model="boxes",version="1"} 1.0' in figures
    assert 'tally_endpoint_stage_seconds_count{model="boxes",stage="scoring",version="1"}' in figures


# ------------------------------------------------------------------------------------ servers of their own


def test_too_many_requests_are_told_to_come_again(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py", pause=0.05)
    with (
        serving(tmp_path, f"echo={model}", "--max-queue", 1, "--max-batch", 1) as server,
        Storm(server, clients=16) as storm,
    ):
        storm.until_answered(20)
        server.until(lambda it: storm.statuses[429] > 0)
        busy = next(each for _ in range(1000) if (each := server.ask("/score", b"x")).status == 429)
    assert busy.headers["retry-after"] == "1"
    assert "busy" in busy.json()["message"]
    assert set(storm.statuses) == {200, 429}
    assert storm.wrong == storm.broken == []


def test_no_replica_is_kept_where_none_is_needed(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py")
    with serving(tmp_path, f"echo={model}", "--replicas", "0..1", "--idle", "0.5s") as server:
        assert server.replicas() == []
        assert server.ask("/readyz").status == 200
        assert server.ask("/score", b"the first").json()["text"] == "the first"
        server.until(lambda it: not it.replicas())
        assert server.ask("/score", b"another").json()["text"] == "another"


def test_more_replicas_come_while_requests_wait(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py", pause=0.05)
    with serving(tmp_path, f"echo={model}", "--replicas", "1..2", "--idle", "1s") as server:
        with Storm(server, clients=64) as storm:
            server.until(lambda it: sum(each["state"] == "ready" for each in it.replicas()) == 2)
        server.until(lambda it: len(it.replicas()) == 1)
    assert storm.wrong == storm.broken == []
    assert set(storm.statuses) == {200}


HOLDS = """
import os

def init():
    pass

def run(raw_data):
    7 ** int(raw_data)  # computes without letting other threads of its process run
    return os.getpid()
"""


def test_a_model_that_holds_the_interpreter_holds_up_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "holds.py").write_text(HOLDS)
    quick = echo(tmp_path / "quick.py")
    with (
        serving(tmp_path, f"holds={tmp_path}/holds.py", f"quick={quick}") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        [replica] = server.replicas("holds")
        slow = pool.submit(server.ask, score("holds"), b"2500000")
        answered = 0
        while not slow.done():
            assert server.ask("/healthz").status == 200
            assert server.ask(score("quick"), b"x").status == 200
            answered += 1
        assert answered > 1
        assert slow.result().json() == replica["pid"] == server.ask(score("holds"), b"2").json()


REQUESTS_LEAVE = """
import asyncio, gc, sys
import uvloop
from tally.serving.server import ModelServer
from tally.serving.settings import ModelSettings, ServeSettings

async def ask(port, count):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(count):
        writer.write(b"POST /score HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1\\r\\n\\r\\nx")
        head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
    writer.close()
    await writer.wait_closed()

async def main():
    server = ModelServer(ServeSettings((ModelSettings("echo", sys.argv[1]),), port=0), lambda line: None)
    running = asyncio.create_task(server.run())
    while not server.ready:
        await asyncio.sleep(0.02)
    port = int(server.url.rpartition(":")[2])
    await ask(port, 10)
    gc.collect()
    gc.disable()
    await ask(port, 200)
    print("left:", gc.collect())
    server.stop()
    await running

uvloop.run(main())
"""


def test_a_request_leaves_nothing_that_only_the_collector_frees(tmp_path: Path) -> None:
    pytest.importorskip("uvloop")
    command = [sys.executable, "-c", REQUESTS_LEAVE, echo(tmp_path / "echo.py", pause=0)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    left = re.search(r"left: (\d+)", ran.stdout)
    assert left is not None, ran.stdout + ran.stderr
    assert int(left[1]) < 50


def test_a_model_is_unloaded_and_loaded_while_another_answers(tmp_path: Path) -> None:
    models = [{"name": name, "model": echo(tmp_path / f"{name}.py", mark=name)} for name in ("one", "two")]
    declared = tmp_path / "served.yaml"
    declared.write_text(json.dumps({"models": [{**models[0], "replicas": 2}, {**models[1], "max_batch": 1}]}))
    with serving(tmp_path, declared) as server, Storm(server, score("one"), clients=4) as storm:
        assert len(server.replicas("one")) == 2
        [replica] = server.replicas("two")
        assert server.ask("/v2/repository/models/two/unload", b"").status == 200
        server.until(lambda _: not psutil.pid_exists(replica["pid"]))
        gone = server.ask(score("two"), b"x")
        assert (gone.status, gone.json()["message"]) == (503, "two is not loaded")
        assert server.ask("/v2/models/two/ready").status == 503
        assert server.ask("/v2/repository/models/two/load", b"").status == 200
        assert server.ask(score("two"), b"x").json()["mark"] == "two"
        storm.until_answered(50)
    assert storm.wrong == storm.broken == []
    assert set(storm.statuses) == {200}


def test_an_alias_is_a_label_and_is_followed(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    for mark in ("old", "new"):
        (tmp_path / mark).mkdir()
        assert cli("models", "add", "words", echo(tmp_path / mark / "echo.py", mark=mark)).code == 0
    assert cli("models", "alias", "words", "champion", "1").code == 0
    with serving(tmp_path, "models:/words@champion") as server:
        assert server.ask("/v1/models/words/labels/champion").json()["model_version_status"][0]["version"] == "1"
        assert server.ask("/score", b"x", headers={"X-Tally-Version": "champion"}).json()["mark"] == "old"
        assert cli("models", "alias", "words", "champion", "2").code == 0
        server.process.send_signal(signal.SIGHUP)
        server.until(lambda it: it.ask("/score", b"x").headers["x-tally-version"] == "2")
        assert server.ask("/score", b"x", headers={"azureml-model-deployment": "champion"}).json()["mark"] == "new"
        assert server.ask("/score", b"x", headers={"X-Tally-Version": "1"}).status == 404


def test_a_sample_of_requests_is_kept(tmp_path: Path) -> None:
    from pyarrow import parquet

    model = echo(tmp_path / "echo.py")
    place = tmp_path / "payloads"
    with serving(tmp_path, f"echo={model}", "--payloads", place) as server:
        for text in (b"one", b"bad", b"two"):
            server.ask("/score", text, headers={"Content-Type": "text/plain"})
    rows = [row for file in place.rglob("*.parquet") for row in parquet.read_table(file).to_pylist()]
    assert sorted((row["body"], row["status"]) for row in rows) == [(b"bad", 422), (b"one", 200), (b"two", 200)]
    assert {(row["model"], row["version"], row["protocol"], row["content_type"]) for row in rows} == {
        ("echo", "1", "azureml", "text/plain")
    }
    assert [json.loads(row["answer"])["text"] for row in rows if row["body"] == b"two"] == ["two"]


MEANS = """
import tally

class Means(tally.Scorer):
    input = "image"
    columns = {"mean": "float64"}

    def score(self, batch):
        return [{"mean": float(picture.mean())} for picture in batch]
"""


def test_how_pictures_are_decoded_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "means.py").write_text(MEANS)
    (tmp_path / "models.yaml").write_text(
        f"models:\n- {{name: all, model: '{tmp_path}/means.py:Means'}}\n"
        f"- {{name: first, model: '{tmp_path}/means.py:Means', pages: first, background: black, max_pixels: 1M}}\n"
    )
    frames = [Image.new("L", (10, 10), shade) for shade in (0, 255)]
    moving, clear = io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (10, 10)).save(clear, "PNG")
    options = ("--pages", "all", "--background", "white", "--max-pixels", "10000")
    with serving(tmp_path, tmp_path / "models.yaml", *options) as server:

        def asked(name: str, content: bytes) -> Any:
            return server.ask(score(name), content, headers={"Content-Type": "image/png"}).json()

        assert asked("all", moving.getvalue()) == [{"page": 0, "mean": 0.0}, {"page": 1, "mean": 255.0}]
        assert asked("first", moving.getvalue()) == {"mean": 0.0}
        assert asked("all", clear.getvalue()) == [{"page": 0, "mean": 255.0}]
        assert asked("first", clear.getvalue()) == {"mean": 0.0}
        large = png(np.full((101, 100, 3), 7, np.uint8))
        assert asked("first", large) == {"mean": 7.0}
        assert "is over the limit of 0.01 million" in str(asked("all", large))


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the-second\n")
    model = echo(tmp_path / "echo.py")
    keys = {"TALLY_ENDPOINT_KEY": "the-first"}
    with serving(tmp_path, f"echo={model}", "--keys", tmp_path / "keys", environment=keys) as server:
        assert server.ask("/").status == server.ask("/readyz").status == 200
        assert server.ask("/v2/health/live").status == 200
        for wrong in ({}, {"Authorization": "Bearer nothing"}, {"Authorization": "the-first"}):
            answer = server.ask("/score", b"x", headers=wrong)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("the-first", "the-second"):
            assert server.ask("/score", b"x", headers={"Authorization": f"Bearer {key}"}).status == 200
        with open(f"/proc/{server.replicas()[0]['pid']}/environ", "rb") as file:
            assert b"the-first" not in file.read()
        assert "the-first" not in server.log


def test_keys_that_are_changed_in_the_folder_of_secrets_count(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "TALLY_ENDPOINT_KEY").write_text("the-first")
    environment = {"TALLY_SECRETS": str(folder)}
    with serving(tmp_path, f"echo={echo(tmp_path / 'echo.py')}", environment=environment) as server:

        def status(key: str) -> int:
            return server.ask("/score", b"x", headers={"Authorization": f"Bearer {key}"}).status

        assert (status("the-first"), status("the-second")) == (200, 401)
        (folder / "TALLY_ENDPOINT_KEY").write_text("the-second, the-third")
        server.until(lambda _: status("the-second") == 200)
        assert (status("the-first"), status("the-third")) == (401, 200)
        (folder / "TALLY_ENDPOINT_KEY").unlink()
        server.until(lambda _: status("the-second") == 401)  # and not: everybody may
        assert server.ask("/score", b"x").status == 401


def test_without_a_key_nobody_else_may_reach_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tally", "serve", echo(tmp_path / "echo.py"), "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != "TALLY_ENDPOINT_KEY"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert ran.returncode == 2
    assert "there is no key" in ran.stderr
    assert "TALLY_ENDPOINT_KEY" in ran.stderr


def test_a_model_that_cannot_be_loaded_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(
        "def init():\n    raise RuntimeError('no weights')\n\ndef run(data):\n    pass\n"
    )
    command = [sys.executable, "-m", "tally", "serve", str(tmp_path / "score.py"), "--port", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "no weights" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl command makes a certificate here")
    model = echo(tmp_path / "echo.py")
    with serving(tmp_path, f"echo={model}", "--certificate", certificate, "--private-key", key) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection(*server.address, context=context, timeout=30)
        connection.request("POST", "/score", b"over TLS")
        assert json.loads(connection.getresponse().read())["text"] == "over TLS"
        connection.close()


def test_a_load_is_measured_and_where_nobody_listens_it_is_told_at_once(
    tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    model = echo(tmp_path / "echo.py")
    (tmp_path / "sent.txt").write_text("again and again")
    asked = ("load", tmp_path / "sent.txt", "--concurrency", 4, "--json")
    with serving(tmp_path, f"echo={model}") as server:
        ran = cli(asked[0], f"{server.url}/score", *asked[1:], "--seconds", "1s")
        assert ran.code == 0, ran.err
        said = json.loads(ran.out)
        assert said["errors"] == {}
        assert said["statuses"].keys() == {"200"}
        assert said["rate"] == pytest.approx(said["statuses"]["200"] / said["seconds"])
        assert 0 < said["p50"] <= said["p95"] <= said["p99"]
        address = server.url
    ran = cli(asked[0], f"{address}/score", *asked[1:], "--seconds", "1h")
    assert ran.code == 1
    assert f"{address}/score cannot be asked: " in ran.err
    assert "tally serve MODEL" in ran.err
