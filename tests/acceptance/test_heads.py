"""Models that were taken for something else: each is scored right, or refused with a sentence, and never wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tally.errors import ModelRefutedError, TallyError
from tally.jobs.facade import Jobs
from tally.scorers.base import Item
from tally.scorers.onnx.pictures import inspect
from tally.scorers.onnx.scorer import OnnxVisionScorer
from tally.scorers.run import copies_of, score
from tally.scorers.vision.heads import Task


def boxes(*rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    names = ("xmin", "ymin", "xmax", "ymax", "label", "score")
    return [dict(zip(names, row, strict=True)) for row in rows]


HALVES = [
    {"label": "0", "index": 0, "pixels": 6144, "share": 0.5},
    {"label": "2", "index": 2, "pixels": 6144, "share": 0.5},
]
DOG = boxes((32, 0, 96, 64, "dog", 0.9))  # at 16, 8, 48, 40 of the letterboxed tensor
ONE = boxes((32, 0, 96, 64, "1", 0.9))
SQUASHED = boxes((32, 12, 96, 60, "1", 0.99))
LOGITS = {"label": "2", "index": 2, "score": 0.458}
YOLOX = {"decoder": "yolox-decoded"}

RIGHT: list[tuple[str, dict[str, Any], Any]] = [
    ("yolov8", {}, DOG),
    ("yolov8_transposed", {"labels": ["cat", "dog", "bird"], "decoder": "yolov8"}, DOG),
    ("yolov5", {}, boxes((32, 0, 96, 64, "1", 0.893))),
    ("yolov5_dynamic", {"labels": ["cat", "dog", "bird"]}, boxes((32, 0, 96, 64, "dog", 0.893))),
    ("yolo_e2e", {}, DOG),
    ("yolo_e2e_dynamic", {}, DOG),
    ("yolox_decoded", {"labels": ["cat", "dog", "bird"]}, boxes((32, 16, 96, 80, "dog", 0.9))),
    ("yolox_decoded80", YOLOX, boxes((61, 45, 67, 51, "2", 0.9))),
    ("yolonas", {}, ONE),
    ("yolonas80", {}, boxes((32, 0, 96, 64, "0", 0.95), (0, -16, 32, 16, "2", 0.9))),
    ("yolonas80", {"labels": "coco80.txt"}, boxes((32, 0, 96, 64, "person", 0.95), (0, -16, 32, 16, "car", 0.9))),
    ("yolonas_class0", {}, boxes((32, 0, 96, 64, "0", 0.95))),
    ("yolov7_e2e", {}, ONE),
    ("yolo_nms4", {}, ONE),
    ("detr", {}, SQUASHED),
    ("rtdetr", {"labels": ["cat", "dog"]}, boxes((32, 12, 96, 60, "dog", 0.9))),
    ("fasterrcnn", {}, boxes((32, 12, 96, 60, "2", 0.9))),
    ("fasterrcnn_4d", {"labels": ["cat", "dog"]}, boxes((32, 12, 96, 60, "dog", 0.9))),
    ("tf_od", {}, boxes((32, 12, 96, 60, "2", 0.9))),
    ("tf_od", {"labels": ["background", "cat", "dog"]}, boxes((32, 12, 96, 60, "dog", 0.9))),
    ("mmdet", {}, boxes((32, 16, 96, 80, "1", 0.9))),
    ("customvision", {}, {"label": "dog", "index": 2, "score": 0.85}),
    ("binary_sigmoid", {}, {"value": 0.005}),
    ("binary_logit", {}, {"value": -5.375}),
    ("binary_sigmoid", {"labels": "two.txt"}, {"label": "cat", "index": 0, "score": 0.995}),
    ("binary_logit", {"labels": "two.txt"}, {"label": "cat", "index": 0, "score": 0.995}),
    ("multilabel", {}, {"label": "0", "index": 0, "score": 0.95}),
    ("multilabel_sum1", {}, {"label": "0", "index": 0, "score": 0.5}),
    ("regression", {}, {"value": 33.0}),
    ("two_heads", {"outputs": "gender"}, {"label": "1", "index": 1, "score": 0.8}),
    ("two_heads", {"outputs": "age"}, {"label": "2", "index": 2, "score": 0.6}),
    ("vit", {"preprocess": {"size": 32, "scale": "1/255"}}, {"embedding": [0.039, 0.078, 0.118]}),
    ("seg_two", {}, HALVES),
    ("seg_argmax", {}, HALVES),
    ("seg_argmax4", {}, HALVES),
    ("seg_quarter", {}, HALVES),
    (
        "u2net_like",
        {},
        [
            {"label": "0", "index": 0, "pixels": 6123, "share": 0.498},
            {"label": "1", "index": 1, "pixels": 6165, "share": 0.502},
        ],
    ),
    ("old_ir3_initializer_inputs", {}, {"label": "0", "index": 0, "score": 0.719}),
    (
        "multilabel",
        {"threshold": 0.5},
        [
            {"label": "0", "index": 0, "score": 0.95, "rank": 1},
            {"label": "1", "index": 1, "score": 0.9, "rank": 2},
        ],
    ),
    (
        "binary_sigmoid",
        {"labels": "two.txt", "threshold": 0.001},
        [{"label": "dog", "index": 1, "score": 0.005, "rank": 1}],
    ),
    *((name, {}, LOGITS) for name in ("ext_ok", "fp16", "negdim", "baked_reshape", "baked_reshape_wide")),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("yolov8_transposed", {}, "fit several heads: yolox-decoded (2 classes) of output0, yolov8 (3 classes) of output0"),
    (
        "yolov8_transposed",
        {"labels": "two.txt"},
        "with 2 labels, the outputs output0 [1, 84, 7] fit yolox-decoded (2 classes) of output0, which finds no box",
    ),
    ("yolov8_transposed", {"labels": "coco80.txt"}, "none has 80 classes, as there are labels"),
    ("yolov8_transposed", {"labels": "two.txt", "decoder": "yolov8"}, "the model has 3 classes, read as yolov8"),
    ("yolox_decoded", {}, "fit several heads: yolox-decoded (3 classes) of output, yolov8 (4 classes) of output"),
    ("yolox_decoded80", {}, "fit several heads: yolox-decoded (80 classes)"),
    ("yolox_decoded80", {"decoder": "yolox"}, "its values for dark.png do not bear that out: centres reach 32 cells"),
    ("yolov5", {"decoder": "end-to-end"}, "outputs of output0 [1, 252, 8] are not those of end-to-end"),
    (
        "yolonas",
        {"decoder": "ssd"},
        "taken for ssd boxes, and its values for dark.png do not bear that out",
    ),
    ("yolov7_e2e", {"task": "classify"}, "look like those of yolov7-end-to-end: boxes, not what classify gives"),
    ("detr", {"decoder": "ssd"}, "was taken for ssd boxes, and its values for dark.png do not bear that out"),
    *((name, {"task": "classify"}, "boxes, not what classify gives") for name in ("tf_od", "yolo_nms4", "mmdet")),
    ("fasterrcnn_4d", {"task": "segment"}, "look like those of torchvision: boxes, not what segment gives"),
    ("rtdetr", {"labels": ["cat"]}, "rtdetr.onnx gives a class 1, and there are 1 labels"),
    ("customvision", {"labels": ["cat", "dog"]}, "labels: the model's own are bird, cat, dog"),
    ("yolonas80", {"task": "segment"}, "are not those of segment"),
    ("regression", {"task": "classify"}, "outputs of age [1, 1] are not those of classify"),
    ("vit_hidden", {}, "nothing that Tally knows fits the outputs last_hidden_state [1, 197, 768]"),
    ("vit_hidden", {"task": "segment"}, "are not those of segment"),
    ("binary_sigmoid", {"task": "classify"}, "For one number that tells two classes apart, give 2 labels"),
    ("depth", {}, "a map of depth, distance or the like"),
    ("depth", {"task": "segment"}, "its values for dark.png do not bear that out: values lie between 0 and 10"),
    ("two_heads", {}, "classify (2 classes) of gender, classify (5 classes) of age"),
    ("seg_two", {"task": "restyle", "outputs": "out"}, "make a picture of one colour"),
    ("multilabel", {"outputs": "score"}, "the model has no output 'score'; it has tags"),
    ("nan", {}, "the model's output holds NaN or infinity"),
    ("rgba", {}, "no picture of 1 or 3 channels"),
    *((name, {}, "a tensor of four axes in uint8, float16 or float") for name in ("bf16_in", "double_in", "int8_in")),
    ("custom_op", {}, "a custom one that ONNX Runtime does not have"),
    ("ext_absolute", {}, "weights outside its own folder"),
    ("ext_dotdot", {}, "weights outside its own folder"),
    ("ext_missing", {}, "keeps its weights in model.onnx.data, which is missing"),
    ("ext_short", {}, "ONNX Runtime cannot load the model"),
    ("ir_new", {}, "of a newer ONNX version"),
    ("opset_new", {}, "of a newer ONNX version"),
]
ELSEWHERE = {"ab", "ab_int", "kind", "kind_a"}  # tables
MORE = {"clip_like", "depth", "trainmode_bn", "yolov8_cls"}  # below


@pytest.fixture(scope="module")
def found(data: Path) -> Path:
    folder = data / "found"
    if not folder.is_dir():
        pytest.skip("there are no such models here")
    return folder


def scored(found: Path, name: str, options: dict[str, Any], picture: str = "dark.png") -> Any:
    path = found / "models" / f"{name}.onnx"
    scorer = OnnxVisionScorer(inspect(path, options))
    scorer.load(path.parent, "cpu")
    with Image.open(found / "pictures" / picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    item = Item(picture, pixels, {"width": pixels.shape[1], "height": pixels.shape[0]})
    prepared = [scorer.prepare(item)]
    [part] = score(scorer, prepared, 1, copies_of(prepared))
    [result] = part.to_list()
    if isinstance(result, Exception):
        raise result
    return result


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.mark.parametrize(("name", "options", "right"), RIGHT)
def test_a_model_is_scored_right(found: Path, name: str, options: dict[str, Any], right: Any) -> None:
    assert rounded(scored(found, name, options)) == right


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_or_refused_with_a_sentence(found: Path, name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TallyError) as caught:
        scored(found, name, options)
    assert words in str(caught.value)


SAYS = re.compile(r"--task (\w+)((?: --set \w+=[\w:.-]*[\w-])*)")
TASKS: tuple[Task, ...] = get_args(Task)


def outcome(found: Path, name: str, options: dict[str, Any]) -> TallyError | None:
    try:
        scored(found, name, options)
    except TallyError as error:
        return error
    return None


@pytest.mark.parametrize("name", sorted({name for name, *_ in RIGHT} | {"vit_hidden", "depth", "yolov7_e2e", "tf_od"}))
def test_what_a_refusal_says_to_say_is_taken(found: Path, name: str) -> None:
    """For whatever task is said: the advice leads to results, or to what else is to be said."""
    for task in TASKS:
        error = outcome(found, name, {"task": task})
        if error is None:
            continue
        said = SAYS.findall(error.hint or "")
        assert said, (task, error)
        for other, sets in said:
            more = dict(each.split("=", 1) for each in sets.split(" --set ")[1:])
            then = outcome(found, name, {"task": other, **more})
            assert then is None or "fit several heads" in then.message, (task, error, then)


def test_every_model_has_its_answer(found: Path) -> None:
    named = {name for name, *_ in [*RIGHT, *REFUSED]} | ELSEWHERE | MORE
    assert {path.stem for path in (found / "models").glob("*.onnx")} <= named


def test_an_ultralytics_classifier_gets_plain_pixels(found: Path) -> None:
    labels = [scored(found, "yolov8_cls", {}, name)["label"] for name in ("orange.jpg",)]
    assert labels == ["reddish"]
    options = inspect(found / "models" / "yolov8_cls.onnx", {})
    assert (options["preprocess"]["mean"], options["preprocess"]["scale"]) == (None, 1 / 255)
    assert options["labels"] == ["reddish", "greenish", "bluish"]


def test_vectors_and_maps_are_whole(found: Path) -> None:
    assert len(scored(found, "clip_like", {})["embedding"]) == 512
    depth = scored(found, "depth", {"task": "values"})
    assert depth["shape"] == [32, 32]
    assert (len(depth["values"]), depth["values"][0], depth["values"][-1]) == (1024, 0.0, 10.0)


def test_a_model_that_looks_at_the_whole_batch_is_refused(found: Path) -> None:
    path = found / "models" / "trainmode_bn.onnx"
    scorer = OnnxVisionScorer(inspect(path, {}))
    scorer.load(path.parent, "cpu")
    items = [Item(str(grey), np.full((40, 40, 3), grey, np.uint8)) for grey in (0, 80, 160)]
    with pytest.raises(ModelRefutedError, match="other values of logits for 0 alone than beside other pictures"):
        scorer.score([scorer.prepare(item) for item in items])


@pytest.mark.parametrize("task", ["segment", "restyle"])
def test_maps_and_pictures_that_depend_on_the_batch_are_refused(tmp_path: Path, task: str) -> None:
    sides = ["n", 3, 32, 32]
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["usual"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["usual", "half"], ["less"]),
        helper.make_node("Sub", ["input", "less"], ["output"]),
    ]
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name in ("input", "output"))
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    graph = helper.make_graph(nodes, "g", [given], [made], [half])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "m.onnx")
    scale = 1.0 if task == "restyle" else 0.1
    scorer = OnnxVisionScorer(
        inspect(tmp_path / "m.onnx", {"task": task, "batch_size": 4, "preprocess": {"scale": scale}})
    )
    scorer.load(tmp_path, "cpu")
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    with pytest.raises(ModelRefutedError, match="alone than beside other pictures"):
        scorer.score([scorer.prepare(Item(str(at), each)) for at, each in enumerate(noise)])


def test_a_job_is_refused_before_anything_is_scored(found: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Shapes fit, values do not: the first batch shows it, and nothing is committed."""
    out = tmp_path / "out"
    pictures = [found / "pictures" / name for name in ("dark.png", "light.png", "orange.jpg")]
    ran = cli("score", *pictures, "--model", found / "models" / "yolonas80.onnx", "--out", out,
              "--set", "decoder=ssd", "-w", 1)  # fmt: skip
    assert ran.code == 1
    assert "yolonas80.onnx was taken for ssd boxes" in ran.err
    assert "Say with --set decoder=..." in ran.err
    record = Jobs().at(str(out))
    assert record is not None
    assert (record.state, record.done, record.rows) == ("failed", 0, 0)


def test_what_was_assumed_is_said_and_kept(found: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    ran = cli(
        "score", found / "pictures" / "dark.png", "--model", found / "models" / "seg_two.onnx", "--out", out, "-q"
    )
    assert ran.code == 0
    said = "the output aux [1, 3, 32, 32] is not used"
    assert f"warning: {said}" in ran.err
    record = Jobs().at(str(out))
    assert record is not None
    assert record.manifest is not None
    assert any(line.startswith(said) for line in record.manifest["assumed"])
