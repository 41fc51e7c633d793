"""Classifiers of well-known collections as ONNX files, told by their layers, or by what their quantized input keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tally.scorers.onnx.graph import Graph
from tally.scorers.vision.known import known_by
from tally.scorers.vision.options import IMAGENET, MINUS_ONE_TO_ONE, ZERO_TO_ONE, Known

_CONVOLUTIONS = frozenset({"Conv", "QLinearConv", "ConvInteger", "FusedConv"})

_RANGES: tuple[tuple[str, tuple[float, float], Mapping[str, Any]], ...] = (
    ("0..255", (0.0, 255.0), {}),
    ("0..1", (0.0, 1.0), ZERO_TO_ONE),
    ("-1..1", (-1.0, 1.0), MINUS_ONE_TO_ONE),
    ("-2.118..2.64, that of ImageNet's mean and deviation", (-0.485 / 0.229, (1 - 0.406) / 0.225), IMAGENET),
)


def recognised(graph: Graph, given: str, classes: int | None) -> Known | None:
    """What a model of three channels is, if its file tells. given: its input. classes: None where it has none."""
    first = graph.first(given)
    straight = bool(first) and first <= _CONVOLUTIONS
    if straight and (range_ := graph.quantized(given)) is not None:
        for name, wanted, values in _RANGES:
            near = 0.03 * (wanted[1] - wanted[0])
            if all(abs(a - b) <= near for a, b in zip(range_, wanted, strict=True)):
                return Known(f"its quantized input keeps {name}, and so it", values)
    return known_by(list(graph.names()), classes, straight=straight)
