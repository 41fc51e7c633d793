"""From a message to the items that it names.

One message may name several: the files of an Event Grid or S3 event, the attachments of a record. How a body is read:

- ``auto`` (the default): an event that is known (S3, SNS around it, Event Grid, CloudEvents), or else text.
- ``text``: the name or URL of one item.
- ``json``: ``key`` is the path to the names: ``payload.attachments.*.path``.
- ``pyliteral``: as ``json``, for the text of a Python dict.
- ``content``: the message is the item itself.

A ``template`` makes a name of the fields that it mentions: ``{video_name}/input_frames/{input_frame}``. A name that is
no URL is looked for under ``base``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import unquote, unquote_plus, urlsplit

from tally.errors import ItemError, SpecError
from tally.sources.queues.base import Message
from tally.storage import is_url, is_web
from tally.text import storable

Form: TypeAlias = Literal["auto", "text", "json", "pyliteral", "content"]

FORMS: tuple[Form, ...] = get_args(Form)

HOW_TO_READ = (
    f"--queue body=FORM says what messages are ({', '.join(FORMS)}), key=PATH or template= where the name is. "
    "'tally queue replay' puts dead ones back."
)
"""The next step where a message cannot be read."""

MAX_ITEMS = 10_000
"""Items that one message may name."""
_PATHS = "--queue meta.NAME=body:PATH says where a value is, with a number for one element of a list."
_FIELD = re.compile(r"\{([^{}]*)\}")
_BLOB_CREATED = "Microsoft.Storage.BlobCreated"
_AZURE_HOST = re.compile(r"(?P<account>[a-z0-9]+)\.blob\.[a-z.]+")


@dataclass(frozen=True, slots=True)
class Named:
    """An item that a message names. url: where it is; None where the message is the item."""

    key: str
    url: str | None


@dataclass(frozen=True, slots=True)
class BodyReader:
    """Reads bodies of one form; see the module."""

    form: Form = "auto"
    key: str | None = None
    template: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.form in ("json", "pyliteral") and not (self.key or self.template):
            problems.append(f"queue: a body of the form {self.form} needs key (the path to the name) or template")
        if self.form in ("auto", "text", "content") and (self.key or self.template):
            problems.append(f"queue: key and template are for bodies of the forms json and pyliteral, not {self.form}")
        if self.key and self.template:
            problems.append("queue: give key or template, not both")
        if problems:
            raise SpecError(problems)

    def items(self, message: Message) -> list[Named]:
        """The items that the message names, in order, each once. Raises ItemError where it cannot be understood."""
        if self.form == "content":
            key = message.headers.get("key") or hashlib.sha256(message.body).hexdigest()[:32]
            return [Named(self._kept(message, key), None)]
        names = list(dict.fromkeys(self._names(message, self._text(message))))
        if not names:
            raise self._unreadable(message, "it names no item")
        if len(names) > MAX_ITEMS:
            raise self._unreadable(message, f"it names more than {MAX_ITEMS:,} items")
        return [self._named(message, name) for name in names]

    def _names(self, message: Message, text: str) -> Iterator[str]:
        if self.form == "text":
            yield text.strip()
        elif self.form == "auto":
            event = _event(text)
            if event is None and _is_object(text):
                why = "it is JSON, and no event that is known"
                raise self._unreadable(message, why, hint="--queue body=json --queue key=PATH, where the name is")
            if event is None:
                yield text.strip()
            else:
                yield from event
        else:
            value = self._value(message, text)
            if self.template is not None:
                yield _FIELD.sub(lambda found: self._field(message, value, found[1]), self.template)
            else:
                yield from self._path(message, value)

    def value(self, message: Message) -> Any:
        """What the body says, as JSON or the text of a Python value. Raises ItemError."""
        return self._value(message, self._text(message))

    def _text(self, message: Message) -> str:
        try:
            return message.body.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._unreadable(message, f"it is no UTF-8 text: {error.reason}") from None

    def _value(self, message: Message, text: str) -> Any:
        try:
            return ast.literal_eval(text.strip()) if self.form == "pyliteral" else json.loads(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            kind = "the text of a Python value" if self.form == "pyliteral" else "JSON"
            raise self._unreadable(message, f"it is not {kind}: {str(error)[:100]}") from None

    def _field(self, message: Message, value: Any, path: str) -> str:
        found = list(_walk(value, path.split(".")))
        if len(found) != 1 or not isinstance(found[0], (str, int)):
            raise self._unreadable(message, f"{path!r} should be one text in it")
        try:
            return str(found[0])
        except ValueError as error:  # a number of thousands of digits
            raise self._unreadable(message, f"{path!r} is no name: {error}") from None

    def _path(self, message: Message, value: Any) -> Iterator[str]:
        assert self.key is not None
        for found in _walk(value, self.key.split(".")):
            if not isinstance(found, str):
                raise self._unreadable(message, f"{self.key!r} should be text in it, not {type(found).__name__}")
            yield found

    def _named(self, message: Message, name: str) -> Named:
        if not self._kept(message, name) or "\n" in name:
            raise self._unreadable(message, "it holds no name of one item")
        if name[:7].lower() == "file://":  # who may send messages may not thereby read this machine's files
            raise self._unreadable(message, f"{name!r} is a file of this machine", hint="--queue base=/its/folder")
        if is_web(name):  # nor have anything asked for that this machine reaches
            raise self._unreadable(message, f"{name!r} is of the web", hint="--queue base=https://its/folder")
        if is_url(name):
            return Named(name, name)
        if self.base is None:
            hint = "--queue base=FOLDER says where names are: s3://bucket/images"
            raise self._unreadable(message, f"{name!r} is no URL, and the job says no base", hint=hint)
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise self._unreadable(message, f"{name!r} leads out of {self.base}")
        return Named(name, f"{self.base.rstrip('/')}/{name}")

    def _kept(self, message: Message, name: str) -> str:
        """The name, as one that results, databases and brokers can keep. Raises ItemError."""
        if name != storable(name):
            raise self._unreadable(message, f"{name[:80]!r} is no text that can be kept")
        return name

    def _unreadable(self, message: Message, why: str, *, hint: str | None = None) -> ItemError:
        shown = message.body[:80].decode("utf-8", "replace")
        what = f"the message {shown!r} cannot be read as {self.form}: {why}"
        return ItemError(what, stage="read", hint=hint or HOW_TO_READ)


def _walk(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """What is at the path: names of fields, numbers of elements, and ``*`` for all."""
    if not path:
        yield value
        return
    part, rest = path[0], path[1:]
    if part == "*":
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        for each in inner:
            yield from _walk(each, rest)
    elif isinstance(value, Mapping) and part in value:
        yield from _walk(value[part], rest)
    elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        yield from _walk(value[int(part)], rest)


def one_value(value: Any, path: str) -> str | None:
    """The text, number or truth value at the path, as text; None where there is none. Raises ItemError."""
    found = [each for each in _walk(value, path.split(".")) if each is not None]
    if not found:
        return None
    if len(found) > 1 or not isinstance(found[0], (str, int, float)):
        kind = f"{len(found)} values" if len(found) > 1 else type(found[0]).__name__
        what = f"{path!r} should be one text or number in the message, and is {kind}"
        raise ItemError(what, stage="read", hint=_PATHS)
    try:
        return found[0] if isinstance(found[0], str) else json.dumps(found[0])
    except ValueError as error:  # a number of thousands of digits
        raise ItemError(f"{path!r} is no number that can be kept: {error}", stage="read", hint=_PATHS) from None


# -- events that stores send -------------------------------------------------------------------------------------------


def _event(text: str) -> list[str] | None:
    """The URLs of the objects that an event says were made; None where the text is no event that is known."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and value.get("Type") == "Notification" and isinstance(value.get("Message"), str):
        return _event(value["Message"])  # SNS
    if isinstance(value, dict) and isinstance(value.get("Records"), list):
        return [url for record in value["Records"] if (url := _s3(record))]
    events = value if isinstance(value, list) else [value]
    if events and all(isinstance(each, dict) and isinstance(each.get("data"), dict) for each in events):
        urls = [each["data"].get("url") for each in events if _kind(each) == _BLOB_CREATED]
        return [_azure(url) for url in urls if isinstance(url, str)]
    return None


