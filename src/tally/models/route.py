"""Models that messages choose: ``models:/{meta:model}@{meta:alias|champion}``.

What a message says becomes part of a name in the registry, and of nothing else: never of a path, a URL or a class.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tally.errors import ItemError, SpecError

_START = "models:/"
_PLACEHOLDER = re.compile(r"\{meta:([^{}|]+)(?:\|([^{}|]*))?\}")
_NAME = r"[a-z0-9][a-z0-9._-]{0,127}"
_REGISTERED = re.compile(rf"models:/(?P<name>{_NAME})(/[0-9]{{1,9}}|@{_NAME})?")
_SHOWN = 100


def is_route(model: str) -> bool:
    """Whether a job's model is chosen by each message."""
    return model.startswith(_START) and "{" in model


@dataclass(frozen=True, slots=True)
class Route:
    """How a message's metadata chooses its model.

    template: the name of a registered model, with ``{meta:NAME}`` for what a message says, and ``{meta:NAME|OTHER}``
        with what counts where it says nothing. The value may hold a version or an alias, too: ``detector@champion``.
    allowed: names of models that messages may choose; all where there are none.
    Raises SpecError if the template is none.
    """

    template: str
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        plain = _PLACEHOLDER.sub("x", self.template)
        if "{" in plain or "}" in plain or not _PLACEHOLDER.search(self.template):
            raise SpecError(
                f"model: {self.template!r} is no name of a model that messages choose",
                hint="Write models:/{meta:model}, models:/{meta:model}@{meta:alias}, or models:/detector@{meta:alias}; "
                "{meta:alias|champion} says what counts for messages without it.",
            )
        if not _REGISTERED.fullmatch(_PLACEHOLDER.sub("1", self.template)):
            raise SpecError(
                f"model: {self.template!r} cannot become the name of a registered model",
                hint="Those are models:/NAME, models:/NAME/VERSION and models:/NAME@ALIAS.",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The metadata that it asks for."""
        return tuple(dict.fromkeys(found[1] for found in _PLACEHOLDER.finditer(self.template)))

    def uri(self, value: Callable[[str], str | None]) -> str:
        """The registered model that is chosen: ``models:/NAME``, with a version or an alias if it is said.

        value: what the message says under a name; None if nothing. Raises ItemError.
        """

        def said(found: re.Match[str]) -> str:
            text = value(found[1]) or found[2]
            if not text:
                raise ItemError(f"the message names no model: it has no {found[1]!r}", stage="read")
            return text

        uri = _PLACEHOLDER.sub(said, self.template)
        match = _REGISTERED.fullmatch(uri)
        if match is None:
            raise ItemError(f"the message names {_short(uri)}, which is no name of a registered model", stage="read")
        if self.allowed and match["name"] not in self.allowed:
            raise ItemError(
                f"the message names the model {match['name']!r}, and the job allows {', '.join(self.allowed)}",
                stage="read",
            )
        return uri


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
