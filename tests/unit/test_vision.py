from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from tally.errors import ItemError, SpecError
from tally.models.labels import read_labels
from tally.scorers.base import Item
from tally.scorers.vision import outputs
from tally.scorers.vision.detection.base import ANY_CLASSES, Boxes, Given, Output
from tally.scorers.vision.detection.decoders import DECODERS
from tally.scorers.vision.detection.rows import detect_rows
from tally.scorers.vision.detection.suppression import nms
from tally.scorers.vision.outputs import probabilities
from tally.scorers.vision.preprocess import Prepared, Preprocess, Preprocessor


def picture(width: int, height: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prepare(value: np.ndarray[Any, Any], **spec: Any) -> Prepared:
    return Preprocessor(Preprocess(**spec))(Item("a.jpg", value))


# ------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("size", [(64, 64), 64, "64x64", "64", [64, 64]])
def test_size_forms(size: Any) -> None:
    assert Preprocess(size=size).size == (64, 64)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"size": 0}, "whole numbers from 1"),
        ({"size": "wide"}, "whole numbers from 1"),
        ({"size": [1, 2, 3]}, "width and height"),
        ({"mean": [1, 2]}, "one finite number, or three"),
        ({"mean": "dark"}, "one number for each channel"),
        ({"std": 0}, "std: must not be 0"),
        ({"scale": -1}, "greater than 0"),
        ({"fill": [0, 0, 300]}, "0 to 255"),
        ({"resize": "crop", "size": 224, "shorter": 200}, "less than the 224 pixels"),
        ({"channels": "gray", "mean": [1, 2, 3]}, "gray has one channel"),
        ({"dtype": "uint8", "scale": 0.5}, "uint8 takes pixels as they are"),
        ({"sizes": 3}, "Extra inputs"),
    ],
)
def test_wrong_settings(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Preprocess(**spec)


# -------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_normalising_is_the_formula(layout: str, channels: str, dtype: str) -> None:
    value, mean, std = picture(7, 5), np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])
    tensor = prepare(
        value, layout=layout, channels=channels, dtype=dtype, scale=1 / 255, mean=mean.tolist(), std=std.tolist()
    ).tensor
    ordered = value[:, :, ::-1] if channels == "bgr" else value
    expected = (ordered / 255 - mean) / std
    assert tensor.dtype == dtype
    assert tensor.flags.c_contiguous
    if layout == "nchw":
        expected = expected.transpose(2, 0, 1)
    np.testing.assert_allclose(tensor, expected, atol=1e-5 if dtype == "float32" else 1e-2)


def test_raw_pixels_are_kept_exactly() -> None:
    value = picture(7, 5)
    tensor = prepare(value, layout="nhwc", dtype="uint8").tensor
    assert tensor.dtype == np.uint8
    np.testing.assert_array_equal(tensor, value)
    np.testing.assert_array_equal(prepare(value).tensor, value.transpose(2, 0, 1).astype(np.float32))


def test_gray() -> None:
    value = picture(7, 5)
    tensor = prepare(value, channels="gray", scale=1 / 255).tensor
    np.testing.assert_allclose(tensor[0], np.asarray(Image.fromarray(value).convert("L")) / 255, atol=1e-6)


def test_crop_is_resize_then_centre() -> None:
    value = picture(90, 60)
    prepared = prepare(value, size=(28, 28), resize="crop")
    whole = Image.fromarray(value).resize((48, 32), Image.Resampling.BILINEAR)  # 28 * 256 / 224 = 32
    np.testing.assert_array_equal(prepared.tensor, np.asarray(whole.crop((10, 2, 38, 30))).transpose(2, 0, 1))
    box = np.array([[0, 0, 28, 28]], np.float32)
    np.testing.assert_allclose(prepared.original(box), [[18.75, 3.75, 71.25, 56.25]], rtol=1e-6)


@pytest.mark.parametrize(("anchor", "top"), [("top-left", 0), ("center", 8)])
def test_letterbox(anchor: str, top: int) -> None:
    prepared = prepare(picture(100, 50), size=(32, 32), resize="letterbox", anchor=anchor, fill=[9, 8, 7])
    tensor = prepared.tensor.transpose(1, 2, 0)
    assert prepared.region == (0, top, 32, top + 16)
    np.testing.assert_array_equal(tensor[31], np.tile([9, 8, 7], (32, 1)))
    assert len(np.unique(tensor[top : top + 16])) > 3
    corners = prepared.original(np.array([[0, top, 32, top + 16]], np.float32))
    np.testing.assert_allclose(corners, [[0, 0, 100, 50]])


