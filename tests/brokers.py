"""Real brokers, and what can be done to them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.extent import FULL
from tests.faulty import FaultyProxy
from tests.kafka import MockKafka, mock_kafka
from tests.objectstores import AZURITE_ACCOUNT, azurite_queues, moto_s3
from tests.ports import free_ports
from tests.servicebus import ServiceBus, service_bus
from tests.services import require

PATIENCE = 60.0
LOCK = 60 if FULL else 10
"""Seconds, where each lock is renewed by a request of its own: with many messages, there is hardly time for others."""


class BrokerUnderTest(ABC):
    """A broker with one queue of the test's own. url: what users write."""

    url: str

    @abstractmethod
    def hurt(self) -> None:
        """Something happens to it that happens to brokers. It is back afterwards."""


class OwnRedis(BrokerUnderTest):
    """A Redis server of the test's own, which may be killed. It writes each command to its disk."""

    def __init__(self, folder: Path, suffix: str = "") -> None:
        self._folder, [self.port] = folder, free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0/items{suffix}"
        self._start()

    def _start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None
        command = [program, "--port", str(self.port), "--dir", str(self._folder), "--bind", "127.0.0.1", "--save", ""]
        options = ["--appendonly", "yes", "--appendfsync", "always", "--logfile", "redis.log"]
        self._process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        listening(self.port)

    def hurt(self) -> None:
        """``kill -9``, and a new start."""
        self.close()
        self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class CutRabbit(BrokerUnderTest):
    """The RabbitMQ of this machine, behind a proxy that cuts connections: other tests use it, too."""

    def __init__(self) -> None:
        self._name = f"tally-test-{secrets.token_hex(6)}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.url = f"amqp://127.0.0.1:{self._listener.getsockname()[1]}/{self._name}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", 5672))
                for each in (client, server):  # or small frames wait for one another
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pairs.append((client, server))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=_relay, args=(one, other), daemon=True).start()

    def hurt(self) -> None:
        """Every connection is reset."""
        pairs, self._pairs = self._pairs, []
        for each in (each for pair in pairs for each in pair):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        import pika

        self._listener.close()
        self.hurt()
        with pika.BlockingConnection() as connection:
            channel = connection.channel()
            for each in (self._name, f"{self._name}.dead"):
                channel.queue_delete(each)


def _relay(one: socket.socket, other: socket.socket) -> None:
    """Hand on what one side sends, until it ends or is killed: then the other side is told."""
    with one, other:
        with contextlib.suppress(OSError):
            while content := one.recv(65536):
                other.sendall(content)
        for each in (one, other):  # closing is not enough: the other thread reads there, and so keeps it open
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def listening(port: int) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + PATIENCE
    while not answers(port):
        assert time.monotonic() < deadline, f"nobody listens on port {port}"
        time.sleep(0.02)


class Faulty(BrokerUnderTest):
    """A broker that is asked over HTTP, behind a proxy that breaks requests in all the ways there are."""

    def __init__(self, url: str, proxy: FaultyProxy) -> None:
        self.url, self._proxy = url, proxy

    def hurt(self) -> None:
        """The next requests fail: half of them have been done. Those that were to fail before do not any more."""
        self._proxy.calm()
        for fault in ("cut", "late-cut", "503", "late-cut"):
            self._proxy.inject(fault, 5)


def make_sqs_queue(name: str, **attributes: str) -> None:
    import boto3

    if name.endswith(".fifo"):
        attributes["FifoQueue"] = "true"
    with contextlib.closing(boto3.client("sqs")) as client:
        client.create_queue(QueueName=name, Attributes=attributes)


@contextmanager
def _rabbitmq(_: Path, __: pytest.MonkeyPatch) -> Iterator[BrokerUnderTest]:
    require("RabbitMQ", answers(5672))
    with contextlib.closing(CutRabbit()) as rabbit:
        yield rabbit


@contextmanager
def _redis(folder: Path, _: pytest.MonkeyPatch, *, options: str = "?lock=2") -> Iterator[BrokerUnderTest]:
    require("Redis (redis-server)", shutil.which("redis-server") is not None)
    with contextlib.closing(OwnRedis(folder, options)) as redis:
        yield redis


@contextmanager
def _sqs(_: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokerUnderTest]:
    with moto_s3() as service, FaultyProxy(service.url) as proxy:
        service.through(proxy.url).enter(monkeypatch)
        make_sqs_queue("items")
        yield Faulty("sqs://us-east-1/items?lock=10", proxy)


def make_azure_queue(name: str) -> None:
    from azure.storage.queue import QueueClient

    with QueueClient.from_connection_string(os.environ["AZURE_STORAGE_CONNECTION_STRING"], name) as client:
        client.create_queue()


@contextmanager
def _azure_queue(_: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokerUnderTest]:
    with azurite_queues() as service, FaultyProxy(service.url) as proxy:
        service.through(proxy.url).enter(monkeypatch)
        make_azure_queue("items")
        yield Faulty(f"azure-queue://{AZURITE_ACCOUNT}/items?lock={LOCK}", proxy)


class CutServiceBus(BrokerUnderTest):
    def __init__(self, bus: ServiceBus) -> None:
        self._bus, self.url = bus, f"{bus.url}/items"

    def hurt(self) -> None:
        """Every connection is cut."""
        self._bus.cut()


@contextmanager
def _servicebus(_: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokerUnderTest]:
    with service_bus() as bus:
        bus.enter(monkeypatch)
        bus.make("items", lock=LOCK)
        yield CutServiceBus(bus)


class RestartedKafka(BrokerUnderTest):
    def __init__(self, cluster: MockKafka) -> None:
        self._cluster, self.url = cluster, f"kafka://{cluster.servers}/items?lock=6"

    def hurt(self) -> None:
        """Every connection is cut."""
        self._cluster.restart()


@contextmanager
def _kafka(_: Path, __: pytest.MonkeyPatch) -> Iterator[BrokerUnderTest]:
    with mock_kafka() as cluster:
        cluster.make("items", partitions=3)
        yield RestartedKafka(cluster)


BROKERS = {
    "rabbitmq": _rabbitmq,
    "redis-stream": _redis,
    "redis-list": partial(_redis, options="?kind=list&lock=2"),
    "sqs": _sqs,
    "azure-queue": _azure_queue,
    "servicebus": _servicebus,
    "kafka": _kafka,
}
"""Each gives a broker of this kind; the test is skipped where it is not there."""
