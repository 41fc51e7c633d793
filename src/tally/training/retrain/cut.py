"""A classifier without its last layer, as a file of its own: a backbone."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tally.errors import ModelError
from tally.models.reference import ModelRef
from tally.storage import failure
from tally.text import did_you_mean

LARGEST = 1_800_000_000
"""Bytes of an ONNX file; what is larger keeps its weights beside it, as protobuf ends at 2 GiB."""
_LAYERS = frozenset({"Gemm", "MatMul", "Conv", "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "ConvInteger"})

_IDLE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Identity"})
"""What changes no value."""


def last_layer_input(ref: ModelRef) -> str | None:
    """The name of the value that a model's last layer with weights takes; None where there is no such layer."""
    import onnx

    graph = onnx.load(str(ref.location / ref.entry), load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    value = str((ref.options.get("outputs") or [graph.output[0].name])[0])
    for _ in graph.node:
        node = made_by.get(value)
        if node is None:
            return None
        value = str(node.input[0])
        if node.op_type in _LAYERS:
            while (before := made_by.get(value)) is not None and before.op_type in _IDLE:
                value = str(before.input[0])
            return value
    return None


def cut(ref: ModelRef, at: str, folder: Path) -> Path:
    """The model up to the value ``at`` as an ONNX file in ``folder``, made once for a content and a value.

    A value that is a map of features is averaged over the picture.
    Raises ModelError if there is no such value, or nothing is known of its type; StorageError.
    """
    name = hashlib.sha256(f"{ref.hash}\0{at}".encode()).hexdigest()[:32]
    place = folder / name / f"{Path(ref.entry).stem}.onnx"
    if place.exists():
        return place
    model = _up_to(ref, at)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".cut-", dir=folder))
        try:
            save(model, partial / place.name)
            partial.chmod(0o755)
            os.replace(partial, place.parent)  # noqa: PTH105
        except OSError:
            if not place.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise failure("write", str(place), error) from error
    return place


def _up_to(ref: ModelRef, at: str) -> Any:
    import onnx

    path = ref.location / ref.entry
    model = onnx.load(str(path))
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    if at not in made_by:
        last = last_layer_input(ref)
        raise ModelError(
            f"--cut: {path.name} makes no value {at!r}{did_you_mean(at, made_by)}",
            hint=f"Its last layer takes {last!r}." if last else None,
        )
    known = {each.name: each for each in (*graph.output, *graph.value_info)}
    if at not in known:
        try:
            inferred = onnx.shape_inference.infer_shapes(model).graph
        except Exception as error:  # whatever onnx makes of a model that it cannot follow
            raise ModelError(f"--cut: the type of {at!r} in {path.name} cannot be found: {error}") from None
        known = {each.name: each for each in (*inferred.output, *inferred.value_info)}
    if at not in known:
        raise ModelError(f"--cut: the type of {at!r} in {path.name} is not known", hint="Cut at another value.")
    output = onnx.ValueInfoProto()
    output.CopyFrom(known[at])
    wanted, needed = [at], {at}
    while wanted:
        node = made_by.get(wanted.pop())
        if node is not None:
            new = set(_takes([node])) - needed
            needed |= new
            wanted += new
    nodes = [node for node in graph.node if needed & set(node.output)]
    weights = [each for each in graph.initializer if each.name in needed]
    # Older files list their weights among the inputs.
    inputs = [each for each in graph.input if each.name in needed]
    parts = ((graph.node, nodes), (graph.initializer, weights), (graph.input, inputs), (graph.output, [output]))
    for field, kept in parts:
        kept = [_copy(each) for each in kept]
        del field[:]
        field.extend(kept)
    del graph.value_info[:]
    average(graph)
    return model


def average(graph: Any) -> None:
    """Have a graph whose output is a map of features give their averages over the picture."""
    import onnx

    [output] = graph.output
    dims = output.type.tensor_type.shape.dim
    if len(dims) == 4 and any(not each.HasField("dim_value") or each.dim_value != 1 for each in dims[2:]):
        # The layout is that of Conv, whose output or input it is.
        pooled = f"{output.name}/average"
        graph.node.append(onnx.helper.make_node("GlobalAveragePool", [output.name], [pooled]))
        output.name = pooled
        for each in dims[2:]:
            each.dim_value = 1


def _copy(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _takes(nodes: Iterable[Any]) -> Iterator[str]:
    """The names of all that nodes take, those of the graphs within them included."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _takes(graph.node)
                yield from (each.name for each in graph.output)


def save(model: Any, path: Path) -> None:
    """Write an ``onnx.ModelProto``, with its weights in ``NAME.data`` beside it where it is large."""
    import onnx

    large = model.ByteSize() > LARGEST
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)
