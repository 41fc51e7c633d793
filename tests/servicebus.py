"""A stand-in for Azure Service Bus: an AMQP 1.0 server in a thread of this process, by python-qpid-proton.

It has what azure-servicebus asks of queues, of topics with subscriptions, and of their dead-letter subqueues: tokens,
links in peek-lock mode, batches, dispositions with their outcomes, and the requests to ``ENTITY/$management``. Locks
run out. What it does is what Microsoft's guide to the protocol says; it was never compared with the service.
"""

from __future__ import annotations

import secrets
import string
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
from proton import Condition, Delivery, Disposition, Endpoint, Event, Handler, Link, Message, symbol, timestamp, ulong
from proton.handlers import Handshaker, IOHandler
from proton.reactor import Container
from tests.ports import free_ports

TICK_SECONDS = 0.05
_LETTERS = string.ascii_letters + string.digits
_DATA = 0x75
_DEAD = "/$DeadLetterQueue"
_LOST, _MISSING = "com.microsoft:message-lock-lost", "amqp:not-found"


@dataclass(eq=False)
class _Stored:
    """A message; token and until: of its lock. at: when it was sent."""

    number: int
    message: Message
    token: str | None = None
    until: float = 0.0
    at: float = field(default_factory=time.time)

    @property
    def locked(self) -> bool:
        return self.token is not None and self.until > time.time()

    def encoded(self) -> bytes:
        at = timestamp(int(self.at * 1000))
        annotations = {"x-opt-sequence-number": ulong(self.number), "x-opt-enqueued-time": at}
        if self.token is not None:
            annotations["x-opt-locked-until"] = timestamp(int(self.until * 1000))
        self.message.annotations = {symbol(name): value for name, value in annotations.items()}
        return self.message.encode()


@dataclass(eq=False)
class _Entity:
    """A queue, a subscription, or a dead-letter subqueue. lock: seconds."""

    lock: float
    dead: _Entity | None
    sessions: bool = False
    stored: dict[int, _Stored] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def put(self, message: Message) -> None:
        number = next(self.numbers)
        self.stored[number] = _Stored(number, message)

    def held(self, token: str) -> _Stored | None:
        return next((each for each in self.stored.values() if each.token == token and each.locked), None)

    def settle(self, token: str, outcome: str, reason: str = "", description: str = "") -> bool:
        """outcome: completed, abandoned or suspended. False where the lock is lost."""
        found = self.held(token)
        if found is None:
            return False
        found.token = None
        if outcome == "completed":
            del self.stored[found.number]
        elif outcome == "suspended":
            del self.stored[found.number]
            more = {"DeadLetterReason": reason, "DeadLetterErrorDescription": description}
            found.message.properties = {**(found.message.properties or {}), **more}
            assert self.dead is not None
            self.dead.put(found.message)
        return True


class _Connections(IOHandler):
    """Connections that end when they cannot be read or written. proton's own end in one direction only: their links
    would still be handed messages, which nobody gets."""

    def on_selectable_readable(self, event: Event) -> None:
        selectable = event.selectable
        transport = selectable._transport
        if transport is not None and transport.capacity() > 0:
            try:
                content = selectable.recv(transport.capacity())
            except OSError:
                content = b""
            if not content:
                self.on_selectable_error(event)
                return
            transport.push(content)
            self.update(transport, selectable, selectable._reactor.now)

    def on_selectable_writable(self, event: Event) -> None:
        selectable = event.selectable
        transport = selectable._transport
        if transport is not None and transport.pending() > 0:
            try:
                transport.pop(selectable.send(transport.peek(transport.pending())))
            except OSError:
                self.on_selectable_error(event)
                return
            self.update(transport, selectable, selectable._reactor.now)


