"""Opening ONNX models: sessions, what models say of themselves, readable refusals, and execution providers."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tally.errors import ItemError, ModelLoadError, ModelNotFoundError
from tally.models.contents import content_of
from tally.models.hashing import content_hash
from tally.scorers.runtime import CPU_PIXELS, Runtime


def open_session(
    path: Path, providers: Sequence[Any], *, threads: int = 1, optimise: bool = True, pattern: bool = True
) -> Any:
    """An ``onnxruntime.InferenceSession`` that is quiet and leaves idle cores alone.

    pattern: remember where a run of these shapes had its values; with shapes of all kinds it would only grow.
    Raises ModelNotFoundError, or ModelLoadError with what is wrong with the file.
    """
    import onnxruntime

    head = _head(path)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.enable_mem_pattern = pattern
    if not optimise:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        # its own fallback prints to standard output
        return onnxruntime.InferenceSession(str(path), settings, providers=list(providers), enable_fallback=0)
    except Exception as error:
        raise _refusal(path, head, str(error)) from None


@dataclass(frozen=True, slots=True)
class Node:
    """An input or output. type: as ONNX Runtime names it (``tensor(float)``). shape: names where sizes vary."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, node: Any) -> Node:
        return cls(node.name, node.type, tuple(node.shape or ()))


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model file says about itself."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    metadata: Mapping[str, str]


def signature(path: Path) -> Signature:
    """What a model file says about itself; a process opens the same content once. Raises as :func:`open_session`."""
    _head(path)
    return _signature(path, content_hash(path.parent, (path.name, *external_data(path))))


@lru_cache(maxsize=64)
def _signature(path: Path, content: str) -> Signature:
    session = open_session(path, ["CPUExecutionProvider"], optimise=False)
    try:
        return Signature(
            tuple(map(Node.of, session.get_inputs())),
            tuple(map(Node.of, session.get_outputs())),
            dict(session.get_modelmeta().custom_metadata_map),
        )
    except UnicodeDecodeError:
        raise ModelLoadError(
            f"{path}: the model is damaged (its names are not valid text)", hint="Fetch it again."
        ) from None


def external_names(path: Path) -> list[str]:
    """Names of the files that an ONNX model says hold its large weights.

    Each tensor names its file in a protobuf entry ``{key: "location", value: name}``. Searching for that
    entry's bytes finds them without reading gigabytes of protobuf into memory.
    Raises ModelLoadError for names that lead out of the model's folder: only what lies in it belongs to the model.
    """
    names: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in re.finditer(rb"\x0a\x08location\x12([\x80-\xff]?[\x00-\x7f])", content):
            low, *high = match[1]
            length = (low & 0x7F) | (high[0] << 7 if high else 0)
            names.add(os.fsdecode(content[match.end() : match.end() + length]))
    if above := [name for name in sorted(names) if ".." in name.split("/")]:
        raise ModelLoadError(
            f"{path}: the model asks for weights outside its own folder: {above[0]!r}",
            hint="Save it again with its weights beside it, in one folder.",
        )
    return sorted(name for name in names if not os.path.isabs(name))  # noqa: PTH117


def external_data(path: Path) -> list[str]:
    """Files beside an ONNX model that hold its large weights."""
    return [name for name in external_names(path) if (path.parent / name).is_file()]


def _head(path: Path) -> bytes:
    """The file's first bytes; refuses what can be told from them."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: there is no such model file") from None
    except OSError as error:
        raise ModelLoadError(f"{path}: the model cannot be read ({error.strerror or error})") from None
    if not head:
        raise ModelLoadError(f"{path}: the model file is empty (0 bytes)", hint="Fetch it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ModelLoadError(
            f"{path}: this is a Git LFS pointer of {path.stat().st_size} bytes, not the model",
            hint="Run `git lfs pull` in its repository, or download the model's file itself.",
        )
    content = content_of(path)
    if content is not None:
        raise ModelLoadError(f"{path}: this is {content.name}, not an ONNX model", hint=content.hint)
    return head


def _refusal(path: Path, head: bytes, message: str) -> ModelLoadError:
    """ONNX Runtime's complaint as a user needs it."""
    import onnxruntime

    size = path.stat().st_size
    if match := re.search(r"([\w.]+):(\w+)\(-?\d+\) is not a registered function/op", message):
        domain, operator = match.groups()
        if domain in ("com.microsoft.extensions", "ai.onnx.contrib"):
            return ModelLoadError(
                f"{path}: the operator {operator} needs the package onnxruntime-extensions, which Tally does not load",
                hint="Use the model without built-in pre- and postprocessing: Tally decodes and resizes.",
            )
        return ModelLoadError(
            f"{path}: the operator {operator} of {domain} is a custom one that ONNX Runtime does not have",
            hint="Export the model with standard ONNX operators only.",
        )
    if match := re.search(r"No Op registered for (\w+) with domain_version of (\d+)", message):
        return ModelLoadError(
            f"{path}: opset {match[2]} has no operator {match[1]}",
            hint="Export the model with standard ONNX operators only.",
        )
    if "External data path" in message:
        if "escapes" in message or "Absolute" in message:
            return ModelLoadError(f"{path}: the model asks for weights outside its own folder; refused")
        missing = re.search(r'does not exist: "?([^"\s]+)', message)
        name = Path(missing[1]).name if missing else "a file beside it"
        return ModelLoadError(
            f"{path}: the model keeps its weights in {name}, which is missing",
            hint="Put that file into the same folder.",
        )
    if re.search(r"Unsupported model IR version|Opset \d+ is under development", message):
        return ModelLoadError(
            f"{path}: the model is of a newer ONNX version than ONNX Runtime {onnxruntime.__version__} reads",
            hint="Upgrade onnxruntime, or export the model with an older opset.",
        )
    if "Protobuf parsing failed" in message or "No graph was found" in message:
        if head[:1] == b"\x08":  # field 1 of every ONNX file: its version
            return ModelLoadError(f"{path}: the model is damaged or cut short ({size:,} bytes)", hint="Fetch it again.")
        return ModelLoadError(f"{path}: this is not an ONNX model ({size:,} bytes)")
    if "codec can't decode" in message:
        return ModelLoadError(f"{path}: the model is damaged (its names are not valid text)", hint="Fetch it again.")
    return ModelLoadError(f"{path}: ONNX Runtime cannot load the model: {plain_reason(message)}")


