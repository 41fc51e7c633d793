"""Models of well-known collections are told by what their files say, and by nothing less."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tally.errors import ModelLoadError
from tally.media.images import decode
from tally.scorers.base import Item
from tally.scorers.onnx.graph import read_graph
from tally.scorers.onnx.pictures import inspect
from tally.scorers.onnx.scorer import OnnxVisionScorer

IMAGENET = (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MINUS_ONE = (1 / 127.5, (1.0,), None)
CAFFE = (1.0, (104.0, 117.0, 123.0), None)
KERAS_CAFFE = (1.0, (103.939, 116.779, 123.68), None)


def network(
    folder: Path,
    *layers: str,
    last: bool = False,
    classes: int = 1000,
    before: str | None = None,
    scopes: str = "",
    head: str = "fc.weight",
    metadata: dict[str, str] | None = None,
) -> Path:
    """A classifier of nothing, whose convolutions have these names. before: what its pictures meet first."""
    nodes, given = [], "x"
    if before is not None:
        nodes.append(helper.make_node(before, [given, "c"], ["changed"]))
        given = "changed"
    if last:
        nodes.append(helper.make_node("Transpose", [given], ["turned"], perm=[0, 3, 1, 2]))
        given = "turned"
    for number, layer in enumerate(layers or ("layer",)):
        nodes.append(helper.make_node("Conv", [given, "w"], [f"h{number}"], name=layer))
        given = f"h{number}"
    nodes += [
        helper.make_node("GlobalAveragePool", [given], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", head], ["y"]),
    ]
    weights = {
        "c": np.array(2.0, np.float32),
        "w": np.ones((3, 3, 1, 1), np.float32),
        head: np.ones((3, classes), np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 224, 224, 3] if last else [1, 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, classes])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    if scopes:
        entry = model.graph.node[0].metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.class_hierarchy", scopes
    helper.set_model_props(model, metadata or {})
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def taken(path: Path, **options: Any) -> tuple[tuple[Any, Any, Any], str, str]:
    """Scale, mean and deviation; channels; and what is said of it."""
    found = inspect(path, options)
    values = found["preprocess"]
    [said] = [each for each in found["assumed"] if each.startswith("preprocessing")]
    numbers = tuple(None if values[name] is None else tuple(values[name]) for name in ("mean", "std"))
    return (values["scale"], *numbers), values["channels"], said


@pytest.mark.parametrize(
    ("layers", "last", "values", "name"),
    [
        (("fire2/squeeze1x1", "fire9/expand3x3"), False, CAFFE, "SqueezeNet of Caffe (told by fire2/squeeze1x1)"),
        (("inception_3a/3x3_reduce", "inception_5b/pool_proj"), False, CAFFE, "GoogLeNet of Caffe"),
        (("resnetv17_conv0_fwd",), False, IMAGENET, "MXNet's Gluon"),
        (("mobilenetv20_features_conv0_fwd",), False, IMAGENET, "MXNet's Gluon"),
        (("/conv1/Conv", "/layer4/layer4.0/conv1/Conv"), False, IMAGENET, "ResNet of torchvision or timm"),
        (("/features/denseblock4/denselayer16/conv2/Conv",), False, IMAGENET, "DenseNet of torchvision or timm"),
        (("efficientnet-lite4/model/stem/conv2d/Conv2D",), True, (1 / 128, (127 / 128,), None), "EfficientNet-Lite"),
        (("StatefulPartitionedCall/mobilenet_1.00_224/conv_pw_13/Conv2D",), True, MINUS_ONE, "MobileNet of Keras"),
        (("mobilenetv2_1.00_224/block_16_project_BN/FusedBatchNormV3",), True, MINUS_ONE, "MobileNetV2 of Keras"),
        (("xception/block14_sepconv2/separable_conv2d",), True, MINUS_ONE, "Xception of Keras"),
        (("inception_v3/mixed9_1/concat", "inception_v3/mixed10/concat"), True, MINUS_ONE, "Inception V3 of Keras"),
        (
            ("resnet50v2/conv5_block1_preact_bn/Fused", "resnet50v2/conv5_block3_out/add"),
            True,
            MINUS_ONE,
            "ResNet V2 of Keras",
        ),
        (("resnet50/conv5_block3_add/add",), True, KERAS_CAFFE, "ResNet of Keras"),
        (("densenet121/conv5_block16_concat/concat",), True, IMAGENET, "DenseNet of Keras"),
        (("vgg16/block5_conv3/Conv2D",), True, KERAS_CAFFE, "VGG of Keras"),
    ],
)
def test_layers_name_a_collection(tmp_path: Path, layers: Any, last: bool, values: Any, name: str) -> None:
    found, channels, said = taken(network(tmp_path, *layers, last=last))
    assert found == values
    assert channels == ("bgr" if values in (CAFFE, KERAS_CAFFE) else "rgb")
    assert name in said


def test_classes_of_pytorch_name_a_collection(tmp_path: Path) -> None:
    scopes = "['torchvision.models.mobilenetv2.MobileNetV2', 'torch.nn.modules.conv.Conv2d', 'aten.conv2d.default']"
    found, _, said = taken(network(tmp_path, scopes=scopes, head="w2"))
    assert found == IMAGENET
    assert "a network of torchvision (told by torchvision.models.mobilenetv2.MobileNetV2) takes RGB, 0..1" in said


def test_a_network_that_rescales_its_pictures_is_given_them_as_they_are(tmp_path: Path) -> None:
    layers = ("efficientnetb0/rescaling/mul", "efficientnetb0/stem_conv/Conv2D")
    found, _, said = taken(network(tmp_path, *layers, last=True, before="Mul"))
    assert found == (1.0, None, None)
    assert "a network of Keras that rescales pictures itself" in said


@pytest.mark.parametrize(
    "other",
    [
        {"before": "Mul"},  # it changes the values itself: MobileNetV2 with a layer of one's own before it
        {"classes": 7},  # another head, trained in who knows which way
    ],
)
def test_the_file_has_to_bear_a_name_out(tmp_path: Path, other: dict[str, Any]) -> None:
    said = taken(network(tmp_path, "m/block_16_project/Conv2D", last=True, **other))[2]
    assert said.startswith("preprocessing was not declared: assumed RGB, 0..255")


def test_ultralytics_is_told_by_its_metadata(tmp_path: Path) -> None:
    found, _, said = taken(network(tmp_path, classes=5, metadata={"author": "Ultralytics"}))
    assert found == (1 / 255, None, None)
    assert "a model of Ultralytics, by its metadata, takes RGB, 0..1, shorter side to 224, centre crop" in said


def test_what_is_declared_is_not_overruled(tmp_path: Path) -> None:
    path = network(tmp_path, "fire2/squeeze1x1", "fire9/expand3x3")
    found, channels, said = taken(path, preprocess={"scale": "1/255"})
    assert (found, channels) == ((1 / 255, None, None), "rgb")
    assert "SqueezeNet" not in said


@pytest.mark.parametrize(
    ("step", "zero", "kind", "values"),
    [
        (0.01866, 114, np.uint8, IMAGENET),
        (1 / 255, 0, np.uint8, (1 / 255, None, None)),
        (2 / 255, -1, np.int8, MINUS_ONE),
    ],
)
def test_a_quantized_input_says_what_it_keeps(tmp_path: Path, step: float, zero: int, kind: Any, values: Any) -> None:
    path = network(tmp_path, classes=7)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array(step, np.float32), "step"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(zero, kind), "zero"))
    for number, (kind_, given) in enumerate([("QuantizeLinear", "x"), ("DequantizeLinear", "q")]):
        made = helper.make_node(kind_, [given, "step", "zero"], ["q" if not number else "d"])
        model.graph.node.insert(number, made)
    model.graph.node[2].input[0] = "d"
    path.write_bytes(model.SerializeToString())
    found, _, said = taken(path)
    assert found == values
    assert "its quantized input keeps" in said


def test_a_graph_that_is_cut_short(tmp_path: Path) -> None:
    path = network(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelLoadError, match="damaged or cut short"):
        read_graph(path)


def test_squeezenet_without_a_word_is_right(data: Path) -> None:
    """Its input is named like any other; taken for a network of torchvision, it sees a mosquito net in all photos."""
    scorer = OnnxVisionScorer(inspect(data / "models" / "classify" / "squeezenet_fp16.onnx", {}))
    scorer.load(data / "models" / "classify", "cpu")
    with (data / "images" / "imagenet" / "labels.csv").open(newline="") as file:
        lines = list(csv.reader(file))[1:41]
    items = [Item(each[0], *decode((data / "images" / "imagenet" / each[0]).read_bytes())) for each in lines]
    rows: Any = scorer.score([scorer.prepare(each) for each in items])
    assert [row["index"] for row in rows] == [int(line[6]) for line in lines]


def test_a_network_that_begins_with_arithmetic_is_none_of_the_known_ones(data: Path) -> None:
    """Converted from TensorFlow Lite: its layers are called as those of others that take -1..1."""
    said = taken(data / "models" / "classify" / "mobilenet_v2_fp32.onnx")[2]
    assert said.startswith("preprocessing was not declared: assumed RGB, 0..255")