def test_reduced_decoding_does_not_move_boxes() -> None:
    item = Item("a.jpg", picture(50, 30), {"width": 200, "height": 120})
    prepared = Preprocessor(Preprocess(size=(20, 20)))(item)
    assert (prepared.width, prepared.height) == (200, 120)
    np.testing.assert_allclose(prepared.original(np.array([[0, 0, 20, 10.0]])), [[0, 0, 200, 60]])


@pytest.mark.parametrize(
    "value", [b"bytes", *(np.zeros(shape, np.uint8) for shape in [(4, 4), (4, 4, 4)]), np.zeros((4, 4, 3), np.float32)]
)
def test_what_is_no_picture(value: Any) -> None:
    with pytest.raises(ItemError, match=r"a\.jpg: not a decoded picture"):
        prepare(value)


@pytest.mark.parametrize("shape", [(1, 1), (5000, 1), (1, 5000)])
@pytest.mark.parametrize("resize", ["squash", "crop", "letterbox"])
def test_extreme_shapes(shape: tuple[int, int], resize: str) -> None:
    assert prepare(picture(*shape), size=(224, 224), resize=resize).tensor.shape == (3, 224, 224)


@pytest.mark.parametrize("spec", [{}, {"scale": 1 / 127.5, "mean": 1}, {"dtype": "uint8"}])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_pixels_inverts_tensor(layout: str, channels: str, spec: dict[str, Any]) -> None:
    value = picture(9, 6)
    preprocessor = Preprocessor(Preprocess(layout=layout, channels=channels, **spec))  # type: ignore[arg-type]
    found = preprocessor.pixels(preprocessor.tensor(Image.fromarray(value)))
    np.testing.assert_array_equal(found, value)
    assert found.flags.c_contiguous


@pytest.mark.parametrize("size", [None, (9, 6)])
@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_picture_that_fits_is_taken_as_it_is(layout: str, channels: str, dtype: str, size: Any) -> None:
    value = picture(9, 6)
    preprocessor = Preprocessor(Preprocess(layout=layout, channels=channels, dtype=dtype, size=size))  # type: ignore[arg-type]
    prepared = preprocessor(Item("a.jpg", value, {}))
    image = Image.fromarray(value).convert("L" if channels == "gray" else "RGB")
    np.testing.assert_array_equal(prepared.tensor, preprocessor.tensor(image))
    assert (prepared.width, prepared.height, prepared.scale, prepared.offset) == (9, 6, (1, 1), (0, 0))
    assert prepared.region == (0, 0, 9, 6)
    assert not np.shares_memory(prepared.tensor, value)


def test_gray_values_become_a_picture_of_three_channels() -> None:
    found = Preprocessor(Preprocess(channels="gray")).pixels(np.array([[[1.0, 2.0]]], np.float32))
    assert found.tolist() == [[[1, 1, 1], [2, 2, 2]]]


def test_pixels_are_clipped() -> None:
    out = Preprocessor(Preprocess()).pixels(np.array([-43.0, 127.4, 273.0], np.float32).reshape(3, 1, 1))
    assert out.tolist() == [[[0, 127, 255]]]


# ------------------------------------------------------------------------------------------- classify


def test_softmax_only_where_it_is_missing() -> None:
    logits = np.array([2.0, 1.0, 0.1], np.float32)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(probabilities(logits, softmax=True), expected, rtol=1e-6)
    np.testing.assert_array_equal(probabilities(expected.reshape(3, 1, 1), softmax=False), expected)
    np.testing.assert_array_equal(probabilities(logits, softmax=False), logits)
    assert probabilities(expected, softmax=True).max() < expected.max()


def test_softmax_is_stable() -> None:
    np.testing.assert_allclose(
        probabilities(np.array([1000.0, 999.0, -1000.0]), softmax=True), [0.7311, 0.2689, 0], atol=1e-4
    )


def test_quantised_probabilities() -> None:
    np.testing.assert_allclose(probabilities(np.array([[128], [64]], np.uint8), softmax=False), [0.5, 0.25])


def test_top_ranks_and_equal_scores() -> None:
    scores = np.array([1, 5, 5, 0], np.uint8)
    assert outputs.classify_rows(scores, str, top=1, softmax=False) == {"label": "1", "index": 1, "score": 5 / 256}
    rows = outputs.classify_rows(scores, "abcd".__getitem__, top=3, softmax=False)
    assert [(r["rank"], r["label"]) for r in rows] == [(1, "b"), (2, "c"), (3, "a")]  # type: ignore[index]


# --------------------------------------------------------------------------------------------- detect


def boxes(*rows: tuple[float, ...]) -> Boxes:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def test_nms_keeps_the_best_of_each_class() -> None:
    found = boxes((0, 0, 10, 10, 0.5, 0), (0, 0, 10, 9, 0.9, 0), (0, 0, 10, 10, 0.6, 1), (50, 50, 60, 60, 0.4, 0))
    assert nms(found, 0.45).scores.tolist() == pytest.approx([0.9, 0.6, 0.4])


