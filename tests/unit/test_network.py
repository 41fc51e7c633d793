"""What a server has started connects to public addresses and allowed hosts only, whatever a name leads to by then."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tally import network
from tally.alerts.webhook import UndeliveredError, _connection, post
from tally.errors import ModelNotFoundError, SpecError
from tally.models import web
from tally.network import ALLOWED, PrivateAddressError, create_connection, refusal, restrict

Answers = Callable[[str], list[str]]


@pytest.fixture(autouse=True)
def unrestricted_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "")  # so that it is put back
    monkeypatch.delenv(ALLOWED)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Has names lead to addresses, to the next one at each look-up; returns what was looked up."""

    def set_up(**names: list[str]) -> list[str]:
        looked_up: list[str] = []
        real = socket.getaddrinfo

        def lookup(host: Any, port: Any, *options: Any, **more: Any) -> Any:
            known = names.get(str(host).replace(".", "_"))
            if known is None:
                return real(host, port, *options, **more)
            looked_up.append(str(host))
            address = known.pop(0) if len(known) > 1 else known[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        return looked_up

    return set_up


@pytest.fixture
def inside() -> Iterator[tuple[int, list[str]]]:
    """A server of this machine that must not be reached: its port, and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1], asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "::1",
        "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "224.0.0.1", "255.255.255.255",
        "::127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::808:808", "fec0::1", "5f00::1",
        "192.0.0.192", "::ffff:192.0.0.192", "168.63.129.16", "2001:0:7f00:1::", "ff02::1",
    ],
)  # fmt: skip
def test_private_addresses_are_refused(address: str) -> None:
    assert refusal(address, 80) is None
    restrict([])
    assert "is a private address" in (refusal(address, 80) or "")
    with pytest.raises(PrivateAddressError):
        create_connection((address, 9), timeout=1)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::8.8.8.8"])
def test_public_addresses_are_not(address: str) -> None:
    restrict([])
    assert refusal(address, 80) is None


@pytest.mark.parametrize(("url", "port"), [("http://[::1]/hook", 80), ("https://[::1]/", 443), ("http://[::1]:8/", 8)])
def test_the_end_of_an_address_is_no_port(url: str, port: int) -> None:
    connection = _connection(urlsplit(url))
    assert (connection.host, connection.port) == ("::1", port)


def test_allowed_hosts_are_reached(inside: tuple[int, list[str]], resolve: Callable[..., list[str]]) -> None:
    resolve(broker_internal=["127.0.0.1"])
    restrict(["Broker.Internal"])
    create_connection(("broker.internal", inside[0]), timeout=5).close()
    with pytest.raises(PrivateAddressError):
        create_connection(("localhost", inside[0]), timeout=5)
    assert refusal("no-such-host.invalid", 80) == "'no-such-host.invalid' cannot be found"


def test_servers_of_kafka_are_allowed_ones(resolve: Callable[..., list[str]]) -> None:
    """The first says where the others are, and the client goes there unchecked."""
    pytest.importorskip("fastapi")
    from tally.server.places import check_places

    resolve(kafka_internal=["10.0.0.1"])
    check_places([("source", "kafka://1.1.1.1/topic")], ())  # nothing is restricted
    restrict(["Kafka.Internal"])
    check_places([("source", "kafkas://me@kafka.internal:9093/topic")], ())
    for url in ("kafka://1.1.1.1/topic", "KAFKAS://kafka.internal:9093,1.1.1.1:9093/topic"):
        with pytest.raises(SpecError, match=r"the host '1\.1\.1\.1' would say where else to connect"):
            check_places([("source", url)], ())


def test_a_name_that_leads_elsewhere_by_then_leads_nowhere(
    inside: tuple[int, list[str]], resolve: Callable[..., list[str]], tmp_path: Path
) -> None:
    pytest.importorskip("fastapi")
    from tally.jobs.spec import make
    from tally.server.auth.roles import Principal
    from tally.server.places import check

    who = Principal("ada", "operator", "1")
    restrict([])
    looked_up = resolve(rebinding_test=["1.1.1.1", "127.0.0.1"])
    url = f"https://rebinding.test:{inside[0]}/m.onnx"
    check(make(source="s3://b/in", model=url, out="s3://b/out"), (), who)  # the first time it is public
    with pytest.raises(ModelNotFoundError, match="is a private address"):
        web.fetch(url, tmp_path / "m")
    with pytest.raises(SpecError, match="is a private address"):
        check(make(source="s3://b/in", model=url, out="s3://b/out"), (), who)
    assert (len(looked_up), inside[1]) == (3, [])


def test_what_was_checked_is_what_is_connected_to(
    inside: tuple[int, list[str]], resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look-up for each connection: nothing comes between its check and its use."""
    restrict([])
    resolve(rebinding_test=["1.1.1.1", "127.0.0.1"])
    connected: list[Any] = []

    def connect(address: Any, *options: Any) -> Any:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ConnectionRefusedError):
        create_connection(("rebinding.test", 443))
    assert connected == [("1.1.1.1", 443)]


def test_redirects_and_webhooks_are_checked_too(
    inside: tuple[int, list[str]], resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port, asked = inside
    restrict([])
    resolve(hook_test=["10.0.0.1"])
    with pytest.raises(UndeliveredError, match="is a private address"):
        post(f"http://hook.test:{port}/", b"k" * 24, "id", b"{}")
    with pytest.raises(UndeliveredError, match="is a private address"):
        post(f"http://127.0.0.1:{port}/", b"k" * 24, "id", b"{}")
    handler = web._HttpsOnly()
    request = urllib.request.Request("https://public.test/m")
    moved = handler.redirect_request(request, None, 302, "", {}, f"https://127.0.0.1:{port}/m")
    opener = urllib.request.build_opener(web._HttpsOnly, web._Checked)
    with pytest.raises(urllib.error.URLError) as raised:
        opener.open(moved)
    assert isinstance(raised.value.reason, PrivateAddressError)
    assert asked == []


def test_a_proxy_may_be_private_and_what_is_behind_it_may_not() -> None:
    restrict([])
    connection = network.HTTPSConnection("127.0.0.1", 9, timeout=1)
    connection.set_tunnel("10.1.2.3", 443)
    with pytest.raises(PrivateAddressError):
        connection.connect()
    connection = network.HTTPSConnection("127.0.0.1", 9, timeout=1)
    connection.set_tunnel("1.1.1.1", 443)
    with pytest.raises(ConnectionRefusedError):  # the proxy is asked, and nobody is there
        connection.connect()


def test_workers_are_told() -> None:
    from tally.processes import environment

    restrict(["a.internal", "b.internal"])
    assert environment()[ALLOWED] == os.environ[ALLOWED] == "a.internal,b.internal"
