"""Azure Service Bus, by azure-servicebus: ``servicebus://NAMESPACE/QUEUE``, ``servicebus://NAMESPACE/TOPIC/Subscriptions/NAME``,
or the queue's https URL.

Credentials come from ``SERVICEBUS_CONNECTION_STRING``, or else from where azure-identity looks for them: a managed
identity, say. The queue has to be there, without sessions; how long its locks hold, it says itself.

Dead messages go to the queue's own dead-letter subqueue, with their reason as its description. AMQP does not say how
many messages there are: who asks looks at them all.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from azure.core.exceptions import ClientAuthenticationError
from azure.identity import DefaultAzureCredential
from azure.servicebus import (
    ServiceBusClient,
    ServiceBusMessage,
    ServiceBusMessageState,
    ServiceBusReceivedMessage,
    ServiceBusReceiver,
    ServiceBusSender,
    ServiceBusSubQueue,
    parse_connection_string,
)
from azure.servicebus.amqp import AmqpMessageBodyType
from azure.servicebus.exceptions import (
    MessageAlreadySettled,
    MessageLockLostError,
    MessageNotFoundError,
    MessageSizeExceededError,
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
    ServiceBusAuthenticationError,
    ServiceBusAuthorizationError,
    ServiceBusError,
)

from tally.config import variable
from tally.errors import SourceNotFoundError, SpecError, StorageAwayError, StorageError
from tally.masking import mask
from tally.sources.queues.base import AWAY, REASON, Depth, Message, PolledQueue, Queue, iso_time

# The client logs what it raises, with tracebacks, which would be printed where nobody has set up logging.
logging.getLogger("azure.servicebus").addHandler(logging.NullHandler())

CONNECTION = "SERVICEBUS_CONNECTION_STRING"
ANSWER_SECONDS = 30.0
_CLOUDS = r"[a-z0-9-]+\.servicebus\.(windows\.net|usgovcloudapi\.net|chinacloudapi\.cn|cloudapi\.de)"
"""Hosts that tokens of the environment are sent to."""
_SHORTEST_LOCK, _LONGEST_LOCK = 5.0, 300.0
"""Seconds, as the service has them."""
_POLL_SECONDS = 0.2
"""A receiver does one thing at a time; so it waits for messages for a short time only."""
_TURN_SECONDS = 0.005
"""Between two requests for messages, so that what was done can be settled."""
_PAGE = 250
"""Messages that are looked at, or moved, in one request, at most."""
_LONGEST_REASON = 4096
_DEAD_REASON = "tally"
"""In the property DeadLetterReason, whose values are kinds of failures; what failed is in the other property."""
_REASON, _DESCRIPTION = "DeadLetterReason", "DeadLetterErrorDescription"
_RIGHTS = (
    f"Check {CONNECTION}, or the roles of the identity that is signed in: Azure Service Bus Data Receiver, and Data "
    "Sender for inject and replay. The queue has to be without sessions."
)
_LEFT = (MessageAlreadySettled, MessageLockLostError, MessageNotFoundError)
"""What says that this consumer does not have a message any more."""
_REFUSALS = (ServiceBusAuthenticationError, ServiceBusAuthorizationError, MessagingEntityDisabledError)
_VAGUE = ("Management Operation error", "Failed to open mgmt link", "amqp:unknown-error")
"""What the client says when a link was closed, whatever the service said."""

T = TypeVar("T")


def open_queue(url: str) -> Queue:
    """The queue of this URL."""
    parts = urlsplit(url)
    entity, *subscriptions = re.split("/subscriptions(?:/|$)", unquote(parts.path).strip("/"), flags=re.IGNORECASE)
    names = [*entity.split("/"), *subscriptions]
    if (
        not all(re.fullmatch(r"[A-Za-z0-9._-]+", each) for each in names)
        or subscriptions[1:]
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
    ):
        hint = "Write servicebus://NAMESPACE/QUEUE or servicebus://NAMESPACE/TOPIC/Subscriptions/NAME."
        raise SpecError(f"{mask(url)} names no queue", hint=hint)
    return ServiceBusQueue(_client(url), entity, subscriptions[0] if subscriptions else None, shown=mask(url))


def _client(url: str) -> ServiceBusClient:
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = host if "." in host else f"{host}.servicebus.windows.net"
    options: dict[str, Any] = {"retry_total": 1, "retry_backoff_factor": 0.2, "try_timeout": ANSWER_SECONDS}
    if given := variable(CONNECTION):
        try:
            theirs = urlsplit(f"//{parse_connection_string(given).fully_qualified_namespace}")
            client = ServiceBusClient.from_connection_string(given, **options)
        except ValueError as error:
            hint = "Copy it from the namespace's access policies: Endpoint=sb://...;SharedAccessKeyName=...;SharedAccessKey=..."
            raise SpecError(f"{CONNECTION} is no connection string: {error}", hint=hint) from None
        if (theirs.hostname, theirs.port or 443) != (host, parts.port or 443):
            other = f"{mask(url)} is of {host}, and {CONNECTION} of {theirs.hostname}"
            raise SpecError(other, hint=f"Write the other namespace into one of them, or unset {CONNECTION}.")
        return client
    if not re.fullmatch(_CLOUDS, host):
        hint = f"Put its connection string into the environment: {CONNECTION}"
        raise SpecError(f"{mask(url)} names no namespace of Service Bus", hint=hint)
    return ServiceBusClient(host, DefaultAzureCredential(), **options)


class ServiceBusQueue(PolledQueue):
    """One queue, or one subscription. ``_lock`` is held while a client of azure-servicebus is used: they may be used by
    one thread at a time."""

    def __init__(self, client: ServiceBusClient, entity: str, subscription: str | None, *, shown: str) -> None:
        super().__init__()
        self.lock_seconds = _SHORTEST_LOCK  # until a message has said it
        self._client, self._entity, self._subscription, self._shown = client, entity, subscription, shown
        self._lock = threading.RLock()
        self._held: dict[int, ServiceBusReceivedMessage] = {}
        """What is in hand, by its id in Python."""
        self._receiver = self._ask(self._make_receiver)
        self._sender: ServiceBusSender | None = None

    # -- the contract ------------------------------------------------------------------------------

    def _poll(self, most: int, seconds: float) -> list[Message]:
        deadline = time.monotonic() + seconds
        while True:
            self._closed.wait(_TURN_SECONDS)
            left = deadline - time.monotonic()
            wait = max(0.01, min(left, _POLL_SECONDS))
            found = self._with_receiver(lambda receiver, wait=wait: receiver.receive_messages(most, wait))  # type: ignore[misc]
            if found or left <= 0 or self._closed.is_set():
                break
        self._held.update((id(each), each) for each in found)
        for each in found[-1:]:
            if each.locked_until_utc is not None:
                left = (each.locked_until_utc - datetime.now(UTC)).total_seconds()
                self.lock_seconds = max(_SHORTEST_LOCK, min(left, _LONGEST_LOCK))
        return [_message(each) for each in found]

    def acknowledge(self, messages: Sequence[Message]) -> None:
        for each in messages:
            self._settle(each, lambda receiver, held: receiver.complete_message(held))

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        for each, reason in rejected:
            told = reason[:_LONGEST_REASON]
            self._settle(
                each,
                lambda receiver, held, told=told: receiver.dead_letter_message(  # type: ignore[misc]
                    held, reason=_DEAD_REASON, error_description=told
                ),
            )

    def extend(self, messages: Sequence[Message]) -> None:
        for each in messages:
            self._unless_lost(
                lambda receiver, each=each: receiver.renew_message_lock(each.handle, timeout=ANSWER_SECONDS)  # type: ignore[misc]
            )

    def send(self, messages: Sequence[Message]) -> None:
        """See :meth:`Queue.send`. What is sent to a subscription is sent to its topic, which has others, too."""
        with self._lock:
            if self._sender is None:
                make = self._client.get_topic_sender if self._subscription else self._client.get_queue_sender
                self._sender = self._ask(lambda: make(self._entity))
            sender = self._sender
            self._ask(lambda: _send(sender, messages))

    def depth(self) -> Depth:
        """See :meth:`Queue.depth`. Those in hand are counted among those that wait; scheduled and deferred ones do not
        wait for anybody."""
        active = ServiceBusMessageState.ACTIVE
        waiting = self._with_receiver(lambda receiver: sum(each.state == active for each in _looked_at(receiver)))
        return Depth(waiting, None, self._with_dead(lambda dead: sum(1 for _ in _looked_at(dead))))

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        look = self._with_dead if dead else self._with_receiver
        return look(lambda receiver: [_message(each) for each in _looked_at(receiver, most)])

    def replay(self, most: int) -> int:
        def move(dead: ServiceBusReceiver) -> int:
            moved = 0
            while moved < most:
                found = dead.receive_messages(min(most - moved, _PAGE), 1.0)
                if not found:
                    break
                self.send([_without_reason(_message(each)) for each in found])
                for each in found:
                    with suppress(*_LEFT):
                        dead.complete_message(each)
                moved += len(found)
            return moved

        return self._with_dead(move)

    def _give_back(self) -> None:
        for each in list(self._held.values()):
            self._unless_lost(lambda receiver, each=each: receiver.abandon_message(each))  # type: ignore[misc]
        self._held.clear()

    def _release(self) -> None:
        with self._lock:
            self._client.close()

    # -- requests ----------------------------------------------------------------------------------

    def _make_receiver(self, **options: Any) -> ServiceBusReceiver:
        if self._subscription:
            return self._client.get_subscription_receiver(self._entity, self._subscription, **options)
        return self._client.get_queue_receiver(self._entity, **options)

    def _with_receiver(self, what: Callable[[ServiceBusReceiver], T]) -> T:
        with self._lock:
            # Entered again and again: that connects if it is not connected, or not any more.
            return self._ask(lambda: what(self._receiver.__enter__()))

    def _with_dead(self, what: Callable[[ServiceBusReceiver], T]) -> T:
        """With the dead-letter subqueue, for a short time: a receiver holds messages that it was not asked for."""
        with self._lock:

            def ask() -> T:
                with self._make_receiver(sub_queue=ServiceBusSubQueue.DEAD_LETTER) as receiver:
                    return what(receiver)

            return self._ask(ask)

    def _settle(self, message: Message, what: Callable[[ServiceBusReceiver, ServiceBusReceivedMessage], Any]) -> None:
        self._unless_lost(lambda receiver: what(receiver, message.handle))
        self._held.pop(id(message.handle), None)

    def _unless_lost(self, what: Callable[[ServiceBusReceiver], Any]) -> None:
        """Nothing happens where another consumer has the message."""

        def settle(receiver: ServiceBusReceiver) -> None:
            with suppress(*_LEFT):
                what(receiver)

        self._with_receiver(settle)

    def _ask(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except MessagingEntityNotFoundError:
            hint = "Make it first, or mend its name or namespace."
            raise SourceNotFoundError(f"{self._shown}: there is no such queue", hint=hint) from None
        except MessageSizeExceededError as error:
            raise StorageError(f"{self._shown} refuses a message: {error}", hint="Send less in one message.") from None
        except (ServiceBusError, ClientAuthenticationError) as error:
            inner = getattr(error, "inner_exception", None)
            refused = isinstance(error, _REFUSALS) or "amqp:not-allowed" in str(error)
            if refused or isinstance(error, ClientAuthenticationError) or isinstance(inner, ClientAuthenticationError):
                raise StorageError(f"{self._shown} refuses: {error}", hint=_RIGHTS) from None
            vague = any(each in str(error) for each in _VAGUE)
            away = f"{self._shown} does not answer: {error}"
            raise StorageAwayError(away, hint="Is there such a queue?" if vague else AWAY) from None
        except ValueError as error:  # it is closed, or the connection string is of another queue
            kind = StorageAwayError if self._closed.is_set() else SpecError
            raise kind(f"{self._shown}: {error}") from None


def _send(sender: ServiceBusSender, messages: Iterable[Message]) -> None:
    batch = sender.create_message_batch()
    for each in messages:
        properties: dict[str | bytes, Any] = dict(each.headers.items())
        written = ServiceBusMessage(each.body, application_properties=properties)
        try:
            batch.add_message(written)
            continue
        except MessageSizeExceededError:
            if len(batch):
                sender.send_messages(batch, timeout=ANSWER_SECONDS)
                batch = sender.create_message_batch()
        try:
            batch.add_message(written)
        except MessageSizeExceededError:  # a message alone may be larger than a batch
            sender.send_messages(written, timeout=ANSWER_SECONDS)
    if len(batch):
        sender.send_messages(batch, timeout=ANSWER_SECONDS)


def _looked_at(receiver: ServiceBusReceiver, most: int | None = None) -> Iterable[ServiceBusReceivedMessage]:
    """The oldest messages, or all."""
    seen, after = 0, 0
    while most is None or seen < most:
        asked = _PAGE if most is None else min(most - seen, _PAGE)
        found = receiver.peek_messages(asked, sequence_number=after + 1, timeout=ANSWER_SECONDS)
        if not found:
            return
        yield from found
        seen, after = seen + len(found), found[-1].sequence_number or 0


def _message(found: ServiceBusReceivedMessage) -> Message:
    headers = {_text(name): _text(value) for name, value in (found.application_properties or {}).items()}
    reason, description = headers.pop(_REASON, ""), headers.pop(_DESCRIPTION, "")
    if reason == _DEAD_REASON:
        headers[REASON] = description
    elif reason or description:  # the service's own: MaxDeliveryCountExceeded
        headers[REASON] = ": ".join(filter(None, (reason, description)))
    sent = found.enqueued_time_utc
    return Message(_body(found), headers, found, found.message_id, iso_time(None if sent is None else sent.timestamp()))


def _body(found: ServiceBusReceivedMessage) -> bytes:
    body = found.body
    if found.body_type == AmqpMessageBodyType.DATA:
        return body if isinstance(body, bytes) else b"".join(body)
    return _text(body).encode()


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _without_reason(message: Message) -> Message:
    return Message(message.body, {name: value for name, value in message.headers.items() if name != REASON})
