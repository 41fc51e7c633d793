"""A network of PyTorch as an ONNX file: what bottlenecks are computed with, and what a trained one becomes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tally.errors import ModelError, SpecError, StorageError, TallyError, error_line
from tally.models.reference import ModelRef
from tally.scorers.base import Item
from tally.scorers.torch.network import Network, library, open_network, quietly
from tally.scorers.torch.options import OWN
from tally.scorers.vision.preprocess import Preprocess, Preprocessor, made_up_pictures
from tally.storage import failure
from tally.training.retrain.cut import average, save

SIZE = (224, 224)
"""Width and height of the pictures of a network that takes any, unless its package or the user says otherwise."""
INPUT, OUTPUT = "picture", "features"
"""Names in the ONNX file."""
CLOSE = 1e-3
"""How far the features of a picture may be from those that it has alone, relative to the largest."""


def prepared_as(ref: ModelRef) -> dict[str, Any]:
    """What a network's package and the user say of how pictures are prepared: options of its ONNX file."""
    return {name: value for name, value in ref.declared.items() if name not in (*OWN, "task", "labels")}


def exported(ref: ModelRef, folder: Path) -> Path:
    """The network as an ONNX file in ``folder``, made once for a content, its options and a version of PyTorch.

    Raises ModelError for a network that is no backbone, or cannot be written as ONNX; SpecError; StorageError.
    """
    torch = library()
    facts = [ref.hash, ref.entry, ref.declared, torch.__version__]
    text = json.dumps(facts, sort_keys=True, default=str)
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:32] / f"{Path(ref.entry).stem}.onnx"
    if place.exists():
        return place
    network = open_network(ref)
    shape = _shape(network, ref)
    _check(network, shape, ref)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".exported-", dir=folder))
        try:
            write_onnx(network, shape, partial / place.name)
            partial.chmod(0o755)
            os.replace(partial, place.parent)  # noqa: PTH105
        except OSError as error:
            if isinstance(error, TallyError) or not place.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise failure("write", str(place), error) from error
    return place