def test_nms_is_greedy_not_transitive() -> None:
    # the middle one is suppressed by the first, and then suppresses nothing itself
    found = boxes((0, 0, 10, 10, 0.9, 0), (4, 0, 14, 10, 0.8, 0), (8, 0, 18, 10, 0.7, 0))
    assert nms(found, 0.4).boxes[:, 0].tolist() == [0, 8]


def test_nms_of_nothing_and_of_empty_boxes() -> None:
    assert len(nms(boxes(), 0.45).scores) == 0
    assert len(nms(boxes((5, 5, 5, 5, 0.9, 0), (5, 5, 5, 5, 0.8, 0)), 0.45).scores) == 2


def decode(name: str, outputs: list[np.ndarray[Any, Any]], size: tuple[int, int]) -> list[Any]:
    prepared = prepare(picture(2 * size[0], 3 * size[1]), size=size)
    return detect_rows(
        outputs,
        prepared,
        "ab".__getitem__,
        decoder=DECODERS[name],
        given=Given(size),
        threshold=0.5,
        iou_threshold=0.45,
    )


def test_yolox() -> None:
    raw = np.zeros((84, 7), np.float32)  # 64x64: 8*8 + 4*4 + 2*2 cells
    raw[8 * 2 + 3] = [0.5, 0.25, np.log(2), np.log(4), 0.9, 0.1, 1.0]
    [row] = decode("yolox", [raw], (64, 64))
    assert row["label"] == "b"
    assert row["score"] == pytest.approx(0.9)
    assert [row[k] for k in ("xmin", "xmax")] == pytest.approx([2 * (28 - 8), 2 * (28 + 8)])
    assert [row[k] for k in ("ymin", "ymax")] == pytest.approx([3 * (18 - 16), 3 * (18 + 16)])


def test_yolox_refuses_what_does_not_fit() -> None:
    with pytest.raises(ItemError, match="83 anchors"):
        decode("yolox", [np.zeros((83, 7), np.float32)], (64, 64))


def test_an_infinite_box_is_an_error() -> None:
    raw = np.zeros((84, 7), np.float32)
    raw[0] = [0, 0, 1000, 0, 1, 1, 0]
    with pytest.raises(ItemError, match=r"a\.jpg: .*not finite"):
        decode("yolox", [raw], (64, 64))


def test_fastestdet() -> None:
    raw = np.zeros((7, 4, 4), np.float32)
    raw[:, 1, 2] = [0.9, 0, 0, 0, 0, 0.8, 0.2]
    [row] = decode("fastestdet", [raw], (64, 64))
    assert row["label"] == "a"
    assert row["score"] == pytest.approx(0.9**0.6 * 0.8**0.4)
    assert [row["xmin"], row["xmax"]] == pytest.approx([2 * (32 - 16), 2 * (32 + 16)])
    assert [row["ymin"], row["ymax"]] == pytest.approx([3 * (16 - 16), 3 * (16 + 16)])


def test_ssd() -> None:
    scores = np.array([[0.1, 0.1, 0.8], [0.9, 0.05, 0.05]], np.float32)
    corners = np.array([[0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1]], np.float32)
    [row] = decode("ssd", [corners, scores], (64, 64))
    assert row == {
        "xmin": 32.0,
        "ymin": 96.0,
        "xmax": 96.0,
        "ymax": 192.0,
        "label": "b",
        "score": pytest.approx(0.8),
    }


@pytest.mark.parametrize(
    ("shapes", "size", "found"),
    [
        ([[1, 3549, 85]], (416, 416), {"yolox": 80, "yolox-decoded": 80, "yolov6": 80, "yolov8": 81, "yolov8-obb": 80}),
        (
            [[None, 8400, 6]],
            (640, 640),
            {"yolox": 1, "yolox-decoded": 1, "yolov6": 1, "yolov8": 2, "yolov8-obb": 1, "end-to-end": ANY_CLASSES},
        ),
        ([[1, 25200, 85]], (640, 640), {"yolov5": 80}),
        ([[1, 84, 8400]], (640, 640), {"yolov8": 80, "yolov8-obb": 79}),
        ([[1, 300, 6]], (640, 640), {"end-to-end": ANY_CLASSES}),
        ([[1, 300, 84]], (640, 640), {"detr-joined": 80}),
        ([[1, 85, 22, 22]], (352, 352), {"fastestdet": 80}),
        ([[1, 4420, 2], [1, 4420, 4]], (320, 240), {"ssd": 1, "detr": 1, "detr-sigmoid": 2}),
        ([[1, 4420, 4], [1, 4420, 21]], (320, 240), {"ssd": 20, "detr": 20, "detr-sigmoid": 21}),
        ([[1, 8400, 4], [1, 8400, 80]], (640, 640), {"ssd": 79, "yolonas": 80, "detr": 79, "detr-sigmoid": 80}),
        ([[1, 144, 80, 80], [1, 144, 20, 20], [1, 144, 40, 40]], (640, 640), {"yolov8-raw": 80}),
        ([[1, 3, 80, 80, 85], [1, 3, 40, 40, 85], [1, 3, 20, 20, 85]], (640, 640), {"yolov5-raw": 80}),
        ([[1, 116, 8400], [1, 32, 160, 160]], (640, 640), {"yolov8": 112, "yolov8-obb": 111, "yolov8-segment": 80}),
        ([[1, 1000]], (224, 224), {}),
        ([[1, 100, 4], [1, 200, 2]], (320, 240), {}),
    ],
)
def test_decoders_are_told_by_shapes(shapes: Any, size: Any, found: dict[str, int]) -> None:
    outputs = [Output(str(number), tuple(shape)) for number, shape in enumerate(shapes)]
    told = {name: [match.classes for match in each.find(outputs, Given(size))] for name, each in DECODERS.items()}
    assert {name: classes[0] for name, classes in told.items() if classes} == found


