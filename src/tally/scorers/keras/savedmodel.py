"""SavedModels of TensorFlow: folders with a ``saved_model.pb``, called by their signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.errors import ItemError, ModelLoadError, UntrustedModelError, error_line
from tally.models.base import Candidate, ModelRequest
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.keras.base import DescribedKind, DescribedRuntime, Tensor
from tally.scorers.keras.encoded import EncodedScorer, inspect_encoded, takes_encoded
from tally.scorers.torch.network import quietly

_USUAL = "serving_default"


class SavedModelKind(DescribedKind):
    """SavedModels of TensorFlow. They are programs that may read and write files, and need the user's trust."""

    libraries: ClassVar[tuple[str, ...]] = ("tensorflow",)
    distributions: ClassVar[tuple[str, ...]] = ("tensorflow", "tensorflow-cpu")

    def content(self, path: Path) -> tuple[str, ...]:
        return (".",)

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        if not request.trust:
            raise UntrustedModelError(
                f"{found.folder} is a SavedModel of TensorFlow: a program, which may read and write files as it scores",
                hint="If you know who made it, give --trust. Better: convert it with tf2onnx.",
            )
        return super().resolve(found, request)

    def open(self, path: Path, *, trusted: bool) -> DescribedRuntime:
        return SavedModelRuntime(path.parent)

    def _inspected(self, path: Path, options: Mapping[str, Any], model: DescribedRuntime) -> dict[str, Any]:
        if takes_encoded(model):
            return inspect_encoded(path, options, model)
        return super()._inspected(path, options, model)

    def create(self, ref: ModelRef) -> Scorer:
        if "encoded" in ref.options:
            return EncodedScorer(ref.options, lambda path: self.opened(path, trusted=ref.trusted))
        return super().create(ref)


class SavedModelRuntime(DescribedRuntime):
    """The signature ``serving_default``, or the only one."""

    def __init__(self, folder: Path) -> None:
        import tensorflow

        self._tensorflow = tensorflow
        with quietly():
            self._model = tensorflow.saved_model.load(str(folder))
        signatures = self._model.signatures
        name = _USUAL if _USUAL in signatures else next(iter(signatures), None)
        if name is None or (name != _USUAL and len(signatures) > 1):
            there = ", ".join(signatures) or "none"
            raise ModelLoadError(
                f"{folder}: which signature is to be called is not told; it has {there}",
                hint=f"Save it with one that is called {_USUAL}.",
            )
        self._call = signatures[name]
        self.describe(
            tuple(_tensor(each, spec) for each, spec in self._call.structured_input_signature[1].items()),
            tuple(_tensor(each, spec) for each, spec in self._call.structured_outputs.items()),
        )
        self.where = f"TensorFlow {tensorflow.__version__}"

    def settle(self, device: str, threads: int) -> None:
        tensorflow = self._tensorflow
        if device.startswith(("cuda", "tensorrt")) and not tensorflow.config.list_physical_devices("GPU"):
            raise ModelLoadError(
                f"device {device} was asked for, but TensorFlow {tensorflow.__version__} sees no GPU",
                hint="Use --device cpu.",
            )

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        try:
            found = self._call(**{name: self._tensorflow.constant(each) for name, each in inputs.items()})
        except Exception as error:
            raise ItemError(error_line(error)[:400]) from error
        return [np.asarray(found[name].numpy()) for name in outputs]


def _tensor(name: str, spec: Any) -> Tensor:
    dims = () if spec.shape.rank is None else tuple(spec.shape.as_list())
    dtype = "object" if spec.dtype.name == "string" else str(spec.dtype.name)
    return Tensor(name, dims, dtype)
