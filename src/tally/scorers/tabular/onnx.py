"""Scores tables with ONNX models: those whose inputs are rows of values, not pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tally.errors import ModelLoadError
from tally.models.base import Kind
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.onnx.session import Node, OnnxRuntime, external_names, signature
from tally.scorers.tabular.tensors import Port, TensorTableOptions, TensorTableScorer, complete_table


def takes_table(path: Path) -> bool:
    """Whether every input of a model is a row of values. Raises ModelNotFoundError, ModelLoadError."""
    return _is_table([_port(node) for node in signature(path).inputs])


def _is_table(inputs: Sequence[Port]) -> bool:
    return bool(inputs) and all(port.plain and 1 <= port.rank <= 2 for port in inputs)


def _port(node: Node) -> Port:
    dims = [size if isinstance(size, int) and size > 0 else None for size in node.shape]
    return Port(
        name=node.name,
        dtype=node.type,
        rank=len(dims),
        width=1 if len(dims) < 2 else dims[1],
        batch=dims[0] if dims else None,
    )


def inspect(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Look at a model, and fill in every option that was left out.

    Returns options (JSON-able) for :class:`OnnxTableScorer`. Raises SpecError with every problem, ModelNotFoundError,
    ModelLoadError.
    """
    found = signature(path)
    inputs, outputs = [_port(node) for node in found.inputs], [_port(node) for node in found.outputs]
    if not _is_table(inputs):
        shown = ", ".join(f"{port.name}: {port.dtype} of {port.rank} axes" for port in inputs) or "nothing"
        raise ModelLoadError(
            f"{path}: a model of tables takes tensors of one or two axes; this one takes {shown}",
            hint="Models of pictures are scored over images and videos.",
        )
    return complete_table(path, options, inputs, outputs, options_type=TensorTableOptions).model_dump(mode="json")


class OnnxTableKind(Kind):
    """ONNX models whose inputs are rows of values."""

    reads_files = False

    def recognises(self, path: Path) -> bool:
        return takes_table(path)

    def companions(self, path: Path) -> list[str]:
        return external_names(path)

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        return inspect(path, options)

    def create(self, ref: ModelRef) -> Scorer:
        return OnnxTableScorer(ref.options)


class OnnxTableScorer(TensorTableScorer):
    """Scores tables with an ONNX model; options as :func:`inspect` returns them."""

    def open(self, path: Path, device: str) -> OnnxRuntime:
        return OnnxRuntime.best(path, device)
