"""Connections of an endpoint's server, with real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

uvloop = pytest.importorskip("uvloop")
pytest.importorskip("httptools")

from tally.serving.http import Connection, Exchange, Server  # noqa: E402

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REQUEST = b"POST /score HTTP/1.%d\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
PATIENCE = 60.0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("minor", [1, 0])
def test_who_sends_no_more_is_answered_and_who_has_gone_is_not_waited_for(minor: int) -> None:
    """Both look alike: clients that have lost their patience close their end as well."""
    asked: list[Exchange] = []
    gone: list[Exchange] = []

    def handle(exchange: Exchange) -> None:
        exchange.on_gone = lambda: gone.append(exchange)
        asked.append(exchange)

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        server = Server(handle, 1000)
        serving = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0)
        address = serving.sockets[0].getsockname()

        def send() -> socket.socket:
            client = socket.create_connection(address, timeout=PATIENCE)
            client.sendall(REQUEST % minor)
            return client

        waiting = send()
        waiting.shutdown(socket.SHUT_WR)
        await until(lambda: len(asked) == 1)
        if minor == 1:
            (send()).close()
            await until(lambda: len(gone) == 1)
            assert gone == asked[1:]
        await asyncio.sleep(0)
        asked[0].answer(200, b"answer")

        def receive() -> bytes:
            with waiting:
                return b"".join(iter(lambda: waiting.recv(4096), b""))

        received = await asyncio.to_thread(receive)
        serving.close()
        return received

    received = uvloop.run(main())
    assert received.startswith(CONTINUE + b"HTTP/1.1 200 OK\r\n" if minor == 1 else b"HTTP/1.1 200 OK\r\n"), received
    assert received.endswith(b"\r\n\r\nanswer")
