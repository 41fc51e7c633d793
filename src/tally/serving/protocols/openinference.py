"""The Open Inference Protocol, version 2, over REST, with the extension for binary data.

Source: https://github.com/open-inference/open-inference-protocol, and for binary data and the model repository, the
protocol extensions of Triton Inference Server. What tensors mean for a model says :mod:`tally.serving.tensors`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tally
from tally.scorers.base import Result, Scorer
from tally.serving import metadata
from tally.serving.messages import Call
from tally.serving.protocols.base import JSON, Paths, Protocol, Reply, RequestError, Route, Served, Work

if TYPE_CHECKING:
    from tally.serving.tensors import Tensor

EXTENSIONS = ["binary_tensor_data", "model_repository"]
LENGTH = "inference-header-content-length"
"""The header that says where JSON ends and binary data begin."""
DIMENSIONS, LARGEST = 16, 1 << 40
"""Dimensions that a tensor may have, and the largest of them."""

_GET, _POST = ("GET", "HEAD"), ("POST",)
_PATHS = Paths(
    {
        "/v2": ("server", _GET),
        "/v2/": ("server", _GET),
        "/v2/health/live": ("live", _GET),
        "/v2/health/ready": ("ready", _GET),
        "/v2/models/{model}": ("model", _GET),
        "/v2/models/{model}/ready": ("model ready", _GET),
        "/v2/models/{model}/infer": ("score", _POST),
        "/v2/models/{model}/versions/{version}": ("model", _GET),
        "/v2/models/{model}/versions/{version}/ready": ("model ready", _GET),
        "/v2/models/{model}/versions/{version}/infer": ("score", _POST),
        "/v2/repository/index": ("index", _POST),
        "/v2/repository/models/{model}/load": ("load", _POST),
        "/v2/repository/models/{model}/unload": ("unload", _POST),
    }
)

TYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""Datatype to NumPy's; BYTES stands beside them."""


class OpenInference(Protocol):
    """``/v2/…``"""

    name = "openinference"
    wanted_headers = (LENGTH.encode(),)

    def route(self, path: str) -> Route | None:
        return _PATHS.find(self, path) if path.startswith("/v2") else None

    def tell(self, route: Route, served: Served | None, others: Sequence[Served]) -> Reply:
        match route.operation:
            case "server":
                return _json({"name": "tally", "version": tally.__version__, "extensions": EXTENSIONS})
            case "live":
                return _json({"live": True})
            case "ready":
                ready = all(each.ready for each in others)
                return _json({"ready": ready}, 200 if ready else 503)
            case "index":
                return _json(
                    [
                        {"name": each.name, "version": version, "state": _state(state), "reason": _reason(state)}
                        for each in others
                        for version, state in (each.versions or {"": "unloaded: unloaded"}).items()
                    ]
                )
        assert served is not None
        if route.operation == "model ready":
            said = {"name": served.name, "ready": served.ready}
            return _json(said, 200 if served.ready else 503)
        return _json(_metadata(served))

    def refusal(self, error: RequestError) -> Reply:
        body = json.dumps({"error": error.message}).encode()
        return Reply(error.status, body, [*JSON, *error.headers.items()], error.message)

    def decode(self, call: Call, scorer: Scorer) -> Work:
        from tally.serving import tensors

        request, rest = _parts(call)
        given = request.get("inputs")
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            raise RequestError(422, "inputs: should be a list of tensors")
        found: list[Tensor] = []
        at = 0
        for number, each in enumerate(given):
            size = _parameters(each, f"inputs[{number}]").get("binary_data_size")
            if size is not None and (
                not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest) - at
            ):
                raise RequestError(
                    400, f"inputs[{number}].parameters.binary_data_size: {size!r}, and {len(rest) - at} bytes are left"
                )
            found.append(_tensor(each, number, None if size is None else rest[at : at + size]))
            at += size or 0
        if at != len(rest):
            raise RequestError(400, f"{len(rest) - at} bytes of binary data belong to no input")
        work = tensors.work_of(found, scorer)
        work.asked = {name: value for name, value in request.items() if name != "inputs"}
        return work

    def encode(self, call: Call, scorer: Scorer, work: Work, results: Sequence[Result]) -> Reply:
        from tally.serving import tensors

        request = work.asked
        found = {tensor.name: tensor for tensor in tensors.tensors_of(results, scorer, work)}
        asked = request.get("outputs") or [{"name": name} for name in found]
        if not isinstance(asked, list) or not all(isinstance(each, dict) for each in asked):
            raise RequestError(422, "outputs: should be a list of objects with a name")
        all_binary = _parameters(request, "the request").get("binary_data_output") is True
        outputs: list[dict[str, Any]] = []
        parts: list[bytes] = []
        for number, each in enumerate(asked):
            name = each.get("name")
            if name not in found:
                raise RequestError(422, f"outputs[{number}].name: there is no {name!r}; there are {', '.join(found)}")
            binary = _parameters(each, f"outputs[{number}]").get("binary_data", all_binary) is True
            outputs.append(_output(found[name], parts if binary else None))
        answer: dict[str, Any] = {
            "model_name": work.model,
            "model_version": work.version,
            "outputs": outputs,
        }
        if isinstance(request.get("id"), str):
            answer["id"] = request["id"]
        text = json.dumps(answer).encode()
        if not parts:
            return Reply(200, text)
        headers = [("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", str(len(text)))]
        return Reply(200, b"".join([text, *parts]), headers)


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode())


