"""A scorer that makes pictures gives figures of each in the same run: in a job, and behind an endpoint."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tally

NEGATIVE = """
import tally

class Negative(tally.Scorer):
    output = "image"
    columns = {"bright": "float64"}

    def score(self, batch):
        return [tally.Pictured(255 - picture, [{"bright": float(picture.mean())}]) for picture in batch]
"""


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (shade,) * 3).save(content, "PNG")
    return content.getvalue()


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_in_a_job(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for shade in (10, 20):
        (tmp_path / "in" / f"{shade}.png").write_bytes(png(shade))
    (tmp_path / "negative.py").write_text(NEGATIVE)
    job = tally.score(tmp_path / "in", f"{tmp_path}/negative.py:Negative", tmp_path / "out", quiet=True, workers=1)
    rows = job.results().sort_by("key").to_pylist()
    assert [(row["key"], row["bright"], row["file"], row["width"], row["height"]) for row in rows] == [
        ("10.png", 10.0, "10.png", 6, 4),
        ("20.png", 20.0, "20.png", 6, 4),
    ]
    assert (pixels((tmp_path / "out" / "20.png").read_bytes()) == 235).all()


def test_behind_an_endpoint(tmp_path: Path) -> None:
    pytest.importorskip("msgspec")
    from tests.endpoints import serving

    (tmp_path / "negative.py").write_text(NEGATIVE)
    with serving(tmp_path, f"negative={tmp_path}/negative.py:Negative") as server:
        answer = server.ask("/api/v1/service/negative/score", png(20), headers={"Content-Type": "image/png"}).json()
        assert answer["rows"] == [{"bright": 20.0}]
        assert (pixels(base64.b64decode(answer["picture"])) == 235).all()
        sent = {"name": "picture", "datatype": "UINT8", "shape": [1, 4, 6, 3], "data": [20] * 72}
        outputs = server.ask(
            "/v2/models/negative/infer",
            json.dumps({"inputs": [sent]}).encode(),
            headers={"Content-Type": "application/json"},
        ).json()["outputs"]
        assert [each["name"] for each in outputs] == ["image", "bright"]
        assert outputs[0]["data"] == [235] * 72
        assert outputs[1]["data"] == [20.0]