class ServiceBus(Handler):
    """url: that of its queues, without their names."""

    def __init__(self) -> None:
        super().__init__()
        [self.port] = free_ports(1)
        self.url = f"servicebus://127.0.0.1:{self.port}"
        self._connection = (
            f"Endpoint=sb://127.0.0.1:{self.port};SharedAccessKeyName=x;SharedAccessKey=y;UseDevelopmentEmulator=true"
        )
        self._entities: dict[str, _Entity] = {}
        self._topics: dict[str, list[str]] = {}
        self._senders: list[Link] = []
        self._cutting = self._stopped = False
        self._cut = threading.Event()
        self._container = Container(self, global_handler=_Connections())
        self._container.handler.add(Handshaker())
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._container.run, name="service-bus", daemon=True)
        self._thread.start()
        assert self._listening.wait(30)

    # -- for tests ---------------------------------------------------------------------------------

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have clients of this test, and of what it starts, find it."""
        monkeypatch.setenv("SERVICEBUS_CONNECTION_STRING", self._connection)

    def make(self, name: str, *, lock: float = 60, sessions: bool = False) -> None:
        """A queue; or a subscription, ``TOPIC/Subscriptions/NAME``, and its topic."""
        topic, _, subscription = name.partition("/Subscriptions/")
        if subscription:
            self._topics.setdefault(topic, []).append(name)
        dead = self._entities[name + _DEAD] = _Entity(lock, None)
        self._entities[name] = _Entity(lock, dead, sessions)

    def put(self, name: str, message: Message) -> None:
        """As another program sends it."""
        for each in self._topics.get(name, [name]):
            self._entities[each].put(message)

    def cut(self) -> None:
        """Every connection is cut."""
        self._cut.clear()
        self._cutting = True
        assert self._cut.wait(30)

    def close(self) -> None:
        self._stopped = True
        self._thread.join(30)

    # -- what happens ------------------------------------------------------------------------------

    def on_reactor_init(self, event: Event) -> None:
        self._acceptor = self._container.listen(f"127.0.0.1:{self.port}")
        self._container.schedule(TICK_SECONDS, self)
        self._listening.set()

    def on_timer_task(self, event: Event) -> None:
        if self._cutting:
            self._cutting = False
            for each in {link.connection.transport for link in self._senders if link.connection.transport}:
                each.close_tail()
                each.close_head()
            self._cut.set()
        if self._stopped:
            self._acceptor.close()
            self._container.stop()
            return
        for each in self._senders:  # locks may have run out
            self._deliver(each)
        self._container.schedule(TICK_SECONDS, self)

    def on_link_remote_open(self, event: Event) -> None:
        link = event.link
        link.source.copy(link.remote_source)
        link.target.copy(link.remote_target)
        link.rcv_settle_mode = link.remote_rcv_settle_mode
        link.snd_settle_mode = link.remote_snd_settle_mode
        link.open()
        name = _name(link)
        entity = name.removesuffix("/$management")
        if entity != "$cbs" and entity not in self._entities and entity not in self._topics:
            link.condition = Condition(_MISSING, f"The messaging entity '{name}' could not be found.")
            link.close()
        elif link.is_sender and name in self._entities and self._entities[name].sessions:
            link.condition = Condition("amqp:not-allowed", "The entity requires sessions.")
            link.close()
        elif link.is_receiver:
            link.flow(1000)
        else:
            self._senders.append(link)

    def on_link_final(self, event: Event) -> None:
        self._forget(event.link)

    def on_link_remote_close(self, event: Event) -> None:
        self._forget(event.link)

    def on_connection_remote_close(self, event: Event) -> None:
        self._senders = [each for each in self._senders if each.connection != event.connection]

    def on_transport_closed(self, event: Event) -> None:
        self._senders = [each for each in self._senders if each.connection != event.connection]

    def _forget(self, link: Link) -> None:
        if link in self._senders:
            self._senders.remove(link)

    def on_link_flow(self, event: Event) -> None:
        if event.link.is_sender:
            self._deliver(event.link)
            if event.link.drain_mode:
                event.link.drained()

    def on_delivery(self, event: Event) -> None:
        delivery, link = event.delivery, event.link
        if link.state & Endpoint.LOCAL_CLOSED:
            return  # it was refused meanwhile
        if link.is_sender:
            if delivery.updated and delivery.remote_state:
                self._settled(delivery, _name(link))
        elif delivery.readable and not delivery.partial:
            content = link.recv(delivery.pending)
            link.advance()
            name = _name(link)
            if name.endswith("$cbs"):
                self._answer(link, _decoded(content), {"status-code": 202, "status-description": "Accepted"}, None)
            elif name.endswith("/$management"):
                self._manage(link, name.removesuffix("/$management"), _decoded(content))
            else:
                for each in _parts(content):
                    for entity in self._topics.get(name, [name]):
                        self._entities[entity].put(_decoded(each))
            delivery.update(Delivery.ACCEPTED)
            delivery.settle()
            link.flow(1)
            for each in self._senders:
                self._deliver(each)

    def _deliver(self, link: Link) -> None:
        entity = self._entities.get(_name(link))
        if entity is None or not link.state & Endpoint.REMOTE_ACTIVE:
            return
        for each in sorted(entity.stored.values(), key=lambda each: each.number):
            if link.credit <= 0:
                return
            if not each.locked:
                each.token = "".join(secrets.choice(_LETTERS) for _ in range(16))
                each.until = time.time() + entity.lock
                link.delivery(each.token)
                link.stream(each.encoded())
                link.advance()

    def _settled(self, delivery: Delivery, name: str) -> None:
        state, entity = delivery.remote_state, self._entities[name]
        outcome = {Delivery.ACCEPTED: "completed", Delivery.REJECTED: "suspended"}.get(state, "abandoned")
        info = (
            (delivery.remote.condition.info or {}) if state == Delivery.REJECTED and delivery.remote.condition else {}
        )
        why = {str(key): str(value) for key, value in info.items()}
        known = entity.settle(
            delivery.tag, outcome, why.get("DeadLetterReason", ""), why.get("DeadLetterErrorDescription", "")
        )
        if known:
            delivery.update(state)
        else:
            delivery.local.condition = Condition(_LOST, "The lock supplied is invalid.")
            delivery.update(Disposition.REJECTED)
        delivery.settle()
        for each in self._senders:
            self._deliver(each)

    def _manage(self, link: Link, name: str, asked: Message) -> None:
        entity, body = self._entities[name], {str(key): value for key, value in asked.body.items()}
        status, answer = 200, None
        match asked.properties["operation"]:
            case "com.microsoft:peek-message":
                later = [
                    each for number, each in sorted(entity.stored.items()) if number >= body["from-sequence-number"]
                ]
                found = later[: min(body["message-count"], 100)]  # the service, too, shows fewer than it is asked for
                answer = {"messages": [{"message": each.encoded()} for each in found]}
                status = 200 if found else 204
            case "com.microsoft:renew-lock":
                held = [entity.held(_tag(each)) for each in _tokens(body)]
                for each in held:
                    if each is None:
                        status = 410
                    else:
                        each.until = time.time() + entity.lock
                if status == 200:
                    answer = {"expirations": [timestamp(int(each.until * 1000)) for each in held if each is not None]}
            case "com.microsoft:update-disposition":
                why = body.get("deadletter-reason", ""), body.get("deadletter-description", "")
                done = [entity.settle(_tag(each), body["disposition-status"], *why) for each in _tokens(body)]
                status = 200 if all(done) else 410
            case other:
                raise AssertionError(other)
        properties: dict[str, Any] = {"statusCode": status, "statusDescription": "OK"}
        if status == 410:
            properties = {"statusCode": 410, "statusDescription": "lost", "errorCondition": symbol(_LOST)}
        self._answer(link, asked, properties, answer)

    def _answer(self, asked_by: Link, asked: Message, properties: dict[str, Any], body: Any) -> None:
        answer = Message(body=body, correlation_id=asked.id, properties=properties)
        for link in self._senders:
            if link.connection == asked_by.connection and _name(link) == _name(asked_by):
                link.delivery(secrets.token_hex(8))
                link.stream(answer.encode())
                link.advance()
                return


def _name(link: Link) -> str:
    """The entity that a link is of: clients name it with or without the host."""
    address = (link.remote_source if link.is_sender else link.remote_target).address or ""
    return urlsplit(address).path.strip("/") if "://" in address else address.strip("/")


def _tag(token: uuid.UUID) -> str:
    return token.bytes_le.decode("ascii", "replace")


def _tokens(body: dict[str, Any]) -> list[uuid.UUID]:
    tokens = body["lock-tokens"]
    return list(getattr(tokens, "elements", tokens))


def _decoded(content: bytes) -> Message:
    message = Message()
    message.decode(content)
    return message


def _parts(content: bytes) -> list[bytes]:
    """The messages of a batch, each of which is in a data section of its own; or the one message that this is."""
    parts, position = [], 0
    while position < len(content):
        section, constructor = content[position + 2 : position + 4]
        begin = position + 4 + {0x45: 0, 0xA0: 1, 0xC0: 1}.get(constructor, 4)
        position = begin + int.from_bytes(content[position + 4 : begin], "big")
        if section == _DATA:
            parts.append(content[begin:position])
    return parts if parts and all(each.startswith(b"\x00\x53") for each in parts) else [content]


@contextmanager
def service_bus() -> Iterator[ServiceBus]:
    bus = ServiceBus()
    try:
        yield bus
    finally:
        bus.close()
