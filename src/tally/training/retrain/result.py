"""What a training leaves: one ONNX file that takes pictures and tells classes, as a model package."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tally import plain_yaml
from tally.errors import ModelError, OutputExistsError, SpecError, StorageError
from tally.models.labels import read_labels
from tally.models.load import load
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.optional import needed
from tally.scorers.run import run
from tally.storage import failure
from tally.training.retrain.cut import save
from tally.training.retrain.examples import Matrix
from tally.training.retrain.head import Head

FILE = "model.onnx"
TOLERANCE = 1e-3
"""How far the probabilities of the written file may differ from those that the training had."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Pictures that the written file is tried with. probabilities: what it should find, ``float32[n, classes]``."""

    paths: Sequence[Path]
    probabilities: Matrix


def check_library() -> None:
    """Raises ModelError unless ONNX files can be written."""
    with needed("training needs", "retrain", ModelError):
        import onnx  # noqa: F401 - needed only at the end of a long training


def write(
    out: Path,
    backbone: ModelRef,
    head: Head,
    labels: Sequence[str],
    *,
    tensor: str = "final_result",
    description: str = "",
    sample: Sample | None = None,
) -> ModelRef:
    """Write the package, at once, to a folder that is not there yet; returns what it resolves to.

    tensor: the name of the file's output.
    Raises OutputExistsError, StorageError; ModelError if the file does not find what the training found.
    """
    if out.exists():
        raise OutputExistsError(f"{out} is there already", hint="Choose another folder, or remove it first.")
    described: dict[str, Any] = {
        "name": out.name,
        "description": description or f"Tells apart: {', '.join(labels)[:500]}.",
        "kind": "onnx",
        "file": FILE,
        "options": {
            "task": "classify",
            "labels": "labels.txt",
            "softmax": "never",
            "preprocess": _said(backbone.options["preprocess"]),
        },
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            save(with_head(backbone, head, tensor), partial / FILE)
            written = partial / "labels.txt"
            written.write_text("".join(f"{label}\n" for label in labels), "utf-8")
            if read_labels(written) != [*labels]:  # a label that begins as a list does
                written.unlink()
                described["options"]["labels"] = [*labels]
            (partial / "tally.yaml").write_text(plain_yaml.dump(described), "utf-8")
            if sample is not None:
                _compare(resolve(partial), sample)
            partial.chmod(0o755)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise failure("write", str(out), error) from error
    return resolve(out)


def _said(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """What a package says of how pictures are prepared: without what has no value or no effect."""
    idle = () if preprocess["resize"] == "crop" else ("shorter",)
    return {name: value for name, value in preprocess.items() if value is not None and name not in idle}


def with_head(backbone: ModelRef, head: Head, tensor: str = "final_result") -> Any:
    """The backbone and the head as one ``onnx.ModelProto``, whose one output is the probabilities ``[n, classes]``.

    tensor: the name of that output, which is no value of the backbone: see :func:`check_name`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(backbone.location / backbone.entry))
    graph = model.graph
    name = str((backbone.options.get("outputs") or [graph.output[0].name])[0])
    [output] = [each for each in graph.output if each.name == name]
    taken = _values(graph)

    def free(wanted: str) -> str:
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        return wanted

    weights, biases, flat, single, logits = map(
        free,
        (
            "final_training_ops/weights",
            "final_training_ops/biases",
            "final_training_ops/features",
            "final_training_ops/features_float",
            "final_training_ops/Wx_plus_b",
        ),
    )
    shape = output.type.tensor_type.shape
    batch = shape.dim[0] if shape.dim else None
    count: int | str = "batch"
    if batch is not None:
        count = batch.dim_value if batch.HasField("dim_value") else batch.dim_param or "batch"
    nodes = [helper.make_node("Flatten", [name], [flat], axis=1)]
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [flat], [single], to=TensorProto.FLOAT))
        flat = single
    nodes += [
        helper.make_node("Gemm", [flat, weights, biases], [logits]),
        helper.make_node("Softmax", [logits], [tensor], axis=1),
    ]
    graph.node.extend(nodes)
    graph.initializer.extend(
        [numpy_helper.from_array(head.weights, weights), numpy_helper.from_array(head.biases, biases)]
    )
    del graph.output[:]
    classes = len(head.biases)
    graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [count, classes]))
    # What the file says about its classes is the backbone's: labels of before.
    kept = [each for each in model.metadata_props if each.key not in ("names", "task")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return model


def check_name(backbone: ModelRef, tensor: str) -> None:
    """Raises SpecError if a value of the backbone's file has this name."""
    import onnx

    model = onnx.load(str(backbone.location / backbone.entry), load_external_data=False)
    if tensor in _values(model.graph):
        raise SpecError(f"--final_tensor_name: {backbone.entry} has a value {tensor!r} already; choose another name")


def _values(graph: Any) -> set[str]:
    """The names of all values of a graph."""
    found = {value for node in graph.node for value in (*node.input, *node.output)}
    return found | {each.name for each in (*graph.input, *graph.output, *graph.initializer)}


def _compare(ref: ModelRef, sample: Sample) -> None:
    """Score pictures with the written package. Raises ModelError if it does not find what the training found."""
    scorer = load(ref, "cpu")
    scorer.all_classes = True
    try:
        found = run(scorer, sample.paths)
    finally:
        scorer.close()
    for path, result, wanted in zip(sample.paths, found, sample.probabilities, strict=True):
        if isinstance(result, Exception):
            raise ModelError(f"the model that was written cannot score {path}: {result}")
        assert isinstance(result, Mapping)
        difference = float(np.abs(np.array(result["scores"]) - wanted).max())
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the model that was written differs from what was trained, by up to {difference:.3g} for {path}"
            )
