"""ONNX models of pictures: what they say about themselves, and those that take or give more than plain tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from tally.errors import ModelLoadError, SpecError
from tally.scorers.onnx.graph import read_graph
from tally.scorers.onnx.known import recognised
from tally.scorers.onnx.session import Node, OnnxRuntime, Signature, open_session, plain_reason, signature
from tally.scorers.runtime import Runtime
from tally.scorers.vision.detection.base import Dims, Output, show
from tally.scorers.vision.heads import BY_YOURSELF
from tally.scorers.vision.options import ModelFacts, VisionOptions, complete, layout_of
from tally.scorers.vision.preprocess import MADE_UP_SIZE, Array, Preprocessor, Size, made_up_pictures

TENSOR_TYPES = {"tensor(uint8)": "uint8", "tensor(float16)": "float16", "tensor(float)": "float32"}
_SIZE_TYPES = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32"}
_SIZE_INPUTS = ("orig_target_sizes", "target_sizes", "orig_size", "orig_sizes", "image_size", "image_sizes", "im_shape")

Order: TypeAlias = Literal["width, height", "height, width"]


class OnnxPictureOptions(VisionOptions):
    """Options of an ONNX model of pictures.

    size_order: found by :func:`inspect`: in which order a second input takes the picture's size.
    """

    size_order: Order | None = None


class PictureRuntime(Runtime):
    """A model that is given pictures alone, each of the same size.

    A second input is told the size of the tensors. A model that takes one picture is given it without an axis for
    several, which its outputs get. Mappings from class to score become rows, in the classes' order.
    """

    def __init__(self, model: OnnxRuntime, path: Path, *, nchw: bool, order: Order = "width, height") -> None:
        self._model, self._nchw, self._order = model, nchw, order
        self._picture, self._sized = picture_inputs(path, model.nodes)
        self.where, self.inputs, self.outputs = model.where, [self._picture.name], model.outputs
        self.pixels = model.pixels

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        [pictures] = inputs.values()
        height, width = pictures.shape[2:] if self._nchw else pictures.shape[1:3]
        return self.told(outputs, pictures, (width, height))

    def told(self, outputs: Sequence[str], pictures: Array, size: Size) -> list[Any]:
        """The outputs where the pictures are said to be of this size."""
        alone = len(self._picture.shape) == 3
        given: dict[str, Any] = {self._picture.name: pictures[0] if alone else pictures}
        if self._sized is not None:
            said = size if self._order == "width, height" else size[::-1]
            sizes = np.array(said, _SIZE_TYPES[self._sized.type])
            given[self._sized.name] = sizes if len(self._sized.shape) == 1 else np.tile(sizes, (len(pictures), 1))
        found = [_rows(output) for output in self._model.run(outputs, given)]
        return [output[None] for output in found] if alone else found


def picture_inputs(path: Path, inputs: Sequence[Node]) -> tuple[Node, Node | None]:
    """The input that takes the picture, and the one that takes its size, if there is one.

    Raises ModelLoadError for a model with others.
    """
    pictures = [node for node in inputs if len(node.shape) in (3, 4)]
    sizes = [node for node in inputs if node not in pictures and node.name in _SIZE_INPUTS and node.type in _SIZE_TYPES]
    if len(inputs) == 1:
        return inputs[0], None
    if len(pictures) == len(sizes) == 1 and len(inputs) == 2:
        return pictures[0], sizes[0]
    names = ", ".join(node.name for node in inputs) or "none"
    raise ModelLoadError(
        f"{path}: a vision model takes one picture, and may take its size ({', '.join(_SIZE_INPUTS)}); "
        f"this one has {len(inputs)} inputs ({names})",
        hint=BY_YOURSELF,
    )


def _rows(output: Any) -> Array:
    if isinstance(output, list) and output and isinstance(output[0], dict):
        return np.array([[row[key] for key in sorted(row)] for row in output], np.float32)
    return np.asarray(output)


def _dims(shape: Sequence[Any] | None) -> Dims:
    return tuple(n if isinstance(n, int) and n > 0 else None for n in shape or ())


def _examine(path: Path, found: Signature) -> ModelFacts:
    """The facts. Raises ModelLoadError unless the model takes pictures."""
    picture, _ = picture_inputs(path, found.inputs)
    dims = _dims(picture.shape)
    if len(dims) not in (3, 4) or picture.type not in TENSOR_TYPES:
        raise ModelLoadError(
            f"{path}: a vision model takes a picture, a tensor of four axes in uint8, float16 or float (or three, for "
            f"one picture alone); this one takes {picture.name}: {picture.type.removeprefix('tensor').strip('()')} "
            f"{show(dims)}",
            hint=BY_YOURSELF,
        )
    ahead = (1,) if len(dims) == 3 else ()
    return ModelFacts(
        path,
        ahead + dims,
        TENSOR_TYPES[picture.type],
        tuple(_output(path, picture, each, ahead) for each in found.outputs),
        found.metadata,
        lambda classes: recognised(read_graph(path), picture.name, classes),
        alone=bool(ahead),
    )


def _output(path: Path, picture: Node, node: Node, ahead: tuple[int, ...]) -> Output:
    if node.type.startswith("seq(map(") and node.type.endswith("tensor(float)))"):
        labels = _keys(path, picture, node.name)
        return Output(node.name, (None, len(labels)), labels=labels)
    if not node.type.startswith("tensor(") or node.type == "tensor(string)":
        return Output(node.name, (), "other")
    return Output(node.name, ahead + _dims(node.shape), "integer" if "int" in node.type else "float")


def _keys(path: Path, picture: Node, output: str) -> tuple[str, ...]:
    """The classes of which an output gives the scores, asked of the model."""
    session = open_session(path, ["CPUExecutionProvider"], optimise=False)
    zeros = np.zeros([n or 1 for n in _dims(picture.shape)], TENSOR_TYPES.get(picture.type, "float32"))
    try:
        [[scores, *_]] = session.run([output], {picture.name: zeros})
    except Exception as error:
        raise ModelLoadError(f"{path}: the classes of {output} cannot be asked: {plain_reason(str(error))}") from None
    return tuple(str(key) for key in sorted(scores))


def inspect(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Look at a model and fill in every option that was left out.

    Returns options (JSON-able) for :class:`~tally.scorers.onnx.scorer.OnnxVisionScorer`; see
    :func:`tally.scorers.vision.options.complete`. Raises SpecError with every problem, ModelNotFoundError,
    ModelLoadError.
    """
    declared = OnnxPictureOptions.parse({"file": path.name, **options})
    found = signature(path)
    facts = _examine(path, found)
    names = [output.name for output in facts.outputs if output.kind != "other"]

    def opened(*, nchw: bool) -> PictureRuntime:
        session = open_session(path, ["CPUExecutionProvider"], threads=os.cpu_count() or 1, optimise=False)
        return PictureRuntime(OnnxRuntime(session, 1), path, nchw=nchw)

    def run(pictures: Array) -> dict[str, Array]:
        runtime = opened(nchw=layout_of(facts.dims, declared.preprocess) == "nchw")
        return dict(zip(names, runtime.run(names, {"picture": pictures}), strict=True))

    completed = complete(declared, facts, run)
    if len(found.inputs) == 2:
        order = _size_order(opened(nchw=completed.preprocess.layout == "nchw"), completed)
        completed = completed.model_copy(update={"size_order": order})
    return completed.model_dump(mode="json")


def _size_order(runtime: PictureRuntime, options: OnnxPictureOptions) -> Order:
    """In which order the size is told: the model is asked which coordinates follow the first number. A square's is the
    same either way. Raises SpecError where none follows."""
    width, height = size = options.preprocess.size or MADE_UP_SIZE
    if width == height:
        return "width, height"
    tensor = Preprocessor(options.preprocess).tensor(Image.fromarray(made_up_pictures(size)[0]))
    pictures = np.repeat(tensor[None], options.batch or 1, axis=0)
    moved = np.zeros(2)
    once, twice = (runtime.told(options.outputs or (), pictures, told) for told in (size, (2 * width, height)))
    for before, after in zip(once, twice, strict=True):
        if before.ndim == 3 and before.shape[2] == 4 and before.shape == after.shape:
            moved = np.maximum(moved, np.abs(after - before).reshape(-1, 2, 2).max(axis=(0, 1)))
    if moved[0] == moved[1]:
        raise SpecError(
            f"preprocess.size: no box follows the size {width}x{height} that the model is told; use a square"
        )
    return "width, height" if moved[0] > moved[1] else "height, width"
