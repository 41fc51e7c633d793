"""A detection script as people deploy it to Azure ML, run as a job without a change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

SCRIPT = """
import io
import json
import logging
import os

import numpy as np
import onnxruntime
from PIL import Image


def init():
    global model, name
    path = os.path.join(os.getenv("AZUREML_MODEL_DIR"), "model", "face_rfb320.onnx")
    model = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = model.get_inputs()[0].name
    logging.info("Init complete")
    print("model loaded")


def detect(file):
    image = Image.open(file).convert("RGB")
    width, height = image.size
    pixels = np.asarray(image.resize((320, 240), Image.Resampling.BICUBIC), np.float32)
    scores, boxes = model.run(["scores", "boxes"], {name: ((pixels - 127) / 128).transpose(2, 0, 1)[None]})
    kept = []
    for at in np.argsort(-scores[0, :, 1]):
        score = float(scores[0, at, 1])
        if score < 0.7:
            break
        box = [float(v) for v in boxes[0, at] * [width, height, width, height]]
        if all(overlap(box, other) < 0.45 for other, _ in kept):
            kept.append((box, score))
    return [dict(zip(["xmin", "ymin", "xmax", "ymax"], box), label="face", score=score) for box, score in kept]


def overlap(a, b):
    wide = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return wide * high / (area(a) + area(b) - wide * high)
"""

RAW = """
from azureml.contrib.services.aml_request import AMLRequest, rawhttp
from azureml.contrib.services.aml_response import AMLResponse


@rawhttp
def run(request):
    if request.method != "POST":
        return AMLResponse("bad request", 500)
    try:
        return AMLResponse(json.dumps(detect(io.BytesIO(request.get_data(False)))), 200)
    except OSError as error:
        return AMLResponse(str(error), 400)
"""

MINI_BATCH = """
def run(mini_batch):
    print(f"run method start: {__file__}, run({len(mini_batch)} files)")
    return [detect(path) for path in mini_batch]
"""

PHOTOS = ["face.jpg", "grace_hopper.bmp", "faces_detection1.jpg", "faces_detection3.jpg", "dog.jpg", "person.jpg"]


@pytest.mark.parametrize("form", ["raw", "mini_batch"])
def test_a_detection_script_gives_the_reference_boxes(
    cli: Callable[..., Any], data: Path, tmp_path: Path, form: str
) -> None:
    reference = json.loads((data / "images" / "detections_reference.json").read_text())
    known = [name for name in PHOTOS if f"images/photos/{name}" in reference]
    assert len(known) >= 4
    photos, weights = tmp_path / "photos", tmp_path / "weights"
    photos.mkdir()
    for name in known:
        shutil.copyfile(data / "images" / "photos" / name, photos / name)
    (photos / "broken.jpg").write_bytes(b"no picture at all")
    (weights / "model").mkdir(parents=True)
    shutil.copyfile(data / "models" / "detect" / "face_rfb320.onnx", weights / "model" / "face_rfb320.onnx")
    script, out = tmp_path / "score.py", tmp_path / "out"
    script.write_text(SCRIPT + (RAW if form == "raw" else MINI_BATCH))

    ran = cli("score", photos, "--model", script, "--artifacts", weights, "--out", out)
    assert ran.code == 0, ran.err
    assert f"{len(known)} of {len(known) + 1} items scored" in ran.err
    rows = [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    for name in known:
        wanted = reference[f"images/photos/{name}"]["faces_rfb320"]
        found = [row for row in rows if row["key"] == name]
        assert len(found) == len(wanted), name
        for row, face in zip(found, wanted, strict=True):
            assert [row[side] for side in ("xmin", "ymin", "xmax", "ymax")] == pytest.approx(face["box"], abs=1), name
            assert row["score"] == pytest.approx(face["score"], abs=0.01)
            assert row["label"] == "face"
    assert sum(row["key"] == "face.jpg" for row in rows) == 4
    [dead] = [json.loads(line) for line in cli("jobs", "dead", out, "--json").out.splitlines()]
    assert dead["key"] == "broken.jpg"
    assert "cannot identify image file" in dead["error"]
    assert len(dead["error"]) < 300
    # What the script prints is kept, and does not mix with the progress.
    assert "model loaded" not in ran.err + ran.out
    [log] = [line[13:] for line in cli("jobs", "show", out).out.splitlines() if line.startswith("log ")]
    assert "model loaded" in Path(log).read_text()


def test_a_script_that_cannot_start_says_why(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "1.jpg").write_bytes(b"1")
    (tmp_path / "weights").mkdir()
    script = tmp_path / "score.py"
    script.write_text(SCRIPT + MINI_BATCH)
    ran = cli(
        *("score", tmp_path / "items", "--model", script, "--artifacts", tmp_path / "weights"),
        *("--out", tmp_path / "out", "--workers", 1),
    )
    assert ran.code == 1
    assert "init()" in ran.err
    assert "face_rfb320.onnx" in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("\n") < 12