# ---------------------------------------------------------------------------------- segment and restyle


def test_label_map_forms() -> None:
    classes = np.array([[0, 1, 2], [2, 1, 0]])
    one_hot = np.eye(3, dtype=np.float32)[classes]
    for output, last in ((one_hot, True), (one_hot.transpose(2, 0, 1), False), (classes[None], False)):
        np.testing.assert_array_equal(outputs.label_map(output, (2, 3), channels_last=last), classes)
    foreground = np.array([[[0.1, 0.9]]], np.float32)
    assert outputs.label_map(foreground, (1, 2), channels_last=False).tolist() == [[0, 1]]
    assert outputs.label_map(10 * foreground - 5, (1, 2), channels_last=False, logits=True).tolist() == [[0, 1]]


def test_segment_leaves_letterbox_borders_out() -> None:
    prepared = prepare(picture(100, 50), size=(32, 32), resize="letterbox")
    classes = np.full((32, 32), 7)
    classes[:16, :8] = 1
    classes[:16, 8:] = 0
    rows = outputs.segment_rows(classes, prepared, (32, 32), str)
    assert [(r["index"], r["pixels"], r["share"]) for r in rows] == [(0, 3750, 0.75), (1, 1250, 0.25)]
    restored = outputs.restore_map(classes, prepared, (32, 32))
    assert restored.shape == (50, 100)
    assert (restored == 1).mean() == 0.25
    assert set(np.unique(restored)) == {0, 1}


def test_restored_pictures_have_the_original_size() -> None:
    letterboxed = prepare(picture(100, 51), size=(32, 32), resize="letterbox", anchor="center")
    assert outputs.restore_image(picture(32, 32), letterboxed, (32, 32)).shape == (51, 100, 3)
    assert outputs.restore_image(picture(64, 64), letterboxed, (32, 32)).shape == (51, 100, 3)
    same, larger = prepare(picture(30, 21)), picture(32, 24)
    np.testing.assert_array_equal(outputs.restore_image(larger, same, (30, 21)), larger[:21, :30])


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "text",
    ["cat\ndog\n", "\ufeffcat\r\ndog\r\n", "cat\ndog\n\nand a remark", '["cat", "dog"]', '{"1": "dog", "0": "cat"}',
     "{0: 'cat',\n 1: 'dog'}"],
)  # fmt: skip
def test_labels(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text, encoding="utf-8")
    assert read_labels(tmp_path / "labels") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "UTF-8"),
        (b"[1, 2]", "list of names"),
        (b'{"0": "a", "2": "b"}', "indices 0, 1, 2"),
        (b"{oops", "neither JSON"),
        (b"[__import__('os')]", "neither JSON"),
    ],
)
def test_wrong_labels(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(SpecError, match=words):
        read_labels(tmp_path / "labels")


@pytest.mark.parametrize(
    "names", ["names: [cat, dog]", "names:\n  0: cat\n  1: dog", "- cat\n- dog", "names:\n- cat\n- dog"]
)
def test_labels_of_a_file_that_yolo_is_trained_from(names: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(
        names if names[0] == "-" else f"train: ../train/images\nval: ../valid/images\n\nnc: 2\n{names}\n"
    )
    assert read_labels(tmp_path / "data.yaml") == ["cat", "dog"]
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\n\nnc: 2\n")
    with pytest.raises(SpecError, match=r"must map the indices 0, 1, 2 \.\.\. to names"):
        read_labels(tmp_path / "data.yaml")


def test_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_labels(tmp_path / "labels.txt")
