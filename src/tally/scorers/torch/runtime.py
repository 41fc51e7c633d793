"""A network of PyTorch on a device, and what running it once on made-up values tells of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tally.errors import ItemError, ModelLoadError, TallyError, error_line
from tally.scorers.base import Item
from tally.scorers.runtime import CPU_PIXELS, Runtime
from tally.scorers.tabular.tensors import Port
from tally.scorers.torch.network import Network, library
from tally.scorers.torch.options import TorchSettings
from tally.scorers.vision.detection.base import Dims, Output
from tally.scorers.vision.options import ModelFacts, layout_of
from tally.scorers.vision.preprocess import Array, Preprocess, Preprocessor, Size, made_up_pictures

INPUT = "input"
"""What the one tensor is called that a network takes."""
CLOSE = 1e-3
"""How far what a network makes of a picture may be from what it makes of it alone, relative to the largest value."""
_USUAL = (224, 224)
_OTHER = (64, 32)
"""Pixels by which a second size is larger: what changes with it varies."""
_BY_YOURSELF = "A scorer of your own can run it (docs: write-a-scorer)."


def device_of(wanted: str) -> str:
    """PyTorch's name of a device: ``cpu``, ``cuda[:N]``, or the best there is for ``auto``. Raises ModelLoadError."""
    torch = library()
    kind, _, number = wanted.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        raise ModelLoadError(f"PyTorch has no device {wanted!r}", hint="Use cpu, cuda, cuda:N or auto.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        return "cuda" if there else "cpu"
    if kind == "cuda" and int(number or 0) >= there:
        raise ModelLoadError(
            f"device {wanted} was asked for, but PyTorch {torch.__version__} sees {there or 'no'} "
            f"GPU{'' if there == 1 else 's'}",
            hint="Check the driver with nvidia-smi, install a build of PyTorch for CUDA, or use --device cpu.",
        )
    return wanted


class TorchRuntime(Runtime):
    """A network that is open.

    On a GPU, batches are copied from pinned memory; while it works, the next ones are read and prepared.
    threads: of PyTorch, in this process; None leaves them.
    """

    inputs = (INPUT,)

    def __init__(self, network: Network, settings: TorchSettings, device: str, threads: int | None = None) -> None:
        self._torch = torch = library()
        self.device, self._settings, module = device, settings, network.module
        if threads is not None:
            torch.set_num_threads(threads)
        self._gpu = device != "cpu"
        self.pixels = None if self._gpu else CPU_PIXELS
        shown = f" ({threads} thread{'s' if threads != 1 else ''})" if threads else ""
        self.where = "CUDA" + device.removeprefix("cuda") if self._gpu else f"CPU{shown}"
        weights = [each.dtype for each in module.parameters() if each.is_floating_point()]
        own = next(iter(weights), torch.float32)
        self._cast = own if own in (torch.bfloat16, torch.float64) else None  # pictures come in neither
        if settings.channels_last:
            module = module.to(memory_format=torch.channels_last)
        self._module = torch.compile(module) if settings.compile else module

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        found = self.all(inputs[INPUT])
        return [found[name] for name in outputs]

    def all(self, values: Array) -> dict[str, Array]:
        """Every output by its name. Raises ItemError."""
        torch, settings = self._torch, self._settings
        try:
            with torch.inference_mode(), torch.autocast(
                "cuda" if self._gpu else "cpu",
                dtype=getattr(torch, settings.autocast or "bfloat16"),
                enabled=settings.autocast is not None,
            ):  # fmt: skip
                tensor = torch.from_numpy(np.ascontiguousarray(values))
                if self._gpu:
                    tensor = tensor.pin_memory().to(self.device, non_blocking=True)
                if self._cast is not None:
                    tensor = tensor.to(self._cast)
                if settings.channels_last and tensor.dim() == 4:
                    tensor = tensor.contiguous(memory_format=torch.channels_last)
                return {name: self._array(each) for name, each in _named(self._module(tensor), torch)}
        except TallyError:
            raise
        except Exception as error:
            raise ItemError(error_line(error)) from error

    def _array(self, tensor: Any) -> Array:
        array: Array = (tensor.float() if tensor.dtype == self._torch.bfloat16 else tensor).cpu().numpy()
        return array


def _named(value: Any, torch: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors of what a network gives, by their names or places. Raises ItemError."""
    if isinstance(value, torch.Tensor):
        yield prefix or "output", value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _named(each, torch, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        for name, each in zip(names, value, strict=True):
            yield from _named(each, torch, f"{prefix}.{name}" if prefix else str(name))
    elif value is not None:
        raise ItemError(f"{f'its output {prefix}' if prefix else 'what it gives'} is {type(value).__name__}, no tensor")


# ------------------------------------------------------------------------------------------ what it takes


def takes_table(network: Network) -> bool:
    """Whether a network takes rows of numbers, not pictures, as far as its program or its first weights say."""
    if network.told:
        return len(network.dims) <= 2
    return len(_first_weight(network)) == 2


def _first_weight(network: Network) -> tuple[int, ...]:
    return next((tuple(each.shape) for each in network.module.parameters() if each.dim() > 1), ())


def picture_facts(path: Path, network: Network, runtime: TorchRuntime, given: Preprocess) -> ModelFacts:
    """What a network of pictures says about itself: what its program says, and what comes of made-up pictures of two
    sizes, alone and beside another. Raises ModelLoadError."""
    dims = network.dims
    if len(dims) != 4:
        raise ModelLoadError(
            f"{path}: a vision model takes pictures, a tensor of four axes; this one takes one of {len(dims)}",
            hint=_BY_YOURSELF,
        )
    dtype: Any
    layout, dtype = layout_of(dims, given), "float32" if network.dtype == "float64" else network.dtype
    first = _first_weight(network)
    usual = 1 if given.channels == "gray" or (len(first) == 4 and first[1] == 1) else 3
    channels = (dims[1] if layout == "nchw" else dims[3]) or usual
    height, width = dims[2:] if layout == "nchw" else dims[1:3]
    sides = given.size or _USUAL
    size = (width or sides[0], height or sides[1])

    def run(count: int, size: Size, *, beside: int = 1) -> dict[str, Array]:
        """beside: which of the made-up pictures stand beside the first."""
        plain = Preprocess(
            size=size, layout=layout, channels="gray" if channels == 1 else "rgb",
            dtype=dtype, scale=None if dtype == "uint8" else 1 / 255,
        )  # fmt: skip
        made = [Preprocessor(plain)(Item("made up", each)).tensor for each in made_up_pictures(size)]
        return runtime.all(np.stack([made[0], *[made[beside]] * (count - 1)]))

    fixed = dims[0]
    try:
        alone = run(fixed or 1, size)
    except TallyError as error:
        shown = (
            [fixed or 1, channels, size[1], size[0]] if layout == "nchw" else [fixed or 1, size[1], size[0], channels]
        )
        raise ModelLoadError(
            f"{path}: the network cannot take a picture {shown}: {error.message}",
            hint="Say its size: --set preprocess.size=WIDTHxHEIGHT" if not (width and height) else _BY_YOURSELF,
        ) from None
    seen = [alone]
    with suppress(TallyError):
        seen.append(run(fixed or 2, size, beside=2))
    if len(seen) == 1:
        fixed = 1  # two at once are too many for it
        seen.append(run(1, size))
    _check_alone(path, *seen[:2])
    sides_known: tuple[int | None, int | None] = (width, height)
    if not (width and height):
        larger = (width or size[0] + _OTHER[0], height or size[1] + _OTHER[1])
        with suppress(TallyError):
            seen.append(run(fixed or 2, larger))
        if len(seen) == 2:
            sides_known = size
    wide, high = sides_known
    return ModelFacts(
        path,
        (fixed, channels, high, wide) if layout == "nchw" else (fixed, high, wide, channels),
        dtype,
        tuple(Output(name, each, _kind_of(alone[name])) for name, each in _varying(seen).items()),
        network.metadata,
    )


def table_ports(path: Path, network: Network, runtime: TorchRuntime) -> tuple[Port, list[Port]]:
    """The input and the outputs of a network that takes rows of numbers. Raises ModelLoadError."""
    fixed, width = network.dims if network.told and len(network.dims) == 2 else (None, None)
    if network.told and len(network.dims) != 2:
        raise ModelLoadError(
            f"{path}: a model of tables takes [rows, columns]; this one takes one axis", hint=_BY_YOURSELF
        )
    width = width or (_first_weight(network) or (0, 0))[1] or None
    if width is None:
        raise ModelLoadError(f"{path}: how many columns it takes is not told by its program", hint=_BY_YOURSELF)
    rows = np.random.default_rng(0).normal(size=(fixed or 3, width)).astype(network.dtype)
    try:
        seen = [runtime.all(rows)]
    except TallyError as error:
        raise ModelLoadError(
            f"{path}: the network cannot take rows of {width} numbers, as its first weights have it: {error.message}",
            hint=_BY_YOURSELF,
        ) from None
    first = {name: each[:1] for name, each in seen[0].items() if each.ndim}
    with suppress(TallyError):
        seen.append(runtime.all(rows[:1]))
        _check_alone(path, seen[-1], first)
    shapes = _varying(seen)
    return Port(name=INPUT, dtype=network.dtype, rank=2, width=width, batch=fixed), [
        Port(
            name=name,
            dtype=each.dtype.name,
            rank=each.ndim,
            width=1 if each.ndim < 2 else shapes[name][1] if each.ndim == 2 else None,
            batch=fixed,
        )
        for name, each in seen[0].items()
    ]


def _varying(seen: Sequence[Mapping[str, Array]]) -> dict[str, Dims]:
    """The shape of each output; None where it was not always the same, and no axes where their number was not."""
    dims: dict[str, Dims] = {}
    for name in seen[0]:
        shapes = [each[name].shape if name in each else () for each in seen]
        alike = len({len(shape) for shape in shapes}) == 1
        dims[name] = (
            tuple(axis[0] if len(set(axis)) == 1 else None for axis in zip(*shapes, strict=True)) if alike else ()
        )
    return dims


def _check_alone(path: Path, alone: Mapping[str, Array], beside: Mapping[str, Array]) -> None:
    """Raises ModelLoadError where what a network makes of a value depends on those beside it, or on chance."""
    for name, one in alone.items():
        other = beside.get(name)
        if other is None or one.dtype.kind != "f" or not one.ndim or one.shape[1:] != other.shape[1:]:
            continue
        first, again = one[0].astype(np.float64), other[0].astype(np.float64)
        apart = float(np.abs(first - again).max(initial=0))
        if np.isfinite(apart) and apart > CLOSE * max(1.0, float(np.abs(first).max(initial=0))):
            raise ModelLoadError(
                f"{path}: what the network makes of an item depends on those beside it, or on chance: values of "
                f"{name} differ by {apart:.3g}",
                hint="It was exported while it was trained. Export it after network.eval()",
            )


def _kind_of(values: Array) -> Any:
    return "float" if values.dtype.kind == "f" else "integer" if values.dtype.kind in "iub" else "other"
