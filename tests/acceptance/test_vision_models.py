"""The ONNX vision scorers on real models and photos, against answers worked out independently of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tally.errors import ModelLoadError
from tally.models.labels import read_labels
from tally.scorers.base import Item
from tally.scorers.onnx.pictures import inspect
from tally.scorers.onnx.scorer import OnnxVisionScorer

BGR_MEANS = {"channels": "bgr", "mean": [104, 117, 123]}


def read(path: Path, key: str | None = None) -> Item:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return Item(key or path.name, pixels, {"width": pixels.shape[1], "height": pixels.shape[0]})


def loaded(data: Path, model: str, **options: Any) -> OnnxVisionScorer:
    path = data / "models" / model
    scorer = OnnxVisionScorer(inspect(path, options))
    scorer.load(path.parent, "cpu")
    return scorer


def run(scorer: OnnxVisionScorer, items: list[Item]) -> list[Any]:
    results: list[Any] = []
    for start in range(0, len(items), scorer.batch_size):
        results += scorer.score([scorer.prepare(item) for item in items[start : start + scorer.batch_size]])
    return results


@pytest.fixture(scope="module")
def imagenet(data: Path) -> list[Item]:
    return [read(data / "images" / "imagenet" / row[0]) for row in reference(data)]


def reference(data: Path) -> list[list[str]]:
    """file, class_index, wnid, label, mobilenet top-1, its probability, squeezenet top-1, its probability"""
    with (data / "images" / "imagenet" / "labels.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


def names(data: Path, file: str) -> list[str]:
    return read_labels(data / "models" / "labels" / file)


# ------------------------------------------------------------------------------------------- classify


def test_mobilenet_agrees_on_every_photo(data: Path, imagenet: list[Item]) -> None:
    labels = names(data, "imagenet_1001_background.txt")
    rows = run(loaded(data, "classify/mobilenet_v2_fp32.onnx", task="classify", labels=labels), imagenet)
    expected = reference(data)
    assert len(rows) == len(expected) == 100
    # the model counts a background class first
    assert [row["index"] - 1 for row in rows] == [int(e[4]) for e in expected]
    assert [row["score"] for row in rows] == pytest.approx([float(e[5]) for e in expected], abs=0.001)
    assert rows[0]["label"] == "tench, Tinca tinca"


def test_squeezenet_half_precision_agrees_on_every_photo(data: Path, imagenet: list[Item]) -> None:
    labels = names(data, "imagenet_1000.txt")
    scorer = loaded(data, "classify/squeezenet_fp16.onnx", preprocess=BGR_MEANS, labels=labels)
    assert scorer.batch_size == 1
    rows, expected = run(scorer, imagenet), reference(data)
    assert [row["index"] for row in rows] == [int(e[6]) for e in expected]
    assert [row["score"] for row in rows] == pytest.approx([float(e[7]) for e in expected], abs=0.001)


def test_quantised_rows_do_not_depend_on_the_batch(data: Path, imagenet: list[Item]) -> None:
    one, many = (
        run(loaded(data, "classify/mobilenet_v2_u8.onnx", task="classify", top=3, batch_size=n), imagenet)
        for n in (1, 32)
    )
    assert one == many
    right = [rows[0]["index"] - 1 == int(e[1]) for rows, e in zip(one, reference(data), strict=True)]
    assert sum(right) >= 80


@pytest.mark.parametrize(
    ("model", "offset", "least"),
    [
        ("mobilenet_v2_int8_torch", 0, 60),
        ("mobilenet_v1_025_128_u8", 1, 40),
        ("mobilenet_v1_050_160_u8", 1, 60),
    ],
)
def test_other_imagenet_models_are_as_accurate_as_published(
    data: Path, imagenet: list[Item], model: str, offset: int, least: int
) -> None:
    rows = run(loaded(data, f"classify/{model}.onnx", task="classify"), imagenet)
    right = sum(row["index"] - offset == int(e[1]) for row, e in zip(rows, reference(data), strict=True))
    assert right >= least


@pytest.mark.parametrize(
    ("model", "preprocess", "least"),
    [("cifar10_resnet20", {}, 0.72), ("cifar10_small_winml", {"scale": 1 / 255, "mean": 0.5, "std": 0.5}, 0.55)],
)
def test_cifar_models(data: Path, model: str, preprocess: dict[str, Any], least: float) -> None:
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files = sorted((data / "images" / "cifar10" / "test").glob("*/*.jpg"))
    scorer = loaded(data, f"classify/{model}.onnx", labels=classes, preprocess=preprocess)
    rows = run(scorer, [read(file) for file in files])
    assert np.mean([row["label"] == file.parent.name for row, file in zip(rows, files, strict=True)]) >= least


@pytest.mark.parametrize(
    ("model", "labels", "photo", "label"),
    [
        ("mnist", None, "mnist_nine.bmp", "9"),
        ("inat_bird_u8", "inat_bird_965.txt", "parrot.jpg", "Ara macao (Scarlet Macaw)"),
        ("inat_bird_u8", "inat_bird_965.txt", "owl.jpg", "Athene cunicularia (Burrowing Owl)"),
        ("mobilenet_v2_u8", "imagenet_1001_background.txt", "hot_dog.jpg", "hotdog, hot dog, red hot"),
    ],
)
def test_single_photos(data: Path, model: str, labels: str | None, photo: str, label: str) -> None:
    scorer = loaded(data, f"classify/{model}.onnx", task="classify", labels=labels and names(data, labels))
    [row] = run(scorer, [read(data / "images" / "photos" / photo)])
    assert row["label"] == label


def test_features(data: Path, imagenet: list[Item]) -> None:
    rows = run(loaded(data, "classify/mobilenet_v2_fp32_features.onnx"), imagenet[:3])
    vectors = np.array([row["embedding"] for row in rows])
    assert vectors.shape == (3, 1280)
    assert vectors.std() > 0.1


# --------------------------------------------------------------------------------------------- detect


def agree(rows: list[dict[str, Any]], expected: list[dict[str, Any]], *, labels: bool) -> None:
    """Same boxes in the same order of score, within a pixel and 0.01."""
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert [row[k] for k in ("xmin", "ymin", "xmax", "ymax")] == pytest.approx(wanted["box"], abs=1)
        assert row["score"] == pytest.approx(wanted["score"], abs=0.01)
        assert not labels or row["label"] == wanted["label"]


@pytest.mark.parametrize(("model", "entry"), [("yolox_nano", "yolox_nano"), ("face_rfb320", "faces_rfb320")])
def test_detections_agree_on_every_photo(data: Path, model: str, entry: str) -> None:
    expected = json.loads((data / "images" / "detections_reference.json").read_text())
    labels = names(data, "coco_80.txt") if model == "yolox_nano" else ["face"]
    scorer = loaded(data, f"detect/{model}.onnx", task="detect", labels=labels)
    items = [read(data / key, key) for key in expected]
    results = run(scorer, items)
    assert len(results) == 44
    assert sum(map(len, results)) > 15
    for item, rows in zip(items, results, strict=True):
        agree(rows, expected[item.key][entry], labels=model == "yolox_nano")


def test_fastestdet_on_the_dog(data: Path) -> None:
    scorer = loaded(data, "detect/fastestdet.onnx", task="detect", labels=names(data, "coco_80.txt"))
    item = read(data / "images" / "photos" / "dog.jpg")
    [rows] = run(scorer, [item])
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        best.setdefault(row["label"], row)
    assert {label: round(row["score"], 2) for label, row in best.items()} == {"car": 0.78, "dog": 0.77, "bicycle": 0.73}
    truth = json.loads((data / "images" / "detections_reference.json").read_text())["images/photos/dog.jpg"]
    for wanted in truth["yolox_nano"][:2]:  # the other detector's dog and car, roughly
        box = [best[wanted["label"]][k] for k in ("xmin", "ymin", "xmax", "ymax")]
        assert box == pytest.approx(wanted["box"], abs=20)


# ---------------------------------------------------------------------------------- segment and restyle


@pytest.mark.parametrize(
    ("photo", "label", "percent"), [("bird_segmentation.bmp", "bird", 19.7), ("cat_720p.jpg", "cat", 35.5)]
)
def test_segmentation(data: Path, photo: str, label: str, percent: float) -> None:
    labels, item = names(data, "pascal_voc_21.txt"), read(data / "images" / "photos" / photo)
    model = "segment/deeplab_v3_257.onnx"
    [rows] = run(loaded(data, model, task="segment", labels=labels), [item])
    shares = {row["label"]: row["share"] for row in rows}
    assert set(shares) == {"background", label}
    assert round(100 * shares[label], 1) == percent
    assert abs(sum(row["pixels"] for row in rows) - item.value[..., 0].size) <= 1
    [picture] = run(loaded(data, model, task="segment", output="image", labels=labels), [item])
    assert picture.shape == item.value.shape[:2]
    assert picture.dtype == np.uint8
    assert 100 * (picture > 0).mean() == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("candy_720", {"preprocess": {"channels": "bgr"}}),
        ("mosaic_720", {}),
        ("rain_princess_dyn", {}),
    ],
)
def test_restyle(data: Path, model: str, options: dict[str, Any]) -> None:
    with Image.open(data / "images" / "photos" / "dog.jpg") as image:
        small = np.asarray(image.resize((301, 226)))
    item = Item("dog.jpg", small, {"width": 301, "height": 226})
    scorer = loaded(data, f"style/{model}.onnx", task="restyle", **options)
    assert scorer.output == "image"
    [picture] = run(scorer, [item])
    assert picture.shape == (226, 301, 3)
    assert picture.dtype == np.uint8
    assert picture.min() < 30
    assert picture.max() > 225
    # another style, yet the same scene: brightness still follows the photo
    gray, before = picture.mean(axis=2).ravel(), small.mean(axis=2).ravel()
    assert np.corrcoef(gray, before)[0, 1] > 0.4
    assert np.abs(gray - before).mean() > 10


# ----------------------------------------------------------------------------------------- inspection


def test_every_model_is_understood_without_a_word(data: Path) -> None:
    found = {}
    for path in sorted((data / "models").glob("*/*.onnx")):
        if path.parent.name not in ("sensor_ocsvm", "tabular"):
            options = inspect(path, {})
            assert inspect(path, options) == options, path.name
            found[path.name] = options["task"] if options["decoder"] == "auto" else options["decoder"]
    assert found.pop("mobilenet_v2_fp32_features.onnx") == "embed"
    expected = {"style": "restyle", "segment": "segment"}
    for path in (data / "models" / "detect").glob("*.onnx"):
        assert found.pop(path.name) in path.name or path.name == "face_rfb320.onnx"
    for name, task in found.items():
        folder = next((data / "models").glob(f"*/{name}")).parent.name
        assert task == expected.get(folder, "classify"), name


# -------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("lfs_pointer_named.onnx", "Git LFS pointer of 134 bytes"),
        ("custom_op_noisy_relu.onnx", "operator NoisyRelu"),
        ("superres_needs_ort_extensions.onnx", "onnxruntime-extensions"),
        ("sklearn_0.19.2_pickle_model_1_1", "Python pickle"),
        ("derived_fastestdet_truncated_60pct.onnx", "damaged or cut short"),
    ],
)
def test_hostile_models_are_refused(data: Path, model: str, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        inspect(data / "hostile" / "models" / model, {})
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_a_model_of_numbers_is_no_vision_model(data: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"takes input: float \[any, 4\]"):
        inspect(data / "models" / "tabular" / "iris.onnx", {})
