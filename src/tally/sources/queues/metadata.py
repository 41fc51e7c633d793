"""What a message says beside its items: in its headers, in fields of its body, by its id and the time it was sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tally.errors import ItemError, SpecError
from tally.sources.queues.base import Message
from tally.sources.queues.bodies import BodyReader, one_value
from tally.text import storable

LONGEST = 4096
"""Characters of one value, at most."""

_OF_MESSAGE = ("id", "time")
_OF_RESULTS = ("key", "item", "model", "model_version", "model_hash", "item_row", "rows", "job", "version", "now")
"""Names that results and pushed bodies have for something else."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Where values are in a message. places: by name, ``header:NAME``, ``body:PATH``, ``id`` or ``time``.

    A name that has no place is that of a header. choosing: names that choose the model: of these, those that results
    have for something else, such as ``model``, may have a place, and are not kept. Raises SpecError.
    """

    reader: BodyReader
    places: Mapping[str, str] = field(default_factory=dict)
    choosing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for name, place in self.places.items():
            kind, colon, rest = str(place).partition(":")
            taken = name in _OF_RESULTS and name not in self.choosing
            if not name.strip() or taken or any(each in name for each in "{}|"):
                why = "results have it for something else" if taken else "it is empty, or has one of { } |"
                problems.append(f"queue: meta has {name!r}, which cannot be the name of a column here: {why}")
            if not (place in _OF_MESSAGE or (colon and rest and kind in ("header", "body"))):
                problems.append(
                    f"queue: meta.{name} should be header:NAME, body:PATH, id or time, not {str(place)[:100]!r}"
                )
            if kind == "body" and self.reader.form in ("text", "content"):
                problems.append(
                    f"queue: meta.{name} is {place}, and a body of the form {self.reader.form} has no fields"
                )
        if problems:
            raise SpecError(problems)

    @property
    def names(self) -> list[str]:
        """What is kept of each message."""
        return [name for name in self.places if name not in _OF_RESULTS]

    def of(self, message: Message) -> Callable[[str], str | None]:
        """What the message says under a name; None where it says nothing. That raises ItemError for what is no text."""
        body: list[Any] = []

        def value(name: str) -> str | None:
            place = self.places.get(name, f"header:{name}")
            kind, _, rest = place.partition(":")
            found: str | None
            if kind == "body":
                if not body:
                    body.append(self.reader.value(message))
                found = one_value(body[0], rest)
            elif kind == "header":
                found = message.headers.get(rest)
            else:
                found = message.id if kind == "id" else message.time
            if found is not None and (len(found) > LONGEST or found != storable(found)):
                what = f"over {LONGEST:,} characters long" if len(found) > LONGEST else "no text that can be kept"
                hint = f"Leave out --queue meta.{name}, or have the sender send less."
                raise ItemError(f"the message's {name!r} ({place}) is {what}: {found[:40]!r}", stage="read", hint=hint)
            return found

        return value

    def kept(self, message: Message) -> dict[str, str | None]:
        """The values of all :attr:`names`. Raises ItemError."""
        value = self.of(message)
        return {name: value(name) for name in self.names}
