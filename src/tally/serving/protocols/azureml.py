"""The protocol of Azure ML's endpoints, and of clients that just send a file: ``POST /score``.

Scripts with ``init()`` and ``run()`` are given the request as they expect it, and answer as they like. For any other
model, the body is a picture (or whatever its items are), or rows as JSON or CSV.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tally.scorers.base import Item, Request, Result, Scorer
from tally.serving import values
from tally.serving.messages import Call, Description
from tally.serving.protocols.base import (
    JSON,
    Paths,
    Protocol,
    Reply,
    RequestError,
    Route,
    Served,
    Work,
    column_names,
    failed_items,
)

PREFIX = "/api/v1/service"

_PATHS = Paths(
    {
        "/": ("health", ("GET", "HEAD")),
        "/score": ("score", ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")),
        "/swagger.json": ("swagger", ("GET", "HEAD")),
        "/ui": ("ui", ("GET", "HEAD")),
        PREFIX + "/{model}": ("health", ("GET", "HEAD")),
        PREFIX + "/{model}/": ("health", ("GET", "HEAD")),
        PREFIX + "/{model}/score": ("score", ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")),
        PREFIX + "/{model}/swagger.json": ("swagger", ("GET", "HEAD")),
        PREFIX + "/{model}/ui": ("ui", ("GET", "HEAD")),
    }
)


class AzureML(Protocol):
    """``/score``, at the root for a server's only model, and under ``/api/v1/service/NAME`` for each."""

    name = "azureml"
    wanted_headers = (b"content-type", b"accept")

    def route(self, path: str) -> Route | None:
        return _PATHS.find(self, path)

    def tell(self, route: Route, served: Served | None, others: Sequence[Served]) -> Reply:
        if route.operation == "health":
            if served is not None and not served.ready:
                raise RequestError(503, f"{served.name} has no replica that answers")
            return Reply(200, b"Healthy", [("Content-Type", "text/plain; charset=utf-8")])
        each = [served] if served is not None else list(others)
        if route.operation == "swagger":
            return Reply(200, json.dumps(document(each)).encode())
        return Reply(200, _page(each).encode(), [("Content-Type", "text/html; charset=utf-8"), *_PAGE_HEADERS])

    def refusal(self, error: RequestError) -> Reply:
        body = json.dumps({"message": error.message}).encode()
        return Reply(error.status, body, [*JSON, *error.headers.items()], error.message)

    def decode(self, call: Call, scorer: Scorer) -> Work:
        if (method := call.parameters.get("method", "POST")) != "POST":
            raise RequestError(405, f"the method {method} is not supported; send the item with POST", Allow="POST")
        if not call.body:
            raise RequestError(400, f"the body is empty: {_takes(scorer.input)}")
        kind = call.parameters.get("header:content-type", "").partition(";")[0].strip().lower()
        if scorer.input == "table":
            from tally.scorers.scripts import requests

            try:
                request = Request(call.body, headers={"content-type": kind})
                by_name = scorer.by if isinstance(scorer.features, int) else None
                return Work(requests.table_of(request, None, unnamed=column_names(scorer), by_name=by_name))
            except requests.RefusedError as error:
                raise RequestError(400, str(error)) from None
        if kind == "application/json":
            return Work([Item(str(at), content) for at, content in enumerate(_contents(call.body, scorer))])
        return Work([Item("body", call.body)])

    def encode(self, call: Call, scorer: Scorer, work: Work, results: Sequence[Result]) -> Reply:
        single = scorer.input != "table" and len(results) == 1 and work.items[0].key == "body"
        if errors := failed_items(results):
            message = "; ".join(str(error) if single else f"item {at}: {error}" for at, error in [*errors.items()][:3])
            found: dict[str, Any] = {"message": message}
            if not single:
                found["errors"] = {str(at): str(error) for at, error in errors.items()}
                found["results"] = [None if at in errors else values.json_value(r) for at, r in enumerate(results)]
            return Reply(422, json.dumps(found).encode(), JSON, message)
        if single and values.is_picture(results[0]):
            if "image/jpeg" in call.parameters.get("header:accept", ""):
                return Reply(200, values.jpeg(results[0]), [("Content-Type", "image/jpeg")])
            return Reply(200, values.png(results[0]), [("Content-Type", "image/png")])
        shown = [values.json_value(result) for result in results]
        return Reply(200, json.dumps(shown[0] if single else shown, default=str).encode())


def _takes(kind: str) -> str:
    """What a body should be, in a sentence."""
    if kind in ("image", "frame"):
        return "send the content of a picture"
    return "send rows as JSON or CSV" if kind == "table" else "send the content of a file"


