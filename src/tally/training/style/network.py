"""The network that restyles a picture in one pass, in PyTorch and as an ONNX graph.

After Johnson, Alahi, Fei-Fei 2016 (https://arxiv.org/abs/1603.08155), made small enough for video on a CPU: two
convolutions each halve the picture's sides, residual blocks follow, and two convolutions double the sides again. It is
fully convolutional and takes any size. Both forms are built from the same :data:`LAYERS`, so they cannot diverge.

One addition: a *canvas*. Strokes from a part of the style picture, tiled over the whole picture, are a fourth input
channel. A small network cannot invent strokes, least of all where a picture is flat, but it learns to paint with given
ones. In a video they stay in place instead of flickering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Parameters = Mapping[str, Any]
"""Tensors of PyTorch, or arrays, by name: ``<layer>.weight`` and ``.bias``; and ``.gain`` if it is normalised.

``canvas``: ``uint8[1, 1, CANVAS, CANVAS]``, brightness around 127.5; it is not trained.
"""

CANVAS = 256
"""Pixels per side of the canvas, which is tiled."""

_SEAM = 32
"""Pixels over which an edge of the canvas is blended into the opposite one."""

SMALLEST_STYLE = CANVAS + _SEAM
"""Pixels per side."""

_STROKES = 25
"""Pixels. Brightness over a larger scale is removed from the canvas: the picture decides what is dark."""

EPSILON = 1e-5
"""Added to the variance, in units of the activations."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution, with what is done before and after it in the order of the fields from ``opens_skip`` on.

    opens_skip, closes_skip: the input of the one is added to the output of the other; pairs are nested like brackets.
    upsamples: pixels are repeated first, which leaves no checkerboard as a transposed convolution does.
    norm: instance normalisation instead of a bias.
    """

    name: str
    inputs: int
    outputs: int
    kernel: int = 3
    opens_skip: bool = False
    upsamples: bool = False
    stride: int = 1
    norm: bool = True
    relu: bool = True
    closes_skip: bool = False


def _residual(name: str) -> list[Layer]:
    return [
        Layer(f"{name}.first", 32, 32, opens_skip=True),
        Layer(f"{name}.second", 32, 32, relu=False, closes_skip=True),
    ]


LAYERS = [
    Layer("enter", 4, 16, kernel=5),
    Layer("half", 16, 24, opens_skip=True, stride=2),
    Layer("quarter", 24, 32, opens_skip=True, stride=2),
    *(layer for number in range(4) for layer in _residual(f"block{number}")),
    Layer("double", 32, 24, upsamples=True, closes_skip=True),
    Layer("full", 24, 16, upsamples=True, closes_skip=True),
    Layer("leave", 16, 3, kernel=5, norm=False, relu=False),
]


def initial(style: Any, seed: int) -> dict[str, Any]:
    """Initial parameters, determined by the seed.

    style: ``float32[1, 3, height, width]`` RGB in 0..255, at least SMALLEST_STYLE pixels per side.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = {"canvas": _canvas(style)}
    for layer in LAYERS:
        shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
        spread = (2 / (layer.inputs * layer.kernel**2)) ** 0.5
        parameters[f"{layer.name}.weight"] = torch.randn(shape, generator=generator) * spread
        parameters[f"{layer.name}.bias"] = torch.zeros(layer.outputs)
        if layer.norm:
            parameters[f"{layer.name}.gain"] = torch.ones(layer.outputs)
    return parameters