def _is_object(text: str) -> bool:
    """Whether it is an object in JSON, which nothing is called."""
    try:
        return text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _kind(event: Mapping[str, Any]) -> Any:
    """Of CloudEvents ``type``, of Event Grid's own schema ``eventType``."""
    return event.get("type") or event.get("eventType")


def _s3(record: Any) -> str | None:
    try:
        if not str(record["eventName"]).removeprefix("s3:").startswith("ObjectCreated"):
            return None
        bucket, key = record["s3"]["bucket"]["name"], record["s3"]["object"]["key"]
        return f"s3://{bucket}/{unquote_plus(key)}" if isinstance(bucket, str) and isinstance(key, str) else None
    except (KeyError, TypeError):
        return None


def _azure(url: str) -> str:
    """``https://ACCOUNT.blob.core.windows.net/CONTAINER/NAME`` as ``az://CONTAINER/NAME``, whose names stand for
    themselves: those of URLs are percent-encoded.

    Raises ItemError for a name that is no text, and for another account than that of ``az://``: a container there may
    have the same name.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    if (found := _AZURE_HOST.fullmatch(parts.hostname or "")) is None:
        return url
    ours = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", found["account"])
    if ours != found["account"]:
        raise ItemError(
            f"{parts.path.lstrip('/')} is in the account {found['account']}, and az:// here is that of {ours}",
            stage="read",
            hint="AZURE_STORAGE_ACCOUNT_NAME says which account az:// is of.",
        )
    try:
        return f"az:/{unquote(parts.path, errors='strict')}"
    except UnicodeDecodeError:
        raise ItemError(
            f"{parts.path.lstrip('/')[:80]!r} is no name in UTF-8", stage="read", hint="Give the blob another name."
        ) from None
