"""Opening networks of PyTorch.

Weights are read as weights alone (``weights_only``); programs are opened by who has the user's trust.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tally.errors import ModelLoadError, SpecError, TallyError, error_line, is_interrupt
from tally.models.reference import ModelRef
from tally.optional import needed
from tally.scorers.scripts.script import explained, load_module
from tally.scorers.torch.options import TorchSettings, form_of
from tally.text import did_you_mean

Dims = tuple[int | None, ...]
_WRAPPED = ("state_dict", "model_state_dict", "model")
"""Under what training scripts keep the weights, beside their own state."""
_COUNTERS = "num_batches_tracked"
"""What the names of counters of batch normalisation end in."""


@dataclass(frozen=True, slots=True)
class Network:
    """module: a ``torch.nn.Module``; it takes a tensor of ``dims`` (for pictures: batch, channels, height, width; None
    where any will do) and NumPy's type ``dtype``.

    told: a program says what it takes. scripted: it is TorchScript. metadata: what its exporter wrote beside it.
    assumed: sentences for the user.
    """

    module: Any
    dims: Dims = (None, None, None, None)
    dtype: Any = "float32"
    told: bool = False
    scripted: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


def library() -> Any:
    """PyTorch. Raises ModelLoadError where it is not installed."""
    with needed("networks of PyTorch need", "torch", ModelLoadError):
        import torch
    return torch


@contextmanager
def quietly() -> Iterator[None]:
    """Without PyTorch's remarks on itself: what it is going to remove, and what is not installed beside it."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def open_network(ref: ModelRef, device: str = "cpu") -> Network:
    """The network of a reference of kind ``torch``; see :func:`open_file`."""
    return open_file(ref.location / ref.entry, TorchSettings.among(ref.options), device)


def open_file(path: Path, settings: TorchSettings, device: str = "cpu") -> Network:
    """The network of a file, in inference mode: statistics stay as they are, nothing is dropped.

    device: as PyTorch names it. Raises SpecError where a class is needed, ModelLoadError.
    """
    torch = library()
    form = form_of(path)
    try:
        with quietly():
            if form == "exported":
                return _exported(torch, path, device)
            if form == "torchscript":
                return _scripted(torch, path, device)
            return _with_weights(torch, path, settings, device)
    except TallyError:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise ModelLoadError(f"{path}: PyTorch {torch.__version__} cannot open it: {error_line(error)}") from error


def _exported(torch: Any, path: Path, device: str) -> Network:
    program = torch.export.load(str(path))
    taken = program.graph_signature.user_inputs
    if len(taken) != 1:
        raise ModelLoadError(
            f"{path}: a model takes one tensor, this program takes {len(taken)} ({', '.join(map(str, taken))})",
            hint="A scorer of your own can run it (docs: write-a-scorer).",
        )
    [node] = [each for each in program.graph.nodes if each.op == "placeholder" and each.name == taken[0]]
    value = node.meta["val"]
    dims = tuple(side if isinstance(side, int) else None for side in value.shape)
    if device != "cpu":
        program = torch.export.passes.move_to_device_pass(program, device)
    dtype = str(value.dtype).removeprefix("torch.")
    return Network(program.module(), dims, "float32" if dtype == "bfloat16" else dtype, told=True)


def _scripted(torch: Any, path: Path, device: str) -> Network:
    beside = {"config.txt": ""}  # where Ultralytics writes what ONNX has as metadata
    module = torch.jit.load(str(path), map_location=device, _extra_files=beside).eval()
    found: Any = {}
    with suppress(ValueError):
        found = json.loads(beside["config.txt"])
    metadata = {}
    if isinstance(found, dict):
        if isinstance(names := found.get("names"), dict) and all(str(key).isdecimal() for key in names):
            found["names"] = {int(key): name for key, name in names.items()}
        metadata = {str(name): str(value) for name, value in found.items()}
    return Network(module, dtype=_type_of(torch, module), scripted=True, metadata=metadata)


def _type_of(torch: Any, module: Any) -> str:
    """NumPy's name of the type of a network's weights."""
    kinds_of = {torch.float16: "float16", torch.float64: "float64"}
    return next((kinds_of.get(each.dtype, "float32") for each in module.parameters()), "float32")


def _with_weights(torch: Any, path: Path, settings: TorchSettings, device: str) -> Network:
    """The class that the settings name, with the weights of the file; or the network that a trusted pickle is."""
    found = _contents(torch, path, trusted=settings.trusted)
    if isinstance(found, torch.nn.Module):
        if settings.module is not None:
            raise SpecError(f"module: {path.name} is a whole network, and needs no class: leave module out")
        module = found.to(device).eval()
        return Network(module, dtype=_type_of(torch, module))
    if settings.module is None:
        some = ", ".join(f"{name} {list(value.shape)}" for name, value in list(found.items())[:3])
        raise SpecError(
            f"module: is needed, as {path.name} holds weights alone: {len(found)} tensors, such as {some}",
            hint="Put the network's class beside it and say --set module=file.py:Class; or export the whole network "
            "with torch.export, or to ONNX.",
        )
    module = _made(torch, path, settings)
    assumed = _fill(torch, path, module, found, settings.module)
    return Network(module.to(device).eval(), dtype=_type_of(torch, module), assumed=assumed)


