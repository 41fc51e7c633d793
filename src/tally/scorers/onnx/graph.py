"""What an ONNX file says of its graph: names of nodes and weights, and what happens to the picture first.

ONNX Runtime tells inputs, outputs and metadata, not nodes, and the package ``onnx`` is no dependency of scoring. So the
few fields that are looked at are read here, without the weights, whatever the file's size:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tally.errors import ModelLoadError

Content: TypeAlias = mmap.mmap

_LOOKS_ON = frozenset(
    {"Identity", "Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Pad", "BatchNormalization"}
    | {"QuantizeLinear", "DequantizeLinear"}
)
"""Operators that leave open what values pictures have: those of whole models, too, begin with them."""
_SMALL = 64
"""Bytes of weights whose values are read."""


@dataclass(frozen=True, slots=True)
class GraphNode:
    """An operator. scopes: the modules that it was exported from, where the exporter tells (PyTorch's does)."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scopes: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """producer: the program that wrote the file. weights: their names, with the values of single numbers."""

    producer: str
    nodes: tuple[GraphNode, ...]
    weights: Mapping[str, float | None]

    def names(self) -> Iterator[str]:
        """Every name by which a layer may be known."""
        yield from self.weights
        for node in self.nodes:
            yield node.name
            yield node.scopes

    def first(self, given: str) -> frozenset[str]:
        """The operators that the input meets first, past those that leave its values as they are."""
        found, ahead, seen = set(), [given], set()
        while ahead:
            name = ahead.pop()
            for node in self.nodes:
                if name not in node.inputs or id(node) in seen:
                    continue
                seen.add(id(node))
                if node.operator in _LOOKS_ON:
                    ahead += node.outputs
                else:
                    found.add(node.operator)
        return frozenset(found)

    def quantized(self, given: str) -> tuple[float, float] | None:
        """The least and the greatest value that the input keeps, where it is quantized to 8 bits first."""
        for node in self.nodes:
            if node.operator != "QuantizeLinear" or node.inputs[:1] != (given,):
                continue
            step, zero = (self.weights.get(name) for name in (*node.inputs[1:], "")[:2])
            if step is not None and zero is not None:
                return (-zero * step, (255 - zero) * step) if zero >= 0 else ((-128 - zero) * step, (127 - zero) * step)
        return None


def read_graph(path: Path) -> Graph:
    """Raises ModelLoadError for a damaged file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _model(content)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError):
        raise ModelLoadError(f"{path}: the model is damaged or cut short", hint="Fetch it again.") from None


def _model(content: Content) -> Graph:
    producer, nodes, weights = "", [], {}
    for number, start, end in _fields(content, 0, len(content)):
        if number == 2:
            producer = _text(content, start, end)
        elif number == 7:
            for inner, first, last in _fields(content, start, end):
                if inner == 1:
                    nodes.append(_node(content, first, last))
                elif inner == 5:
                    name, value = _weight(content, first, last)
                    weights[name] = value
    return Graph(producer, tuple(nodes), weights)


def _node(content: Content, start: int, end: int) -> GraphNode:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    scopes = ""
    for number, first, last in _fields(content, start, end):
        if number in texts:
            texts[number].append(_text(content, first, last))
        elif number == 9:  # metadata
            entry = {field: _text(content, a, b) for field, a, b in _fields(content, first, last)}
            if entry.get(1) == "pkg.torch.onnx.class_hierarchy":
                scopes = entry.get(2, "")
    return GraphNode("".join(texts[4]), "".join(texts[3]), tuple(texts[1]), tuple(texts[2]), scopes)


def _weight(content: Content, start: int, end: int) -> tuple[str, float | None]:
    name, kind, value = "", 0, None
    for number, first, last in _fields(content, start, end):
        if number == 2:
            kind = first
        elif number == 8:
            name = _text(content, first, last)
        elif number == 9 and 0 < last - first <= _SMALL:  # raw data: of floats, or of whole numbers of 8 bits
            raw = bytes(content[first:last])
            form = {1: "<f", 2: "<B", 3: "<b"}.get(kind)
            value = struct.unpack(form, raw)[0] if form and len(raw) == struct.calcsize(form) else None
        elif number == 4 and last - first == 4:
            value = struct.unpack("<f", bytes(content[first:last]))[0]
        elif number == 5 and 0 < last - first <= 10:
            found, after = _number(content, first)
            value = (found - (1 << 64) if found >> 63 else found) if after == last else None
    return name, value


def _fields(content: Content, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: number, and where the content begins and ends; of a plain number, itself for both."""
    while at < end:
        tag, at = _number(content, at)
        match tag & 7:
            case 0:
                value, at = _number(content, at)
                yield tag >> 3, value, value
                continue
            case 1:
                length = 8
            case 2:
                length, at = _number(content, at)
            case 5:
                length = 4
            case _:
                raise ValueError("no field")
        if at + length > end:
            raise ValueError("cut short")
        yield tag >> 3, at, at + length
        at += length


def _number(content: Content, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = shift = 0
    while True:
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _text(content: Content, start: int, end: int) -> str:
    return bytes(content[start:end]).decode()
