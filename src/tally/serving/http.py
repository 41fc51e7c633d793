"""HTTP/1.1 for the server of endpoints, on httptools: as little as possible between a socket and a replica.

One event loop serves all connections, and does nothing that takes long: bodies are passed on as they are, and
replicas read them; what came compressed is unpacked, in a thread if it is large. A request whose client has gone is
abandoned. What comes too slowly, or is too large, is refused.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import httptools

from tally.serving.encodings import ENCODINGS, TooLargeError, decoded

HEADERS_BYTES = 64 << 10
"""Bytes that the path and headers of one request may have."""
STALLED_SECONDS = 30.0
"""A request that has begun, and of which nothing more comes for so long, is refused."""
REQUEST_SECONDS = 600.0
"""How long a request may take to come in, and its answer to be taken."""
IDLE_SECONDS = 120.0
"""A connection without requests is closed after so long."""
SWEEP_SECONDS = 2.0
FIRST_SECONDS = 1.0
"""A client that has connected sends its first request within so long, or is not waited for at the end."""
LINGER_SECONDS = 1.0
"""How long what a refused client still sends is read, and forgotten."""
PIPELINED = 32
"""Requests of one connection that may wait behind each other, before nothing more of it is read."""

DECODED_AT_ONCE = 64 << 10, 1 << 20
"""Compressed bodies of so many bytes, out of which no more than so many come, are unpacked in the event loop: a
millisecond or two."""
DECODERS = 2
"""Threads that unpack larger ones."""

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}
_LINES = {status: f"HTTP/1.1 {status} {phrase}\r\n".encode() for status, phrase in _REASONS.items()}
_BREAKS = str.maketrans({"\r": " ", "\n": " ", "\0": " "})


class Exchange:
    """One request, and the way back for its answer.

    path: decoded, without the query. headers: names in lower case. encoding: of the body, while it is compressed.
    on_gone: called if the client goes before that.
    """

    __slots__ = (
        "_connection",
        "_keep_alive",
        "answered",
        "arrived",
        "body",
        "encoding",
        "headers",
        "method",
        "on_gone",
        "path",
        "query",
    )

    def __init__(self, connection: Connection, method: str, target: bytes, headers: dict[bytes, bytes]) -> None:
        if (
            not target.startswith(b"/") and b"://" in target
        ):  # as it is sent to proxies: servers take it, too (RFC 9112)
            target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
        path, _, query = target.partition(b"?")
        self._connection = connection
        self._keep_alive = True
        self.method = method
        self.path = (unquote_to_bytes(path) if b"%" in path else path).decode("utf-8", "replace")
        self.query = query.decode("latin-1")
        self.headers = headers
        self.body = b""
        self.encoding = ""
        self.answered = False
        self.arrived = time.monotonic()
        self.on_gone: Callable[[], None] | None = None

    def header(self, name: bytes) -> str | None:
        """A header's value; its name in lower case."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def answer(self, status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Send the answer; once."""
        if not self.answered:
            self.answered = True
            self.on_gone = None  # it knows the request, as this does: a circle, and Python would keep both for long
            self._connection.answer(self, status, body, headers)