def _state(state: str) -> str:
    return {"ready": "READY", "loading": "LOADING"}.get(state, "UNAVAILABLE")


def _reason(state: str) -> str:
    return state.partition(": ")[2]


def _metadata(served: Served) -> dict[str, Any]:
    description = served.description
    found: dict[str, Any] = {
        "name": served.name,
        "versions": list(served.versions),
        "platform": "tally",
        "inputs": [],
        "outputs": [],
    }
    if description is not None:
        for name, declared in (("inputs", metadata.inputs(description)), ("outputs", metadata.outputs(description))):
            found[name] = [{"name": n, "datatype": kind, "shape": shape} for n, kind, shape in declared]
    return found


def _parts(call: Call) -> tuple[dict[str, Any], bytes]:
    """The JSON of a request, and the binary data behind it."""
    body = call.body
    length = call.parameters.get(f"header:{LENGTH}")
    end = len(body)
    if length is not None:
        if not length.isdigit() or int(length) > len(body):
            raise RequestError(400, f"Inference-Header-Content-Length: {length!r}, and the body has {len(body)} bytes")
        end = int(length)
    try:
        request = json.loads(body[:end])
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RequestError(400, "the body should be a JSON object")
    return request, body[end:]


def _parameters(holder: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    found = holder.get("parameters") or {}
    if not isinstance(found, dict):
        raise RequestError(422, f"{where}.parameters: should be an object")
    return found


def _tensor(given: Mapping[str, Any], number: int, raw: bytes | None) -> Tensor:
    """One input. raw: its binary data, if it has some."""
    from tally.serving.tensors import Tensor

    where = f"inputs[{number}]"
    name: Any = given.get("name")
    datatype: Any = given.get("datatype")
    shape: Any = given.get("shape")
    count = values_of(name, datatype, shape, where)
    if raw is not None:
        return from_binary(name, datatype, shape, raw, where)
    if "data" not in given:
        raise RequestError(422, f"{where}.data: is missing")
    flat = _flat(given["data"])
    if len(flat) != count:
        raise RequestError(422, f"{where}.data: {len(flat)} values, and the shape {shape} has {count}")
    nested = _nested(given["data"])
    if len(nested) > 1 and [n for n in nested if n != 1] != [n for n in shape if n != 1]:
        raise RequestError(422, f"{where}.data: its lists have the shape {nested}, and {shape} is declared")
    if datatype == "BYTES":
        return Tensor(name, tuple(shape), [_text(value, given, where) for value in flat])
    return Tensor(name, tuple(shape), _numbers(flat, datatype, where).reshape(shape))


def values_of(name: Any, datatype: Any, shape: Any, where: str) -> int:
    """How many values a tensor has that is declared like this. Raises RequestError where it cannot be."""
    if not isinstance(name, str) or not name:
        raise RequestError(422, f"{where}.name: should be a text")
    if (
        not isinstance(shape, list)
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= LARGEST for n in shape)
        or len(shape) > DIMENSIONS
    ):
        raise RequestError(422, f"{where}.shape: should be a list of whole numbers, not {shape!r}")
    if datatype != "BYTES" and datatype not in TYPES:
        raise RequestError(422, f"{where}.datatype: {datatype!r} is none of BYTES, {', '.join(TYPES)}")
    return math.prod(shape)


