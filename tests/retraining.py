"""Pictures of colours, and a small backbone that sees them, to retrain with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 60, 60), "green": (60, 190, 70), "blue": (60, 70, 200)}


def photos(folder: Path, counts: Mapping[str, int] | None = None, *, suffix: str = ".png") -> Path:
    """A folder of noisy pictures, 24 × 20, for each label; labels beyond those of COLOURS are grey."""
    rng = np.random.default_rng(3)
    for label, count in (counts or dict.fromkeys(COLOURS, 24)).items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            base = np.array(COLOURS.get(label, (128, 128, 128)), float) + rng.normal(0, 25, 3)
            pixels = np.clip(base + rng.normal(0, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number:03d}{suffix}")
    return folder


def backbone(path: Path) -> Path:
    """An ONNX model: pictures ``float32[batch, 16, 16, 3]`` to 12 features, the means of colours in each quarter."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Mul", ["image", "share"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["means"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 16, 16, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 12])],
        [numpy_helper.from_array(np.array(1 / 64, np.float32), "share")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))
    return path
