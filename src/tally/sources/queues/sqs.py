"""Amazon SQS, by boto3: ``sqs://REGION/QUEUE``, ``sqs://REGION/ACCOUNT/QUEUE``, or the queue's https URL.

Credentials, and another endpoint than Amazon's, are where boto3 looks for them: ``AWS_PROFILE``, ``AWS_ENDPOINT_URL``.
The queue has to be there. A message that was received is hidden from other consumers for the lock (``?lock=`` seconds,
60). Dead messages go to the queue that the redrive policy names, or else to ``QUEUE-dead``, which is made where it is
not there, with their reason as an attribute.

SQS cannot be looked into: who looks receives, and gives back at once, which a redrive policy counts as a delivery.

In a FIFO queue, a message stays in its group when it is moved. One that is sent is in the group that its header
``MessageGroupId`` names, or else in one of its own: messages of one group wait for each other.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError

from tally.errors import SourceNotFoundError, SpecError, StorageAwayError, StorageError
from tally.masking import mask
from tally.sources.queues.base import AWAY, REASON, Depth, Message, PolledQueue, Queue, iso_time, lock_of, options_of

LOCK_SECONDS = 60.0
GROUP = "MessageGroupId"
_SENT = "SentTimestamp"
AT_ONCE = 10
"""Messages in one request, at most."""
_LARGEST = 1 << 20
"""Bytes of one message, and of all messages of one request, with their attributes."""
_ATTRIBUTES = 10
_LOOK_SECONDS = 30
"""For how long messages are hidden, at most, while somebody moves them, or looks at some."""
_LOOKS_A_SECOND = 20
"""Messages that are looked at in a second, at least: those that were first have to stay hidden until the last."""
_ASK_SECONDS = 1
"""An answer without messages that was not waited for says nothing: SQS asks some of its servers only."""
_CREDENTIALS = (
    "Check the credentials that boto3 finds (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), and what "
    "they may do with this queue."
)
_LEFT = ("ReceiptHandleIsInvalid", "InvalidParameterValue", "AWS.SimpleQueueService.MessageNotInflight")
"""What SQS says of a message that this consumer does not have any more."""
_BUSY = ("RequestThrottled", "ThrottlingException", "Throttling", "OverLimit", "KmsThrottled")

T = TypeVar("T")


def open_queue(url: str) -> Queue:
    """The queue of this URL."""
    parts = urlsplit(url)
    owner, _, name = unquote(parts.path).strip("/").rpartition("/")
    region = parts.netloc if parts.scheme == "sqs" else parts.netloc.split(".")[1]
    if not name or not region or "/" in owner:
        raise SpecError(f"{mask(url)} names no queue", hint="Write sqs://REGION/QUEUE, or the queue's https URL.")
    lock = lock_of(url, options_of(url, "lock"), LOCK_SECONDS, longest=43_200)
    return SqsQueue(region, owner, name, lock=int(lock), shown=mask(url))


class SqsQueue(PolledQueue):
    """One queue. Clients of boto3 may be used by several threads."""

    def __init__(self, region: str, owner: str, name: str, *, lock: int, shown: str) -> None:
        super().__init__()
        self.lock_seconds = self._lock = lock
        self._owner, self._name, self._shown = owner, name, shown
        self._held: dict[str, None] = {}
        """The handles of what is in hand."""
        retries = {"mode": "standard", "total_max_attempts": 3}
        config = Config(region_name=region, connect_timeout=5, read_timeout=30, retries=retries)
        self._client: Any = self._ask(lambda: boto3.session.Session().client("sqs", config=config))

    # -- the contract ------------------------------------------------------------------------------

    def _poll(self, most: int, seconds: float) -> list[Message]:
        deadline = time.monotonic() + seconds
        found = self._receive(self._url, min(most, AT_ONCE), self._lock, wait=int(seconds))
        if not found:
            self._closed.wait(max(0.0, deadline - time.monotonic()))
        while found and len(found) < most:
            more = self._receive(self._url, min(most - len(found), AT_ONCE), self._lock)
            if not more:
                break
            found += more
        self._held.update(dict.fromkeys(each.handle for each in found))
        return found

    def acknowledge(self, messages: Sequence[Message]) -> None:
        handles = [each.handle for each in messages]
        self._batches("delete_message_batch", self._url, [{"ReceiptHandle": each} for each in handles], _LEFT)
        self._forget(handles)

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        if rejected:
            self._send(self._dead, [_with_reason(message, reason) for message, reason in rejected])
            self.acknowledge([message for message, _ in rejected])

    def extend(self, messages: Sequence[Message]) -> None:
        self._hide(self._url, [each.handle for each in messages], self._lock)

    def send(self, messages: Sequence[Message]) -> None:
        self._send(self._url, messages)

    def depth(self) -> Depth:
        waiting, in_hand = self._count(self._url)
        return Depth(waiting, in_hand, sum(self._count(self._dead)))

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        url = self._dead if dead else self._url
        found: dict[str | None, Message] = {}
        lock = max(_LOOK_SECONDS, most // _LOOKS_A_SECOND)
        try:
            while (left := most - len(found)) > 0:
                more = self._receive(url, min(left, AT_ONCE), lock, wait=_ASK_SECONDS)
                new = [each for each in more if each.id not in found]
                found |= {each.id: each for each in more}  # a later handle takes the place of an earlier one
                if not new:
                    break
        finally:
            self._hide(url, [each.handle for each in found.values()], 0)
        return list(found.values())

    def replay(self, most: int) -> int:
        moved = 0
        while moved < most:
            found = self._receive(self._dead, min(most - moved, AT_ONCE), _LOOK_SECONDS, wait=_ASK_SECONDS)
            if not found:
                break
            self._send(self._url, [_without_reason(each) for each in found])
            entries = [{"ReceiptHandle": each.handle} for each in found]
            self._batches("delete_message_batch", self._dead, entries, _LEFT)
            moved += len(found)
        return moved

    def _give_back(self) -> None:
        self._hide(self._url, list(self._held), 0)

    def _release(self) -> None:
        self._client.close()

    # -- queues ------------------------------------------------------------------------------------

    @cached_property
    def _url(self) -> str:
        return self._url_of(self._name, self._owner)

    @cached_property
    def _dead(self) -> str:
        """The URL of the dead-letter queue."""
        attributes = self._attributes(self._url, "RedrivePolicy", "FifoQueue")
        if policy := attributes.get("RedrivePolicy"):
            *_, owner, name = json.loads(policy)["deadLetterTargetArn"].split(":")
            return self._url_of(name, owner)
        fifo = attributes.get("FifoQueue") == "true"
        name = f"{self._name.removesuffix('.fifo')}-dead" + (".fifo" if fifo else "")
        try:
            return self._url_of(name, self._owner)
        except SourceNotFoundError:
            kept = {"MessageRetentionPeriod": "1209600"}  # two weeks, the longest that SQS keeps a message
            asked = {"QueueName": name, "Attributes": kept | ({"FifoQueue": "true"} if fifo else {})}
            return str(self._ask(lambda: self._client.create_queue(**asked))["QueueUrl"])

    def _url_of(self, name: str, owner: str) -> str:
        asked = {"QueueName": name} | ({"QueueOwnerAWSAccountId": owner} if owner else {})
        return str(self._ask(lambda: self._client.get_queue_url(**asked))["QueueUrl"])

    def _attributes(self, url: str, *names: str) -> dict[str, str]:
        asked = {"QueueUrl": url, "AttributeNames": ["All"]}
        found = self._ask(lambda: self._client.get_queue_attributes(**asked)).get("Attributes", {})
        return {name: value for name, value in found.items() if name in names}

    def _count(self, url: str) -> tuple[int, int]:
        """How many messages wait, and are in hand; approximate, as SQS says."""
        waiting, delayed, hidden = (f"ApproximateNumberOfMessages{each}" for each in ("", "Delayed", "NotVisible"))
        found = self._attributes(url, waiting, delayed, hidden)
        return int(found[waiting]) + int(found.get(delayed, 0)), int(found[hidden])

    # -- requests ----------------------------------------------------------------------------------

    def _receive(self, url: str, most: int, lock: int, *, wait: int = 0) -> list[Message]:
        answer = self._ask(
            lambda: self._client.receive_message(
                QueueUrl=url,
                MaxNumberOfMessages=most,
                VisibilityTimeout=lock,
                WaitTimeSeconds=min(wait, 20),
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=[GROUP, _SENT],
            )
        )
        return [_message(each) for each in answer.get("Messages", ())]

    def _send(self, url: str, messages: Sequence[Message]) -> None:
        fifo = url.endswith(".fifo")
        self._batches("send_message_batch", url, [_entry(each, fifo=fifo) for each in messages], ())

    def _hide(self, url: str, handles: Sequence[str], seconds: int) -> None:
        entries = [{"ReceiptHandle": each, "VisibilityTimeout": seconds} for each in handles]
        self._batches("change_message_visibility_batch", url, entries, _LEFT)

    def _forget(self, handles: Sequence[str]) -> None:
        for each in handles:
            self._held.pop(each, None)

    def _batches(self, operation: str, url: str, entries: Sequence[dict[str, Any]], lost: Sequence[str]) -> None:
        """One request for every few entries. lost: what SQS may say of an entry without that being an error."""
        for batch in _few(entries):
            asked = [{"Id": str(number), **each} for number, each in enumerate(batch)]
            answer = self._ask(lambda asked=asked: getattr(self._client, operation)(QueueUrl=url, Entries=asked))  # type: ignore[misc]
            for each in answer.get("Failed", ()):
                if each["Code"] not in lost:
                    kind = StorageError if each.get("SenderFault") else StorageAwayError
                    raise kind(f"{self._shown} refuses a message: {each.get('Message') or each['Code']}")

    def _ask(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except (BotoConnectionError, HTTPClientError) as error:
            raise StorageAwayError(f"{self._shown} does not answer: {error}", hint=AWAY) from None
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code.rpartition(".")[2] in ("NonExistentQueue", "QueueDoesNotExist"):
                hint = "Make it first, or mend its name or region."
                raise SourceNotFoundError(f"{self._shown}: there is no such queue", hint=hint) from None
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            kind = StorageAwayError if status >= 500 or code in _BUSY else StorageError
            raise kind(f"{self._shown} refuses: {error}", hint=_CREDENTIALS if kind is StorageError else None) from None
        except BotoCoreError as error:
            raise StorageError(f"{self._shown} cannot be asked: {error}", hint=_CREDENTIALS) from None


def _few(entries: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """As many as one request takes."""
    batch: list[dict[str, Any]] = []
    held = 0
    for each in entries:
        size = len(each.get("MessageBody", "").encode()) + _size(each.get("MessageAttributes", {}))
        if batch and (len(batch) == AT_ONCE or held + size > _LARGEST):
            yield batch
            batch, held = [], 0
        batch.append(each)
        held += size
    if batch:
        yield batch


def _size(attributes: Mapping[str, Mapping[str, str]]) -> int:
    return sum(len(name.encode()) + 6 + len(each["StringValue"].encode()) for name, each in attributes.items())


def _entry(message: Message, *, fifo: bool) -> dict[str, Any]:
    try:
        body = message.body.decode()
    except UnicodeDecodeError:
        hint = "Send the item's name or URL; or the content as text, in base64."
        raise SpecError("SQS carries messages of text only", hint=hint) from None
    headers = {name: value for name, value in message.headers.items() if name != GROUP and value}
    attributes = {name: {"DataType": "String", "StringValue": value} for name, value in headers.items()}
    entry: dict[str, Any] = {"MessageBody": body, "MessageAttributes": attributes}
    if fifo:
        entry[GROUP] = message.headers.get(GROUP) or uuid.uuid4().hex
        entry["MessageDeduplicationId"] = uuid.uuid4().hex  # or what is sent again within five minutes is dropped
    return entry


def _message(found: Mapping[str, Any]) -> Message:
    attributes = found.get("MessageAttributes", {})
    headers = {name: each["StringValue"] for name, each in attributes.items() if "StringValue" in each}
    system = found.get("Attributes", {})
    if group := system.get(GROUP):
        headers[GROUP] = group
    sent = iso_time(int(system[_SENT]) / 1000) if _SENT in system else None
    return Message(found["Body"].encode(), headers, found["ReceiptHandle"], found["MessageId"], sent)


def _with_reason(message: Message, reason: str) -> Message:
    """The message with its reason: as long as there is room for, and of the characters that SQS takes."""
    kept = dict(islice(_without_reason(message).headers.items(), _ATTRIBUTES - 1))
    room = _LARGEST - len(message.body) - sum(len(f"{name}{value}String".encode()) for name, value in kept.items())
    clean = "".join(each if each >= " " or each in "\n\t" else " " for each in reason)
    fitting = clean.encode()[: min(10_000, max(1, room - len(REASON) - 6))].decode(errors="ignore")
    return Message(message.body, {**kept, REASON: fitting or "?"}, message.handle)


def _without_reason(message: Message) -> Message:
    headers = {name: value for name, value in message.headers.items() if name != REASON}
    return Message(message.body, headers, message.handle)
