"""What only Azure's storage queues have: base64 or not, no headers, receipts that change."""

from __future__ import annotations

import base64
import json
import os
import secrets
from contextlib import closing

import pytest
from tests.brokers import make_azure_queue
from tests.objectstores import AZURITE_ACCOUNT, Service

from tally.errors import SourceNotFoundError, SpecError
from tally.sources.queues.base import REASON, Message
from tally.sources.queues.factory import open_queue


@pytest.fixture
def name(azure_queue_server: Service, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("azure.storage.queue")
    azure_queue_server.enter(monkeypatch)
    return f"tally-test-{secrets.token_hex(6)}"


@pytest.fixture
def url(name: str) -> str:
    make_azure_queue(name)
    return f"azure-queue://{AZURITE_ACCOUNT}/{name}"


def write(name: str, *texts: str) -> None:
    """As another program does."""
    from azure.storage.queue import QueueClient

    with QueueClient.from_connection_string(os.environ["AZURE_STORAGE_CONNECTION_STRING"], name) as client:
        for each in texts:
            client.send_message(each)


def test_bodies_may_be_base64(url: str, name: str) -> None:
    event = '{"eventType": "Microsoft.Storage.BlobCreated"}'
    write(name, "cats/1.jpg", base64.b64encode(event.encode()).decode(), "test", "photo001")
    with closing(open_queue(url)) as queue:
        bodies = [each.body for each in queue.receive(9, 1.0)]
        assert bodies == [b"cats/1.jpg", event.encode(), b"test", b"photo001"]
    with closing(open_queue(f"{url}?encoding=plain")) as queue:
        assert base64.b64encode(event.encode()) in [each.body for each in queue.peek(9)]


@pytest.mark.parametrize("body", [b"a&<b> \xc3\xa9", b"two\r\nlines", b"\x01", base64.b64encode(b"key")])
def test_what_is_sent_is_received(url: str, body: bytes) -> None:
    with closing(open_queue(url)) as queue:
        if body == b"\x01":
            with pytest.raises(SpecError, match="no text"):
                queue.send([Message(body)])
            return
        queue.send([Message(body)])
        assert [each.body for each in queue.receive(1, 1.0)] == [body]


def test_bodies_that_are_no_text(url: str) -> None:
    with closing(open_queue(f"{url}?encoding=base64")) as queue:
        queue.send([Message(b"\x00\xff")])
        [message] = queue.receive(1, 1.0)
        queue.reject([(message, "bad")])
        assert [(each.body, each.headers[REASON]) for each in queue.peek(5, dead=True)] == [(b"\x00\xff", "bad")]


def test_large_messages_are_kept_with_as_much_of_the_reason_as_there_is_room_for(url: str) -> None:
    with closing(open_queue(url)) as queue:
        bodies = [b"x" * 60_000, b"y" * 65_000, b"z" * 65_500]
        queue.send([Message(each) for each in bodies])
        queue.reject([(each, "why" * 10_000) for each in queue.receive(3, 1.0)])
        dead = queue.peek(5, dead=True)
        assert [each.body for each in dead] == bodies
        assert [len(each.headers.get(REASON, "")) for each in dead] == [1_000, 100, 0]


def test_the_poison_queue_may_be_that_of_azure_functions(url: str, name: str) -> None:
    make_azure_queue(f"{name}-poison")
    write(f"{name}-poison", base64.b64encode(b'{"name": "a"}').decode(), "[1]")
    with closing(open_queue(url)) as queue:
        assert [(each.body, each.headers) for each in queue.peek(5, dead=True)] == [
            (b'{"name": "a"}', {}),
            (b"[1]", {}),
        ]
        assert queue.replay(5) == 2
        assert [json.loads(each.body) for each in queue.receive(2, 1.0)] == [{"name": "a"}, [1]]


def test_more_than_a_request_takes(url: str) -> None:
    with closing(open_queue(url)) as queue:
        queue.send([Message(str(number).encode()) for number in range(70)])
        assert len({each.body for each in queue.peek(60)}) == 60
        messages = queue.receive(70, 1.0)
        assert len({each.body for each in messages}) == 70
        queue.extend(messages)
        queue.acknowledge(messages)
        assert queue.depth().waiting == 0


def test_a_queue_that_is_not_there(name: str) -> None:
    with closing(open_queue(f"azure-queue://{AZURITE_ACCOUNT}/{name}")) as queue:
        for ask in (queue.depth, lambda: queue.receive(1, 0.1), lambda: queue.peek(1), lambda: queue.replay(1)):
            with pytest.raises(SourceNotFoundError, match="there is no such queue"):
                ask()


@pytest.mark.parametrize(
    "url", ["azure-queue://account", "azure-queue:///items", "azure-queue://account/a/b", "azure-queue://other/items"]
)
def test_urls_that_name_no_queue(url: str, name: str) -> None:
    with pytest.raises(SpecError):
        open_queue(url)