def _canvas(style: Any) -> Any:
    """The strokes in the middle of the style picture, tileable."""
    import torch
    from torch.nn import functional

    top, left = ((side - SMALLEST_STYLE) // 2 for side in style.shape[2:])
    cut = style[:, :, top : top + SMALLEST_STYLE, left : left + SMALLEST_STYLE].mean(1, keepdim=True)
    strokes = cut - functional.avg_pool2d(cut, _STROKES, stride=1, padding=_STROKES // 2, count_include_pad=False)
    share = torch.linspace(0, 1, _SEAM, device=style.device)
    for axis in (2, 3):
        start, rest, surplus = strokes.split([_SEAM, CANVAS - _SEAM, _SEAM], dim=axis)
        weight = share[:, None] if axis == 2 else share
        # Square roots keep the energy: half of two different strokes would make a faint one.
        start = start * weight.sqrt() + surplus * (1 - weight).sqrt()
        strokes = torch.cat([start, rest], dim=axis)
    return (strokes + 127.5).clamp(0, 255).round().to(torch.uint8)


def restyle(parameters: Parameters, pictures: Any) -> Any:
    """``float32[batch, 3, height, width]`` RGB in 0..255 → the same shape and range, restyled."""
    import torch
    from torch.nn import functional

    count, _, height, width = pictures.shape
    canvas = parameters["canvas"].float().repeat(count, 1, height // CANVAS + 1, width // CANVAS + 1)
    canvas = canvas[:, :, :height, :width]
    x = torch.cat([pictures, canvas], dim=1) / 127.5 - 1
    kept = []
    for layer in LAYERS:
        weight, bias = parameters[f"{layer.name}.weight"], parameters[f"{layer.name}.bias"]
        if layer.opens_skip:
            kept.append(x)
        if layer.upsamples:
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
        # Repeating the edge leaves no frame around the picture, as zeros do, and fits any size, unlike mirroring.
        x = functional.pad(x, [layer.kernel // 2] * 4, mode="replicate")
        x = functional.conv2d(x, weight, None if layer.norm else bias, layer.stride)
        if layer.norm:
            x = functional.instance_norm(x, weight=parameters[f"{layer.name}.gain"], bias=bias, eps=EPSILON)
        if layer.relu:
            x = functional.relu(x)
        if layer.closes_skip:
            before = kept.pop()
            x = x[:, :, : before.shape[2], : before.shape[3]] + before  # halving rounds up
    return 255 * torch.sigmoid(x)


def to_onnx(parameters: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """:func:`restyle` as an ``onnx.ModelProto``: input ``image``, output ``restyled``, every axis but RGB free."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: dict[str, np.ndarray[Any, Any]] = {}

    def constant(name: str, numbers: Any, dtype: Any = np.float32) -> str:
        constants[name] = np.asarray(numbers, dtype)
        return name

    def node(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def integers(name: str, *numbers: int) -> str:
        return constant(name, numbers, np.int64)

    def cut(value: str, like: str, name: str) -> str:
        """The top left part, of the height and width of ``like``."""
        size = node("Shape", [like], f"{name}.size", start=2, end=4)
        return node("Slice", [value, integers("corner", 0, 0), size, integers("sides", 2, 3)], name)

    # The canvas is tiled once more than fits, and then cut, for each picture of the batch.
    node("Shape", ["image"], "size", start=2, end=4)
    whole = node("Div", ["size", integers("period", CANVAS, CANVAS)], "whole")
    across = node("Add", [whole, integers("more", 1, 1)], "across")
    count = node("Shape", ["image"], "count", start=0, end=1)
    repeats = node("Concat", [count, integers("channels", 1), across], "repeats", axis=0)
    canvas = node("Cast", [constant("canvas", parameters["canvas"], np.uint8)], "canvas.float", to=TensorProto.FLOAT)
    canvas = cut(node("Tile", [canvas, repeats], "canvas.tiled"), "image", "canvas.cut")
    value = node("Concat", ["image", canvas], "both", axis=1)
    value = node("Mul", [value, constant("to_two", 1 / 127.5)], "scaled")
    value = node("Sub", [value, constant("one", 1)], "centred")
    kept = []
    for layer in LAYERS:
        name, margin = layer.name, layer.kernel // 2
        weight = constant(f"{name}.weight", parameters[f"{name}.weight"])
        bias = constant(f"{name}.bias", parameters[f"{name}.bias"])
        if layer.opens_skip:
            kept.append(value)
        if layer.upsamples:
            value = node(
                "Resize",
                [value, "", constant("twice", [1, 1, 2, 2])],
                f"{name}.doubled",
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        margins = integers(f"margin{margin}", *[0, 0, margin, margin] * 2)
        value = node("Pad", [value, margins], f"{name}.padded", mode="edge")
        inputs = [value, weight] if layer.norm else [value, weight, bias]
        value = node("Conv", inputs, f"{name}.conv", kernel_shape=[layer.kernel] * 2, strides=[layer.stride] * 2)
        if layer.norm:
            gain = constant(f"{name}.gain", parameters[f"{name}.gain"])
            value = node("InstanceNormalization", [value, gain, bias], f"{name}.norm", epsilon=EPSILON)
        if layer.relu:
            value = node("Relu", [value], f"{name}.relu")
        if layer.closes_skip:
            before = kept.pop()
            if layer.upsamples:  # halving rounds up
                value = cut(value, before, f"{name}.cut")
            value = node("Add", [value, before], f"{name}.sum")
    node("Mul", [node("Sigmoid", [value], "share"), constant("white", 255)], "restyled")
    shape: list[str | int | None] = ["batch", 3, "height", "width"]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "style",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("restyled", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="tally",
    )
    onnx.checker.check_model(model, full_check=True)
    return model