def from_binary(name: str, datatype: str, shape: Sequence[int], raw: bytes, where: str) -> Tensor:
    """A tensor from its binary form. Raises RequestError."""
    import numpy as np

    from tally.serving.tensors import Tensor

    count = math.prod(shape)
    if datatype == "BYTES":
        texts = texts_of(raw, f"{where} ({name})")
        if len(texts) != count:
            raise RequestError(422, f"{where}: {len(texts)} texts, and the shape {list(shape)} has {count}")
        return Tensor(name, tuple(shape), texts)
    kind = np.dtype(TYPES[datatype])
    if len(raw) != count * kind.itemsize:
        raise RequestError(
            422, f"{where}: {len(raw)} bytes, and {datatype} of shape {list(shape)} has {count * kind.itemsize}"
        )
    return Tensor(name, tuple(shape), np.frombuffer(raw, kind).reshape(shape))


def _nested(data: Any) -> list[int]:
    """The lengths of lists in lists; as deep as the first of them are."""
    lengths = []
    while isinstance(data, list):
        lengths.append(len(data))
        data = data[0] if data else None
    return lengths


def _flat(data: Any) -> list[Any]:
    if not isinstance(data, list):
        return [data]
    if not any(isinstance(each, list) for each in data):
        return data
    return [value for each in data for value in _flat(each)]


def _text(value: Any, given: Mapping[str, Any], where: str) -> bytes:
    if not isinstance(value, str):
        raise RequestError(422, f"{where}.data: a value of BYTES should be a text, not {value!r}")
    if _parameters(given, where).get("content_type") == "base64":
        from tally.serving.values import from_base64

        try:
            return from_base64(value)
        except ValueError as error:
            raise RequestError(422, f"{where}.data: {error}") from None
    return value.encode("utf-8", "surrogateescape")


def _numbers(flat: list[Any], datatype: str, where: str) -> Any:
    """Values as an array of the datatype, without changing them in silence. Raises RequestError."""
    import numpy as np

    kind = np.dtype(TYPES[datatype])
    allowed = (bool,) if kind.kind == "b" else (int,) if kind.kind in "iu" else (int, float)
    for value in flat:
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind.kind != "b"):
            if value is None and kind.kind == "f":
                continue
            raise RequestError(422, f"{where}.data: {value!r} is no {datatype}")
    try:
        return np.array(flat, kind) if kind.kind != "f" else np.array(flat, np.float64).astype(kind)
    except (OverflowError, ValueError) as error:
        raise RequestError(422, f"{where}.data: {error}") from None


def texts_of(raw: bytes, where: str) -> list[bytes]:
    """The elements of a BYTES tensor in binary form: each has four bytes of length before it."""
    found, at = [], 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + length > len(raw):
            raise RequestError(422, f"{where}: a text of {length} bytes, and {len(raw) - at - 4} are left")
        found.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def raw_of(tensor: Tensor) -> bytes:
    """A tensor in binary form."""
    if tensor.is_text:
        return b"".join(len(each).to_bytes(4, "little") + each for each in tensor.values)
    content: bytes = tensor.values.astype(TYPES[datatype_of(tensor)], copy=False).tobytes()
    return content


def datatype_of(tensor: Tensor) -> str:
    """The name of a tensor's datatype."""
    if tensor.is_text:
        return "BYTES"
    kind = tensor.values.dtype
    return next(name for name, text in TYPES.items() if kind == text)


def _output(tensor: Tensor, parts: list[bytes] | None) -> dict[str, Any]:
    """An output as JSON. parts: gets its content, if that is to be binary."""
    from tally.serving.values import finite

    output: dict[str, Any] = {"name": tensor.name, "datatype": datatype_of(tensor), "shape": list(tensor.shape)}
    if parts is not None:
        content = raw_of(tensor)
        parts.append(content)
        return output | {"parameters": {"binary_data_size": len(content)}}
    if not tensor.is_text:
        return output | {"data": finite(tensor.values.reshape(-1).tolist())}
    try:
        return output | {"data": [each.decode() for each in tensor.values]}
    except UnicodeDecodeError:
        import base64

        data = [base64.b64encode(each).decode() for each in tensor.values]
        return output | {"parameters": {"content_type": "base64"}, "data": data}
