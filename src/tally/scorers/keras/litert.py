"""Models of TensorFlow Lite, ``.tflite``, run by LiteRT on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.errors import ItemError, error_line
from tally.scorers.keras.base import DescribedKind, DescribedRuntime, Tensor, cpu_only
from tally.scorers.vision.preprocess import Array


class LitertKind(DescribedKind):
    """Models of TensorFlow Lite."""

    libraries: ClassVar[tuple[str, ...]] = ("ai_edge_litert.interpreter",)
    distributions: ClassVar[tuple[str, ...]] = ("ai-edge-litert",)

    def open(self, path: Path, *, trusted: bool) -> DescribedRuntime:
        return LitertRuntime(path)


class LitertRuntime(DescribedRuntime):
    """Pixels in 0..255 go into a quantized model as they are, any other quantized input as the numbers that it stands
    for; outputs come out as these."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start(1)
        taken, given = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._taken, self._given = {each["name"]: each for each in taken}, {each["name"]: each for each in given}
        self.describe(tuple(map(_tensor, taken)), tuple(_tensor(each, pixels=False) for each in given))

    def _start(self, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(self._path), num_threads=threads)
        self._interpreter.allocate_tensors()
        self.where = f"LiteRT on CPU ({threads} thread{'s' if threads > 1 else ''})"

    def settle(self, device: str, threads: int) -> None:
        cpu_only(device, "LiteRT")
        if threads != 1:
            self._start(threads)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        [(name, values)] = inputs.items()
        detail = self._taken[name]
        try:
            if tuple(values.shape) != tuple(self._interpreter.get_input_details()[0]["shape"]):
                self._interpreter.resize_tensor_input(detail["index"], values.shape)
                self._interpreter.allocate_tensors()
            self._interpreter.set_tensor(detail["index"], _quantized(values, detail))
            self._interpreter.invoke()
            found = [self._given[name] for name in outputs]
            return [_plain(self._interpreter.get_tensor(each["index"]), each) for each in found]
        except Exception as error:
            raise ItemError(error_line(error)) from error


def _tensor(detail: Mapping[str, Any], *, pixels: bool = True) -> Tensor:
    dims = tuple(None if side < 0 else int(side) for side in detail["shape_signature"])
    name = np.dtype(detail["dtype"]).name
    plain = not detail["quantization"][0] or (pixels and name == "uint8")
    return Tensor(str(detail["name"]), dims, name if plain else "float32")


def _quantized(values: Array, detail: Mapping[str, Any]) -> Array:
    dtype, (step, zero) = np.dtype(detail["dtype"]), detail["quantization"]
    if values.dtype == dtype or not step:
        return np.ascontiguousarray(values, dtype)
    limits = np.iinfo(dtype)
    whole: Array = np.clip(np.rint(values / step) + zero, limits.min, limits.max).astype(dtype)
    return whole


def _plain(values: Array, detail: Any) -> Array:
    step, zero = detail["quantization"]
    if not step or values.dtype.kind not in "iu":
        return values.copy()
    plain: Array = (values.astype(np.float32) - zero) * np.float32(step)
    return plain