def plain_reason(message: str) -> str:
    """ONNX Runtime's message in one line, without its status codes and source locations."""
    text = message.rpartition("failed:")[2]
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.(cc|h):\d+ [^()]*\([^()]*\)( const)?", "", text)
    return (text.strip().splitlines() or ["it gives no reason"])[0].strip()[:300]


def choose_providers(device: str, available: Sequence[str]) -> list[Any]:
    """Execution providers for a device: ``cpu``, ``cuda[:N]``, ``tensorrt[:N]`` or ``auto``.

    TensorRT builds an engine for minutes in every worker, and is therefore chosen by name, or when it is the
    only one for a GPU. Raises ModelLoadError when the provider is not there.
    """
    kind, _, number = device.partition(":")
    index = int(number) if number.isdigit() else 0
    gpu = [name for name in ("CUDAExecutionProvider", "TensorrtExecutionProvider") if name in available]
    if kind == "tensorrt":
        gpu.reverse()
    if kind not in ("cpu", "cuda", "tensorrt", "auto") or (number and not number.isdigit()):
        raise ModelLoadError(f"there is no device {device!r}", hint="Use cpu, cuda, cuda:N, tensorrt or auto.")
    if kind == "cpu" or (kind == "auto" and not gpu):
        return ["CPUExecutionProvider"]
    if not gpu or (kind == "tensorrt" and "TensorrtExecutionProvider" not in gpu):
        raise ModelLoadError(
            f"device {device} was asked for, but this ONNX Runtime has only {', '.join(available)}",
            hint="Install onnxruntime-gpu in place of onnxruntime, or use --device cpu.",
        )
    chosen = gpu if kind == "tensorrt" else gpu[:1]
    return [*((name, {"device_id": index}) for name in chosen), "CPUExecutionProvider"]


_SHORT_NAMES = {
    "CPUExecutionProvider": "CPU",
    "CUDAExecutionProvider": "CUDA",
    "TensorrtExecutionProvider": "TensorRT",
}


class OnnxRuntime(Runtime):
    """An open session: as a :class:`~tally.scorers.runtime.Runtime`.

    alike: whether all inputs have the same shapes. The memory of a run is kept for the next one: where they vary, only
    for one of the same shapes.
    """

    def __init__(self, session: Any, threads: int, *, alike: bool = True) -> None:
        import onnxruntime

        self._session = session
        self._alike, self._shapes = alike, [()]
        self._giving_back = onnxruntime.RunOptions()
        self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.nodes = [Node.of(each) for each in session.get_inputs()]
        self.inputs = [each.name for each in self.nodes]
        self.outputs = [each.name for each in session.get_outputs()]
        self.provider: str = session.get_providers()[0]
        self.where = _SHORT_NAMES.get(self.provider, self.provider)
        if self.where == "CPU":
            self.pixels = CPU_PIXELS
            self.where += f" ({threads} thread{'s' if threads > 1 else ''})"

    @classmethod
    def best(cls, path: Path, device: str, *, threads: int = 1, alike: bool = True) -> OnnxRuntime:
        """On the device, or for ``auto`` on the best one that starts. Raises ModelNotFoundError, ModelLoadError."""
        import onnxruntime

        providers = choose_providers(device, onnxruntime.get_available_providers())
        wants_gpu = len(providers) > 1
        if wants_gpu and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        try:
            found = cls(open_session(path, providers, threads=threads, pattern=alike), threads, alike=alike)
        except ModelLoadError:
            if not wants_gpu or device != "auto":
                raise
            session = open_session(path, providers[-1:], threads=threads, pattern=alike)
            return cls(session, threads, alike=alike)
        if wants_gpu and found.provider == "CPUExecutionProvider" and device != "auto":
            raise ModelLoadError(
                f"device {device} was asked for, but ONNX Runtime could not start it",
                hint="Check the driver with nvidia-smi and that the CUDA and cuDNN libraries are installed.",
            )
        return found

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        shapes = [value.shape for value in inputs.values()]
        known, self._shapes = self._alike or shapes == self._shapes, shapes
        try:
            found: list[Any] = self._session.run(list(outputs), dict(inputs), None if known else self._giving_back)
        except Exception as error:
            raise ItemError(plain_reason(str(error)) if str(error) else type(error).__name__) from None
        return found
