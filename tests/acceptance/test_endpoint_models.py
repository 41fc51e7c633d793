"""Real models answer online, through every protocol, what a job writes."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.test_azureml_script import DETECTOR, MINI_BATCH, PHOTOS, RAW
from tests.endpoints import Serving, serving

import tally

PICTURES = ["images/photos/dog.jpg", "images/coco/000000009400.jpg", "images/coco/000000000139.jpg"]


def scored(data: Path, tmp_path: Path, model: str, **options: Any) -> list[list[dict[str, Any]]]:
    """The rows that a job writes for each of the pictures."""
    sources = [data / each for each in PICTURES]
    job = tally.score(sources, data / model, tmp_path / "out", quiet=True, workers=1, **options)
    found: dict[str, list[dict[str, Any]]] = {Path(each).name: [] for each in PICTURES}
    for row in job.results().to_pylist():
        found[Path(row.pop("key")).name].append(row)
    return list(found.values())


def infer(server: Serving, model: str, contents: list[bytes], name: str = "image") -> list[list[dict[str, Any]]]:
    """The rows of each picture by the Open Inference Protocol."""
    tensor = {
        "name": name, "shape": [len(contents)], "datatype": "BYTES", "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(each).decode() for each in contents],
    }  # fmt: skip
    answer = server.post(f"/v2/models/{model}/infer", {"inputs": [tensor]})
    assert answer.status == 200, answer.body
    return _by_picture({each["name"]: each["data"] for each in answer.json()["outputs"]}, len(contents))


def predict(server: Serving, model: str, contents: list[bytes]) -> list[Any]:
    """The same by TensorFlow Serving's."""
    instances = [{"b64": base64.b64encode(each).decode()} for each in contents]
    answer = server.post(f"/v1/models/{model}:predict", {"instances": instances})
    assert answer.status == 200, answer.body
    return list(answer.json()["predictions"])


def grpc_infer(server: Serving, model: str, contents: list[bytes]) -> list[list[dict[str, Any]]]:
    """The rows of each picture by the Open Inference Protocol over gRPC."""
    from tests.grpc_client import OIP, outputs, tensor

    sent = tensor("image", "BYTES", [len(contents)], bytes_contents=contents)
    columns = outputs(_grpc(server, OIP, "ModelInfer", model_name=model, inputs=[sent]))
    return _by_picture(columns, len(contents))


def grpc_predict(server: Serving, model: str, contents: list[bytes]) -> dict[str, list[Any]]:
    """What TensorFlow Serving's Predict answers over gRPC: the values of each output."""
    from tests.grpc_client import PREDICTION

    image = {"dtype": "DT_STRING", "string_val": contents, "tensor_shape": {"dim": [{"size": len(contents)}]}}
    answer = _grpc(server, PREDICTION, "Predict", model_spec={"name": model}, inputs={"image": _tensor(image)})
    found = {}
    for name, output in answer.outputs.items():
        [(_, values)] = [each for each in output.ListFields() if each[0].name.endswith("_val")]
        found[name] = [str(value, "utf-8") if isinstance(value, bytes) else value for value in values]
    return found


def _grpc(server: Serving, service: str, method: str, **fields: Any) -> Any:
    import grpc
    from tests.grpc_client import Client

    with grpc.insecure_channel(server.grpc) as channel:
        return Client(channel).call(service, method, **fields)


def _tensor(fields: dict[str, Any]) -> Any:
    from tally.serving import protobuf

    return protobuf.message("tensorflow.TensorProto")(**fields)


def _by_picture(columns: dict[str, list[Any]], pictures: int) -> list[list[dict[str, Any]]]:
    """Rows from the columns of all pictures."""
    plain = {
        name: [str(value, "utf-8") if isinstance(value, bytes) else value for value in values]
        for name, values in columns.items()
    }
    counts = plain.pop("count", [1] * pictures)
    rows = [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]
    return [[rows.pop(0) for _ in range(count)] for count in counts]


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same rows, numbers to the precision of float32 in batches of another size."""
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert row[name] == (pytest.approx(value, abs=2e-3) if isinstance(value, float) else value)


def test_a_detector(data: Path, tmp_path: Path) -> None:
    model, labels = "models/detect/yolox_nano.onnx", data / "models/labels/coco_80.txt"
    expected = scored(data, tmp_path, model, labels=labels)
    assert all(expected)
    contents = [(data / each).read_bytes() for each in PICTURES]
    pytest.importorskip("grpc")
    with serving(tmp_path, f"detector={data / model}", "--labels", labels, "--grpc-port", 0) as server:
        for content, rows in zip(contents, expected, strict=True):
            close(server.ask("/score", content).json(), rows)
        for answers in (
            infer(server, "detector", contents),
            predict(server, "detector", contents),
            grpc_infer(server, "detector", contents),
            _by_picture(grpc_predict(server, "detector", contents), len(contents)),
        ):
            for found, rows in zip(answers, expected, strict=True):
                close(found, rows)


def test_a_classifier(data: Path, tmp_path: Path) -> None:
    model, labels = "models/classify/mobilenet_v2_fp32.onnx", data / "models/labels/imagenet_1001_background.txt"
    expected = scored(data, tmp_path, model, labels=labels, task="classify")
    contents = [(data / each).read_bytes() for each in PICTURES]
    options = ("--labels", labels, "--task", "classify", "--grpc-port", 0)
    pytest.importorskip("grpc")
    with serving(tmp_path, f"classifier={data / model}", *options) as server:
        for content, [row] in zip(contents, expected, strict=True):
            close([server.ask("/score", content).json()], [row])
        for answers in (infer(server, "classifier", contents), grpc_infer(server, "classifier", contents)):
            for found, rows in zip(answers, expected, strict=True):
                close(found, rows)
        predicted = predict(server, "classifier", contents)
        over_grpc = grpc_predict(server, "classifier", contents)
        assert over_grpc["classes"] == [name for each in predicted for name in each["classes"]]
        assert over_grpc["prediction"] == pytest.approx([v for each in predicted for v in each["prediction"]], abs=1e-5)
        for all_scores, [row] in zip(predicted, expected, strict=True):
            best = max(range(len(all_scores["classes"])), key=lambda at: all_scores["prediction"][at])
            found = {"label": all_scores["classes"][best], "index": best, "score": all_scores["prediction"][best]}
            close([found], [row])


def test_scripts_as_people_deploy_them(data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copyfile(data / "models/detect/face_rfb320.onnx", weights / "face_rfb320.onnx")
    for name, script in (("raw", RAW), ("mini", MINI_BATCH)):
        (tmp_path / f"{name}.py").write_text(DETECTOR + script)
    photo = data / PHOTOS[0]
    job = tally.score(photo, tmp_path / "raw.py", tmp_path / "out", artifacts=weights, quiet=True, workers=1)
    expected = [{name: row[name] for name in row if name != "key"} for row in job.results().to_pylist()]
    assert len(expected) == 4
    models = [f"{name}={tmp_path / name}.py" for name in ("raw", "mini")]
    with serving(tmp_path, *models, "--artifacts", weights) as server:
        for name in ("raw", "mini"):
            answer = server.ask(f"/api/v1/service/{name}/score", photo.read_bytes())
            assert answer.status == 200, answer.body
            close(answer.json(), expected)
            [found] = infer(server, name, [photo.read_bytes()], "body")
            close(found, expected)
        refused = server.ask("/api/v1/service/raw/score", b"\xff\xd8 cut short")
        assert refused.status == 400
        assert refused.body.startswith(b"cannot identify image file")
        assert server.ask("/api/v1/service/raw/score").status == 405