def _made(torch: Any, path: Path, settings: TorchSettings) -> Any:
    file, _, name = str(settings.module).rpartition(":")
    place = path.parent / file
    made = getattr(load_module(place), name, None)
    if made is None:
        raise ModelLoadError(f"{place} defines no {name!r}")
    with explained(place, f"{name}()"):
        module = made(**settings.arguments)
    if not isinstance(module, torch.nn.Module):
        raise ModelLoadError(f"{place}: {name} is {type(module).__name__}, not a torch.nn.Module")
    return module


def _fill(torch: Any, path: Path, module: Any, weights: dict[str, Any], named: str) -> tuple[str, ...]:
    """Put weights into a network. Returns what the user should know. Raises ModelLoadError where they are another's."""
    name, wanted = named.rpartition(":")[2], module.state_dict()
    for each in wanted:
        if each.endswith(_COUNTERS) and each not in weights:  # PyTorch before 0.4.1 had none, and only training counts
            weights[each] = wanted[each]
    stray = [each for each in weights if each not in wanted and _is_stray(torch, module, each)]
    weights = {each: value for each, value in weights.items() if each not in stray}
    problems = [f"has no {each!r}{did_you_mean(each, list(weights))}" for each in wanted if each not in weights]
    problems += [f"has {each!r}, which {name} does not" for each in weights if each not in wanted]
    problems += [
        f"has {each!r} of shape {list(weights[each].shape)}, and {name} takes {list(value.shape)}"
        for each, value in wanted.items()
        if each in weights and weights[each].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} things more" if len(problems) > 3 else ""
        raise ModelLoadError(f"{path} is not of {named}: it {'; it '.join(problems[:3])}{more}")
    module.load_state_dict(weights)
    if not stray:
        return ()
    return (f"{len(stray)} statistics of instance normalisation are left out ({stray[0]}, ...): {name} has none",)


def _is_stray(torch: Any, module: Any, name: str) -> bool:
    """Whether it is a statistic that PyTorch before 0.4 saved of an instance normalisation, which keeps none."""
    place, _, last = name.rpartition(".")
    if last not in ("running_mean", "running_var"):
        return False
    try:
        owner = module.get_submodule(place)
    except AttributeError:
        return False
    return isinstance(owner, torch.nn.modules.instancenorm._InstanceNorm) and not owner.track_running_stats


_NAMED = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL|Unsupported class) ([\w.]+)")
"""How PyTorch says what is named in a pickle and is no weight."""


def read_pickle(path: Path, *, trusted: bool = False) -> Any:
    """What ``torch.save`` wrote, if that is weights alone: nothing in the file is run. Raises ModelLoadError,
    which does not pass on PyTorch's advice to run it.

    trusted: run what else is in it, where it is more than weights.
    """
    try:
        return library().load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever it makes of damage, and of what is more than weights
        named = _NAMED.search(str(error))
        if named and trusted:
            return _run_pickle(path)
        why = f"it names {named[1]}, and what that is would run as the file is read" if named else "or is damaged"
        raise ModelLoadError(
            f"{path} holds more than weights{':' if named else ','} {why}",
            hint="Save the weights alone: torch.save(network.state_dict(), ...)"
            + (". Or, if you know who made it, give --trust." if named else ""),
        ) from None


def _run_pickle(path: Path) -> Any:
    try:
        return library().load(path, map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        raise ModelLoadError(
            f"{path} holds a whole network, whose class is in the module {error.name}, which is not here",
            hint="Put that module where Python finds it, or save the network with torch.export.",
        ) from None
    except AttributeError as error:  # its class was defined in the program that saved it
        raise ModelLoadError(
            f"{path} holds a whole network, whose class is not here: {error_line(error)}",
            hint="Save its weights alone, and say --set module=file.py:Class; or save it with torch.export.",
        ) from None


def _contents(torch: Any, path: Path, *, trusted: bool) -> Any:
    """What a file holds: tensors by name, or the network that a trusted pickle is. Raises ModelLoadError."""
    if form_of(path) == "safetensors":
        with needed(f"{path} needs", "torch", ModelLoadError):
            from safetensors.torch import load_file
        found: Any = load_file(str(path))
    else:
        found = read_pickle(path, trusted=trusted)
    for name in _WRAPPED:
        if isinstance(found, Mapping) and isinstance(found.get(name), (Mapping, torch.nn.Module)):
            found = found[name]
    if isinstance(found, torch.nn.Module):
        return found
    if not isinstance(found, Mapping) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        held = f" of {', '.join(map(str, list(found)[:3]))}" if isinstance(found, Mapping) else ""
        raise ModelLoadError(
            f"{path} holds {type(found).__name__}{held}, not tensors by name",
            hint="Save the weights alone: torch.save(network.state_dict(), ...), or as safetensors.",
        )
    if found and all(name.startswith("module.") for name in found):  # of torch's DataParallel
        return {name.removeprefix("module."): each for name, each in found.items()}
    return dict(found)
