"""Requests as scoring scripts take them, and what they return as responses."""

from __future__ import annotations

import json
import math
import mimetypes
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tally.scorers.base import Request, Response
from tally.scorers.scripts import azureml
from tally.scorers.scripts.answers import plain, records

if TYPE_CHECKING:
    import pyarrow as pa

FAILED = "x-ms-run-function-failed"
"""The header by which clients of Azure ML tell that ``run`` failed."""


class RefusedError(Exception):
    """The request is none that the script takes."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def value_of(request: Request, form: str, features: Sequence[str] | None, files: ExitStack) -> Any:
    """What ``run`` of a script of that form is given. files: removes the file that holds the body, of mini_batch.

    Raises RefusedError.
    """
    if form == "raw":
        return azureml.AMLRequest(
            request.body, method=request.method, path=request.path, query=request.query, headers=request.headers
        )
    if form == "json" and request.method == "GET":
        fields = {name: [_parsed(each) for each in values] for name, values in _query(request).items()}
        return json.dumps({name: values if len(values) > 1 else values[0] for name, values in fields.items()})
    if request.method != "POST":
        raise RefusedError(f"the method {request.method} is not supported; use POST", 405)
    if form == "json":
        try:
            return text_of(request.body)
        except RefusedError as error:
            raise RefusedError(f"the body should be text (JSON), and is {error}") from None
    if form == "dataframe":
        from tally.scorers.tabular import tables

        return tables.frame(table_of(request, features))
    if form == "mini_batch":
        from tally.storage import temporary

        suffix = mimetypes.guess_extension(_content_type(request)) or ""
        path = files.enter_context(temporary.folder("request")) / f"body{suffix}"
        path.write_bytes(request.body)
        return [str(path)]
    return request.body


def text_of(content: bytes) -> str:
    """Raises RefusedError for what is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RefusedError(f"not UTF-8 (byte {error.start})") from None


def fields_of(text: str) -> dict[str, Any]:
    """The arguments by name in a JSON object, for a ``run`` with a declared schema. Raises RefusedError."""
    fields = _json(text)
    if not isinstance(fields, dict):
        raise RefusedError("the body should be a JSON object of the arguments of run()")
    return fields


def response_of(answer: Any) -> Response:
    """What ``run`` returned: a response as it is, bytes as they are, and anything else as JSON with status 200.

    Raises TypeError for what JSON cannot hold.
    """
    if hasattr(answer, "status_code") and hasattr(answer, "get_data"):
        headers = [(str(name), str(value)) for name, value in answer.headers.items()]
        return Response(answer.status_code, bytes(answer.get_data()), headers)
    if isinstance(answer, (bytes, bytearray)):
        return Response(200, bytes(answer), [("Content-Type", "application/octet-stream")])
    if hasattr(answer, "to_pylist"):  # pyarrow
        answer = answer.to_pylist()
    elif hasattr(answer, "iloc"):  # pandas
        answer = records(answer)
    return _as_json(200, plain(answer))


def refusal(status: int, message: str) -> Response:
    """The answer to a request that is none for the script."""
    return _as_json(status, {"message": message})


def failure(message: str) -> Response:
    """The answer where ``run`` failed."""
    return _as_json(500, {"message": message}, (FAILED, "true"))


def _as_json(status: int, value: Any, *headers: tuple[str, str]) -> Response:
    text = json.dumps(_finite(value), allow_nan=False, default=_written)
    return Response(status, text.encode(), [("Content-Type", "application/json"), *headers])


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value


def _written(value: Any) -> str:
    """Dates and times as text."""
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError(f"run() returned a value of type {type(value).__name__}, which cannot be written as JSON")


def _query(request: Request) -> dict[str, list[str]]:
    return parse_qs(request.query, keep_blank_values=True)


def _parsed(text: str) -> Any:
    """A query's value: JSON if it is that, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RefusedError(f"the body is not JSON: {error}") from None


def _content_type(request: Request) -> str:
    kind = azureml.Headers(request.headers).get("Content-Type", "")
    return kind.partition(";")[0].strip().lower()


def table_of(
    request: Request,
    features: Sequence[str] | None,
    *,
    unnamed: Sequence[str] | None = None,
    by_name: Collection[str] | None = None,
) -> pa.Table:
    """The rows in a body of CSV or JSON, with the columns ``features`` alone if they are given.

    unnamed: what the values of rows without names are called; by default ``features``. by_name: given for who takes
    columns by their place: the columns that are taken by name all the same. Raises RefusedError, also for JSON objects
    with several columns to be taken by place: objects have no order, and some clients sort their names.
    """
    import pyarrow as pa

    try:
        if _content_type(request) in ("text/csv", "application/csv"):
            from pyarrow import csv

            table = csv.read_csv(pa.BufferReader(request.body))
            _check_once(table.column_names)
        else:
            columns, in_order = _columns(_json(request.body), features if unnamed is None else unnamed)
            if by_name is not None and not in_order and len([each for each in columns if each not in by_name]) > 1:
                raise RefusedError(
                    "the model's columns have an order and no names, and those of objects have names and no order: "
                    'send rows of values, {"data": [[1, 2], ...]}, or have it served with --set features=...'
                )
            table = pa.table(columns)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise RefusedError(f"the body holds no table: {' '.join(str(error).split())}") from None
    if features is None:
        return table
    if missing := [name for name in features if name not in table.column_names]:
        raise RefusedError(f"the body lacks the columns {', '.join(missing)}")
    return table.select(list(features))


def _columns(body: Any, features: Sequence[str] | None) -> tuple[dict[str, list[Any]], bool]:
    """Columns by name, from the shapes in which clients send rows; and whether these have an order.

    A list of objects, an object of columns, or rows of values beside their names (``{"columns": [...], "data":
    [[...], ...]}``; without names, they are the script's ``features``). Each may stand alone in one of ``_WRAPPERS``.
    """
    names = list(features) if features is not None else None
    while isinstance(body, dict):
        if isinstance(body.get("columns"), list) and isinstance(body.get("data"), list):
            names, body = [str(each) for each in body["columns"]], body["data"]
            _check_once(names)
            break
        [key] = body if len(body) == 1 else [None]
        if key not in _WRAPPERS or not _holds_rows(body[key]):
            return {str(name): values if isinstance(values, list) else [values] for name, values in body.items()}, False
        body = body[key]
    if not isinstance(body, list):
        raise RefusedError("the body should hold rows: a JSON list of objects, or an object of columns")
    if body and all(isinstance(row, Mapping) for row in body):
        found = dict.fromkeys(name for row in body for name in row)
        return {str(name): [row.get(name) for row in body] for name in found}, False
    if names is None or not all(isinstance(row, list) and len(row) == len(names) for row in body):
        raise RefusedError("the rows should be objects, or lists of values beside the names of their columns")
    return {name: [row[at] for row in body] for at, name in enumerate(names)}, True


def _check_once(names: Sequence[str]) -> None:
    """Raises RefusedError where two columns have one name: whose values are meant?"""
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RefusedError(f"several columns have the name {', '.join(map(repr, twice))}")


def _holds_rows(value: Any) -> bool:
    """Whether it is a table rather than the values of one column."""
    rows = value if isinstance(value, list) else [value]
    return all(isinstance(each, (dict, list)) for each in rows)


_WRAPPERS = ("data", "inputs", "input_data", "Inputs", "dataframe_records", "dataframe_split")
