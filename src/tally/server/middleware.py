"""What every answer gets, whatever route gave it: security headers, a size limit, a line in the audit log."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from tally.errors import RefusedError, TallyError
from tally.server.errors import answer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tally.server.auth.audit import AuditLog

log = logging.getLogger("tally")

MAX_BODY = 1 << 20
"""Bytes of a request's body; uploads have a limit of their own."""

ENDING_SECONDS = 5.0
"""After which it may be worth asking again, of a server that ends; nor does it wait longer for what it has in hand."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
POLICY_OF_FILES = (
    "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'"
)
"""Of pictures and videos opened on their own: browsers put those into a page of theirs, with styles in it."""
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class SecurityHeaders:
    """Adds the headers that keep a browser from running or framing what is not ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not scope["path"].startswith("/static/"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


class InHand:
    """The requests that are being answered. A server that has told them to end waits for them before its process ends:
    their answers, and the lines that they write to the audit log, would be lost."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def ended(self) -> None:
        """When none is left, or ENDING_SECONDS have passed."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none.wait(), ENDING_SECONDS)


class Ending:
    """Answers what is still in hand when the server has waited for long enough, and ends: 503. An answer that has begun
    is broken off, so that nobody takes it for whole."""

    def __init__(self, app: ASGIApp, *, in_hand: InHand) -> None:
        self._app, self._in_hand = app, in_hand

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        with self._in_hand:
            try:
                await self._app(scope, receive, noting)
            except asyncio.CancelledError:
                if begun:
                    raise
                await answer(RefusedError(503, "the server ends", retry_after=ENDING_SECONDS))(scope, receive, send)


class NoCancelled(logging.Filter):
    """Drops the tracebacks of answers that were broken off as the server ends: how many there are is said before."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class BodyLimit:
    """Refuses a body that is larger than its route takes, whether its length was announced or not."""

    def __init__(self, app: ASGIApp, *, limits: dict[str, int] | None = None) -> None:
        self._app, self._limits = app, limits or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limits.get(scope["path"], MAX_BODY)
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced) > limit:
            await answer(_too_large(limit))(scope, receive, send)
            return
        got, refused = 0, False

        async def counted() -> Message:
            nonlocal got, refused
            message = await receive()
            got += len(message.get("body", b""))
            if got > limit:
                refused = True
                raise _too_large(limit)
            return message

        async def unless_refused(message: Message) -> None:
            # Whoever reads the body may turn the error into an answer of its own.
            if not refused:
                await send(message)
            elif message["type"] == "http.response.start":
                await answer(_too_large(limit))(scope, receive, send)

        await self._app(scope, counted, unless_refused)


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"the request is larger than {limit:,} bytes")


class Audited:
    """Writes who changed what. A change whose line cannot be written is answered all the same: it has happened."""

    def __init__(self, app: ASGIApp, *, audit: AuditLog) -> None:
        self._app, self._audit = app, audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            client = scope.get("client")
            try:
                await asyncio.to_thread(
                    self._audit.write,
                    scope.get("state", {}).get("principal"),
                    action=getattr(scope.get("endpoint"), "__name__", ""),
                    target=f"{scope['method']} {scope['path']}",
                    status=status,
                    address=client[0] if client else "unknown",
                )
            except TallyError as error:
                log.error("the audit log could not be written: %s", error)
