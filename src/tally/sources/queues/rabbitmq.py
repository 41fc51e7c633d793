"""RabbitMQ, by pika: ``amqp://USER@HOST:PORT/VHOST/QUEUE``.

The queue is declared, durable, where it is not there. Dead messages go to ``QUEUE.dead``.

Messages are sent in one transaction, which the broker confirms once it has all of them on disk: to confirm each by
itself takes a disk's turn for each. What is moved is acknowledged after that: a crash in between leaves it in both
queues, never in none.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pika
import pika.exceptions

from tally import network
from tally.config import variable
from tally.errors import SourceNotFoundError, SpecError, StorageAwayError, TallyError
from tally.masking import mask
from tally.sources.queues.base import AWAY, REASON, Depth, Message, Outage, Queue, iso_time, pauses
from tally.sources.queues.factory import LOGIN, PASSWORD

PREFETCH = 2000
ANSWER_SECONDS = 30.0
BROKEN = (pika.exceptions.AMQPError, OSError)
"""What pika raises where the connection is not what it was."""

T = TypeVar("T")


def open_queue(url: str) -> Queue:
    """The queue of this URL."""
    parts = urlsplit(url)
    vhost, _, name = parts.path.removeprefix("/").rpartition("/")
    if not name or not parts.hostname:
        raise SpecError(f"{mask(url)} names no queue", hint="Write amqp://HOST/VHOST/QUEUE, or amqp://HOST/QUEUE.")
    password = variable(PASSWORD)
    if parts.username and not password:
        raise SpecError(f"{mask(url)} names a user", hint=f"Put the password into the environment: {PASSWORD}")
    # pika takes no user without a password.
    netloc = parts.netloc.rpartition("@")[2]
    server = f"{parts.scheme}://{netloc}/{vhost or '%2F'}" + (f"?{parts.query}" if parts.query else "")
    login = None if not password else pika.PlainCredentials(unquote(parts.username or "guest"), password)
    return RabbitQueue(server, unquote(name), login=login, shown=mask(url))


class RabbitQueue(Queue):
    """One queue. A thread of its own talks to the broker, as pika's connections belong to one thread."""

    def __init__(self, server: str, name: str, *, login: Any, shown: str) -> None:
        """login: pika's credentials; None for those of a guest."""
        self._parameters, self._name, self._shown = pika.URLParameters(server), name, shown
        if login is not None:
            self._parameters.credentials = login
        self._dead = f"{name}.dead"
        self._received: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[tuple[Callable[[Any], Any], Future[Any]]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._generation, self._consuming, self._wanted = 0, False, False
        self._there: set[str] = set()
        self._returned: list[tuple[Any, ...]] = []
        """What the broker gave back, as the queue is not there any more."""
        self._thread = threading.Thread(target=self._run, name="tally-rabbitmq", daemon=True)
        self._thread.start()

    # -- the contract ------------------------------------------------------------------------------

    def receive(self, most: int, seconds: float) -> list[Message]:
        self._wanted = True
        messages: list[Message] = []
        deadline = time.monotonic() + seconds
        while len(messages) < most:
            try:
                wait = max(0.0, deadline - time.monotonic())
                messages.append(self._received.get(timeout=wait) if not messages else self._received.get_nowait())
            except queue.Empty:
                break
        return [each for each in messages if each.handle[0] == self._generation]

    def acknowledge(self, messages: Sequence[Message]) -> None:
        self._ask(lambda channel: [channel.basic_ack(each.handle[1]) for each in self._current(messages)])

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        def move(channel: Any) -> None:
            told = [(message, {REASON: reason[:10_000]}) for message, reason in rejected if self._current([message])]
            self._publish(channel, self._dead, [(each.body, _properties(each, reason)) for each, reason in told])
            for each, _ in told:
                channel.basic_ack(each.handle[1])

        self._ask(move)

    def send(self, messages: Sequence[Message]) -> None:
        given = [(each.body, _properties(each, {})) for each in messages]
        self._ask(lambda channel: self._publish(channel, self._name, given))

    def depth(self) -> Depth:
        def count(channel: Any) -> Depth:
            waiting = self._count(channel, self._name)
            if waiting is None:
                raise self._missing()
            return Depth(waiting, dead=self._count(channel, self._dead) or 0)

        return self._ask(count)

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        def look(channel: Any) -> list[Message]:
            found: list[tuple[int, Message]] = []
            if self._count(channel, self._name) is None:
                raise self._missing()
            if dead and self._count(channel, self._dead) is None:
                return []
            for _ in range(most):
                method, properties, body = channel.basic_get(self._dead if dead else self._name)
                if method is None:
                    break
                found.append((method.delivery_tag, _message(body, properties)))
            for tag, _ in found:
                channel.basic_nack(tag, requeue=True)
            return [message for _, message in found]

        return self._ask(look)

    def replay(self, most: int) -> int:
        def move(channel: Any) -> int:
            if self._count(channel, self._dead) is None:
                return 0
            again: list[tuple[bytes, Any]] = []
            tags: list[int] = []
            while len(tags) < most:
                method, properties, body = channel.basic_get(self._dead)
                if method is None:
                    break
                message = _message(body, properties)
                headers = {name: value for name, value in message.headers.items() if name != REASON}
                again.append((body, _properties(replace(message, headers=headers), {})))
                tags.append(method.delivery_tag)
            self._publish(channel, self._name, again)
            for each in tags:
                channel.basic_ack(each)
            return len(tags)

        return self._ask(move)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(ANSWER_SECONDS)

    # -- talking to the broker ---------------------------------------------------------------------

    def _count(self, channel: Any, name: str) -> int | None:
        """The messages that wait in a queue; None if there is no such queue. None is made by looking."""
        look = channel.connection.channel()  # one of its own: the broker closes it where there is no such queue
        try:
            count: int = look.queue_declare(name, passive=True).method.message_count
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != 404:
                raise
            return None
        look.close()
        return count

    def _make(self, channel: Any, name: str) -> None:
        """Make the queue if there is none. One that is there is taken as it is: a quorum queue, say, with a policy of
        its own; the broker refuses to declare that as any other."""
        if name not in self._there:
            if self._count(channel, name) is None:
                channel.queue_declare(name, durable=True)
            self._there.add(name)

    def _publish(self, channel: Any, name: str, messages: Sequence[tuple[bytes, Any]]) -> None:
        """Put these bodies, with their properties, into the queue; returns once the broker has them."""
        if not messages:
            return
        self._make(channel, name)
        for body, properties in messages:
            channel.basic_publish("", name, body, properties, mandatory=True)
        channel.tx_commit()
        channel.connection.process_data_events(time_limit=0)  # what could not be put there comes before the answer
        if self._returned:
            raise pika.exceptions.UnroutableError(self._returned)

    def _missing(self) -> SourceNotFoundError:
        hint = "'tally queue' makes none; 'tally inject' and a job do, where there is none of that name."
        return SourceNotFoundError(f"{self._shown}: there is no such queue", hint=hint)

    def _current(self, messages: Sequence[Message]) -> list[Message]:
        """Those that came over the connection that there is now; others cannot be settled."""
        return [each for each in messages if each.handle[0] == self._generation]

    def _ask(self, what: Callable[[Any], T]) -> T:
        """Have the thread do this with the channel. Raises StorageAwayError while the broker is away."""
        answer: Future[T] = Future()
        if self._closed.is_set():
            raise StorageAwayError(f"{self._shown} is closed")
        self._asked.put((what, answer))
        try:
            return answer.result(ANSWER_SECONDS)
        except TallyError:
            raise
        except TimeoutError:
            answer.cancel()
            raise StorageAwayError(f"{self._shown} does not answer", hint=AWAY) from None
        except BROKEN as error:
            raise self._away(error) from None

    def _away(self, error: BaseException) -> StorageAwayError:
        reason = _reason(error)
        if "ACCESS_REFUSED" in reason or "NOT_ALLOWED" in reason:
            return StorageAwayError(f"{self._shown} refuses: {reason}", hint=LOGIN)
        return StorageAwayError(f"{self._shown} does not answer: {reason}", hint=AWAY)

    def _run(self) -> None:
        attempts, outage = pauses(), Outage()
        while not self._closed.is_set():
            try:
                with pika.BlockingConnection(_checked(self._parameters)) as connection:
                    attempts = pauses()
                    outage.ends()
                    self._serve(connection)
            except BROKEN as error:
                if self._wanted:
                    outage.begins(self._away(error))
                self._refuse(error)
                self._closed.wait(next(attempts))
        self._refuse(StorageAwayError(f"{self._shown} is closed"))

    def _serve(self, connection: Any) -> None:
        """Work with one connection until it is closed."""
        self._generation, self._consuming = self._generation + 1, False
        channel = connection.channel()
        channel.tx_select()
        channel.add_on_return_callback(lambda *returned: self._returned.append(returned))
        self._there.clear()
        self._returned.clear()
        channel.basic_qos(prefetch_count=PREFETCH)
        while not self._closed.is_set():
            if self._wanted and not self._consuming:
                self._make(channel, self._name)
                channel.basic_consume(self._name, self._deliver)
                self._consuming = True
            busy = False
            while not self._asked.empty():
                what, answer = self._asked.get_nowait()
                if answer.set_running_or_notify_cancel():
                    busy = True
                    try:
                        found = what(channel)
                        channel.tx_commit()
                        answer.set_result(found)
                    except BaseException as error:
                        answer.set_exception(error)
                        if isinstance(error, BROKEN) and not isinstance(error, TallyError):
                            raise
                        channel.tx_rollback()
            connection.process_data_events(time_limit=0 if busy else 0.02)

    def _deliver(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._received.put(_message(body, properties, (self._generation, method.delivery_tag)))

    def _refuse(self, error: BaseException) -> None:
        """Answer what was asked meanwhile."""
        while not self._asked.empty():
            _, answer = self._asked.get_nowait()
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)


def _checked(parameters: Any) -> Any:
    """The parameters with the host's addresses in its place, if not all may be connected to. Raises OSError."""
    if network.is_allowed(parameters.host):
        return parameters
    found = []
    for address in network.addresses(parameters.host, parameters.port):
        one = copy.copy(parameters)
        one.host = address
        if parameters.ssl_options is not None:  # the certificate is that of the name
            name = parameters.ssl_options.server_hostname or parameters.host
            one.ssl_options = pika.SSLOptions(parameters.ssl_options.context, name)
        found.append(one)
    return found


def _message(body: bytes, properties: Any, handle: Any = None) -> Message:
    headers = {str(name): str(value) for name, value in (properties.headers or {}).items()}
    return Message(body, headers, handle, properties.message_id, iso_time(properties.timestamp))


def _properties(message: Message, more: dict[str, str]) -> Any:
    sent = None if message.time is None else int(datetime.fromisoformat(message.time).timestamp())
    headers = {**message.headers, **more}
    return pika.BasicProperties(headers=headers, delivery_mode=2, message_id=message.id, timestamp=sent)


def _reason(error: BaseException) -> str:
    """What the broker or the network said: some of pika's errors have no words, and hold the one that does."""
    for held in (*error.args, getattr(error, "exception", None)):
        if isinstance(held, BaseException):
            return _reason(held)
    return str(error) or type(error).__name__
