"""Sending signed JSON to a web address, as the Standard Webhooks specification 1.0 describes it.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

The address may itself be a secret, as everybody who knows it may post there. So messages and logs show only its scheme
and host, and requests are made with the standard library's client: others log the path.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

import tally
from tally.config import variable
from tally.errors import SpecError
from tally.processes import withhold
from tally.text import visible

if TYPE_CHECKING:
    from http.client import HTTPConnection

SECRET = "TALLY_WEBHOOK_SECRET"  # noqa: S105  # the name of the variable
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
"""Limit from the connection to the answer's status, even if single bytes keep arriving."""

_GONE = 410
_MOST_READ = 2000
"""Bytes that are read of an answer."""
_PREFIX = "whsec_"
_SHORTEST = 24
"""Bytes of a secret, by the specification."""


class UndeliveredError(Exception):
    """The receiver did not accept the message; this says why. ``final``: it must not be sent again."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def checked(webhook: str) -> str:
    """The webhook as given, if it is an http(s) address or ``env:NAME``. Raises ValueError, which does not show it."""
    if webhook.startswith("env:"):
        if not webhook[4:].isidentifier():
            raise ValueError("env: has to name an environment variable, such as env:ALERT_URL")
        withhold(webhook[4:])
        return webhook
    _split(webhook)
    return webhook


def shown(webhook: str) -> str:
    """The part that may be shown: scheme, host and port, or the variable's name."""
    if webhook.startswith("env:"):
        return webhook
    try:
        parts = _split(webhook)
    except ValueError:
        return "(no web address)"
    return f"{parts.scheme}://{parts.netloc}"


def address(webhook: str) -> str:
    """The web address, from the environment if it is there. Raises SpecError."""
    name = webhook[4:] if webhook.startswith("env:") else None
    found = webhook if name is None else (variable(name) or "").strip()
    if name is not None and not found:
        raise SpecError(f"the webhook is {webhook}, and {name} is not set", hint=f"Set {name} to the web address.")
    try:
        _split(found)
    except ValueError as error:
        raise SpecError(f"the webhook {f'in {name} ' if name else ''}{error}") from None
    return found


def has_secret() -> bool:
    """Whether there is a key to sign with."""
    return bool((variable(SECRET) or "").strip())


def secret() -> bytes:
    """The key that bodies are signed with, from the environment. Raises SpecError."""
    given = (variable(SECRET) or "").strip()
    hint = f"Make one, and give it to the receiver too: export {SECRET}={_PREFIX}$(openssl rand -base64 32)"
    if not given:
        raise SpecError(f"a webhook is signed, and {SECRET} is not set", hint=hint)
    try:
        key = base64.b64decode(given.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not given.startswith(_PREFIX) or len(key) < _SHORTEST:
        raise SpecError(f"{SECRET} is not {_PREFIX} and at least {_SHORTEST} bytes in base64", hint=hint)
    return key


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``. timestamp: seconds since the epoch, of this try."""
    signed = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return "v1," + base64.b64encode(signed).decode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a receiver said. text: the beginning of what it says about a request that it did not accept.
    retry_after: seconds that it asks for, if it does."""

    status: int
    text: str = ""
    retry_after: float = 0.0


def post(url: str, key: bytes, message_id: str, body: bytes) -> None:
    """Send the JSON ``body`` once. Raises UndeliveredError unless the answer's status is 2xx."""
    status = send(url, body, message_id, key=key).status
    if 200 <= status < 300:
        return
    why = ": redirects are not followed" if 300 <= status < 400 else ""
    raise UndeliveredError(f"answered {status}{why}", final=status == _GONE)


def send(
    url: str, body: bytes, message_id: str, *, key: bytes | None, headers: Mapping[str, str] | None = None
) -> Answer:
    """Post JSON once, signed if there is a key. TLS is verified, redirects are not followed, proxies are not used.

    Raises UndeliveredError where there is no answer.
    """
    parts = urlsplit(url)
    timestamp = int(time.time())
    sent = {
        **(headers or {}),
        "content-type": "application/json",
        "user-agent": f"tally/{tally.__version__}",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
    }
    if key is not None:
        sent["webhook-signature"] = signature(key, message_id, timestamp, body)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _answer(_connection(parts), target, body, sent)


def _answer(connection: HTTPConnection, target: str, body: bytes, headers: Mapping[str, str]) -> Answer:
    import socket
    from http.client import HTTPException

    def hang_up() -> None:
        with suppress(OSError, AttributeError):  # it may be closed already
            connection.sock.shutdown(socket.SHUT_RDWR)

    # The socket's own timeout starts again with each byte.
    timer = threading.Timer(ANSWER_SECONDS, hang_up)
    timer.daemon = True
    until = float("inf")
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
        until = time.monotonic() + ANSWER_SECONDS
        timer.start()
        connection.request("POST", target, body, headers)
        answer = connection.getresponse()
        if 200 <= answer.status < 400:
            return Answer(answer.status)
        after = answer.getheader("retry-after", "")
        text = answer.read(_MOST_READ).decode("utf-8", "replace")
        return Answer(answer.status, visible(" ".join(text.split())), float(after) if after.isdigit() else 0.0)
    except (OSError, HTTPException, ValueError) as error:
        late = time.monotonic() >= until
        raise UndeliveredError(f"no answer within {ANSWER_SECONDS:g} s" if late else _reason(error)) from None
    finally:
        timer.cancel()
        connection.close()


def _reason(error: Exception) -> str:
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return f"no HTTP answer ({type(error).__name__})"


def _connection(parts: SplitResult) -> HTTPConnection:
    import ssl

    from tally.network import HTTPConnection, HTTPSConnection  # which hosts may be told is checked there

    host = parts.hostname or ""
    # Without a port, http.client would take the end of an address of IPv6 for it.
    if parts.scheme == "http":
        return HTTPConnection(host, parts.port or HTTPConnection.default_port, timeout=CONNECT_SECONDS)
    context = ssl.create_default_context()
    return HTTPSConnection(host, parts.port or HTTPSConnection.default_port, timeout=CONNECT_SECONDS, context=context)


def _split(url: str) -> SplitResult:
    """Raises ValueError for anything that is not an address to post to; the message shows nothing of it."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("should be an address such as https://example.com/hook, or env:NAME")
    if "@" in parts.netloc:
        raise ValueError("should hold no user and password: they are not sent")
    return parts
