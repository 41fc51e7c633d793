"""A storage service that misbehaves: a proxy of this machine in front of a good one.

    with moto_s3() as s3, FaultyProxy(s3.url) as proxy:
        proxy.inject("cut", match="GET .*photo")     # the next such request
        proxy.random(0.05, seed=7)                   # and one in twenty of all others
        ...
        assert proxy.injected["cut"] == 1

Requests go through unchanged, the ``Host`` header too, so that signatures stay valid.
"""

from __future__ import annotations

import random
import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

KINDS = ("500", "503", "429", "cut", "late-cut", "stall", "stall-body")
"""What can go wrong with a request:

- ``500``, ``503``, ``429``: answered so, and the server never hears of it.
- ``cut``: the connection is reset in the middle of the request's content (the server never hears of it) or,
  for a request without content, closed in the middle of the answer's (before the answer, where that has none).
- ``late-cut``: the server does what is asked, and the connection is reset before the answer.
- ``stall``: nothing is answered, and the server never hears of it, until the client gives up.
- ``stall-body``: the answer stops in the middle, until the client gives up.
"""

BRIEF = ("500", "503", "429", "cut", "late-cut")
"""The kinds that end at once; a stall ends with the client's patience."""

_BLOCK = 1 << 16
_CODES = {"500": "InternalError", "503": "SlowDown", "429": "TooManyRequests"}
_PHRASES = {"500": "Internal Server Error", "503": "Slow Down", "429": "Too Many Requests"}


class _Closed(Exception):
    """One side ended the connection."""


@dataclass
class _Fault:
    kind: str
    left: int
    match: re.Pattern[str] | None
    seconds: float | None


@dataclass
class _Storm:
    chance: random.Random
    rate: float
    kinds: Sequence[str]
    left: int | None
    match: re.Pattern[str] | None


class FaultyProxy:
    """An HTTP proxy in front of ``upstream`` ("http://host:port") that injects faults. Threaded; a context manager.

    url: where clients connect ("http://127.0.0.1:port", with the upstream's path).
    upstream: may be changed while it runs; a server that is away is answered for with 503.
    injected: how many faults of each kind happened.
    requests: "METHOD /path?query" of every request, in order of arrival, retries too.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.injected: Counter[str] = Counter()
        self.requests: list[str] = []
        self._faults: list[_Fault] = []
        self._storm: _Storm | None = None
        self._changed = threading.Condition()
        self._ending = False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}{urlsplit(upstream).path}"

    def inject(self, kind: str, count: int = 1, match: str | None = None, seconds: float | None = None) -> None:
        """The next ``count`` requests fail so; with ``match``, those in whose "METHOD /path?query" the regex is found.

        seconds: a stall's end, where the client has not given up before; the connection is closed then.
        """
        assert kind in KINDS
        with self._changed:
            self._faults.append(_Fault(kind, count, re.compile(match) if match else None, seconds))

    def random(
        self,
        rate: float,
        seed: int = 0,
        kinds: Sequence[str] = BRIEF,
        most: int | None = None,
        match: str | None = None,
    ) -> None:
        """From now on each request fails with a chance of ``rate`` (0 to 1), ``most`` of them in all."""
        assert set(kinds) <= set(KINDS)
        with self._changed:
            pattern = re.compile(match) if match else None
            self._storm = _Storm(random.Random(seed), rate, tuple(kinds), most, pattern)

    def calm(self) -> None:
        """No fault from now on; those under way go on."""
        with self._changed:
            self._faults.clear()
            self._storm = None

    def wait(self, kind: str, count: int = 1, seconds: float = 60) -> None:
        """Until ``count`` faults of this kind began. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.injected[kind] >= count, seconds):
                raise TimeoutError(f"{self.injected[kind]} of {count} faults {kind!r} happened in {seconds} s")

    def count(self, match: str) -> int:
        """How many requests so far have this regex in their "METHOD /path?query"."""
        with self._changed:
            return sum(re.search(match, request) is not None for request in self.requests)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        for thread in list(self._threads):
            thread.join(30)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    @contextmanager
    def _kept(self, connection: socket.socket) -> Iterator[_Stream]:
        """Closed at the end, and shut down where the proxy ends before."""
        with connection:
            with self._changed:
                self._open.add(connection)
                ending = self._ending
            try:
                if not ending:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    yield _Stream(connection)
            finally:
                with self._changed:
                    self._open.discard(connection)

    def _serve(self, connection: socket.socket) -> None:
        with suppress(_Closed, OSError, RuntimeError), self._kept(connection) as client:
            while self._answer(client):
                pass

    def _drawn(self, request: str) -> _Fault | None:
        """The fault that happens to this request, if one does."""
        with self._changed:
            self.requests.append(request)
            for fault in self._faults:
                if fault.left and (fault.match is None or fault.match.search(request)):
                    fault.left -= 1
                    return self._happened(fault)
            storm = self._storm
            if storm is None or storm.left == 0 or (storm.match and not storm.match.search(request)):
                return None
            if storm.chance.random() >= storm.rate:
                return None
            if storm.left is not None:
                storm.left -= 1
            return self._happened(_Fault(storm.chance.choice(storm.kinds), 0, None, None))

    def _happened(self, fault: _Fault) -> _Fault:
        self.injected[fault.kind] += 1
        self._changed.notify_all()
        return fault

    def _answer(self, client: _Stream) -> bool:
        """One request. False when the connection is of no further use."""
        head = client.head()
        if head is None:
            return False
        method, target = head.first.split(" ")[:2]
        fault = self._drawn(f"{method} {target}")
        kind = fault.kind if fault else ""
        content = head.length is None or head.length > 0
        if head.get("expect"):
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind in _CODES:
            client.relay(head, None)
            _refuse(client, method, kind)
            return True
        if fault and kind == "stall":
            client.relay(head, None)
            return self._stall(client, fault)
        if kind == "cut" and content:
            client.relay(head, None, half=True)
            client.reset()
            return False
        place = urlsplit(self.upstream)
        assert place.hostname
        try:
            server_connection = socket.create_connection((place.hostname, place.port or 80), timeout=60)
        except OSError:
            client.relay(head, None)
            _refuse(client, method, "503")
            return True
        with self._kept(server_connection) as server:
            # One connection for one request: none is idle, and closed by the server, when it is needed.
            server.send(head.without("connection", "expect", more=("Connection: close",)))
            client.relay(head, server)
            answer = server.head()
            while answer is not None and answer.first.split(" ")[1].startswith("1"):
                answer = server.head()
            if answer is None:
                return False
            if method == "HEAD" or answer.first.split(" ")[1] in ("204", "304"):
                answer.length = 0
            elif answer.length == -1:  # until the server closes
                answer.length = _ENDLESS
            if kind == "late-cut":
                server.relay(answer, None)
                client.reset()
                return False
            if kind == "cut" and answer.length == 0:
                return False
            closing = answer.length == _ENDLESS
            client.send(answer.without("connection", more=("Connection: close",) if closing else ()))
            server.relay(answer, client, half=kind in ("cut", "stall-body"))
            if fault and kind == "stall-body":
                return self._stall(client, fault)
        return not closing and kind != "cut"

    def _stall(self, client: _Stream, fault: _Fault) -> bool:
        """Silence, until the client closes the connection or the time is up."""
        until = None if fault.seconds is None else time.monotonic() + fault.seconds
        while not self._ending and (until is None or time.monotonic() < until):
            readable, _, _ = select.select([client.connection], [], [], 0.2)
            if readable:
                client.receive()  # raises where it was closed
        return False


