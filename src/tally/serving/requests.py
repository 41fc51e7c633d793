"""Requests to endpoints, from files: Tally's own or any other server's that speaks one of the protocols.

Which protocol is meant is told by the URL's path: ``/v2/models/…`` is the Open Inference Protocol, ``/v1/models/…``
TensorFlow Serving, and anything else takes the file as it is. A URL without a path means ``/score``.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tally.errors import ServerAwayError, SpecError

TABLES = (".json", ".csv")
"""Files of rows."""


@dataclass(frozen=True, slots=True)
class EndpointRequest:
    """One request. headers: name to value; a key is not among them."""

    url: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def request_of(url: str, file: Path, *, name: str | None = None) -> EndpointRequest:
    """The request that has one file scored.

    name: of the input, where the protocol has names; by default ``image``, or of rows their columns'.
    Raises SpecError for a URL or a file that cannot be used.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SpecError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SpecError(f"{url!r} is no http:// or https:// URL of an endpoint")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read {file}: {error.strerror}") from None
    path = parts.path.rstrip("/")
    if path.startswith("/v2/models/"):
        path = path if path.endswith("/infer") else f"{path}/infer"
        body, headers = _inference(content, file, name)
    elif path.startswith("/v1/models/"):
        path = path if ":" in path else f"{path}:predict"
        body, headers = _predict(content, file, name)
    else:
        path = path or "/score"
        kind = "text/csv" if file.suffix.lower() == ".csv" else mimetypes.guess_type(file.name)[0]
        body, headers = content, {"Content-Type": kind or "application/octet-stream"}
    return EndpointRequest(urlunsplit(parts._replace(path=path)), body, headers)


def _inference(content: bytes, file: Path, name: str | None) -> tuple[bytes, dict[str, str]]:
    if file.suffix.lower() in TABLES:
        inputs = [
            {
                "name": column,
                "shape": [len(values)],
                "datatype": "FP64" if all(isinstance(each, (int, float)) for each in values) else "BYTES",
                "data": values if all(isinstance(each, (int, float)) for each in values) else [str(v) for v in values],
            }
            for column, values in _columns(content, file).items()
        ]
        return json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}
    raw = len(content).to_bytes(4, "little") + content
    tensor = {"name": name or "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return head + raw, headers


def _predict(content: bytes, file: Path, name: str | None) -> tuple[bytes, dict[str, str]]:
    instances: Sequence[Any]
    if file.suffix.lower() in TABLES:
        columns = _columns(content, file)
        instances = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    else:
        encoded = {"b64": base64.b64encode(content).decode()}
        instances = [encoded if name is None else {name: encoded}]
    return json.dumps({"instances": instances}).encode(), {"Content-Type": "application/json"}


def _columns(content: bytes, file: Path) -> dict[str, list[Any]]:
    """Columns of a file of rows. Raises SpecError."""
    try:
        text = content.decode("utf-8-sig")
        if file.suffix.lower() == ".csv":
            rows: list[dict[str, Any]] = [
                {key: _number(value) for key, value in row.items()}
                for row in csv.DictReader(io.StringIO(text), strict=True)
            ]
        else:
            found = json.loads(text)
            rows = found.get("data", [found]) if isinstance(found, dict) else found
        names = list(dict.fromkeys(key for row in rows for key in row))
        return {key: [row[key] for row in rows] for key in names}
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise SpecError(f"{file} holds no rows that have the same columns each: {error}") from None


def _number(text: str) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def cannot_be_asked(url: str, error: Exception) -> ServerAwayError:
    """The error for an endpoint that nobody answers for."""
    return ServerAwayError(
        f"{url} cannot be asked: {str(error) or 'no answer in time'}",
        hint="'tally serve MODEL' starts one, and says its address; 'tally endpoints list' shows kept ones.",
    )
