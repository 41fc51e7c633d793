"""Brokers and databases are connected to at the address that was checked, wherever the name leads by then."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from tests.brokers import answers
from tests.integration.test_push import FACTS, database
from tests.services import require

from tally import network
from tally.errors import SpecError, StorageAwayError, StorageError
from tally.push.base import Parcel
from tally.push.factory import open_receiver
from tally.push.target import Push
from tally.sources.queues.base import Message
from tally.sources.queues.factory import open_queue

HOST = "service.example"


@pytest.fixture(autouse=True)
def restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server without ``--allow-host`` is."""
    monkeypatch.setenv(network.ALLOWED, "")


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the host lead to this machine; returns who looked it up: only what checks addresses may."""
    found: list[str] = []
    real = socket.getaddrinfo

    def lookup(host: Any, port: Any, *options: Any, **more: Any) -> Any:
        if host != HOST:
            return real(host, port, *options, **more)
        found.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return found


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's addresses pass for public ones."""
    monkeypatch.setattr(network, "_is_public", lambda address: True)


def redis_queue() -> Iterator[str]:
    require("Redis", answers(6379))
    name = f"tally-test-{secrets.token_hex(6)}"
    yield f"redis://{HOST}/0/{name}"
    import redis

    with redis.Redis() as client:
        client.delete(name)


def rabbit_queue() -> Iterator[str]:
    require("RabbitMQ", answers(5672))
    name = f"tally-test-{secrets.token_hex(6)}"
    yield f"amqp://{HOST}/{name}"
    import pika

    with pika.BlockingConnection() as connection:
        for each in (name, f"{name}.dead"):
            connection.channel().queue_delete(each)


@pytest.fixture(params=[redis_queue, rabbit_queue])
def queue_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from request.param()


@pytest.mark.usefixtures("public")
def test_brokers_are_reached_at_the_checked_address(queue_url: str, lookups: list[str]) -> None:
    with closing(open_queue(queue_url)) as queue:
        queue.send([Message(b"a")])
        assert queue.depth().waiting == 1
    assert lookups


def test_brokers_that_have_moved_inside_are_not_reached(queue_url: str, lookups: list[str]) -> None:
    with closing(open_queue(queue_url)) as queue, pytest.raises(StorageAwayError, match="is a private address"):
        queue.depth()
    assert lookups


@pytest.fixture(params=["postgresql", "mariadb"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as url:
        yield f"{sa.make_url(url).set(host=HOST).render_as_string(hide_password=False)}#found"


ROWS = pa.table({"key": ["a"], "n": [1]})


@pytest.mark.usefixtures("public")
def test_databases_are_reached_at_the_checked_address(table: str, lookups: list[str]) -> None:
    with closing(open_receiver(Push(url=table), FACTS)) as receiver:
        assert receiver.deliver(Parcel("p", ["a"], ROWS)) == []
        assert receiver.deliver(Parcel("p", ["a"], ROWS)) == []
    assert lookups


def test_databases_that_have_moved_inside_are_not_reached(table: str, lookups: list[str]) -> None:
    refused = pytest.raises(StorageError, match=r"may not be connected to: .* is a private address")
    with closing(open_receiver(Push(url=table), FACTS)) as receiver, refused as caught:
        receiver.deliver(Parcel("p", ["a"], ROWS))
    assert not isinstance(caught.value, StorageAwayError)
    assert lookups


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("env:READINGS", "names a variable of the server's own environment"),
        ("env:READINGS#t", "names a variable of the server's own environment"),
        ("duckdb:////etc/rows.duckdb#t", "is not under a folder that requests may name"),
        ("postgresql://1.1.1.1/d?host=/tmp&query=SELECT 1", "has the option 'host'"),
        ("postgresql://10.0.0.1/d?query=SELECT 1", "is a private address"),
        ("postgresql://1.1.1.1/d#t", "would be sent the server's PGPASSWORD"),
        ("mongodb://1.1.1.1/d#c", "would say where else to connect"),
    ],
)
def test_databases_that_requests_may_not_name(monkeypatch: pytest.MonkeyPatch, place: str, problem: str) -> None:
    pytest.importorskip("fastapi")
    from tally.server.places import check_places

    monkeypatch.setenv(network.ALLOWED, "db.internal")
    monkeypatch.setenv("PGPASSWORD", "hush")
    with pytest.raises(SpecError, match=problem):
        check_places([("source", place)], ())


@pytest.mark.parametrize(
    "option",
    ["host=127.0.0.1", "hostaddr=127.0.0.1", "unix_socket=/run/m.sock", "service=x", "passfile=/etc/x", "host="],
)
def test_a_request_cannot_name_another_host_in_an_option(option: str) -> None:
    pytest.importorskip("fastapi")
    from tally.server.places import check_places

    check_places([("push", "postgresql://1.1.1.1/db?sslmode=require#t")], ())
    with pytest.raises(SpecError, match=f"has the option '{option.partition('=')[0]}'"):
        check_places([("push", f"postgresql://1.1.1.1/db?{option}&sslmode=require#t")], ())


def test_tls_asks_for_the_certificate_of_the_name(monkeypatch: pytest.MonkeyPatch, lookups: list[str]) -> None:
    from tally.sources.queues import rabbitmq
    from tally.sources.queues.redis import _TlsConnection

    pika = pytest.importorskip("pika")
    monkeypatch.setattr(network, "_is_public", lambda address: True)
    (found,) = rabbitmq._checked(pika.URLParameters(f"amqps://{HOST}/%2F"))
    assert (found.host, found.ssl_options.server_hostname) == ("127.0.0.1", HOST)
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: Any) -> Callable[..., Any]:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(network, "create_connection", connect)
    with pytest.raises(ConnectionRefusedError):
        _TlsConnection(host=HOST, port=1)._connect()
    assert asked == [(HOST, 1)]


def test_a_request_cannot_have_the_servers_credentials_sent_elsewhere() -> None:
    pytest.importorskip("fastapi")
    from tally.server.places import check_places
    from tally.sources.queues.factory import is_queue

    for good in (
        "azure-queue://account/q", "azure-queue://account.queue.core.windows.net/q", "servicebus://ns/q",
        "servicebus://ns.servicebus.chinacloudapi.cn/q", "sqs://eu-west-1/q",
    ):  # fmt: skip
        check_places([("source", good)], ())
    elsewhere = (
        "azure-queue://q.evil.example:8080/q",
        "servicebus://ns.servicebus.evil.example/q",
        "servicebus://10.0.0.1/q",
    )
    for bad in elsewhere:
        with pytest.raises(SpecError, match="would be sent the server's credentials"):
            check_places([("source", bad)], ())
    assert is_queue("https://ns.servicebus.windows.net/q")
    for other in ("https://a.queue.core.evil.example/q", "https://ns.servicebus.evil.example/q"):
        assert not is_queue(other)
