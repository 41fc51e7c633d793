"""A model that is open: what the scorers of pictures and of tables ask of a framework whose models take tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

CPU_PIXELS = 2 * 224 * 224
"""Pixels that a model is given at once on a processor. With more, what one layer gives has left the caches before the
next layer takes it up: in batches of 32, MobileNetV2 took 8 % more time for each picture in ONNX Runtime, twice as much
in PyTorch, and four times the memory."""


class Runtime(ABC):
    """A model, open on a device.

    where: the device, for people. inputs, outputs: their names, in the model's order. pixels: of pictures, as many are
    given at once as have so many in all, but one at least; None: as many as there are.
    """

    where: str
    pixels: int | None = None
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()

    @abstractmethod
    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        """The outputs of these names, arrays of numpy with the batch as their first axis; inputs by name, likewise.

        Raises ItemError with what the framework says.
        """
