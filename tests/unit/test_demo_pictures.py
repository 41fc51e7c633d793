"""The pictures and the toy classifier that come with Tally, through Pillow and ONNX Runtime alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image, ImageOps

from tally import demo
from tally.demo import pictures

MODEL = demo.model("shapes")
UNSEEN_SEED = 20_260
ORIENTATION_TAG = 0x0112


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    package: dict[str, Any] = yaml.safe_load((MODEL / "tally.yaml").read_text(encoding="utf-8"))
    return package


@pytest.fixture(scope="module")
def session(package: dict[str, Any]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL / package["file"], options, providers=["CPUExecutionProvider"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepared(content: bytes, declared: dict[str, Any]) -> np.ndarray:
    """``float32[3, height, width]``, made as ``tally.yaml`` declares it."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    pixels = np.asarray(image.resize(tuple(declared["size"]), Image.Resampling.BILINEAR), dtype=np.float32)
    mean, std = np.array(declared["mean"], np.float32), np.array(declared["std"], np.float32)
    return np.ascontiguousarray(((pixels * declared["scale"] - mean) / std).transpose(2, 0, 1), np.float32)


def test_the_same_seed_draws_the_same_collection(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pictures.draw(tmp_path / name, 24, 5)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_seed_draws_another_collection() -> None:
    assert pictures.draw_picture("star", 1, 5) != pictures.draw_picture("star", 1, 6)


def test_a_larger_collection_begins_with_the_smaller(tmp_path: Path) -> None:
    pictures.draw(tmp_path / "few", 11, 7)
    pictures.draw(tmp_path / "many", 21, 7)
    assert contents(tmp_path / "few").items() <= contents(tmp_path / "many").items()


def test_true_labels_are_written_outside_the_collection(tmp_path: Path) -> None:
    pictures.draw(tmp_path / "out", 20, 7, tmp_path / "to" / "truth.csv")
    with (tmp_path / "to" / "truth.csv").open(newline="") as file:
        truth = {row["key"]: row["label"] for row in csv.DictReader(file)}
    assert set(truth) == set(contents(tmp_path / "out"))
    assert set(truth.values()) == set(pictures.SHAPES)
    assert truth["ring-0002.jpg"] == "ring"


def test_pictures_vary_in_size_and_orientation() -> None:
    upright_widths, orientations = [], set()
    for shape, number in pictures.pictures(96):
        image = Image.open(io.BytesIO(pictures.draw_picture(shape, number, UNSEEN_SEED)))
        orientations.add(image.getexif().get(ORIENTATION_TAG, 1))
        upright_widths.append(ImageOps.exif_transpose(image).width)
    assert min(upright_widths) >= 96
    assert max(upright_widths) <= 640
    assert len(set(upright_widths)) > 60
    assert orientations > {1, 6, 8}


def test_labels_are_the_shapes_that_are_drawn(package: dict[str, Any]) -> None:
    labels = (MODEL / package["options"]["labels"]).read_text(encoding="utf-8").splitlines()
    assert labels == sorted(pictures.SHAPES)


def test_the_model_is_small_and_takes_any_batch(package: dict[str, Any], session: onnxruntime.InferenceSession) -> None:
    assert (MODEL / package["file"]).stat().st_size < 1_000_000
    (value,) = session.get_inputs()
    assert value.type == "tensor(float)"
    assert value.shape[1:] == [3, 64, 64]

    batch = np.random.default_rng(1).uniform(-1, 1, (7, 3, 64, 64)).astype(np.float32)
    (together,) = session.run(None, {value.name: batch})
    alone = np.concatenate([session.run(None, {value.name: one[None]})[0] for one in batch])
    assert together.shape == (7, 8)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_model_names_unseen_pictures(package: dict[str, Any], session: onnxruntime.InferenceSession) -> None:
    labels = (MODEL / package["options"]["labels"]).read_text(encoding="utf-8").splitlines()
    truth = list(pictures.pictures(80))
    batch = np.stack(
        [
            prepared(pictures.draw_picture(shape, number, UNSEEN_SEED), package["options"]["preprocess"])
            for shape, number in truth
        ]
    )
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: batch})
    right = [labels[best] == shape for best, (shape, _) in zip(probabilities.argmax(axis=1), truth, strict=True)]
    assert np.mean(right) >= 0.9
