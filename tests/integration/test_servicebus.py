"""What only Service Bus has: topics, bodies of several kinds, a dead-letter subqueue that others write to, too."""

from __future__ import annotations

import gc
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from proton import Message as Amqp
from tests.servicebus import ServiceBus, service_bus

from tally.errors import SourceNotFoundError, SpecError, StorageAwayError, StorageError
from tally.sources.queues.base import REASON, Message
from tally.sources.queues.factory import open_queue

QUEUES = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "queues.md"


@pytest.fixture
def bus(service_bus_server: ServiceBus, monkeypatch: pytest.MonkeyPatch) -> ServiceBus:
    service_bus_server.enter(monkeypatch)
    return service_bus_server


@pytest.fixture
def cuts() -> Iterator[None]:
    """The client leaves its sockets to the garbage collector when a connection is cut."""
    yield
    gc.collect()


LEFT_OPEN = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture
def name(bus: ServiceBus) -> str:
    made = f"tally-test/{secrets.token_hex(6)}"
    bus.make(made)
    return made


@pytest.fixture
def url(bus: ServiceBus, name: str) -> str:
    return f"{bus.url}/{name}"


def test_the_reason_is_where_other_programs_look_for_it(url: str, name: str) -> None:
    from azure.servicebus import ServiceBusClient, ServiceBusSubQueue

    with closing(open_queue(url)) as queue:
        queue.send([Message(b"bad", {"from": "a test"})])
        queue.reject([(each, "x" * 5000) for each in queue.receive(1, 5.0)])
    with (
        ServiceBusClient.from_connection_string(os.environ["SERVICEBUS_CONNECTION_STRING"]) as client,
        client.get_queue_receiver(name, sub_queue=ServiceBusSubQueue.DEAD_LETTER) as receiver,
    ):
        [dead] = receiver.receive_messages(1, 5.0)
        assert (dead.dead_letter_reason, dead.dead_letter_error_description) == ("tally", "x" * 4096)
        assert (str(dead), dead.application_properties[b"from"]) == ("bad", b"a test")


def test_what_the_service_itself_set_aside_has_its_reason(bus: ServiceBus, url: str, name: str) -> None:
    why = {"DeadLetterReason": "MaxDeliveryCountExceeded", "DeadLetterErrorDescription": "after 10"}
    bus.put(f"{name}/$DeadLetterQueue", Amqp(body=b"bad", inferred=True, properties={**why, "n": 1}))
    with closing(open_queue(url)) as queue:
        [dead] = queue.peek(5, dead=True)
        assert (dead.body, dead.headers) == (b"bad", {REASON: "MaxDeliveryCountExceeded: after 10", "n": "1"})
        assert queue.replay(5) == 1
        assert [(each.body, each.headers) for each in queue.receive(1, 5.0)] == [(b"bad", {"n": "1"})]


def test_bodies_may_be_texts(bus: ServiceBus, url: str, name: str) -> None:
    for body in ("cats/\u00e9.jpg", b"\x00\xff"):
        bus.put(name, Amqp(body=body, inferred=isinstance(body, bytes)))
    with closing(open_queue(url)) as queue:
        assert [each.body for each in queue.peek(2)] == ["cats/\u00e9.jpg".encode(), b"\x00\xff"]


def test_each_subscription_has_its_own_messages(bus: ServiceBus, name: str) -> None:
    for each in ("one", "two"):
        bus.make(f"{name}-topic/Subscriptions/{each}")
    topic = f"{bus.url}/{name}-topic"
    with (
        closing(open_queue(f"{topic}/Subscriptions/one")) as one,
        closing(open_queue(f"{topic}/subscriptions/two")) as two,
    ):
        one.send([Message(b"a")])
        one.acknowledge(one.receive(1, 5.0))
        assert (one.depth().waiting, two.depth().waiting) == (0, 1)


def test_more_than_a_request_takes(url: str) -> None:
    with closing(open_queue(url)) as queue:
        large = [Message(bytes([number]) * 600_000) for number in range(3)]
        queue.send(large)  # several batches
        queue.acknowledge(found := queue.receive(3, 5.0))
        while len(found) < 3:
            queue.acknowledge(more := queue.receive(3, 5.0))
            found += more
        assert [each.body for each in found] == [each.body for each in large]

        queue.send([Message(str(number).encode()) for number in range(300)])
        assert queue.depth().waiting == 300
        assert [each.body for each in queue.peek(260)] == [str(number).encode() for number in range(260)]


def test_how_long_locks_hold_is_what_messages_say(url: str) -> None:
    with closing(open_queue(url)) as queue:
        assert queue.lock_seconds == 5  # the shortest that there is: locks are kept from the beginning
        queue.send([Message(b"a")])
        assert queue.receive(1, 5.0)
        assert queue.lock_seconds > 5


