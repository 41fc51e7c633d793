"""TensorFlow Serving's gRPC interface: ``tensorflow.serving.PredictionService`` and ``ModelService``.

It says what it says over REST, in other letters: see :mod:`tally.serving.protocols.tfserving`. Values are answered in
the fields of their types (``float_val``, ``string_val``), which is where clients of TensorFlow Serving look for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from tally.scorers.base import Item, Result, Scorer
from tally.serving import protobuf
from tally.serving.messages import Call
from tally.serving.metadata import ITEM_INPUT
from tally.serving.protocols import tfserving
from tally.serving.protocols.base import GrpcProtocol, Reply, RequestError, Route, Served, Work, check_all
from tally.serving.protocols.openinference import DIMENSIONS, LARGEST
from tally.serving.protocols.tfserving import SIGNATURE

if TYPE_CHECKING:
    from tally.serving.tensors import Tensor

PREDICTION, MODEL = "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"
METADATA = "signature_def"
"""The only metadata that there are, as with TensorFlow Serving."""

_METHODS = {
    f"/{PREDICTION}/Predict": ("score", "tensorflow.serving.PredictRequest"),
    f"/{PREDICTION}/Classify": ("score", "tensorflow.serving.ClassificationRequest"),
    f"/{PREDICTION}/Regress": ("score", "tensorflow.serving.RegressionRequest"),
    f"/{PREDICTION}/GetModelMetadata": ("metadata", "tensorflow.serving.GetModelMetadataRequest"),
    f"/{MODEL}/GetModelStatus": ("status", "tensorflow.serving.GetModelStatusRequest"),
}
_ANSWERS = {
    "metadata": "tensorflow.serving.GetModelMetadataResponse",
    "status": "tensorflow.serving.GetModelStatusResponse",
}

TYPES = {
    "DT_FLOAT": ("<f4", "float_val"),
    "DT_DOUBLE": ("<f8", "double_val"),
    "DT_HALF": ("<f2", "half_val"),
    "DT_INT8": ("i1", "int_val"),
    "DT_INT16": ("<i2", "int_val"),
    "DT_INT32": ("<i4", "int_val"),
    "DT_INT64": ("<i8", "int64_val"),
    "DT_UINT8": ("u1", "int_val"),
    "DT_UINT16": ("<u2", "int_val"),
    "DT_UINT32": ("<u4", "uint32_val"),
    "DT_UINT64": ("<u8", "uint64_val"),
    "DT_BOOL": ("?", "bool_val"),
}
"""Type to NumPy's, and to the field of TensorProto that has its values; DT_STRING stands beside them."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """outputs: those that the client wants; none for all. scalar: one item alone was sent, in a tensor without
    dimensions."""

    request: str
    outputs: Sequence[str] = ()
    scalar: bool = False


class TensorFlowServingGrpc(GrpcProtocol):
    """``/tensorflow.serving.PredictionService/…`` and ``/tensorflow.serving.ModelService/…``"""

    name = "tfserving-grpc"
    services = (PREDICTION, MODEL)

    def __init__(self) -> None:
        self._rest = tfserving.TensorFlowServing()

    def route(self, path: str) -> Route | None:
        if path not in _METHODS:
            return None
        operation, request = _METHODS[path]
        return Route(self, operation, parameters={"request": request})

    def about(self, route: Route, body: bytes) -> Route:
        spec = protobuf.parsed("tally.serving.TensorFlowHead", body).model_spec
        if not spec.name:
            raise RequestError(400, "model_spec.name: the request names no model")
        if route.operation == "metadata":
            asked = protobuf.parsed(route.parameters["request"], body).metadata_field
            if unknown := [name for name in asked if name != METADATA]:
                raise RequestError(400, f"metadata_field: there is no {unknown[0]!r}; there is {METADATA!r}")
            if not asked:
                raise RequestError(400, f"metadata_field: should name {METADATA!r}")
        version: str | None = None
        if spec.HasField("version"):
            version = str(spec.version.value)
        elif spec.HasField("version_label"):
            version = spec.version_label
        return replace(route, model=spec.name, version=version)

    def tell(self, route: Route, served: Served | None, others: Sequence[Served]) -> Reply:
        said = json.loads(self._rest.tell(route, served, others).body)
        if route.operation == "metadata":
            said["metadata"][METADATA]["@type"] = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
        answer = protobuf.message(_ANSWERS[route.operation])()
        json_format.ParseDict(said, answer, descriptor_pool=answer.DESCRIPTOR.file.pool)
        return Reply(200, answer.SerializeToString(), ())

    def decode(self, call: Call, scorer: Scorer) -> Work:
        name = call.parameters["request"]
        request = protobuf.parsed(name, call.body)
        signature = request.model_spec.signature_name or SIGNATURE
        if signature != SIGNATURE:
            raise RequestError(400, f"model_spec.signature_name: there is no {signature!r}; there is {SIGNATURE!r}")
        if name.endswith(".PredictRequest"):
            return _predicted(request, scorer)
        rows = _rows(request.input)
        if scorer.input == "table":
            plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
            return Work(tfserving.table_of(plain, scorer), asked=_Asked(name))
        items = [Item(str(at), _content(row, ITEM_INPUT[scorer.input], at)) for at, row in enumerate(rows)]
        return Work(items, scorer.classes is not None, _Asked(name))

    def encode(self, call: Call, scorer: Scorer, work: Work, results: Sequence[Result]) -> Reply:
        asked: _Asked = work.asked
        check_all(results, "row" if scorer.input == "table" else "item")
        match asked.request.rpartition(".")[2]:
            case "ClassificationRequest":
                answer = protobuf.message("tensorflow.serving.ClassificationResponse")()
                for result in results:
                    classes = answer.result.classifications.add().classes
                    for label, score in tfserving.classified(result, scorer):
                        classes.add(label=str(label), score=math.nan if score is None else score)
            case "RegressionRequest":
                answer = protobuf.message("tensorflow.serving.RegressionResponse")()
                for result in results:
                    answer.result.regressions.add(value=tfserving.regressed(result))
            case _:
                answer = protobuf.message("tensorflow.serving.PredictResponse")()
                found = {tensor.name: tensor for tensor in _tensors(results, scorer, work)}
                for number, name in enumerate(asked.outputs or found):
                    if name not in found:
                        there = ", ".join(found)
                        raise RequestError(400, f"output_filter[{number}]: there is no {name!r}; there are {there}")
                    _fill(answer.outputs[name], found[name])
        spec = answer.model_spec
        spec.name, spec.signature_name = work.model, SIGNATURE
        if work.version.isdecimal():
            spec.version.value = int(work.version)
        return Reply(200, answer.SerializeToString(), ())


def _predicted(request: Any, scorer: Scorer) -> Work:
    """What a PredictRequest wants to have scored."""
    from tally.serving import tensors

    given = [_tensor(name, request.inputs[name]) for name in sorted(request.inputs)]
    if scorer.input != "table" and (names := [tensor.name for tensor in given]) != [ITEM_INPUT[scorer.input]]:
        found = ", ".join(map(repr, names)) or "nothing"
        raise RequestError(400, f"inputs: the model takes {ITEM_INPUT[scorer.input]!r} alone, not {found}")
    work = tensors.work_of(given, scorer)
    work.all_classes = scorer.classes is not None
    work.asked = _Asked("tensorflow.serving.PredictRequest", list(request.output_filter), given[0].shape == ())
    return work


def _tensors(results: Sequence[Result], scorer: Scorer, work: Work) -> list[Tensor]:
    """The outputs of a prediction. A classifier has its classes once for an item alone, otherwise for each item."""
    import numpy as np

    from tally.serving import tensors

    if not (work.all_classes and scorer.classes is not None):
        return tensors.tensors_of(results, scorer, work)
    scores: list[Any] = []
    for result in results:
        assert isinstance(result, Mapping)
        scores.append(result["scores"])
    names = [str(name).encode("utf-8", "surrogateescape") for name in scorer.classes]
    count = len(results)
    prediction = np.array(scores, np.float32).reshape(count, len(names))
    shape = (len(names),) if work.asked.scalar else prediction.shape
    return [
        tensors.Tensor("prediction", prediction.shape, prediction),
        tensors.Tensor("classes", shape, names if work.asked.scalar else names * count),
    ]


def _tensor(name: str, given: Any) -> Tensor:
    """One input. Raises RequestError."""
    import numpy as np

    from tally.serving.tensors import Tensor, numbers

    where = f"inputs.{name}"
    known = {number: text for text, number in protobuf.enum("tensorflow.DataType").items()}
    kind = known.get(given.dtype, str(given.dtype))
    if given.tensor_shape.unknown_rank:
        raise RequestError(400, f"{where}.tensor_shape: should be known")
    shape = tuple(dim.size for dim in given.tensor_shape.dim)
    if kind == "DT_STRING":
        return Tensor(name, _checked(shape, len(given.string_val), where), list(given.string_val))
    if kind not in TYPES:
        raise RequestError(400, f"{where}.dtype: {kind} is none of DT_STRING, {', '.join(TYPES)}")
    numpy_kind, field = TYPES[kind]
    array: Any
    if content := given.tensor_content:
        if len(content) % np.dtype(numpy_kind).itemsize:
            raise RequestError(400, f"{where}.tensor_content: {len(content)} bytes are no whole number of {kind}")
        array = np.frombuffer(content, numpy_kind)
    else:
        bits = "<u2" if kind == "DT_HALF" else numpy_kind
        array = numbers(getattr(given, field), bits, kind, f"{where}.{field}")
        array = array.view(numpy_kind)
    return Tensor(name, _checked(shape, array.size, where), array.reshape(shape))


def _checked(shape: tuple[int, ...], count: int, where: str) -> tuple[int, ...]:
    """The shape, if that many values fill it."""
    if len(shape) > DIMENSIONS or any(not 0 <= size <= LARGEST for size in shape):
        raise RequestError(400, f"{where}.tensor_shape: {list(shape)[: DIMENSIONS + 1]} is no shape of a tensor")
    if math.prod(shape) != count:
        raise RequestError(400, f"{where}: {count} values, and the shape {list(shape)} has {math.prod(shape)}")
    return shape


def _fill(target: Any, tensor: Tensor) -> None:
    """Write a tensor into a TensorProto."""
    from tally.serving.protocols import openinference

    kind = tfserving.TYPES[openinference.datatype_of(tensor)]
    target.dtype = protobuf.enum("tensorflow.DataType")[kind]
    for size in tensor.shape:
        target.tensor_shape.dim.add(size=size)
    if tensor.is_text:
        target.string_val.extend(tensor.values)
    else:
        getattr(target, TYPES[kind][1]).extend(tensor.values.reshape(-1).tolist())


def _rows(given: Any) -> list[dict[str, list[Any]]]:
    """The examples of a classification or regression: the values of each feature."""
    kind = given.WhichOneof("kind")
    if kind is None or not getattr(given, kind).examples:
        raise RequestError(400, "input: there is no example")
    examples = getattr(given, kind)
    shared = _features(examples.context) if kind == "example_list_with_context" else {}
    return [{**shared, **_features(example)} for example in examples.examples]


def _features(example: Any) -> dict[str, list[Any]]:
    found = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        found[name] = [] if kind is None else list(getattr(feature, kind).value)
    return found


def _plain(values: list[Any]) -> Any:
    """The values of a feature as a table has them; none is a missing one."""
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    return None if not texts else texts[0] if len(texts) == 1 else texts


def _content(row: dict[str, list[Any]], name: str, at: int) -> bytes:
    """An item's content, from its example."""
    if list(row) != [name]:
        raise RequestError(400, f"example {at}: should have {name!r} alone, not {', '.join(row) or 'nothing'}")
    [values] = row.values()
    if len(values) != 1 or not isinstance(values[0], bytes):
        raise RequestError(400, f"example {at}: {name} should be one value of bytes")
    content: bytes = values[0]
    return content
