"""A file that is sent to a kept endpoint, and what it answered, for people to look at.

Only an endpoint of this machine is asked, at its loopback address. What the answer says is drawn in a process beside
the server's.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from tally.config import variable
from tally.errors import EndpointError, SpecError, TallyError
from tally.jobs.pictures import MAX_BYTES, drawable, thumbnail
from tally.server.aside import Aside
from tally.server.gallery import SECONDS
from tally.serving.deployments import Deployment
from tally.serving.settings import KEYS
from tally.text import visible

SIZE = 960
"""Pixels of the longer side of a picture that is shown."""
SHOWN_ROWS = 50
SHOWN_CHARACTERS = 5000
_KINDS = {".csv": "text/csv", ".json": "application/json"}
"""What an endpoint has to be told; pictures it tells by their content."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What an endpoint answered. version: that answered. rows: the first of ``count``. text: an answer that is no rows.
    before, after: the picture with what was found, and the one that was made of it, as ``data:`` URLs."""

    status: int
    version: str
    seconds: float
    rows: list[dict[str, Any]]
    count: int
    text: str
    before: str | None
    after: str | None

    @property
    def columns(self) -> list[str]:
        """Of all rows that are shown."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def try_out(found: Deployment, name: str, content: bytes, aside: Aside) -> Trial:
    """Have the endpoint score the content of a file of that name. Raises EndpointError, SpecError."""
    if not content:
        raise SpecError("no file was chosen, or it is empty", hint="Choose a picture.")
    if len(content) > min(MAX_BYTES, found.spec.max_body):
        raise SpecError(f"the file has {len(content):,} bytes: too many for endpoint {found.name}")
    begun = time.monotonic()
    status, headers, body = _ask(found, name, content)
    seconds = time.monotonic() - begun
    kind = headers.get("content-type", "").partition(";")[0]
    rows, text = _read(kind, body)
    before = _picture(aside, content, drawable(rows))
    after = _picture(aside, body, []) if kind.startswith("image/") else None
    version = headers.get("x-tally-version", "")
    return Trial(status, version, seconds, rows[:SHOWN_ROWS], len(rows), text, before, after)


def _ask(found: Deployment, name: str, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
    host, port = _address(found)
    headers = {"Content-Type": _KINDS.get(PurePath(name).suffix.lower(), "application/octet-stream")}
    if key := (variable(KEYS) or "").partition(",")[0].strip():
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(host, port, timeout=found.spec.limits.timeout + 5)
    try:
        connection.request("POST", "/score", content, headers)
        answer = connection.getresponse()
        body = answer.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise EndpointError(f"endpoint {found.name} does not answer: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if len(body) > MAX_BYTES:
        raise EndpointError(f"the answer of endpoint {found.name} has more than {MAX_BYTES:,} bytes: too many to show")
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def _address(found: Deployment) -> tuple[str, int]:
    """Where the endpoint listens on this machine. Raises EndpointError."""
    if found.url is None:
        raise EndpointError(f"endpoint {found.name} is {found.state}", hint="Try again once it is ready.")
    if not found.here:
        raise EndpointError(
            f"endpoint {found.name} is served on another machine", hint=f"tally predict {found.url} FILE"
        )
    parts = urlsplit(found.url)
    try:
        address = ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        address = None
    if address is None or parts.port is None or not (address.is_loopback or address.is_unspecified):
        raise EndpointError(
            f"endpoint {found.name} is not served at a loopback address", hint=f"tally predict {found.url} FILE"
        )
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1", parts.port
    return str(address), parts.port


def _read(kind: str, body: bytes) -> tuple[list[dict[str, Any]], str]:
    """The rows of an answer, or its text."""
    if kind.startswith("image/"):
        return [], ""
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if isinstance(found, dict) and "message" not in found:
        return [found], ""
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        return found, ""
    if isinstance(found, dict) and isinstance(found["message"], str):
        found = found["message"]
    text = found if isinstance(found, str) else body.decode("utf-8", "replace")
    shown = visible(text[:SHOWN_CHARACTERS], lines=True)
    return [], shown + ("…" if len(text) > SHOWN_CHARACTERS else "")


def _picture(aside: Aside, content: bytes, rows: list[dict[str, Any]]) -> str | None:
    """As a ``data:`` URL; None of what is no picture."""
    try:
        made = aside.call(thumbnail, content, SIZE, rows, seconds=SECONDS, what="the picture")
    except TallyError:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(made).decode()
