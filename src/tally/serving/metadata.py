"""What a model takes and returns, as protocols of tensors declare it. Imports nothing heavy: the server asks, too."""

from __future__ import annotations

from collections.abc import Mapping

from tally.serving.messages import Description

ITEM_INPUT = {"image": "image", "frame": "image", "bytes": "body", "path": "body"}
"""What the only input of models that take no tables is called."""

_TYPES: Mapping[str, str] = {
    "string": "BYTES",
    "int64": "INT64",
    "float32": "FP32",
    "float64": "FP64",
    "bool": "BOOL",
    "list<float32>": "FP32",
}


def inputs(description: Description) -> list[tuple[str, str, list[int]]]:
    """Name, datatype (of the Open Inference Protocol) and shape of each input, -1 where it varies."""
    if description.input == "table":
        if isinstance(description.features, list):
            keys = [(name, "BYTES", [-1]) for name in description.by]
            return keys + [(name, "FP64", [-1]) for name in description.features]
        return [("input", "FP64", [-1, description.features if isinstance(description.features, int) else -1])]
    return [(ITEM_INPUT[description.input], "BYTES", [-1])]


def outputs(description: Description) -> list[tuple[str, str, list[int]]]:
    """The same of each output that is known beforehand."""
    if description.output == "image":
        return [("image", "BYTES", [-1])]
    return [
        (name, _TYPES.get(kind, "BYTES"), [-1, -1] if kind.startswith("list") else [-1])
        for name, kind in (description.columns or {}).items()
    ]