def _contents(body: bytes, scorer: Scorer) -> list[bytes]:
    """Items in base64 in a JSON body: a list of texts, alone or as ``data``; one of them alone, too."""
    try:
        found = json.loads(body)
    except ValueError as error:
        if scorer.input in ("bytes", "path"):
            return [body]
        raise RequestError(400, f"the body is not JSON: {error}") from None
    given = found
    if isinstance(given, dict):
        given = next((given[name] for name in ("data", "inputs", "image", "input_data") if name in given), None)
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        if scorer.input in ("bytes", "path"):
            return [body]  # it is for the model
        raise RequestError(
            422, 'JSON should be {"data": [...]}, with each picture in base64; or send one picture\'s bytes as they are'
        )
    try:
        return [values.from_base64(text) for text in texts]
    except ValueError:
        if scorer.input in ("bytes", "path"):
            return [body]
        raise RequestError(422, "data: a picture's text is not base64") from None


# ---------------------------------------------------------------------------------------- what it is like


def document(models: Sequence[Served]) -> dict[str, Any]:
    """The OpenAPI 2 document of ``/score``, as clients of Azure ML read it."""
    paths: dict[str, Any] = {}
    for served in models:
        base = PREFIX + "/" + served.name if len(models) > 1 else ""
        body, consumes, example = _body(served.description)
        paths[f"{base}/"] = {
            "get": {
                "operationId": f"health_{served.name}",
                "summary": "Whether the model answers",
                "responses": {"200": {"description": "It does."}, "503": {"description": "No replica answers."}},
            }
        }
        paths[f"{base}/score"] = {
            "post": {
                "operationId": f"score_{served.name}",
                "summary": served.description.text if served.description else served.name,
                "consumes": consumes,
                "produces": ["application/json"],
                "parameters": [
                    {"name": "body", "in": "body", "required": True, "description": example, "schema": body}
                ],
                "responses": {
                    "200": {"description": "The results", "schema": _result(served.description)},
                    "400": {"description": "The body cannot be read"},
                    "422": {"description": "An item cannot be scored"},
                    "429": {"description": "Too many requests wait already"},
                    "503": {"description": "No replica answers"},
                    "504": {"description": "No answer in time"},
                },
                "security": [{"Bearer": []}],
            }
        }
    title = models[0].name if len(models) == 1 else "models"
    return {
        "swagger": "2.0",
        "info": {"title": title, "version": models[0].version if len(models) == 1 else "1"},
        "schemes": ["http", "https"],
        "securityDefinitions": {"Bearer": {"type": "apiKey", "name": "Authorization", "in": "header"}},
        "paths": paths,
    }


def _body(description: Description | None) -> tuple[dict[str, Any], list[str], str]:
    kind = description.input if description else "bytes"
    if kind == "table":
        features = description.features if description and isinstance(description.features, list) else []
        names = [*(description.by if description else ()), *features]
        row = {"type": "object", "properties": {name: {} for name in names}}
        schema = {"type": "object", "properties": {"data": {"type": "array", "items": row}}}
        return schema, ["application/json", "text/csv"], "Rows as objects"
    if description and description.responds:
        return {}, ["application/json", "application/octet-stream"], "What run() of the script takes"
    schema = {"type": "string", "format": "binary"}
    return schema, ["application/octet-stream", "image/jpeg", "image/png", "application/json"], "A file's content"


def _result(description: Description | None) -> dict[str, Any]:
    if description is None or description.output == "image" or not description.columns:
        return {}
    kinds = {"string": "string", "int64": "integer", "float32": "number", "float64": "number", "double": "number"}
    properties = {n: {"type": kinds[t]} if t in kinds else {} for n, t in description.columns.items()}
    return {"type": "object", "properties": properties}


_PAGE_HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
]


def _page(models: Sequence[Served]) -> str:
    """A page that shows what can be asked."""
    from html import escape

    sections = []
    for served in models:
        base = PREFIX + "/" + served.name if len(models) > 1 else ""
        said = escape(served.description.text if served.description else "not loaded")
        sections.append(
            f"<h2>{escape(served.name)}</h2><p>version {escape(served.version)}: {said}</p>"
            f"<pre>curl --data-binary @FILE {{this server}}{escape(base)}/score</pre>"
        )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>Models</title><style>body{font:16px system-ui;margin:2rem auto;max-width:45rem;padding:0 1rem;"
        "color-scheme:light dark}pre{overflow:auto}</style><h1>Models</h1>"
        + "".join(sections)
        + "<p><a href='/swagger.json'>swagger.json</a> describes it for programs.</p></html>"
    )
