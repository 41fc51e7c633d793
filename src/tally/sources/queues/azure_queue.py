"""Azure Storage Queue, by azure-storage-queue: ``azure-queue://ACCOUNT/QUEUE``, or the queue's https URL.

Credentials come from ``AZURE_STORAGE_CONNECTION_STRING``, ``AZURE_STORAGE_ACCOUNT_KEY`` or ``AZURE_STORAGE_SAS_KEY``,
or else from where azure-identity looks for them: a managed identity, say. The queue has to be there. A message that was
received is hidden from other consumers for the lock (``?lock=`` seconds, 300).

Functions and Event Grid write base64: what decodes to text is decoded, unless ``?encoding=plain``. With
``?encoding=base64`` all bodies are, and may be no text.

Dead messages go to ``QUEUE-poison``, as those of Azure Functions do, which is made where it is not there. Messages have
no headers here, so that the reason is beside the body, in a JSON object.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from azure.core.exceptions import (
    AzureError,
    DecodeError,
    HttpResponseError,
    ResourceExistsError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.identity import DefaultAzureCredential
from azure.storage.queue import ExponentialRetry, QueueClient

from tally.config import variable
from tally.errors import SourceNotFoundError, SpecError, StorageAwayError, StorageError
from tally.masking import mask
from tally.sources.queues.base import AWAY, REASON, Depth, Message, PolledQueue, Queue, iso_time, lock_of, options_of

log = logging.getLogger("tally")

LOCK_SECONDS = 300.0
CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
AT_ONCE = 32
"""Messages that one request receives, at most."""
_LARGEST = 65_536
"""Bytes of a message, as it is written."""
_LOOK_SECONDS = 30
"""For how long messages are hidden, at most, while somebody looks at them, or moves them."""
_THREADS = 8
"""Requests at a time: each message is settled, and its lock extended, by a request of its own."""
_FIRST_POLL, _LONGEST_POLL = 0.05, 0.5
_LEFT = ("MessageNotFound", "PopReceiptMismatch")
"""What the service says of a message that this consumer does not have any more."""
_COPY = "Copy it from the account's access keys: DefaultEndpointsProtocol=https;AccountName=...;AccountKey=..."
_CREDENTIALS = (
    f"Check {CONNECTION}, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY. Without them, the identity that is "
    "signed in needs the role Storage Queue Data Contributor."
)
_WRITABLE = re.compile("[\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")
"""What comes out of XML as it went in."""

T = TypeVar("T")


def open_queue(url: str) -> Queue:
    """The queue of this URL."""
    parts = urlsplit(url)
    account, name = parts.netloc.partition(".")[0], parts.path.strip("/")
    if not account or not re.fullmatch(r"[a-z0-9-]{3,63}", name):
        hint = "Write azure-queue://ACCOUNT/QUEUE, or the queue's https URL."
        raise SpecError(f"{mask(url)} names no queue", hint=hint)
    options = options_of(url, "lock", "encoding")
    lock = lock_of(url, options, LOCK_SECONDS, longest=7 * 86_400)
    encoding = options.get("encoding", "auto")
    if encoding not in ("auto", "plain", "base64"):
        raise SpecError(f"{mask(url)}: encoding should be auto, plain or base64, not {encoding!r}")
    return AzureQueue(_client(url, account, name), _client(url, account, f"{name}-poison"), int(lock), encoding, url)


def _client(url: str, account: str, name: str) -> QueueClient:
    retry = ExponentialRetry(initial_backoff=1, increment_base=2, retry_total=2, random_jitter_range=1)
    options: dict[str, Any] = {"retry_policy": retry, "connection_timeout": 5, "read_timeout": 30}
    if given := variable(CONNECTION):
        try:
            client = QueueClient.from_connection_string(given, name, **options)
        except ValueError as error:
            raise SpecError(f"{CONNECTION} is no connection string: {error}", hint=_COPY) from None
        if client.account_name != account:
            other = f"{mask(url)} is of the account {account}, and {CONNECTION} of {client.account_name}"
            raise SpecError(other, hint=f"Write the other account into one of them, or unset {CONNECTION}.")
        return client
    host = urlsplit(url).netloc if "." in urlsplit(url).netloc else f"{account}.queue.core.windows.net"
    credential = variable("AZURE_STORAGE_ACCOUNT_KEY") or variable("AZURE_STORAGE_SAS_KEY")
    return QueueClient(f"https://{host}", name, credential or DefaultAzureCredential(), **options)


@dataclass(eq=False, slots=True)
class _Lease:
    """What settles a message: its receipt is another after each renewal."""

    id: str
    receipt: str | None
    alone: threading.Lock = field(default_factory=threading.Lock)


class AzureQueue(PolledQueue):
    """One queue. Clients of azure-storage-queue may be used by several threads."""

    def __init__(self, client: QueueClient, dead: QueueClient, lock: int, encoding: str, url: str) -> None:
        super().__init__()
        self.lock_seconds = self._lock = lock
        self._client, self._dead, self._encoding, self._shown = client, dead, encoding, mask(url)
        self._held: dict[_Lease, None] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "tally-azure-queue")

    # -- the contract ------------------------------------------------------------------------------

    def _poll(self, most: int, seconds: float) -> list[Message]:
        deadline, pause = time.monotonic() + seconds, _FIRST_POLL
        while not (found := self._receive(self._client, most, self._lock)):
            left = deadline - time.monotonic()
            if left <= 0 or self._closed.wait(min(pause, left)):
                return []
            pause = min(pause * 2, _LONGEST_POLL)
        self._held.update(dict.fromkeys(each.handle for each in found))
        return found

    def acknowledge(self, messages: Sequence[Message]) -> None:
        self._for_each(self._delete, messages)
        for each in messages:
            self._held.pop(each.handle, None)

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        for message, reason in rejected:
            self._bury(message.body, reason)
            self.acknowledge([message])

    def extend(self, messages: Sequence[Message]) -> None:
        self._for_each(lambda each: self._hide(self._client, each.handle, self._lock), messages)

    def send(self, messages: Sequence[Message]) -> None:
        texts = [self._written(each.body) for each in messages]
        for text in texts:  # one after another: they are received in this order
            self._ask(lambda text=text: self._client.send_message(text, time_to_live=-1))  # type: ignore[misc]

    def depth(self) -> Depth:
        """See :meth:`Queue.depth`. Those in hand are counted among those that wait."""
        try:
            dead = self._count(self._dead)
        except SourceNotFoundError:
            dead = 0
        return Depth(self._count(self._client), None, dead)

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        client = self._dead if dead else self._client
        try:
            if most <= AT_ONCE:
                found = self._ask(lambda: client.peek_messages(most))
                messages = [Message(self._read(str(each.content)), {}, None, *_id_and_time(each)) for each in found]
            else:  # more than the service shows: received, and given back
                messages = self._receive(client, most, _LOOK_SECONDS)
                self._for_each(lambda each: self._hide(client, each.handle, 0), messages)
        except SourceNotFoundError:
            if dead:
                return []
            raise
        return [_unwrapped(each) for each in messages] if dead else messages

    def replay(self, most: int) -> int:
        moved = 0
        try:
            while moved < most and (found := self._receive(self._dead, min(most - moved, AT_ONCE), _LOOK_SECONDS)):
                self.send([_unwrapped(each) for each in found])
                self._for_each(lambda each: self._delete(each, self._dead), found)
                moved += len(found)
        except SourceNotFoundError:
            self._count(self._client)  # it is the queue itself that is not there
        return moved

    def _give_back(self) -> None:
        self._for_each(lambda lease: self._hide(self._client, lease, 0), list(self._held))

    def _release(self) -> None:
        self._threads.shutdown()
        for each in (self._client, self._dead):
            each.close()

    # -- requests ----------------------------------------------------------------------------------

    def _receive(self, client: QueueClient, most: int, lock: int) -> list[Message]:
        found: list[Message] = []
        while len(found) < most:
            count = min(most - len(found), AT_ONCE)
            page = self._ask(
                lambda count=count: next(  # type: ignore[misc]
                    client.receive_messages(messages_per_page=count, visibility_timeout=lock).by_page(), ()
                )
            )
            messages = [
                Message(self._read(str(each.content)), {}, _Lease(each.id, each.pop_receipt), *_id_and_time(each))
                for each in page
            ]
            found += messages
            if len(messages) < count:
                break
        return found

    def _delete(self, message: Message, client: QueueClient | None = None) -> None:
        lease: _Lease = message.handle
        with lease.alone:
            self._settle(lambda: (client or self._client).delete_message(lease.id, lease.receipt))

    def _hide(self, client: QueueClient, lease: _Lease, seconds: int) -> None:
        with lease.alone:
            answer = self._settle(lambda: client.update_message(lease.id, lease.receipt, visibility_timeout=seconds))
            if answer is not None:
                lease.receipt = answer.pop_receipt

    def _bury(self, body: bytes, reason: str) -> None:
        text = self._wrapped(body, reason)
        try:
            self._ask(lambda: self._dead.send_message(text, time_to_live=-1))
        except SourceNotFoundError:
            try:
                self._ask(self._dead.create_queue)
            except ResourceExistsError:
                pass
            self._ask(lambda: self._dead.send_message(text, time_to_live=-1))

    def _count(self, client: QueueClient) -> int:
        return int(self._ask(client.get_queue_properties).approximate_message_count or 0)

    def _for_each(self, what: Callable[[T], None], each: Iterable[T]) -> None:
        list(self._threads.map(what, each))

    def _settle(self, what: Callable[[], T]) -> T | None:
        """As :meth:`_ask`; None where another consumer has the message."""

        def settle() -> T | None:
            try:
                return what()
            except HttpResponseError as error:
                if _code(error) in _LEFT:
                    return None
                raise

        return self._ask(settle)

    def _ask(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except ResourceExistsError:
            raise
        except (ServiceRequestError, ServiceResponseError, DecodeError) as error:
            raise StorageAwayError(f"{self._shown} does not answer: {error}", hint=AWAY) from None
        except HttpResponseError as error:
            if _code(error) == "QueueNotFound":
                hint = "Make it first, or mend its name or account."
                raise SourceNotFoundError(f"{self._shown}: there is no such queue", hint=hint) from None
            status = error.status_code or 500
            kind = StorageAwayError if status >= 500 or status in (408, 429) else StorageError
            told = f"{self._shown} refuses: {_code(error) or error.reason or status}"
            raise kind(told, hint=_CREDENTIALS if kind is StorageError else None) from None
        except AzureError as error:
            raise StorageError(f"{self._shown} cannot be asked: {error}", hint=_CREDENTIALS) from None

    # -- bodies ------------------------------------------------------------------------------------

    def _read(self, text: str) -> bytes:
        if self._encoding != "plain":
            try:
                body = base64.b64decode(text, validate=True)
                if self._encoding == "base64" or (body and _WRITABLE.fullmatch(body.decode().replace("\r", ""))):
                    return body
            except (binascii.Error, ValueError):
                pass  # it is what it looks like
        return text.encode()

    def _written(self, body: bytes) -> str:
        """The text that is read as this body."""
        encoded = base64.b64encode(body).decode()
        try:
            plain = body.decode()
            if self._encoding != "base64" and _WRITABLE.fullmatch(plain) and self._read(plain) == body:
                return plain
        except UnicodeDecodeError:
            pass
        if self._read(encoded) != body:
            hint = "Say ?encoding=base64 in the queue's URL."
            raise SpecError(f"{self._shown}: a message is no text that can be written as it is", hint=hint)
        return encoded

    def _wrapped(self, body: bytes, reason: str) -> str:
        """A dead message with as much of its reason as there is room for."""
        try:
            held = {"body": body.decode()}
        except UnicodeDecodeError:
            held = {"base64": base64.b64encode(body).decode()}
        for length in (10_000, 1_000, 100):
            text = self._written(json.dumps({**held, REASON: reason[:length]}).encode())
            if len(text.encode()) <= _LARGEST:
                return text
        log.warning("%s: a dead message is too large to be kept with its reason: %s", self._shown, reason)
        return self._written(body)


def _id_and_time(found: Any) -> tuple[str, str | None]:
    return found.id, iso_time(found.inserted_on and found.inserted_on.timestamp())


def _unwrapped(message: Message) -> Message:
    """A dead message; those of Azure Functions have no reason."""
    try:
        held = json.loads(message.body)
        body = base64.b64decode(held["base64"]) if "base64" in held else held["body"].encode()
        return Message(body, {REASON: str(held[REASON])}, message.handle)
    except (ValueError, TypeError, KeyError, AttributeError):
        return message


def _code(error: HttpResponseError) -> str:
    """The service's own word for what is wrong: "QueueNotFound"."""
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code) or "")