_ENDLESS = 1 << 62


class _Head:
    """The first lines of a message. ``length``: of its content; None: in chunks; -1: nothing is said."""

    def __init__(self, data: bytes) -> None:
        self.first, *self.lines = data.decode("latin-1").split("\r\n")
        self.length: int | None = -1
        if "chunked" in self.get("transfer-encoding").lower():
            self.length = None
        elif length := self.get("content-length"):
            self.length = int(length)
        elif not self.first.startswith("HTTP/"):
            self.length = 0

    def get(self, name: str) -> str:
        for line in self.lines:
            key, _, value = line.partition(":")
            if key.strip().lower() == name:
                return value.strip()
        return ""

    def without(self, *names: str, more: Sequence[str] = ()) -> bytes:
        kept = [line for line in self.lines if line.partition(":")[0].strip().lower() not in names]
        return "\r\n".join([self.first, *kept, *more, "", ""]).encode("latin-1")


class _Stream:
    """A connection, and what was received of it and not used yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._pending = b""

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def receive(self) -> None:
        block = self.connection.recv(_BLOCK)
        if not block:
            raise _Closed
        self._pending += block

    def head(self) -> _Head | None:
        """None where the connection was closed instead."""
        try:
            return _Head(self._until(b"\r\n\r\n")[:-4])
        except _Closed:
            return None

    def _until(self, end: bytes) -> bytes:
        while end not in self._pending:
            self.receive()
        data, _, self._pending = self._pending.partition(end)
        return data + end

    def relay(self, head: _Head, to: _Stream | None, half: bool = False) -> None:
        """Pass the content on, or drop it. half: stop in the middle."""
        if head.length is None:
            self._relay_chunks(to, half)
        elif head.length == _ENDLESS and half:
            self._pass(1, to)
        elif head.length == _ENDLESS:
            with suppress(_Closed):
                self._pass(_ENDLESS, to)
        else:
            self._pass(head.length // 2 if half else max(head.length, 0), to)

    def _relay_chunks(self, to: _Stream | None, half: bool) -> None:
        while True:
            line = self._until(b"\r\n")
            length = int(line.split(b";")[0], 16)
            if to is not None:
                to.send(line)
            if half:
                self._pass(length // 2, to)
                return
            self._pass(length + 2, to)
            if length == 0:
                return

    def _pass(self, length: int, to: _Stream | None) -> None:
        while length > 0:
            if not self._pending:
                self.receive()
            data, self._pending = self._pending[:length], self._pending[length:]
            length -= len(data)
            if to is not None:
                to.send(data)

    def reset(self) -> None:
        """Closed without a farewell, as by a host that went away."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _refuse(client: _Stream, method: str, status: str) -> None:
    code = _CODES[status]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    head = (
        f"HTTP/1.1 {status} {_PHRASES[status]}\r\nContent-Type: application/xml\r\n"
        f"x-ms-error-code: {code}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client.send(head.encode() + (b"" if method == "HEAD" else body))
