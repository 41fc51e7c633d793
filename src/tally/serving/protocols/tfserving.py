"""TensorFlow Serving's REST interface: ``/v1/models/NAME[/versions/N|/labels/L]:predict`` and its like.

Source: https://www.tensorflow.org/tfx/serving/api_rest. A classifier of pictures answers as the image classifiers of
TensorFlow's retraining example do: ``prediction``, the scores of all classes, and ``classes``, their names, both in the
model's order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tally.scorers.base import Item, Result, Scorer
from tally.serving import metadata, values
from tally.serving.messages import Call, Description
from tally.serving.metadata import ITEM_INPUT
from tally.serving.protocols.base import (
    JSON,
    Paths,
    Protocol,
    Reply,
    RequestError,
    Route,
    Served,
    Work,
    check_all,
    check_order,
    column_names,
)

SIGNATURE = "serving_default"

_GET, _POST = ("GET", "HEAD"), ("POST",)
_BASES = ("/v1/models/{model}", "/v1/models/{model}/versions/{version}", "/v1/models/{model}/labels/{version}")
_PATHS = Paths(
    {
        base + ending: target
        for base in _BASES
        for ending, target in {
            ":predict": ("score", _POST),
            ":classify": ("score", _POST),
            ":regress": ("score", _POST),
            "/metadata": ("metadata", _GET),
            "": ("status", _GET),
        }.items()
    }
)

TYPES = {
    "BYTES": "DT_STRING",
    "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE",
    "INT64": "DT_INT64",
    "BOOL": "DT_BOOL",
    "UINT8": "DT_UINT8",
}
STATES = {"ready": "AVAILABLE", "loading": "LOADING"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """columns: in the columnar form. scalar: one item alone, without a list around it."""

    verb: str
    columns: bool
    scalar: bool


class TensorFlowServing(Protocol):
    """``/v1/models/…``"""

    name = "tfserving"

    def route(self, path: str) -> Route | None:
        if not path.startswith("/v1/models/"):
            return None
        route = _PATHS.find(self, path)
        if route is None or route.operation != "score":
            return route
        return Route(self, "score", route.model, route.version, route.methods, {"verb": path.rpartition(":")[2]})

    def tell(self, route: Route, served: Served | None, others: Sequence[Served]) -> Reply:
        assert served is not None
        if route.operation == "status":
            wanted = [served.version] if route.version is not None else list(served.versions)
            states = [
                {
                    "version": version,
                    "state": STATES.get(served.versions[version], "END"),
                    "status": {"error_code": "OK", "error_message": served.versions[version].partition(": ")[2]},
                }
                for version in wanted
            ]
            return Reply(200, json.dumps({"model_version_status": states}).encode())
        if served.description is None:
            raise RequestError(503, f"{served.name} is not loaded")
        said = {
            "model_spec": {"name": served.name, "signature_name": "", "version": served.version},
            "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature(served.description)}}},
        }
        return Reply(200, json.dumps(said).encode())

    def refusal(self, error: RequestError) -> Reply:
        body = json.dumps({"error": error.message}).encode()
        return Reply(error.status, body, [*JSON, *error.headers.items()], error.message)

    def decode(self, call: Call, scorer: Scorer) -> Work:
        request = _request(call)
        if (name := request.get("signature_name") or SIGNATURE) != SIGNATURE:
            raise RequestError(404, f"signature_name: there is no {name!r}; there is {SIGNATURE!r}")
        verb = call.parameters.get("verb", "predict")
        if verb == "predict":
            given = [name for name in ("instances", "inputs") if name in request]
            if len(given) != 1:
                raise RequestError(422, "the body should have either instances or inputs")
            rows = _instances(request["instances"]) if given == ["instances"] else _rows_of_columns(request["inputs"])
        else:
            rows = _instances(request.get("examples"), "examples")
        asked = _Asked(verb, "inputs" in request, "inputs" in request and _is_scalar(request["inputs"]))
        if scorer.input == "table":
            return Work(table_of(rows, scorer), asked=asked)
        name = ITEM_INPUT[scorer.input]
        items = [Item(str(at), _content(row, name, at)) for at, row in enumerate(rows)]
        return Work(items, scorer.classes is not None, asked)

    def encode(self, call: Call, scorer: Scorer, work: Work, results: Sequence[Result]) -> Reply:
        check_all(results, "instance")
        asked: _Asked = work.asked
        if asked.verb == "classify":
            return _json({"results": [classified(result, scorer) for result in results]})
        if asked.verb == "regress":
            return _json({"results": [regressed(result) for result in results]})
        shown: list[Any] = []
        for result in results:
            if work.all_classes and scorer.classes is not None:
                assert isinstance(result, Mapping)
                shown.append({"prediction": values.finite(result["scores"]), "classes": list(scorer.classes)})
            else:
                value = values.json_value(result)
                shown.append({"b64": value} if values.is_picture(result) else value)
        if not asked.columns:
            return _json({"predictions": shown})
        return _json({"outputs": _columns(shown, scalar=asked.scalar)})


def _json(value: Any) -> Reply:
    return Reply(200, json.dumps(value, default=str).encode())


def _request(call: Call) -> dict[str, Any]:
    try:
        request = json.loads(call.body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RequestError(400, "the body should be a JSON object")
    return request


def _instances(given: Any, what: str = "instances") -> list[Any]:
    if not isinstance(given, list) or not given:
        raise RequestError(422, f"{what}: should be a list with one at least")
    return given


def _is_scalar(inputs: Any) -> bool:
    """Whether one item alone was sent, without a list around it."""
    if isinstance(inputs, dict) and "b64" not in inputs and len(inputs) == 1:
        [inputs] = inputs.values()
    return not isinstance(inputs, list)


def _rows_of_columns(inputs: Any) -> list[Any]:
    """Rows of the columnar form: one tensor alone, or tensors by name."""
    if isinstance(inputs, dict) and "b64" not in inputs:
        columns = {name: each if isinstance(each, list) else [each] for name, each in inputs.items()}
        if len({len(each) for each in columns.values()}) != 1:
            lengths = ", ".join(f"{name} {len(each)}" for name, each in columns.items())
            raise RequestError(422, f"inputs: should have as many values each, not {lengths or 'none'}")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _instances(inputs if isinstance(inputs, list) else [inputs], "inputs")


def _content(row: Any, name: str, at: int) -> bytes:
    """An item's content: base64 in ``{"b64": ...}``, alone or under the input's name; or a text as it is."""
    if isinstance(row, dict) and "b64" not in row:
        if len(row) != 1:
            raise RequestError(422, f"instance {at}: should have {name!r} alone, not {', '.join(row) or 'nothing'}")
        [row] = row.values()
    if isinstance(row, dict) and isinstance(row.get("b64"), str):
        try:
            return values.from_base64(row["b64"])
        except ValueError as error:
            raise RequestError(422, f"instance {at}: {name}.b64 is {error}") from None
    if isinstance(row, str):
        return row.encode()
    raise RequestError(422, f'instance {at}: {name} should be {{"b64": "..."}}, not {type(row).__name__}')


def table_of(rows: Sequence[Any], scorer: Scorer) -> Any:
    import pyarrow as pa

    if all(isinstance(row, dict) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        check_order(names, scorer, "instances")
        flat = [{name: _single(row.get(name)) for name in names} for row in rows]
    elif all(isinstance(row, list) for row in rows):
        width = len(rows[0])
        if any(len(row) != width for row in rows):
            raise RequestError(422, "instances: should have as many values each")
        names = dict.fromkeys(column_names(scorer) or (f"f{at}" for at in range(width)))
        if len(names) != width:
            raise RequestError(422, f"instances: should have {len(names)} values each, not {width}")
        flat = [dict(zip(names, row, strict=True)) for row in rows]
    else:
        raise RequestError(422, "instances: should be objects, or lists of numbers")
    try:
        return pa.Table.from_pylist(flat)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise RequestError(422, f"instances: hold no table: {' '.join(str(error).split())}") from None


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _columns(shown: list[Any], *, scalar: bool) -> Any:
    """Predictions in the columnar form."""
    if shown and all(isinstance(each, dict) and "b64" not in each for each in shown):
        names = dict.fromkeys(name for each in shown for name in each)
        if scalar and "classes" in names and "prediction" in names:  # as a model with a scalar input answers
            return {"prediction": [shown[0]["prediction"]], "classes": shown[0]["classes"]}
        columns = {name: [each.get(name) for each in shown] for name in names}
        return next(iter(columns.values())) if len(columns) == 1 else columns
    return shown


def classified(result: Result, scorer: Scorer) -> list[list[Any]]:
    """Label and score of each class. Raises RequestError."""
    if scorer.classes is not None and isinstance(result, Mapping) and "scores" in result:
        return [[name, score] for name, score in zip(scorer.classes, values.finite(result["scores"]), strict=True)]
    rows = values.rows_of(result)
    if not all("label" in row and "score" in row for row in rows):
        raise RequestError(400, "the model does not tell classes apart: ask it with :predict")
    return [[row["label"], values.json_value(row)["score"]] for row in rows]


def regressed(result: Result) -> Any:
    rows = values.rows_of(result)
    numbers = [v for row in rows for v in values.json_value(row).values() if isinstance(v, (int, float))]
    if len(numbers) != 1:
        raise RequestError(400, "the model does not return one number for each item: ask it with :predict")
    return numbers[0]


def signature(description: Description) -> dict[str, Any]:
    """The signature, as GetModelMetadata tells it in JSON."""

    def told(declared: Sequence[tuple[str, str, Sequence[int]]]) -> dict[str, Any]:
        return {
            name: {
                "dtype": TYPES[kind],
                "tensor_shape": {"dim": [{"size": str(n), "name": ""} for n in shape], "unknown_rank": False},
                "name": f"{name}:0",
            }
            for name, kind, shape in declared
        }

    return {
        "inputs": told(metadata.inputs(description)),
        "outputs": told(outputs(description)),
        "method_name": "tensorflow/serving/predict",
    }


def outputs(description: Description) -> list[tuple[str, str, list[int]]]:
    """Name, datatype and shape of each output of a prediction."""
    if description.classes is not None:
        count = len(description.classes)
        return [("prediction", "FP32", [-1, count]), ("classes", "BYTES", [-1, count])]
    return metadata.outputs(description)
