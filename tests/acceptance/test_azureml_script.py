"""A detection script as people deploy them to Azure ML gives the reference boxes, unchanged."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tally.models.load import load
from tally.models.resolve import resolve
from tally.scorers.base import Item, Request, Response

DETECTOR = """
import io
import os

import numpy as np
import onnxruntime
from PIL import Image


def init():
    global session
    folder = os.environ["AZUREML_MODEL_DIR"]
    session = onnxruntime.InferenceSession(os.path.join(folder, "face_rfb320.onnx"))


def overlap(box, others):
    left_top = np.maximum(box[:2], others[:, :2])
    right_bottom = np.minimum(box[2:], others[:, 2:])
    sides = np.clip(right_bottom - left_top, 0, None)
    area = lambda b: (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    common = sides[:, 0] * sides[:, 1]
    return common / (area(box) + area(others) - common)


def faces(file, threshold=0.7):
    image = Image.open(file).convert("RGB")
    pixels = np.asarray(image.resize((320, 240), RESAMPLING), np.float32)
    tensor = ((pixels - 127) / 128).transpose(2, 0, 1)[None]
    scores, boxes = session.run(["scores", "boxes"], {session.get_inputs()[0].name: tensor})
    scores, boxes = scores[0, :, 1], boxes[0] * np.array(image.size * 2)
    candidates = [i for i in np.argsort(-scores) if scores[i] > threshold]
    found = []
    while candidates:
        best, rest = candidates[0], np.array(candidates[1:], int)
        xmin, ymin, xmax, ymax = boxes[best].tolist()
        found.append(
            {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax, "label": "face", "score": scores[best]}
        )
        candidates = rest[overlap(boxes[best], boxes[rest]) < 0.45].tolist() if len(rest) else []
    return found
""".replace("RESAMPLING", "Image.Resampling.BICUBIC")

RAW = """
import json

from azureml.contrib.services.aml_request import AMLRequest, rawhttp
from azureml.contrib.services.aml_response import AMLResponse


@rawhttp
def run(request):
    if request.method != "POST":
        return AMLResponse("only POST is understood", 405)
    try:
        boxes = faces(io.BytesIO(request.get_data(False)))
    except OSError as error:
        return AMLResponse(str(error), 400)
    return AMLResponse(json.dumps([{**box, "score": float(box["score"])} for box in boxes]), 200)
"""

MINI_BATCH = """
def run(mini_batch):
    results = []
    for path in mini_batch:
        with open(path, "rb") as file:
            results.append(faces(file))
    return results
"""

PHOTOS = [
    "images/photos/face.jpg",
    "images/photos/grace_hopper.bmp",
    "images/photos/faces_detection1.jpg",
    "images/photos/dog.jpg",
    "images/coco/000000009400.jpg",
]


@pytest.mark.parametrize("form", ["raw", "mini_batch"])
def test_boxes_equal_the_reference(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(os.environ, "AZUREML_MODEL_DIR", "")
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copyfile(data / "models/detect/face_rfb320.onnx", weights / "face_rfb320.onnx")
    script = tmp_path / "score.py"
    script.write_text(DETECTOR + (RAW if form == "raw" else MINI_BATCH))
    reference = json.loads((data / "images/detections_reference.json").read_text())

    ref = resolve(script, artifacts=weights)
    assert (ref.kind, ref.options["form"], ref.assumed) == ("script", form, ())
    scorer = load(ref, "cpu")
    items = [Item(photo, (data / photo).read_bytes() if scorer.input == "bytes" else data / photo) for photo in PHOTOS]
    results = scorer.score([scorer.prepare(item) for item in items])

    assert len(results) == len(PHOTOS)
    for photo, rows in zip(PHOTOS, results, strict=True):
        expected = reference[photo]["faces_rfb320"]
        assert not isinstance(rows, Exception)
        assert len(rows) == len(expected), photo
        for row, face in zip(rows, expected, strict=True):
            box = [row[side] for side in ("xmin", "ymin", "xmax", "ymax")]
            assert box == pytest.approx(face["box"], abs=1.0), photo
            assert row["score"] == pytest.approx(face["score"], abs=0.01), photo
            assert row["label"] == "face"

    if form == "raw":  # a bad photo costs itself only, and tells why
        bad, good = scorer.score([scorer.prepare(Item("bad.jpg", b"\xff\xd8 cut short")), scorer.prepare(items[0])])
        assert "the script answered 400: cannot identify image file" in str(bad)
        assert not isinstance(good, Exception)
        assert len(good) == 4
        # Behind an endpoint it answers the same, with its own status.
        answer = scorer.respond(Request(items[0].value))
        assert answer is not None
        assert (answer.status, json.loads(answer.body)) == (200, good)
        assert scorer.respond(Request(method="GET")) == Response(
            405, b"only POST is understood", [("Content-Type", "text/plain; charset=utf-8")]
        )
        refused = scorer.respond(Request(b"\xff\xd8 cut short"))
        assert refused is not None
        assert refused.status == 400
        assert refused.body.startswith(b"cannot identify image file")
