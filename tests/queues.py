"""Queues of every broker, each new and of a test's own."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.brokers import answers, make_azure_queue, make_sqs_queue
from tests.kafka import MockKafka
from tests.objectstores import AZURITE_ACCOUNT
from tests.servicebus import ServiceBus
from tests.services import require


@contextmanager
def new_queue(kind: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a new queue of this kind, one of :data:`MAKERS`; it is removed afterwards."""
    yield from MAKERS[kind](f"tally-test-{secrets.token_hex(6)}", request)


def rabbitmq(name: str, _: pytest.FixtureRequest) -> Iterator[str]:
    require("RabbitMQ", answers(5672))
    yield f"amqp://127.0.0.1/{name}"
    import pika

    with pika.BlockingConnection() as connection:
        channel = connection.channel()
        for each in (name, f"{name}.dead"):
            channel.queue_delete(each)


def redis_stream(name: str, _: pytest.FixtureRequest) -> Iterator[str]:
    require("Redis", answers(6379))
    yield f"redis://127.0.0.1/0/{name}"
    import redis

    with redis.Redis() as client:
        for each in client.scan_iter(match=f"{name}*"):
            client.delete(each)


def redis_list(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    for url in redis_stream(name, request):
        yield f"{url}?kind=list"


def sqs(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    request.getfixturevalue("s3_server").enter(request.getfixturevalue("monkeypatch"))
    make_sqs_queue(name)
    yield f"sqs://us-east-1/{name}"


def sqs_fifo(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    yield from sqs(f"{name}.fifo", request)


def azure_queue(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    request.getfixturevalue("azure_queue_server").enter(request.getfixturevalue("monkeypatch"))
    make_azure_queue(name)
    yield f"azure-queue://{AZURITE_ACCOUNT}/{name}"


def servicebus(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    bus: ServiceBus = request.getfixturevalue("service_bus_server")
    bus.enter(request.getfixturevalue("monkeypatch"))
    bus.make(name)
    bus.make(f"{name}-short", lock=2)
    yield f"{bus.url}/{name}"


def servicebus_topic(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    return servicebus(f"{name}/Subscriptions/tally", request)


def kafka(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    cluster: MockKafka = request.getfixturevalue("kafka_cluster")
    cluster.make(name)
    yield f"kafka://{cluster.servers}/{name}?lock=6"


MAKERS: dict[str, Callable[[str, pytest.FixtureRequest], Iterator[str]]] = {
    "rabbitmq": rabbitmq,
    "redis-stream": redis_stream,
    "redis-list": redis_list,
    "sqs": sqs,
    "sqs-fifo": sqs_fifo,
    "azure-queue": azure_queue,
    "servicebus": servicebus,
    "servicebus-topic": servicebus_topic,
    "kafka": kafka,
}