def write_onnx(network: Network, shape: tuple[int, int, int], path: Path) -> None:
    """Write a network that takes pictures of ``shape`` (channels, height, width) and gives features, by its weights as
    they are now. Raises ModelError where PyTorch cannot; StorageError."""
    torch = library()
    fixed = network.dims[0]
    device = next(network.module.parameters()).device
    pictures = torch.zeros((fixed or 2, *shape), device=device)
    try:
        with quietly(), tempfile.TemporaryDirectory(prefix="tally-") as made:
            if network.scripted:
                import onnx

                # Only the exporter of TorchScript knows it.
                axes = {} if fixed else {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
                file = Path(made) / "network.onnx"
                torch.onnx.export(
                    network.module, (pictures,), str(file), dynamo=False, dynamic_axes=axes,
                    input_names=[INPUT], output_names=[OUTPUT],
                )  # fmt: skip
                model = onnx.load(str(file))
            else:
                shapes = None if fixed else ({0: torch.export.Dim("batch")},)
                program = torch.onnx.export(
                    network.module, (pictures,), dynamo=True, dynamic_shapes=shapes, verbose=False,
                    input_names=[INPUT], output_names=[OUTPUT],
                )  # fmt: skip
                model = program.model_proto
    except ImportError as error:
        raise ModelError(
            f"writing a network of PyTorch as ONNX needs {error.name or 'onnxscript'}, which is not installed",
            hint="pip install 'tally-scoring[train]'",
        ) from None
    except Exception as error:  # whatever PyTorch makes of a network that it cannot follow
        said = error_line(error.__cause__ if error.__cause__ is not None else error)
        raise ModelError(
            f"PyTorch {torch.__version__} cannot write the network as ONNX, which a trained model is: {said[:500]}",
            hint="It has to be exportable: try torch.export.export(network, (pictures,)) alone.",
        ) from error
    for node in model.graph.node:  # where in whose folders its code stands
        del node.metadata_props[:]
        node.doc_string = ""
    average(model.graph)
    save(model, path)


def features_of(network: Network, pictures: Any) -> Any:
    """A tensor ``float32[n, features]`` of one ``[n, channels, height, width]``; a map of features is averaged."""
    fixed, count = network.dims[0], len(pictures)
    if fixed is None:
        return _flat(network.module(pictures))
    torch = library()
    found = []
    for start in range(0, count, fixed):
        some = pictures[start : start + fixed]
        missing = fixed - len(some)
        whole = torch.cat([some, some[-1:].expand(missing, *some.shape[1:])]) if missing else some
        found.append(_flat(network.module(whole))[: len(some)])
    return torch.cat(found)


def _flat(found: Any) -> Any:
    return (found.mean(dim=(2, 3)) if found.dim() == 4 else found.flatten(1)).float()


def _shape(network: Network, ref: ModelRef) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that it is to take. Raises SpecError, ModelError."""
    declared = prepared_as(ref).get("preprocess", {})
    size = declared.get("size") if isinstance(declared, Mapping) else None
    if size is not None:
        size = Preprocess.model_validate({"size": size}).size
    if len(network.dims) != 4:
        raise ModelError(
            f"--backbone: {ref.name} takes a tensor of {len(network.dims)} axes, and a backbone takes pictures, of 4"
        )
    channels, height, width = network.dims[1:]
    if channels not in (1, 3, None):
        raise ModelError(
            f"--backbone: {ref.name} takes {list(network.dims)}, and a backbone takes [pictures, 3, height, width], "
            "or 1 for 3 where they are gray"
        )
    if size is not None and ((width or size[0]), (height or size[1])) != size:
        raise SpecError(f"preprocess.size: {ref.name} takes {width}x{height} pixels, not {size[0]}x{size[1]}")
    gray = isinstance(declared, Mapping) and declared.get("channels") == "gray"
    width, height = width or (size or SIZE)[0], height or (size or SIZE)[1]
    return channels or (1 if gray else 3), height, width


def _check(network: Network, shape: tuple[int, int, int], ref: ModelRef) -> None:
    """Raises ModelError unless it gives each picture a vector, whatever is beside it, that can be trained."""
    torch = library()
    module = network.module
    weights = [each for each in module.parameters() if each.is_floating_point()]
    if not weights:
        raise ModelError(f"--backbone: {ref.name} has no weights")
    if others := sorted({str(each.dtype) for each in weights} - {"torch.float32"}):
        raise ModelError(
            f"--backbone: {ref.name} has weights of {', '.join(others)}, and a backbone has torch.float32",
            hint="Convert it before it is saved: network.float()",
        )
    channels, height, width = shape
    plain = Preprocess(
        size=(width, height), resize="squash", layout="nchw", channels="gray" if channels == 1 else "rgb",
        dtype="float32", scale=1 / 255,
    )  # fmt: skip
    made_up = [Preprocessor(plain)(Item("made up", each)).tensor for each in made_up_pictures((width, height))[:2]]
    pictures = torch.from_numpy(np.stack([made_up[0], made_up[-1]]))
    try:
        with torch.no_grad(), quietly():
            first = module(pictures[:1].expand(network.dims[0] or 1, -1, -1, -1))
            if isinstance(first, torch.Tensor) and first.dim() in (2, 4):
                alone, both = features_of(network, pictures[:1]), features_of(network, pictures)
    except Exception as error:
        raise ModelError(
            f"--backbone: {ref.name} cannot take a picture [1, {channels}, {height}, {width}]: {error_line(error)}",
            hint="Say its size: --set preprocess.size=WIDTHxHEIGHT",
        ) from error
    if not isinstance(first, torch.Tensor) or first.dim() not in (2, 4):
        what = f"a tensor {list(first.shape)}" if isinstance(first, torch.Tensor) else type(first).__name__
        raise ModelError(
            f"--backbone: {ref.name} gives {what}, and a backbone gives a tensor [pictures, features] or "
            "[pictures, features, height, width]"
        )
    if not bool(torch.isfinite(both).all()):
        spoilt = [name for name, each in module.named_parameters() if not bool(torch.isfinite(each).all())]
        spoilt += [
            name for name, each in module.named_buffers() if each.is_floating_point() and bool(each.isnan().any())
        ]
        if spoilt:
            raise ModelError(
                f"--backbone: {ref.name} has weights that are NaN or infinite: {', '.join(spoilt[:3])}"
                f"{f', and {len(spoilt) - 3:,} more' if len(spoilt) > 3 else ''}",
                hint="Its training went out of bounds. Give weights that were saved before that.",
            )
        raise ModelError(
            f"--backbone: {ref.name} gives features that are NaN or infinite for a picture of values from 0 to 1",
            hint="Say how it takes pictures: --set preprocess.scale, preprocess.mean, preprocess.std",
        )
    apart = float((alone[0] - both[0]).abs().max())
    if not apart <= CLOSE * max(1.0, float(alone.abs().max())):
        raise ModelError(
            f"--backbone: what {ref.name} makes of a picture depends on those beside it, or on chance: its features "
            f"differ by {apart:.3g}",
            hint="It was exported while it was trained. Export it after network.eval()",
        )