@LEFT_OPEN
@pytest.mark.usefixtures("cuts")
def test_what_was_received_is_settled_after_the_connection_was_cut(bus: ServiceBus, url: str) -> None:
    with closing(open_queue(url)) as queue:
        queue.send([Message(b"a"), Message(b"b")])
        a, b = queue.receive(2, 5.0)
        bus.cut()
        queue.acknowledge([a])
        bus.cut()
        queue.reject([(b, "bad")])
        depth = queue.depth()
        assert (depth.waiting, depth.dead) == (0, 1)


@LEFT_OPEN
@pytest.mark.usefixtures("cuts")
def test_a_service_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with service_bus() as bus:
        bus.enter(monkeypatch)
        bus.make("items")
        queue = open_queue(f"{bus.url}/items")
        queue.send([Message(b"a")])
        messages = queue.receive(1, 5.0)
        bus.cut()
    with closing(queue):
        for ask in (lambda: queue.acknowledge(messages), queue.depth, lambda: queue.send([Message(b"a")])):
            with pytest.raises(StorageAwayError, match="does not answer"):
                ask()
        assert queue.receive(1, 0.1) == []


def test_a_queue_that_is_not_there(bus: ServiceBus) -> None:
    with closing(open_queue(f"{bus.url}/nowhere")) as queue:
        for ask in (lambda: queue.receive(1, 0.1), lambda: queue.replay(1)):
            with pytest.raises(SourceNotFoundError, match="there is no such queue"):
                ask()
        # Of these, the client does not pass on why they failed.
        for ask in (queue.depth, lambda: queue.peek(1, dead=True), lambda: queue.send([Message(b"a")])):
            with pytest.raises(StorageAwayError, match="Is there such a queue"):
                ask()


def test_what_the_client_logs_is_not_printed(bus: ServiceBus) -> None:
    code = "from tally.cli.main import main; main()"
    command = [sys.executable, "-c", code, "queue", "depth", f"{bus.url}/nowhere"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ")


def test_a_queue_with_sessions_is_refused(bus: ServiceBus, name: str) -> None:
    bus.make(f"{name}-sessions", sessions=True)
    with closing(open_queue(f"{bus.url}/{name}-sessions")) as queue, pytest.raises(StorageError, match="sessions"):
        queue.receive(1, 0.1)


@pytest.mark.parametrize(
    "path", ["", "/", "/a/Subscriptions/", "/a/$DeadLetterQueue", "/a?lock=60", "/a b", "/a/Subscriptions/b/c"]
)
def test_urls_that_name_no_queue(bus: ServiceBus, path: str) -> None:
    with pytest.raises(SpecError, match="names no queue"):
        open_queue(f"{bus.url}{path}")


def test_a_connection_string_is_of_one_namespace(bus: ServiceBus) -> None:
    with pytest.raises(SpecError, match=r"is of other\.servicebus\.windows\.net"):
        open_queue("servicebus://other/items")


def test_a_connection_string_may_be_of_one_queue(bus: ServiceBus, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICEBUS_CONNECTION_STRING", "nonsense")
    with pytest.raises(SpecError, match="is no connection string"):
        open_queue(url)
    bus.enter(monkeypatch)
    given = os.environ["SERVICEBUS_CONNECTION_STRING"]
    monkeypatch.setenv("SERVICEBUS_CONNECTION_STRING", f"{given};EntityPath=other")
    with pytest.raises(SpecError, match="EntityPath"):
        open_queue(url)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:5671", "evil.example", "servicebus.windows.net", "a.servicebus.windows.net.evil.example"]
)
def test_the_environment_s_credentials_go_to_service_bus_only(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVICEBUS_CONNECTION_STRING", raising=False)
    with pytest.raises(SpecError, match="names no namespace"):
        open_queue(f"servicebus://{host}/items")


def test_settings_of_another_system_are_taken_as_the_manual_says(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"```sh\n(export SERVICEBUS_CONNECTION_STRING=.*)\n```", QUEUES.read_text())
    theirs = {"SB_NAMESPACE": "team", "SB_SHARED_ACCESS_KEY_NAME": "all", "SB_SHARED_ACCESS_KEY_VALUE": "a+key/of="}
    shell = ["bash", "-c", f'{line}; printf %s "$SERVICEBUS_CONNECTION_STRING"']
    made = subprocess.run(shell, env={**os.environ, **theirs}, capture_output=True, text=True, check=True).stdout
    monkeypatch.setenv("SERVICEBUS_CONNECTION_STRING", made)
    open_queue("servicebus://team/frames").close()
    with pytest.raises(SpecError, match="of team"):
        open_queue("servicebus://other/frames")
