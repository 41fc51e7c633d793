"""Models of Keras, ``.keras`` and ``.h5``, on whichever of its backends is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.errors import ItemError, ModelLoadError, UntrustedModelError, error_line
from tally.optional import needed
from tally.scorers.keras.base import DescribedKind, DescribedRuntime, Tensor, cpu_only
from tally.scorers.torch.network import quietly

_BACKENDS = ("torch", "tensorflow", "jax")
"""In this order, where ``KERAS_BACKEND`` names none."""


class KerasKind(DescribedKind):
    """Models of Keras."""

    libraries: ClassVar[tuple[str, ...]] = ("h5py",)
    distributions: ClassVar[tuple[str, ...]] = ("keras",)

    def open(self, path: Path, *, trusted: bool) -> DescribedRuntime:
        return KerasRuntime(path, trusted=trusted)


def _keras() -> Any:
    there = [name for name in _BACKENDS if find_spec(name) is not None]
    if not there:
        raise ModelLoadError(
            f"Keras has no backend here: none of {', '.join(_BACKENDS)} is installed",
            hint="Install one of them: pip install torch",
        )
    os.environ.setdefault("KERAS_BACKEND", there[0])
    with needed("models of Keras need", "keras", ModelLoadError):
        import keras
    return keras


class KerasRuntime(DescribedRuntime):
    """trusted: layers that carry code (``Lambda``) may run it."""

    def __init__(self, path: Path, *, trusted: bool) -> None:
        self._keras = keras = _keras()
        _refuse_code(path, trusted=trusted)
        with quietly():
            model = keras.saving.load_model(str(path), compile=False, safe_mode=not trusted)
        self._model = model
        # tensors without names of their own are counted anew in each process
        names = getattr(model, "output_names", None) or [
            "output",
            *(f"output_{n}" for n in range(1, len(model.outputs))),
        ]
        self.describe(
            tuple(
                Tensor(f"input_{n}" if n else "input", tuple(each.shape), str(each.dtype))
                for n, each in enumerate(model.inputs)
            ),
            tuple(
                Tensor(name, tuple(each.shape), str(each.dtype))
                for name, each in zip(names, model.outputs, strict=True)
            ),
        )
        layers = list(_layers(model))
        self.layers = tuple(each.name for each in layers)
        doing = [type(each).__name__ for each in layers if type(each).__name__ not in ("InputLayer", "ZeroPadding2D")]
        self.straight = doing[:1] == ["Conv2D"]
        self.where = f"Keras {keras.__version__} with {keras.backend.backend()}"

    def settle(self, device: str, threads: int) -> None:
        backend = self._keras.backend.backend()
        if backend == "torch":
            import torch

            torch.set_num_threads(threads)
            if device.startswith("cuda") and not torch.cuda.is_available():
                cpu_only(device, "Keras")
        elif device.startswith("tensorrt"):
            cpu_only(device, "Keras")

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        [values] = inputs.values()
        try:
            with quietly(), self._without_gradients():
                found = self._model(np.ascontiguousarray(values), training=False)
                arrays = [np.asarray(self._keras.ops.convert_to_numpy(each)) for each in _flat(found)]
        except Exception as error:
            raise ItemError(error_line(error)) from error
        by_name = dict(zip(self.outputs, arrays, strict=True))
        return [by_name[name] for name in outputs]

    def _without_gradients(self) -> Any:
        if self._keras.backend.backend() != "torch":
            from contextlib import nullcontext

            return nullcontext()
        import torch

        return torch.no_grad()


def _layers(model: Any) -> Iterator[Any]:
    """The layers, in the order in which they are passed; those of models within it in their place."""
    for each in model.layers:
        if hasattr(each, "layers"):
            yield from _layers(each)
        else:
            yield each


def _flat(found: Any) -> Iterator[Any]:
    """The tensors that a model gives, in the order of its outputs."""
    if isinstance(found, Mapping):
        for each in found.values():
            yield from _flat(each)
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _flat(each)
    else:
        yield found


def _refuse_code(path: Path, *, trusted: bool) -> None:
    """Raises UntrustedModelError for an HDF5 file with a layer of code: of these, Keras itself has not always asked."""
    import h5py

    if trusted or not h5py.is_hdf5(path):
        return
    with h5py.File(path, "r") as file:
        described = file.attrs.get("model_config")
    if described is None:
        raise ModelLoadError(
            f"{path} holds weights alone, or no model of Keras",
            hint="Save the whole model: model.save('model.keras').",
        )
    text = described if isinstance(described, str) else bytes(described).decode(errors="replace")
    if '"Lambda"' in text:
        raise UntrustedModelError(
            f"{path} has a Lambda layer: opening it runs the code that it carries",
            hint="If you know who made it, give --trust.",
        )