class Server:
    """What connections have in common.

    handle: takes each request. max_body: bytes. draining: connections end with their next answer.
    """

    def __init__(self, handle: Callable[[Exchange], None], max_body: int) -> None:
        self.handle, self.max_body = handle, max_body
        self.connections: set[Connection] = set()
        self.draining = False
        self.accepted = time.monotonic()
        self._date = b""
        self._date_at = 0
        self._decoders: ThreadPoolExecutor | None = None

    def decode(self, exchange: Exchange) -> None:
        """Take a request once its body is unpacked, or refuse it; unless its client has gone meanwhile."""
        most, out = DECODED_AT_ONCE
        if len(exchange.body) <= most:
            try:
                self._take(exchange, decoded(exchange.body, exchange.encoding, min(out, self.max_body)))
                return
            except TooLargeError as error:
                if self.max_body <= out:
                    self._refuse(exchange, error)
                    return
            except ValueError as error:
                self._refuse(exchange, error)
                return
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(DECODERS, "tally-decode")
        unpacking = asyncio.get_running_loop().run_in_executor(
            self._decoders, decoded, exchange.body, exchange.encoding, self.max_body
        )

        def done(future: asyncio.Future[bytes]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if exchange.answered:
                return
            if error is None:
                self._take(exchange, future.result())
            else:
                self._refuse(exchange, error)

        def give_up() -> None:
            unpacking.cancel()

        exchange.on_gone = give_up
        unpacking.add_done_callback(done)

    def _take(self, exchange: Exchange, body: bytes) -> None:
        exchange.body, exchange.encoding, exchange.on_gone = body, "", None
        # What the model is told of the request is that of the body which it is given.
        exchange.headers.pop(b"content-encoding", None)
        exchange.headers.pop(b"transfer-encoding", None)
        exchange.headers[b"content-length"] = b"%d" % len(body)
        self.handle(exchange)

    def _refuse(self, exchange: Exchange, error: BaseException) -> None:
        if isinstance(error, TooLargeError):
            status, text = 413, f"a body may have {self.max_body:,} bytes, and this one has more once it is unpacked"
        else:
            status, text = 400, f"the body is not what Content-Encoding {exchange.encoding} says: {error}"
        exchange.answer(status, json.dumps({"error": text}).encode(), [("Content-Type", "application/json")])

    def date(self) -> bytes:
        """The Date header."""
        now = int(time.time())
        if now != self._date_at:
            self._date_at = now
            self._date = f"Date: {formatdate(now, usegmt=True)}\r\n".encode()
        return self._date

    async def sweep(self) -> None:
        """Close connections that keep us waiting, for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            for each in list(self.connections):
                each.look(now)


class Connection(asyncio.Protocol):
    """One client's connection. Requests are answered one after the other, in order."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._current: Exchange | None = None
        self._backlog: deque[Exchange] = deque()
        self._closing = False
        self._paused = False
        self._heard = self._begun_at = time.monotonic()
        self._reading = self._in_headers = False
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._encoding = ""
        self._refused: tuple[int, str] | None = None
        self._written_at: float | None = None
        self._ended = self._used = False

    # -- what asyncio calls -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)
        self._server.accepted = time.monotonic()

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._closing = True
        for exchange in (self._current, *self._backlog):
            if exchange is not None and not exchange.answered:
                exchange.answered = True
                gone, exchange.on_gone = exchange.on_gone, None
                if gone is not None:
                    gone()
        self._current = None
        self._backlog.clear()
        self._body.clear()
        self._parser = None

    def eof_received(self) -> bool:
        # A client that sends no more may still wait for its answers.
        self._ended = True
        waits = self._current is not None and not self._reading and not self._closing
        if waits and self._parser.get_http_version() == "1.1":
            self._find_out(0)
        return waits

    def _find_out(self, turn: int) -> None:
        """Whether the client has gone, or only sends no more, which looks alike: its system answers what is sent to a
        closed connection with a reset. So it is sent what clients pass over, and the reset looked for."""
        if self._transport is None or self._closing or self._current is None:
            return
        if turn == 0:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
            return
        asyncio.get_running_loop().call_later(min(0.01 * 2**turn, 1.0), self._find_out, turn + 1)

    def data_received(self, data: bytes) -> None:
        if self._closing or self._parser is None:
            return
        self._heard = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError:
            status, text = self._refused or (400, "the request cannot be read")
            self._fail(status, text)
        except httptools.HttpParserError as error:
            self._fail(400, f"this is no HTTP request: {error}")

    def _stay(self, rest: bytes) -> None:
        """Take a request that offers another protocol as one of this: who offers has to live with that (RFC 9110).
        The parser leaves its body unread, so another one is told of the request without the offer."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._fail(400, "this server does not speak other protocols on the same connection")
            return
        lines = [b"%s %s HTTP/%s" % (method, self._target, self._parser.get_http_version().encode())]
        keeps = self._parser.should_keep_alive()
        for name, value in self._headers.items():
            if name not in (b"upgrade", b"connection", b"expect"):
                lines.append(name + b": " + value)
        lines.append(b"connection: keep-alive" if keeps else b"connection: close")
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def pause_writing(self) -> None:
        self._written_at = time.monotonic()

    def resume_writing(self) -> None:
        self._written_at = None

    # -- what httptools calls ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._used = True
        self._begun_at = time.monotonic()
        self._reading = self._in_headers = True
        self._target, self._headers, self._header_bytes = b"", {}, 0
        self._body, self._body_bytes = [], 0

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if not self._in_headers:  # a trailer: what proxies have let through as no header is none here
            return
        name = name.lower()
        before = self._headers.get(name)
        self._headers[name] = value if before is None else before + b", " + value

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADERS_BYTES:
            self._refuse(431, f"path and headers may have {HEADERS_BYTES:,} bytes")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        length = self._headers.get(b"content-length")
        if length is not None and (not length.isdigit() or int(length) > self._server.max_body):
            self._refuse(
                413, f"a body may have {self._server.max_body:,} bytes, and this one has {length.decode('latin-1')}"
            )
        transfer = self._headers.get(b"transfer-encoding", b"chunked").strip().lower()
        if transfer != b"chunked":
            self._refuse(
                501, f"bodies are not read with Transfer-Encoding {transfer.decode('latin-1')}; send them chunked"
            )
        encoding = self._headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        self._encoding = "" if encoding == "identity" else encoding
        if self._encoding and self._encoding not in ENCODINGS:
            self._refuse(
                415, f"bodies are not read with Content-Encoding {encoding}; send them as they are, in gzip or deflate"
            )
        if self._headers.get(b"expect", b"").lower() == b"100-continue" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._server.max_body:
            self._refuse(413, f"a body may have {self._server.max_body:,} bytes, and this one has more")
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        self._reading = False
        exchange = Exchange(self, self._parser.get_method().decode("ascii"), self._target, self._headers)
        exchange._keep_alive = self._parser.should_keep_alive()
        body = self._body
        exchange.body = body[0] if len(body) == 1 else b"".join(body)
        if exchange.body:
            exchange.encoding = self._encoding
        self._body = []
        if self._current is None:
            self._begin(exchange)
            return
        self._backlog.append(exchange)
        if len(self._backlog) >= PIPELINED and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _refuse(self, status: int, text: str) -> None:
        """End reading; httptools passes the exception on as an error of a callback."""
        self._refused = status, text
        raise ValueError(text)

    # -- answers ----------------------------------------------------------------------------------------

    def _begin(self, exchange: Exchange) -> None:
        self._current = exchange
        if exchange.encoding:
            self._server.decode(exchange)
        else:
            self._server.handle(exchange)

    def answer(self, exchange: Exchange, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
        """Write an exchange's answer, and take the next one."""
        if self._transport is None or self._closing:
            return
        closes = not exchange._keep_alive or self._server.draining or (self._ended and not self._backlog)
        bodiless = status in (204, 304) or status < 200
        parts = [_LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode(), self._server.date()]
        for name, value in headers:
            parts.append(f"{name}: {value}".translate(_BREAKS).encode("latin-1", "replace") + b"\r\n")
        if not bodiless:
            parts.append(b"Content-Length: %d\r\n" % len(body))
        parts.append(b"Connection: close\r\n\r\n" if closes else b"\r\n")
        if body and not bodiless and exchange.method != "HEAD":
            parts.append(body)
        self._transport.write(b"".join(parts))
        self._current = None
        self._heard = time.monotonic()
        if closes:
            self._close()
        elif self._backlog:
            self._begin(self._backlog.popleft())
        if self._paused and len(self._backlog) < PIPELINED // 2 and not self._closing:
            self._paused = False
            self._transport.resume_reading()

    def _fail(self, status: int, text: str) -> None:
        """Refuse what cannot be read, after what was read has been answered, and close."""
        if self._current is not None:  # its answer comes first, and cannot be told from this one if it comes later
            self._close()
            return
        if self._transport is None or self._closing:
            return
        self._closing = True
        body = json.dumps({"error": text}).encode()
        head = b"Content-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        self._transport.write(_LINES[status] + self._server.date() + head + body)
        # A client that still sends would be told of a broken connection, and not read why.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)

    def _close(self) -> None:
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def drain(self) -> None:
        """Close the connection if nothing is in work. A new one is given time for its first request; any other ends
        with its next answer."""
        waited = time.monotonic() - self._heard
        if self._current is None and not self._reading and (self._used or waited > FIRST_SECONDS):
            self._close()

    def look(self, now: float) -> None:
        """Close the connection if it keeps us waiting."""
        if self._transport is None:
            return
        if self._written_at is not None and now - self._written_at > STALLED_SECONDS:
            self._transport.abort()
        elif self._reading and (now - self._heard > STALLED_SECONDS or now - self._begun_at > REQUEST_SECONDS):
            self._fail(408, "the request came too slowly")
        elif self._current is None and not self._reading and now - self._heard > IDLE_SECONDS:
            self._close()
