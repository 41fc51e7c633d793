"""A load test that tells the truth: also about itself.

So many clients send one request after the other, each over a connection of its own. With a ``rate``, requests are due
at fixed times instead, and a latency counts from when its request was due: a server that is late with one is late with
all behind it. Before the test, the same clients are let loose on a server that does nothing, in a process of its own:
what they reach there is what this generator can show at most.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

from tally.serving.requests import EndpointRequest, cannot_be_asked

LIMIT_SECONDS = 1.5
"""How long the generator's own limit is measured."""
NEAR_LIMIT = 0.7
"""From this share of its limit on, the generator and not the server may be what is slow."""


@dataclass(slots=True)
class LoadReport:
    """latencies: seconds, sorted, of requests that were answered with status 200. statuses, errors: how many of each.

    limit: requests a second that the generator reached alone; None where it was not measured.
    """

    seconds: float
    concurrency: int
    latencies: list[float]
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    limit: float | None = None

    @property
    def rate(self) -> float:
        """Requests a second that were answered with status 200."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, share: float) -> float:
        """The latency, in seconds, within which this share of the requests was answered."""
        if not self.latencies:
            return float("nan")
        return self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))]

    @property
    def near_limit(self) -> bool:
        """Whether the generator may be what is slow."""
        return self.limit is not None and self.rate > NEAR_LIMIT * self.limit


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[int] | None = None
        self._transport: Any = None
        self.reusable = True
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed before the answer"))

    async def ask(self, request: bytes) -> int:
        self.body = b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _Load:
    def __init__(self, request: EndpointRequest, key: str | None, timeout: float) -> None:
        parts = urlsplit(request.url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._tls else 80)
        self._name = parts.hostname if self._tls else None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc.rpartition("@")[2], "Content-Length": str(len(request.body)), **request.headers}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._request = head.encode("latin-1") + b"\r\n" + request.body
        self._timeout = timeout
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()

    async def connect(self) -> _Client:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(
            _Client, self._host, self._port, ssl=self._tls, server_hostname=self._name
        )
        return client

    async def client(self, due: Iterable[float], until: float) -> None:
        """Send requests until then. due: when each is due, of ``time.monotonic()``; 0 for as soon as possible."""
        client: _Client | None = None
        for moment in due:
            now = time.monotonic()
            if max(now, moment) >= until:
                break
            if moment > now:
                await asyncio.sleep(moment - now)
            begun = moment or now
            try:
                async with asyncio.timeout(self._timeout):
                    if client is None or not client.reusable:
                        client = await self.connect()
                    status = await client.ask(self._request)
            except TimeoutError:
                self.errors["no answer in time"] += 1
            except (OSError, httptools.HttpParserError) as error:
                self.errors[type(error).__name__] += 1
                await asyncio.sleep(0.01)
            else:
                self.statuses[status] += 1
                if status == 200:
                    self.latencies.append(time.monotonic() - begun)
                continue
            if client is not None:
                client.close()
                client = None
        if client is not None:
            client.close()


def _as_soon_as_possible() -> Iterable[float]:
    while True:
        yield 0.0


def _at_rate(begin: float, number: int, concurrency: int, rate: float) -> Iterable[float]:
    at = begin + number / rate
    while True:
        yield at
        at += concurrency / rate


async def _reach(request: EndpointRequest, timeout: float) -> None:
    """Raises ServerAwayError unless a connection can be made."""
    try:
        async with asyncio.timeout(timeout):
            (await _Load(request, None, timeout).connect()).close()
    except OSError as error:  # TimeoutError is one
        raise cannot_be_asked(request.url, error) from None


async def _run(
    request: EndpointRequest, key: str | None, concurrency: int, seconds: float, rate: float | None, timeout: float
) -> LoadReport:
    load = _Load(request, key, timeout)
    begin = time.monotonic()
    until = begin + seconds
    await asyncio.gather(
        *(
            load.client(_as_soon_as_possible() if rate is None else _at_rate(begin, number, concurrency, rate), until)
            for number in range(concurrency)
        )
    )
    took = time.monotonic() - begin
    return LoadReport(took, concurrency, sorted(load.latencies), load.statuses, load.errors)


def load(
    request: EndpointRequest,
    *,
    key: str | None = None,
    concurrency: int = 16,
    seconds: float = 10.0,
    rate: float | None = None,
    timeout: float = 60.0,
    own_limit: bool = True,
) -> LoadReport:
    """Send the request again and again, and say how it was answered.

    rate: requests a second; by default, as many as are answered. timeout: seconds to wait for one answer.
    own_limit: measure what the generator can reach, too.
    Raises ServerAwayError where nobody listens.
    """
    uvloop.run(_reach(request, timeout))
    limit = measure_limit(request, concurrency) if own_limit else None
    report = uvloop.run(_run(request, key, concurrency, seconds, rate, timeout))
    report.limit = limit
    return report


# ----------------------------------------------------------------------------------- the generator's limit


class _Nothing(asyncio.Protocol):
    """Answers each request at once."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")


def do_nothing(listener: socket.socket) -> None:
    """Answer every request at once, for ever."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Nothing, sock=listener)
        await server.serve_forever()

    uvloop.run(serve())


def measure_limit(request: EndpointRequest, concurrency: int, seconds: float = LIMIT_SECONDS) -> float:
    """Requests a second that this generator reaches against a server that does nothing."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    process = multiprocessing.get_context("fork").Process(target=do_nothing, args=(listener,), daemon=True)
    process.start()
    port = listener.getsockname()[1]
    listener.close()
    try:
        idle = EndpointRequest(f"http://127.0.0.1:{port}/", request.body, request.headers)
        return uvloop.run(_run(idle, None, concurrency, seconds, None, 10.0)).rate
    finally:
        process.kill()
        process.join()


def told(report: LoadReport) -> Sequence[str]:
    """The report as lines for people."""
    total = sum(report.statuses.values()) + sum(report.errors.values())
    lines = [
        f"{report.rate:,.1f} requests/s answered with 200, {report.concurrency} clients, {report.seconds:.1f} s",
    ]
    if report.latencies:
        marks = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
        lines.append("latency  " + "  ".join(f"{n} {report.percentile(share) * 1000:,.2f} ms" for n, share in marks))
    failed = [f"{count:,} × status {status}" for status, count in sorted(report.statuses.items()) if status != 200]
    failed += [f"{count:,} × {what}" for what, count in sorted(report.errors.items())]
    lines.append(f"{total:,} requests, {'; '.join(failed) or 'no error'}")
    if report.limit is not None:
        lines.append(f"this generator alone reaches {report.limit:,.0f} requests/s against a server that does nothing")
        if report.near_limit:
            lines.append("that is near: the server may be faster than shown here; use a generator in C, or several")
    return lines
