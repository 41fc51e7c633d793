"""The contract of a protocol: it only translates. What scoring means is the data plane's business.

A protocol's module has two halves. The server's half finds out from a request's path and headers what it is about, and
answers what needs no model; it imports nothing heavy. The replica's half turns a call's body into items, and results
into a body.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tally.scorers.base import Item, Result, Scorer
from tally.serving.messages import Call, Description

if TYPE_CHECKING:
    import pyarrow as pa

JSON = [("Content-Type", "application/json")]


class RequestError(Exception):
    """A request that cannot be answered. status: of HTTP; protocols with statuses of their own translate it.

    400 what is no request, 404 no such model, 405 method, 413 too large, 415 kind of body, 422 an item or a field that
    cannot be scored, 429 busy, 500 the model failed, 503 no replica, 504 too late.
    """

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back for a request. status: of HTTP. headers: name and value of each."""

    status: int
    body: bytes
    headers: Sequence[tuple[str, str]] = tuple(JSON)
    error: str | None = None


@dataclass(slots=True)
class Work:
    """What a call asks to have scored.

    items: pictures, contents and the like; or a table, each row an item.
    all_classes: the scores of all classes are wanted (:attr:`Scorer.all_classes`).
    asked: what the protocol's own answer depends on. model, version: whose call it is; set by the data plane.
    """

    items: list[Item] | pa.Table
    all_classes: bool = False
    asked: Any = None
    model: str = ""
    version: str = ""

    @property
    def rows(self) -> int:
        return int(self.items.num_rows) if hasattr(self.items, "num_rows") else len(self.items)


@dataclass(frozen=True, slots=True)
class Route:
    """What a request is about.

    model: its name; None for the server's only one. version: a version's number or label, None for whichever gets it.
    operation: ``score``: a replica answers; anything else is the protocol's own, and answered by :meth:`Protocol.tell`.
    methods: those that it may have.
    """

    protocol: Protocol
    operation: str
    model: str | None = None
    version: str | None = None
    methods: tuple[str, ...] = ("POST",)
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Served:
    """A model as it is served, for questions that no replica is needed for. versions: by number, those that can be
    asked for; state of each: loading, ready, or failed with the reason."""

    name: str
    version: str
    ready: bool
    description: Description | None
    versions: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class Protocol(ABC):
    """name: as in :data:`tally.serving.protocols.PROTOCOLS`."""

    name: str
    wanted_headers: tuple[bytes, ...] = ()
    """Headers that the replica's half reads, in lower case."""

    @abstractmethod
    def route(self, path: str) -> Route | None:
        """What a path is about; None where it is none of this protocol's."""

    @abstractmethod
    def tell(self, route: Route, served: Served | None, others: Sequence[Served]) -> Reply:
        """Answer a question about a model, or about the server where ``served`` is None."""

    @abstractmethod
    def refusal(self, error: RequestError) -> Reply:
        """An error in this protocol's shape."""

    @abstractmethod
    def decode(self, call: Call, scorer: Scorer) -> Work:
        """The call's body as items. Raises RequestError."""

    @abstractmethod
    def encode(self, call: Call, scorer: Scorer, work: Work, results: Sequence[Result]) -> Reply:
        """The answer. results: one for each item; the ItemError of one that failed. Raises RequestError."""


class GrpcProtocol(Protocol):
    """A protocol over gRPC. Paths are those of methods; which model a request is about, its message says.

    services: their full names.
    """

    services: tuple[str, ...]

    @abstractmethod
    def about(self, route: Route, body: bytes) -> Route:
        """The route with what the request itself says: model, version and parameters. Raises RequestError."""

    def refusal(self, error: RequestError) -> Reply:
        return Reply(error.status, b"", list(error.headers.items()), error.message)


class Paths:
    """Patterns of paths, and what each is about. ``{name}`` stands for one segment, or what of it comes before the
    character that follows."""

    def __init__(self, patterns: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
        self._patterns = [
            (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+?)", re.escape(pattern))), operation, methods)
            for pattern, (operation, methods) in patterns.items()
        ]

    def find(self, protocol: Protocol, path: str) -> Route | None:
        for pattern, operation, methods in self._patterns:
            if (found := pattern.fullmatch(path)) is not None:
                parts = found.groupdict()
                return Route(protocol, operation, parts.pop("model", None), parts.pop("version", None), methods, parts)
        return None


def failed_items(results: Sequence[Any]) -> dict[int, Exception]:
    """The errors among results, by position."""
    return {at: each for at, each in enumerate(results) if isinstance(each, Exception)}


def check_all(results: Sequence[Any], what: str = "item") -> None:
    """Raises RequestError, which names the items that failed, unless all went well."""
    if errors := failed_items(results):
        shown = [f"{what} {at}: {error}" if len(results) > 1 else str(error) for at, error in errors.items()]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise RequestError(422, "; ".join(shown[:3]) + more)


def column_names(scorer: Scorer) -> list[str] | None:
    """What the values of a row without names are called: as the model's columns, or f0, f1 ... where it only knows how
    many; None where it does not know."""
    features = scorer.features
    if isinstance(features, int):
        return [*scorer.by, *(f"f{at}" for at in range(features))]
    return None if features is None else [*scorer.by, *features]


def check_order(columns: Collection[str], scorer: Scorer, where: str) -> None:
    """Raises RequestError where columns that come by name alone are for a model that takes them by their place."""
    if scorer.input != "table" or not isinstance(scorer.features, int):
        return
    if len([each for each in columns if each not in scorer.by]) > 1:
        raise RequestError(
            400,
            f"{where}: the model's columns have an order and no names, and those of a message have names and no order: "
            f"send rows of {scorer.features} values (a tensor of the shape [rows, {scorer.features}]), "
            "or have it served with --set features=...",
        )
