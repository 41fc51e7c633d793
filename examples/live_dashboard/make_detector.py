"""Make a detector of the toy classifier tally:shapes: it looks at each quarter of a picture, and names what is there.

    python make_detector.py OUT

Writes a model package. It needs ``pip install onnx``. The detector puts out ``[batch, boxes, 6]``: corners in pixels,
score and class of each box, as YOLOv10 does.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import onnx
import yaml
from onnx import helper, numpy_helper

from tally import demo

SHAPES = demo.model("shapes")
TILE = 64
"""What the classifier takes, in pixels; the detector takes two by two of these."""


def detector() -> onnx.ModelProto:
    """The classifier, with cutting before it and boxes after it."""
    model = onnx.load(SHAPES / "shapes.onnx")
    graph = model.graph
    [tiles], [names] = ([each.name for each in group] for group in (graph.input, graph.output))
    corners = [[x, y, x + TILE, y + TILE] for y in (0, TILE) for x in (0, TILE)]
    constants = {
        "cut": np.array([-1, 3, 2, TILE, 2, TILE]), "tile": np.array([-1, 3, TILE, TILE]),
        "quarters": np.array([-1, 4, 8]), "boxes": np.array([corners], np.float32), "each": np.array([4, 4]),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    before = [
        helper.make_node("Reshape", ["pictures", "cut"], ["cut_up"]),
        helper.make_node("Transpose", ["cut_up"], ["tiles_first"], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", ["tiles_first", "tile"], [tiles]),
    ]
    after = [
        helper.make_node("Reshape", [names, "quarters"], ["by_picture"]),
        helper.make_node("ReduceMax", ["by_picture"], ["scores"], axes=[2]),
        helper.make_node("ArgMax", ["by_picture"], ["best"], axis=2),
        helper.make_node("Cast", ["best"], ["classes"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Shape", ["pictures"], ["count"], end=1),
        helper.make_node("Concat", ["count", "each"], ["shape"], axis=0),
        helper.make_node("Expand", ["boxes", "shape"], ["all_boxes"]),
        helper.make_node("Concat", ["all_boxes", "scores", "classes"], ["output0"], axis=2),
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    tensor = helper.make_tensor_value_info
    graph.input.append(tensor("pictures", onnx.TensorProto.FLOAT, ["batch", 3, 2 * TILE, 2 * TILE]))
    graph.output.append(tensor("output0", onnx.TensorProto.FLOAT, ["batch", 4, 6]))
    onnx.checker.check_model(model, full_check=True)
    return model


def main(argv: list[str] | None = None) -> None:
    """Write the package."""
    parser = argparse.ArgumentParser(description="Make a detector of the toy classifier.")
    parser.add_argument("out", type=Path, help="folder for the package; made if it is missing")
    out = parser.parse_args(argv).out
    package = yaml.safe_load((SHAPES / "tally.yaml").read_text(encoding="utf-8"))
    package |= {"name": "four-shapes", "description": "A toy. It names the shape in each quarter of a picture."}
    package |= {"file": "detector.onnx"}
    options = package["options"]
    options["preprocess"]["size"] = [2 * TILE, 2 * TILE]
    package["options"] = {**options, "task": "detect", "decoder": "end-to-end", "threshold": 0.5}
    del package["options"]["softmax"]
    out.mkdir(parents=True, exist_ok=True)
    onnx.save(detector(), out / "detector.onnx")
    shutil.copy(SHAPES / "labels.txt", out)
    (out / "tally.yaml").write_text(yaml.safe_dump(package, sort_keys=False), encoding="utf-8")
    print(f"a detector of {2 * TILE}x{2 * TILE} pixels in {out}")


if __name__ == "__main__":
    main()
