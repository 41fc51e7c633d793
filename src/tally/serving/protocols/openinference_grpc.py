"""The Open Inference Protocol, version 2, over gRPC: ``inference.GRPCInferenceService``.

It says what it says over REST, in other letters: see :mod:`tally.serving.protocols.openinference`. Tensors are answered
as they were asked: in ``raw_output_contents`` those that came in ``raw_input_contents``, otherwise in ``contents``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from tally.scorers.base import Result, Scorer
from tally.serving import protobuf
from tally.serving.messages import Call
from tally.serving.protocols import openinference
from tally.serving.protocols.base import GrpcProtocol, Reply, RequestError, Route, Served, Work

if TYPE_CHECKING:
    from tally.serving.tensors import Tensor

SERVICE = "inference.GRPCInferenceService"

_OPERATIONS = {
    "ServerLive": "live",
    "ServerReady": "ready",
    "ServerMetadata": "server",
    "ModelReady": "model ready",
    "ModelMetadata": "model",
    "ModelInfer": "score",
    "RepositoryIndex": "index",
    "RepositoryModelLoad": "load",
    "RepositoryModelUnload": "unload",
}
_METHODS = {f"/{SERVICE}/{name}": name for name in _OPERATIONS}

CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype to the field of InferTensorContents that has its values; FP16 has none."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """id: the client's own. outputs: those that it wants; none for all. raw: as raw contents."""

    id: str
    outputs: Sequence[str]
    raw: bool


class OpenInferenceGrpc(GrpcProtocol):
    """``/inference.GRPCInferenceService/…``"""

    name = "openinference-grpc"
    services = (SERVICE,)

    def __init__(self) -> None:
        self._rest = openinference.OpenInference()

    def route(self, path: str) -> Route | None:
        method = _METHODS.get(path)
        return None if method is None else Route(self, _OPERATIONS[method])

    def about(self, route: Route, body: bytes) -> Route:
        match route.operation:
            case "score" | "model ready" | "model":
                head = protobuf.parsed("tally.serving.OpenInferenceHead", body)
                name, version = head.name, head.version
            case "load" | "unload":
                request = protobuf.parsed("inference.RepositoryModelLoadRequest", body)
                name, version = request.model_name or request.repository_name, ""  # as KServe's clients write it
            case "index":
                wanted = protobuf.parsed("inference.RepositoryIndexRequest", body)
                return replace(route, parameters={"ready": "true"} if wanted.ready else {})
            case _:
                return route
        if not name:
            raise RequestError(400, "the request names no model")
        return replace(route, model=name, version=version or None)

    def tell(self, route: Route, served: Served | None, others: Sequence[Served]) -> Reply:
        if route.operation in ("load", "unload"):
            done = {"isLoaded": True} if route.operation == "load" else {"isUnloaded": True}
            said: Any = {"model_name": route.model, **done}
        else:
            said = json.loads(self._rest.tell(route, served, others).body)
        if route.operation == "index":
            if route.parameters:  # only those that are ready
                said = [each for each in said if each["state"] == "READY"]
            said = {"models": said}
        method = next(name for name, operation in _OPERATIONS.items() if operation == route.operation)
        answer = protobuf.message(protobuf.methods(SERVICE)[method][1])()
        json_format.ParseDict(said, answer, ignore_unknown_fields=True)
        return Reply(200, answer.SerializeToString(), ())

    def decode(self, call: Call, scorer: Scorer) -> Work:
        from tally.serving import tensors

        request = protobuf.parsed("inference.ModelInferRequest", call.body)
        raw = request.raw_input_contents
        if raw and len(raw) != len(request.inputs):
            raise RequestError(400, f"raw_input_contents: has {len(raw)}, and there are {len(request.inputs)} inputs")
        found = [_tensor(each, at, raw[at] if raw else None) for at, each in enumerate(request.inputs)]
        work = tensors.work_of(found, scorer)
        work.asked = _Asked(request.id, [each.name for each in request.outputs], bool(raw))
        return work

    def encode(self, call: Call, scorer: Scorer, work: Work, results: Sequence[Result]) -> Reply:
        from tally.serving import tensors

        asked: _Asked = work.asked
        found = {tensor.name: tensor for tensor in tensors.tensors_of(results, scorer, work)}
        answer = protobuf.message("inference.ModelInferResponse")()
        answer.model_name, answer.model_version, answer.id = work.model, work.version, asked.id
        for number, name in enumerate(asked.outputs or found):
            if name not in found:
                raise RequestError(422, f"outputs[{number}].name: there is no {name!r}; there are {', '.join(found)}")
            tensor = found[name]
            datatype = openinference.datatype_of(tensor)
            output = answer.outputs.add(name=name, datatype=datatype, shape=tensor.shape)
            if asked.raw:
                answer.raw_output_contents.append(openinference.raw_of(tensor))
            else:
                values = tensor.values if tensor.is_text else tensor.values.reshape(-1).tolist()
                getattr(output.contents, CONTENTS[datatype]).extend(values)
        return Reply(200, answer.SerializeToString(), ())


def _tensor(given: Any, number: int, raw: bytes | None) -> Tensor:
    """One input. raw: its content, where the request has them all in raw form."""
    from tally.serving.tensors import Tensor, numbers

    where = f"inputs[{number}]"
    shape = list(given.shape)
    count = openinference.values_of(given.name, given.datatype, shape, where)
    if raw is not None:
        if given.HasField("contents"):
            raise RequestError(400, f"{where}.contents: should be empty where raw_input_contents are given")
        return openinference.from_binary(given.name, given.datatype, shape, raw, where)
    if given.datatype not in CONTENTS:
        raise RequestError(422, f"{where}.datatype: {given.datatype} has to come in raw_input_contents")
    field = CONTENTS[given.datatype]
    values = getattr(given.contents, field)
    if len(values) != count:
        raise RequestError(422, f"{where}.contents.{field}: {len(values)} values, and the shape {shape} has {count}")
    if given.datatype == "BYTES":
        return Tensor(given.name, tuple(shape), list(values))
    kind = openinference.TYPES[given.datatype]
    array = numbers(values, kind, given.datatype, f"{where}.contents.{field}")
    return Tensor(given.name, tuple(shape), array.reshape(shape))
