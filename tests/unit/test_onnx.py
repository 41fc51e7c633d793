from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tally.errors import ItemError, ModelLoadError, ModelNotFoundError, ModelRefutedError, SpecError
from tally.scorers.base import Item
from tally.scorers.onnx.pictures import inspect
from tally.scorers.onnx.scorer import OnnxVisionScorer
from tally.scorers.onnx.session import OnnxRuntime, choose_providers, open_session, plain_reason
from tally.scorers.runtime import CPU_PIXELS
from tally.scorers.vision.options import VisionOptions
from tally.scorers.vision.overlay import colour_of
from tally.scorers.vision.scorer import CHECKED

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a model of the given nodes, from ``x`` to ``y``."""

    def write(
        nodes: list[onnx.NodeProto],
        given: list[Any],
        *outputs: list[Any],
        dtype: int = TensorProto.FLOAT,
        weights: list[onnx.TensorProto] | None = None,
        metadata: dict[str, str] | None = None,
        names: tuple[str, ...] = ("y", "z"),
        opset: int = 17,
    ) -> Path:
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", dtype, given)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, outputs, strict=False)],
            weights or [],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        helper.set_model_props(model, metadata or {})
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def means(make: Make, batch: Any = "batch", **options: Any) -> Path:
    """Classes are the means of red, green and blue."""
    nodes = [node("ReduceMean", "x", axes=[2, 3], keepdims=0)]
    return make(nodes, [batch, 3, 8, 8], [batch, 3], **options)


def scorer_of(path: Path, **options: Any) -> OnnxVisionScorer:
    scorer = OnnxVisionScorer(inspect(path, options))
    scorer.load(path.parent, "cpu")
    return scorer


def plain(red: int, green: int, blue: int, width: int = 8, height: int = 8) -> Item:
    value = np.empty((height, width, 3), np.uint8)
    value[:] = red, green, blue
    return Item(f"{red}-{green}-{blue}", value, {"width": width, "height": height})


def run(scorer: OnnxVisionScorer, *items: Item) -> list[Any]:
    return list(scorer.score([scorer.prepare(item) for item in items]))


def shaped(make: Make, given: list[Any], output: list[Any]) -> Path:
    """A model that has nothing but its shapes: Abs hides the real one from shape inference."""
    target = numpy_helper.from_array(np.ones(len(output), np.int64), "t")
    return make([node("Abs", "t", "s"), node("Reshape", "x s")], given, output, weights=[target])


RAW = {"scale": 1}


# ---------------------------------------------------------------------------------------- inspection


def test_inspection_fills_everything_in(make: Make) -> None:
    options = inspect(means(make), {"task": "classify", "labels": ["red", "green", "blue"]})
    assert json.loads(json.dumps(options)) == options
    assert options["file"] == "model.onnx"
    assert (options["classes"], options["batch"], options["batch_size"]) == (3, None, 32)
    assert options["preprocess"]["size"] == [8, 8]
    assert options["preprocess"]["layout"] == "nchw"
    assert options["preprocess"]["dtype"] == "float32"
    [assumed] = options["assumed"]
    assert assumed == (
        "preprocessing was not declared: assumed RGB, 0..1 with ImageNet mean and deviation, squash to 8x8 "
        "(set preprocess.* with --set or in tally.yaml)"
    )


@pytest.mark.parametrize("metadata", [{}, {"Image.NominalPixelRange": "NominalRange_0_255"}])
def test_inspection_of_complete_options_changes_nothing(make: Make, metadata: dict[str, str]) -> None:
    path = means(make, metadata=metadata)
    options = inspect(path, {})
    assert inspect(path, options) == options


def test_what_is_declared_is_not_assumed(make: Make) -> None:
    preprocess = {"resize": "squash", "channels": "bgr", "scale": 1, "interpolation": "bicubic"}
    options = inspect(means(make), {"task": "classify", "labels": list("abc"), "preprocess": preprocess})
    assert options["assumed"] == []
    assert options["preprocess"] | preprocess == options["preprocess"]
    # one part of the range declared: the others are neutral, not guessed
    assert options["preprocess"]["mean"] is None


@pytest.mark.parametrize(
    ("given", "output", "task"),
    [
        (["b", 3, 8, 8], ["b", 10], "classify"),
        (["b", 3, 8, 8], ["b", 10, 1, 1], "classify"),
        (["b", 3, 8, 8], ["b", 1], "values"),
        (["b", 8, 8, 3], ["b", 8, 8, 21], "segment"),
        (["b", 3, 8, 8], ["b", 8, 8], "segment"),
        (["b", 3, 32, 32], ["b", 5, 8, 8], "segment"),
        ([1, 3, 64, 64], [1, 252, 7], "detect"),
        ([1, 3, 64, 64], [1, 300, 6], "detect"),
    ],
)
def test_the_task_is_told_by_the_output(make: Make, given: list[Any], output: list[Any], task: str) -> None:
    options = inspect(shaped(make, given, output), {})
    assert options["task"] == task
    assert options["assumed"][0].startswith(f"task was not given: {task}")


@pytest.mark.parametrize(
    ("given", "output", "words"),
    [
        (["b", 3, 8, 8], ["b", 3, 8, 8], r"fit several heads: segment \(3 classes\) of y, restyle of y"),
        (["b", 3, "h", "w"], ["b", 3, "h2", "w2"], "fit several heads: segment"),
        (["b", 3, 8, 8], ["b", 197, 768], r"nothing that Tally knows fits the outputs y \[any, 197, 768\]"),
        (["b", 3, 8, 8], ["b", 5, 7, 7], "nothing that Tally knows fits"),
        (
            [1, 3, 64, 64],
            [1, 84, 7],
            r"yolox \(2 classes\) of y, yolox-decoded .* yolov8 \(3 classes\)",
        ),
        ([1, 3, 64, 64], [1, 7, 84], r"yolov8 \(3 classes\) of y, yolov8-obb \(2 classes\)"),
        ([1, 3, "h", "w"], [1, 300, 6], "preprocess.size: the model takes several sizes"),
        ([1, 3, 32, 320], [1, "t", 97], "fit several heads: yolox"),
    ],
)
def test_what_fits_nothing_or_two_things_is_refused(
    make: Make, given: list[Any], output: list[Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        inspect(shaped(make, given, output), {})


def test_values_tell_pictures_from_classes(make: Make) -> None:
    scaled = numpy_helper.from_array(np.full(1, 255, np.float32), "k")
    picture = make([node("Mul", "x k")], ["b", 3, 8, 8], ["b", 3, 8, 8], weights=[scaled])
    assert inspect(picture, {})["task"] == "restyle"
    softmax = make([node("Mul", "x k", "l"), node("Softmax", "l", axis=1)], ["b", 3, 8, 8], ["b", 3, 8, 8],
                   weights=[scaled])  # fmt: skip
    assert inspect(softmax, {})["task"] == "segment"
    named = make([node("Identity", "x", "stylized")], ["b", 3, 8, 8], ["b", 3, 8, 8], names=("stylized",))
    assert inspect(named, {})["task"] == "restyle"


def test_prototypes_of_masks_are_no_classes(make: Make) -> None:
    target = [
        numpy_helper.from_array(np.array(shape), name) for name, shape in (("s", [1, 38, 84]), ("t", [1, 32, 16, 16]))
    ]
    nodes = [node("Reshape", "x s"), node("Reshape", "x t", "z")]
    path = make(nodes, [1, 3, 64, 64], [1, 38, 84], [1, 32, 16, 16], weights=target)
    options = inspect(path, {})
    assert (options["decoder"], options["classes"], options["outputs"]) == ("yolov8-segment", 2, ["y", "z"])
    assert "those of yolov8-segment: boxes, not what segment gives" in problems(path, task="segment")


def constant(make: Make, values: Any, **options: Any) -> Path:
    """A detector for 64x64 that finds the same in each picture."""
    weights = [numpy_helper.from_array(np.asarray(values, np.float32)[None], "v"),
               numpy_helper.from_array(np.zeros(1, np.float32), "zero")]  # fmt: skip
    nodes = [node("ReduceMean", "x", "mean", keepdims=0), node("Mul", "mean zero", "none"), node("Add", "none v")]
    return make(nodes, [1, 3, 64, 64], [1, *np.shape(values)], weights=weights, **options)


def anchors(last: Any) -> Any:
    """Centres and sides in pixels, two scores, and something for each of the anchors."""
    x, y = np.random.default_rng(0).uniform(0, 64, (2, 84))
    scores = np.full((2, 84), 0.01)
    scores[1, 7] = 0.9
    return np.stack([x, y, np.full(84, 9), np.full(84, 8), *scores, np.broadcast_to(last, 84)])


ANGLES = np.random.default_rng(1).uniform(0.1, 0.9, 84)


@pytest.mark.parametrize("said", [{}, {"task": "detect"}, {"labels": ["a", "b", "c"]}, {"labels": ["a", "b"]}])
def test_angles_are_no_scores(make: Make, said: dict[str, Any]) -> None:
    """Oriented boxes have an angle where others have the score of one more class: told by being below 0, or refused."""
    known, either = constant(make, anchors(ANGLES - 0.5)), {"decoder": "yolov8-obb"}
    labels = said.get("labels", "ab")
    if len(labels) == 2:
        assert inspect(known, said)["decoder"] == "yolov8-obb"
    else:
        assert "3 names, but the model has 2 classes" in problems(known, **said)
    path = constant(make, anchors(ANGLES))
    if "labels" not in said:
        assert re.search("fit several heads: yolov8 .*yolov8-obb", problems(path, **said))
    assert inspect(path, {"decoder": "yolov8"})["classes"] == 3
    assert inspect(path, either)["classes"] == 2


def test_scores_are_no_angles(make: Make) -> None:
    path = constant(make, anchors(0.02))
    assert inspect(path, {})["decoder"] == "yolov8"
    assert inspect(path, {"labels": ["a", "b", "c"]})["decoder"] == "yolov8"
    assert "2 names, but the model has 3 classes" in problems(path, labels=["a", "b"])


def test_what_the_metadata_say_is_not_overruled_by_a_task(make: Make) -> None:
    path = constant(make, anchors(0.02), metadata={"task": "obb"})
    assert inspect(path, {"task": "detect"})["decoder"] == "yolov8-obb"
    path = constant(make, anchors(0.02), metadata={"task": "segment"})
    assert "nothing that Tally knows fits" in problems(path) or "not those of detect" in problems(path, task="detect")


CORNERS = [[16, 8, 48, 40, 0.9, 1], [2, 40, 20, 60, 0.8, 0]]
CENTRES = [[32, 24, 32, 32, 0.9, 1], [11, 50, 18, 20, 0.8, 0]]
FROM_A_CORNER = [[16, 8, 32, 32, 0.9, 1], [2, 40, 18, 20, 0.8, 0]]
LEAVES_IT_OPEN = [[20, 20, 30, 30, 0.9, 1]]  # as corners, as centre and sides, and as corner and sides


def rows(found: list[list[float]]) -> Any:
    return found + [[0.0] * 6] * (300 - len(found))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (CENTRES, "50% of the boxes end before they begin"),
        (FROM_A_CORNER, "50% of the boxes end before they begin"),
        ([[320, 240, 480, 400, 0.9, 1]], "corners lie between 240 and 480, far outside a picture of 64x64"),
        ([[40, 40, 9, 9, 0.06, 1]], "100% of the boxes end before they begin"),
    ],
)
def test_boxes_that_are_no_corners(make: Make, found: Any, words: str) -> None:
    with pytest.raises(ModelRefutedError, match=words):
        run(scorer_of(constant(make, rows(found))), plain(1, 2, 3))


@pytest.mark.parametrize(("before", "checked"), [(LEAVES_IT_OPEN, True), ([], True), (CORNERS, False)])
def test_the_check_goes_on_until_there_is_evidence(make: Make, before: Any, checked: bool) -> None:
    """Light pictures give something else than dark ones."""
    weights = [numpy_helper.from_array(np.asarray(rows(each), np.float32)[None], name)
               for each, name in ((before, "dark"), (CENTRES, "light"))]  # fmt: skip
    weights.append(numpy_helper.from_array(np.full(1, 0.5, np.float32), "half"))
    nodes = [
        node("ReduceMean", "x", "mean", keepdims=0),
        node("Greater", "mean half", "is_light"),
        node("Where", "is_light light dark"),
    ]
    scorer = scorer_of(make(nodes, [1, 3, 64, 64], [1, 300, 6], weights=weights), preprocess={"resize": "squash"})
    run(scorer, *[plain(0, 0, 0)] * CHECKED)
    if checked:
        with pytest.raises(ModelRefutedError, match="end before they begin"):
            run(scorer, plain(255, 255, 255))
    else:
        run(scorer, plain(255, 255, 255))


def test_heat_maps_are_no_classes(make: Make) -> None:
    nodes = [
        node("AveragePool", "x", "small", kernel_shape=[4, 4], strides=[4, 4]),
        node("Concat", "small small", axis=1),
    ]
    path = make(nodes, ["b", 3, 32, 32], ["b", 6, 8, 8])
    item = plain(0, 0, 0, 32, 32)
    item.value[8:16, 8:16] = 128
    with pytest.raises(ModelRefutedError, match=r"between 0 and 0\.502 and do not add up to 1 over the classes"):
        run(scorer_of(path, preprocess={"scale": "1/255"}), item)
    assert len(run(scorer_of(path, preprocess={"scale": "1/255"}, softmax="never"), item)[0]) == 1


def test_what_the_first_pictures_do_not_bear_out_is_refused(make: Make) -> None:
    """Shapes and names fit, and what comes out is a picture for 0..1, not for 0..255."""
    named = make([node("Sigmoid", "x", "stylized")], ["b", 3, 8, 8], ["b", 3, 8, 8], names=("stylized",))
    scorer = scorer_of(named, preprocess=RAW)
    flat, other = plain(9, 9, 9), plain(0, 0, 0)
    other.value[:, :4] = 255
    assert [type(result) for result in run(scorer, flat)] == [np.ndarray]  # a dark picture tells nothing
    with pytest.raises(ModelRefutedError, match=r"taken for restyle, .* values for 0-0-0 .* a picture of one colour"):
        run(scorer, other)


def test_probabilities_of_the_made_up_picture_have_to_stay_probabilities(make: Make) -> None:
    """Scores in 0..1 whatever is seen, but for one picture: 255 for red, and 0 for green and blue."""
    shift = numpy_helper.from_array(np.array([[5, 0, 0]], np.float32), "s")
    only = numpy_helper.from_array(np.array([[250, 250, 250]], np.float32), "o")
    nodes = [
        node("ReduceMean", "x", "m", axes=[2, 3], keepdims=0),
        node("ReduceMin", "m", "low", axes=[1], keepdims=1),
        node("ReduceMax", "m", "high", axes=[1], keepdims=1),
        node("Sub", "high low", "range"),
        node("Greater", "range o", "odd"),
        node("Cast", "odd", "factor", to=TensorProto.FLOAT),
        node("Mul", "factor s", "extra"),
        node("Sigmoid", "m", "p"),
        node("Add", "p extra"),
    ]
    path = make(nodes, ["b", 3, 8, 8], ["b", 3], weights=[shift, only])
    scorer = scorer_of(path, preprocess=RAW)
    [said] = scorer.assumed
    assert said.startswith("softmax is not applied: scores lie in 0..1 and do not add up to 1")
    assert run(scorer, plain(1, 0, 0))[0]["index"] == 0
    with pytest.raises(ModelRefutedError, match=r"values for 255-0-0 do not bear that out: scores lie between 0\.5"):
        run(scorer, plain(255, 0, 0))
    always = scorer_of(path, preprocess=RAW, softmax="always")
    assert always.assumed == ()
    assert run(always, plain(255, 0, 0))[0]["score"] == pytest.approx(np.exp(6) / (np.exp(6) + 2 * np.exp(0.5)))


def test_one_score_is_never_softmaxed(make: Make) -> None:
    path = make([node("ReduceMean", "x", axes=[1, 2, 3], keepdims=0)], ["b", 3, 8, 8], ["b"])
    centred = {"scale": 1 / 128, "mean": 1}
    [row] = run(scorer_of(path, preprocess=centred), plain(255, 255, 255))
    assert row == {"value": pytest.approx(127 / 128)}
    scorer = scorer_of(path, preprocess=centred, labels=["no", "yes"])
    [said] = [line for line in scorer.assumed if "sigmoid" in line]
    assert said.startswith("the sigmoid function is applied: scores are not in 0..1")
    dark, light = run(scorer, plain(0, 0, 0), plain(255, 255, 255))
    assert dark == {"label": "no", "index": 0, "score": pytest.approx(1 / (1 + np.exp(-1)))}
    assert light == {"label": "yes", "index": 1, "score": pytest.approx(1 / (1 + np.exp(-127 / 128)))}
    assert "are not those of classify" in problems(path, task="classify")


@pytest.mark.parametrize(("scale", "right"), [("1/255", 1 / 255), (1 / 255, 1 / 255), ("1 / 127.5", 1 / 127.5)])
def test_scale_may_be_a_fraction(make: Make, scale: Any, right: float) -> None:
    assert inspect(means(make), {"preprocess": {"scale": scale}})["preprocess"]["scale"] == right


@pytest.mark.parametrize(("scale", "most"), [("1/255", "1"), ("1/127.5", "2"), (0.017, "4.335")])
def test_a_mean_of_pixels_that_scale_has_made_smaller_is_refused(make: Make, scale: Any, most: str) -> None:
    """As others write it, whose mean is subtracted before the scale: every picture would come out as one colour."""
    given = {"scale": scale, "mean": [103.94, 116.78, 123.68]}
    right = [each * float(most) / 255 for each in given["mean"]]
    assert (
        f"preprocess.mean: 123.68 is more than any pixel, as scale makes them 0..{most} before the mean is subtracted: "
        f"write it on that scale ({right[-1]:g}), or leave scale out"
    ) in problems(means(make), preprocess=given)
    assert inspect(means(make), {"preprocess": {"scale": scale, "mean": right}})["preprocess"]["mean"] == right


@pytest.mark.parametrize(
    "given",
    [
        {"mean": [0.485, 0.456, 0.406], "std": [0.2, 0.2, 0.2]},
        {"std": 0.5, "scale": 1},
        {"mean": 0.5, "std": [0.229, 0.224, 0.225]},
    ],
)
def test_mean_and_deviation_of_other_values_than_pixels_are_refused(make: Make, given: dict[str, Any]) -> None:
    found = problems(means(make), preprocess=given)
    assert "scale: mean and std below 1 are for pixels in 0..1, so write scale: 1/255 too" in found
    assert inspect(means(make), {"preprocess": given | {"scale": "1/255"}})["preprocess"]["std"]


def test_features_are_embeddings(make: Make) -> None:
    path = make([node("Flatten", "x", "features")], [1, 3, 8, 8], [1, 192], names=("features",))
    assert inspect(path, {})["task"] == "embed"
    [row] = run(scorer_of(path, preprocess=RAW), plain(1, 2, 3))
    assert row == {"embedding": [1.0] * 64 + [2.0] * 64 + [3.0] * 64}


def test_features_beside_classes_are_another_head(make: Make) -> None:
    nodes = [node("ReduceMean", "x", "logits", axes=[2, 3], keepdims=0), node("Flatten", "x", "features")]
    path = make(nodes, [1, 3, 8, 8], [1, 3], [1, 192], names=("logits", "features"))
    assert "classify (3 classes) of logits, embed of features" in problems(path)
    found = inspect(path, {"outputs": "logits"})
    assert (found["task"], found["outputs"]) == ("classify", ["logits"])
    assert inspect(path, {"task": "embed"})["outputs"] == ["features"]


@pytest.mark.parametrize(
    ("metadata", "channels", "scale", "mean"),
    [
        ({"Image.BitmapPixelFormat": "Bgr8"}, "bgr", 1 / 255, [0.485, 0.456, 0.406]),
        ({"Image.NominalPixelRange": "NominalRange_0_255"}, "rgb", 1.0, None),
        ({"Image.NominalPixelRange": "Normalized_0_1"}, "rgb", 1 / 255, None),
        ({"Image.NominalPixelRange": "Normalized_1_1"}, "rgb", 1 / 127.5, [1.0]),
    ],
)
def test_metadata_is_used(make: Make, metadata: Any, channels: str, scale: Any, mean: Any) -> None:
    found = inspect(means(make, metadata=metadata), {})["preprocess"]
    assert (found["channels"], found["scale"], found["mean"]) == (channels, scale, mean)


def test_gray_uint8_and_dynamic_size(make: Make) -> None:
    cast = [node("Cast", "x", "f", to=TensorProto.FLOAT), node("GlobalAveragePool", "f")]
    path = make(cast, ["b", 1, "h", "w"], ["b", 1, 1, 1], dtype=TensorProto.UINT8)
    found = inspect(path, {"task": "values"})["preprocess"]
    assert (found["channels"], found["dtype"], found["size"]) == ("gray", "uint8", [224, 224])


def test_gray_floats(make: Make) -> None:
    path = make([node("GlobalAveragePool", "x")], ["b", 1, 8, 8], ["b", 1, 1, 1])
    found = inspect(path, {})["preprocess"]
    assert (found["channels"], found["mean"]) == ("gray", None)
    [row] = run(scorer_of(path), plain(255, 255, 255))
    assert row["value"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------ problems


def problems(path: Path, **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        inspect(path, options)
    return "\n".join(caught.value.problems)


def test_all_wrong_options_are_reported_together(make: Make) -> None:
    text = problems(
        means(make),
        task="clasify",
        top=0,
        sofmax="never",
        preprocess={"size": "wide", "stdd": 1, "mean": [1, 2], "fill": None},
        labels=[1, 2],
    )
    kinds = "classify, detect, restyle, embed, segment"
    assert text.splitlines() == [
        f"task: should be {kinds} or values; did you mean 'classify'? (given: 'clasify')",
        "labels: give the name of a file in the artifacts folder, or a list of names (given: [1, 2])",
        "preprocess.size: width and height must be whole numbers from 1 to 16384 (given: 'wide')",
        "preprocess.mean: give one finite number, or three (given: [1, 2])",
        "preprocess.stdd: no such option; did you mean 'std'?",
        "top: should be at least 1 (given: 0)",
        "sofmax: no such option; did you mean 'softmax'?",
    ]  # fmt: skip


def test_all_that_does_not_fit_the_model_is_reported_together(make: Make) -> None:
    text = problems(
        means(make),
        task="classify",
        top=4,
        labels=["red", "green"],
        preprocess={"size": 224, "dtype": "uint8", "channels": "gray", "layout": "nchw"},
    )
    assert text.splitlines() == [
        "preprocess.size: the model takes 8x8 pixels, not 224x224",
        "labels: 2 names, but the model has 3 classes",
        "top: 4, but the model has only 3 classes",
        "preprocess.dtype: the model takes float32, not uint8",
        "preprocess.channels: gray, but the model takes 3",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "detect"}, r"outputs of y \[any, 3\] are not those of detect"),
        ({"task": "detect", "decoder": "yolox"}, r"outputs of y \[any, 3\] are not those of yolox"),
        ({"task": "restyle"}, r"are not those of restyle"),
        ({"task": "segment"}, r"are not those of segment"),
        ({"labels": "absent.txt"}, r"absent\.txt cannot be read"),
        ({"labels": "../labels.txt"}, "inside the artifacts folder"),
        ({"labels": "/etc/hostname"}, "inside the artifacts folder"),
        ({"preprocess": {"std": 0}}, r"preprocess\.std: must not be 0"),
        ({"preprocess": {"layout": "nhwc"}}, r"no picture of 1 or 3 channels in nhwc"),
    ],
)
def test_what_does_not_fit(make: Make, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        inspect(means(make), options)


def test_crop_and_whole_pictures_do_not_go_together(make: Make) -> None:
    path = make([node("Relu", "x")], ["b", 3, 8, 8], ["b", 3, 8, 8])
    assert "crop would lose the borders" in problems(path, preprocess={"resize": "crop"})


def test_a_detector_of_any_size_needs_one(make: Make) -> None:
    path = shaped(make, [1, 3, "h", "w"], [1, "n", 85])
    assert "preprocess.size: the model takes several sizes" in problems(path, task="detect")
    assert inspect(path, {"decoder": "yolox", "preprocess": {"size": 640}})["decoder"] == "yolox"


def test_incomplete_options_are_refused() -> None:
    with pytest.raises(SpecError, match="not complete"):
        OnnxVisionScorer({"file": "model.onnx"})
    with pytest.raises(SpecError, match="file: is required"):
        VisionOptions.parse({})


# ------------------------------------------------------------------------------------- hostile models


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer of 46 bytes"),
        (b"\x80\x04\x95", "Python pickle"),
        (b"PK\x03\x04", "ZIP archive"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x1f\x8b", "gzip"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
        (b"weights", "not an ONNX model"),
        (b"\x08\x07hello", "damaged or cut short"),
    ],
)
def test_what_is_no_model(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=words) as caught:
        inspect(path, {})
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no such model file"):
        inspect(tmp_path / "absent.onnx", {})
    with pytest.raises(ModelLoadError, match="Is a directory"):
        inspect(tmp_path, {})


@pytest.mark.parametrize(
    ("location", "words"),
    [("weights.bin", "keeps its weights in weights.bin, which is missing"), ("../../secret", "outside its own folder")],
)
def test_external_weights(make: Make, location: str, words: str) -> None:
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    path = make([node("Conv", "x w")], ["b", 3, 8, 8], ["b", 3, 8, 8], weights=[weight])
    with pytest.raises(ModelLoadError, match=words):
        inspect(path, {})


@pytest.mark.parametrize(
    ("nodes", "opset", "words"),
    [
        ([node("Nope", "x")], 17, "opset 17 has no operator Nope"),
        ([node("Relu", "x")], 99, "newer ONNX version"),
        ([node("Add", "x absent")], 17, "cannot load the model: .*absent"),
    ],
)
def test_models_that_cannot_run(make: Make, nodes: list[Any], opset: int, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        inspect(make(nodes, ["b", 3, 8, 8], ["b", 3, 8, 8], opset=opset), {})


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        (["b", 4], TensorProto.FLOAT, r"takes x: float \[any, 4\]"),
        (["b", 3, 8, 8], TensorProto.DOUBLE, r"takes x: double \[any, 3, 8, 8\]"),
    ],
)
def test_inputs_that_are_no_picture(make: Make, shape: list[Any], dtype: int, words: str) -> None:
    path = make([node("Cast", "x", to=TensorProto.FLOAT)], shape, shape, dtype=dtype)
    with pytest.raises(ModelLoadError, match=words):
        inspect(path, {})


def test_several_inputs(tmp_path: Path) -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in ("a", "b", "y")]
    graph = helper.make_graph([node("Add", "a b")], "graph", info[:2], info[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "two.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelLoadError, match=r"2 inputs \(a, b\)"):
        inspect(tmp_path / "two.onnx", {})


def test_errors_survive_a_process_boundary(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        inspect(tmp_path / "absent.onnx", {})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_reasons_are_plain() -> None:
    message = "[ONNXRuntimeError] : 1 : FAIL : Load model from /a/b failed:/src/core/graph.cc:15 void Graph::Do() no."
    assert plain_reason(message) == "no."
    assert plain_reason("") == "it gives no reason"


# ------------------------------------------------------------------------------------------- scoring


def test_classify(make: Make) -> None:
    scorer = scorer_of(means(make), labels=["red", "green", "blue"], softmax="never", preprocess=RAW)
    rows = run(scorer, plain(9, 5, 1), plain(1, 2, 30))
    assert rows == [
        {"label": "red", "index": 0, "score": 9.0},
        {"label": "blue", "index": 2, "score": 30.0},
    ]
    assert list(rows[0]) == list(scorer.columns or {})
    assert scorer.describe() == "model.onnx on CPU (1 thread), classify, 8x8, batch 32"
    scorer.close()


def test_top_classes_have_ranks(make: Make) -> None:
    scorer = scorer_of(means(make), top=2, preprocess=RAW)
    assert scorer.columns == {"label": "string", "index": "int64", "score": "float32", "rank": "int64"}
    [rows] = run(scorer, plain(9, 5, 8))
    assert [(row["label"], row["rank"]) for row in rows] == [("0", 1), ("2", 2)]


@pytest.mark.parametrize("batch", ["batch", 1, 3, 4])
def test_any_number_of_pictures_for_any_batch(make: Make, batch: Any) -> None:
    scorer = scorer_of(means(make, batch), preprocess=RAW)
    assert scorer.batch_size == (32 if batch == "batch" else batch)
    items = [plain(i, 0, 0) for i in range(1, 8)]
    scores = scorer_of(means(make, batch), softmax="never", preprocess=RAW)
    assert [row["score"] for row in run(scores, *items)] == [float(i) for i in range(1, 8)]
    assert run(scorer) == []


@pytest.mark.parametrize(
    ("pixels", "groups"), [(None, [7]), (8 * 8, [1] * 7), (3 * 8 * 8 + 1, [3, 3, 1]), (1, [1] * 7)]
)
def test_the_model_is_given_as_many_pictures_as_its_runtime_is_best_at(
    make: Make, monkeypatch: pytest.MonkeyPatch, pixels: int | None, groups: list[int]
) -> None:
    scorer = scorer_of(means(make), softmax="never", preprocess=RAW)
    runtime = scorer._runtime
    assert runtime.pixels == CPU_PIXELS
    given: list[int] = []
    whole = runtime.run

    def counted(outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        given.extend(map(len, inputs.values()))
        return whole(outputs, inputs)

    monkeypatch.setattr(runtime, "pixels", pixels)
    monkeypatch.setattr(runtime, "run", counted)
    scorer._compared = True  # once, the first of several is run by itself, too
    assert [row["score"] for row in run(scorer, *(plain(i, 0, 0) for i in range(1, 8)))] == [*map(float, range(1, 8))]
    assert given == groups


def test_labels_from_a_file(make: Make, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    path = means(make)
    options = inspect(path, {"labels": "names.txt", "preprocess": RAW})
    scorer = OnnxVisionScorer(options)
    scorer.load(tmp_path, "cpu")
    assert run(scorer, plain(0, 9, 0))[0]["label"] == "green"


def test_not_a_number_is_that_items_alone(make: Make) -> None:
    nodes = [node("ReduceMean", "x", "m", axes=[2, 3], keepdims=0), node("Log", "m")]
    scorer = scorer_of(make(nodes, ["b", 3, 8, 8], ["b", 3]), preprocess=RAW)
    good, bad, last = run(scorer, plain(9, 9, 1), plain(0, 1, 2), plain(1, 1, 9))
    assert isinstance(bad, ItemError)
    assert bad.message == "0-1-2: the model's output holds NaN or infinity"
    assert (good["label"], last["label"]) == ("0", "2")


def test_a_failing_run_is_narrowed_down(make: Make) -> None:
    # indexes a table of four rows with the red value
    table = numpy_helper.from_array(np.eye(4, dtype=np.float32), "table")
    corner = [numpy_helper.from_array(np.array(v), n) for n, v in (("zero", 0), ("axis", [1, 2]))]
    nodes = [
        node("Gather", "x zero", "red", axis=1),
        node("ReduceMean", "red", "mean", axes=[1, 2], keepdims=0),
        node("Cast", "mean", "index", to=TensorProto.INT64),
        node("Gather", "table index", axis=0),
    ]
    scorer = scorer_of(make(nodes, ["b", 3, 8, 8], ["b", 4], weights=[table, *corner[:1]]), preprocess=RAW)
    first, bad, last = run(scorer, plain(1, 0, 0), plain(200, 0, 0), plain(3, 0, 0))
    assert (first["index"], last["index"]) == (1, 3)
    assert isinstance(bad, ItemError)
    assert bad.message.startswith("200-0-0: the model failed: ")
    assert "\n" not in bad.message


def test_an_output_that_is_not_per_picture_is_an_error(make: Make) -> None:
    nodes = [node("ReduceMean", "x", axes=[0, 2, 3], keepdims=0)]
    scorer = scorer_of(make(nodes, ["b", 3, 8, 8], ["b"]), task="values", preprocess=RAW)
    [result] = run(scorer, plain(1, 2, 3))
    assert isinstance(result, ItemError)
    assert "an output of shape [3] for 1 pictures" in result.message


def test_restyle_of_mixed_sizes_keeps_each_size_and_colour(make: Make) -> None:
    path = make([node("Identity", "x", "styled")], ["b", 3, "h", "w"], ["b", 3, "h", "w"], names=("styled",))
    scorer = scorer_of(path, preprocess={"channels": "bgr"}, batch_size=8)
    assert (scorer.size, scorer.output, scorer.columns) == (None, "image", None)
    items = [plain(1, 2, 3, 20, 10), plain(4, 5, 6, 7, 9), plain(7, 8, 9, 20, 10)]
    for item, result in zip(items, run(scorer, *items), strict=True):
        np.testing.assert_array_equal(result, item.value)


def test_restyle_of_fixed_size_restores_the_original(make: Make) -> None:
    path = make([node("Identity", "x")], ["b", 3, 16, 16], ["b", 3, 16, 16])
    [result] = run(scorer_of(path), plain(10, 20, 30, 40, 25))
    assert result.shape == (25, 40, 3)
    assert np.abs(result.astype(int) - [10, 20, 30]).max() <= 1


def test_segment_as_rows_and_as_a_map(make: Make) -> None:
    path = make([node("Identity", "x")], ["b", 8, 8, 3], ["b", 8, 8, 3])
    value = np.zeros((10, 20, 3), np.uint8)
    value[:, :10, 1] = 200
    value[:, 10:, 2] = 200
    item = Item("a", value, {"width": 20, "height": 10})
    [rows] = run(scorer_of(path, task="segment", labels=["a", "b", "c"]), item)
    assert [(r["label"], r["index"]) for r in rows] == [("b", 1), ("c", 2)]
    [classes] = run(scorer_of(path, task="segment", output="image"), item)
    assert classes.dtype == np.uint8
    assert classes[0].tolist() == [1] * 10 + [2] * 10
    large = Item("a", np.repeat(np.repeat(value, 20, 0), 20, 1), {"width": 400, "height": 200})
    coloured = scorer_of(path, task="segment", output="colours", labels=["background", "b", "c"])
    assert coloured.output == "image"
    [shown] = run(coloured, large)
    assert shown.shape == (200, 400, 3)
    assert [tuple(shown[150, x]) for x in (50, 350)] == [colour_of("b"), colour_of("c")]
    legend = shown[:30, :60].reshape(-1, 3)
    assert (legend == colour_of("c")).all(axis=1).any()  # over the other class


def test_detect(make: Make) -> None:
    boxes = np.array([[[0.25, 0.5, 0.75, 1.0], [0, 0, 0.1, 0.1]]], np.float32)
    scores = np.array([[[0.1, 0.9], [0.8, 0.2]]], np.float32)
    nodes = [
        node("Constant", "", "y", value=numpy_helper.from_array(scores)),
        node("Constant", "", "z", value=numpy_helper.from_array(boxes)),
    ]
    for constant in nodes:
        del constant.input[:]
    path = make(nodes, [1, 3, 8, 8], [1, 2, 2], [1, 2, 4])
    for labels in (["face"], ["background", "face"]):
        scorer = scorer_of(path, labels=labels)
        [rows] = run(scorer, plain(1, 2, 3, 100, 50))
        assert rows == [{"xmin": 25, "ymin": 25, "xmax": 75, "ymax": 50, "label": "face", "score": pytest.approx(0.9)}]
    assert "detect (ssd), 8x8" in scorer.describe()


# ----------------------------------------------------------------------------------------- providers

CPU, CUDA, RT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("cpu", [RT, CUDA, CPU], [CPU]),
        ("auto", [CPU], [CPU]),
        ("auto", [RT, CUDA, CPU], [(CUDA, {"device_id": 0}), CPU]),
        ("cuda:1", [RT, CUDA, CPU], [(CUDA, {"device_id": 1}), CPU]),
        ("cuda", [RT, CPU], [(RT, {"device_id": 0}), CPU]),
        ("tensorrt", [CUDA, RT, CPU], [(RT, {"device_id": 0}), (CUDA, {"device_id": 0}), CPU]),
    ],
)
def test_providers(device: str, available: list[str], chosen: list[Any]) -> None:
    assert choose_providers(device, available) == chosen


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "has only CPUExecutionProvider"),
        ("tensorrt", "has only"),
        ("gpu", "no device 'gpu'"),
        ("cuda:x", "no device"),
    ],
)
def test_providers_that_are_not_there(device: str, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        choose_providers(device, [CPU])
    assert caught.value.hint


def test_a_gpu_that_does_not_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    path = means(make)
    scorer = OnnxVisionScorer(inspect(path, {}))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    sessions: list[Any] = []

    def without_gpu(path: Path, providers: list[Any], **settings: Any) -> Any:
        sessions.append(providers)
        return open_session(path, [CPU], **settings)

    monkeypatch.setattr("tally.scorers.onnx.session.open_session", without_gpu)
    with pytest.raises(ModelLoadError, match="cuda was asked for, but ONNX Runtime could not start it"):
        scorer.load(path.parent, "cuda")
    scorer.load(path.parent, "auto")
    assert "on CPU" in scorer.describe()
    assert sessions == [[(CUDA, {"device_id": 0}), CPU]] * 2


@pytest.mark.parametrize(("alike", "kept"), [(False, [False, True, False, False]), (True, [True] * 4)])
def test_memory_is_kept_for_pictures_of_the_same_size(make: Make, alike: bool, kept: list[bool]) -> None:
    path = make([node("Identity", "x")], [1, 3, "height", "width"], [1, 3, "height", "width"])
    session = open_session(path, [CPU], pattern=alike)
    given: list[Any] = []

    class Spy:
        get_inputs, get_outputs, get_providers = session.get_inputs, session.get_outputs, session.get_providers

        def run(self, outputs: list[str], inputs: dict[str, Any], options: Any) -> Any:
            given.append(options)
            return session.run(outputs, inputs, options)

    runtime = OnnxRuntime(Spy(), 1, alike=alike)
    for height in (8, 8, 6, 8):
        tensor = np.full((1, 3, height, 8), height, np.float32)
        [found] = runtime.run(["y"], {"x": tensor})
        np.testing.assert_array_equal(found, tensor)
    assert [options is None for options in given] == kept


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, tally.scorers.onnx.scorer; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_outside_the_models_folder_are_refused_before_it_is_added(tmp_path: Path) -> None:
    from tally.scorers.onnx.session import external_names

    for name in (b"../weights.bin", b"a/../../weights.bin"):
        (tmp_path / "m.onnx").write_bytes(b"\x0a\x08location\x12" + bytes([len(name)]) + name)
        with pytest.raises(ModelLoadError, match="outside its own folder"):
            external_names(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"\x0a\x08location\x12\x0bweights.bin")
    assert external_names(tmp_path / "m.onnx") == ["weights.bin"]
