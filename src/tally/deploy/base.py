"""The contract of a target: where endpoints run that this process does not serve itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import yaml

from tally.deploy.shipping import Shipped, shipped
from tally.deploy.spec import DeploymentSpec

S = TypeVar("S", bound=DeploymentSpec)
Action = Literal["create", "change", "replace", "remove"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a target is to have. documents: as the target takes them. file: what they are called when written.

    notes: lines for the user: what is promised, and what is not.
    """

    documents: Sequence[Mapping[str, Any]]
    file: str
    notes: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The documents as YAML."""
        return dump(self.documents)


@dataclass(frozen=True, slots=True)
class Change:
    """One object that differs. what: its kind and name. lines: of the difference, as ``diff -u`` prints them."""

    action: Action
    what: str
    lines: Sequence[str] = field(default=())


@dataclass(frozen=True, slots=True)
class Status:
    """What a target has of an endpoint. ready, wanted: replicas. model: as it was deployed; version: in the registry,
    where it has one. problems: one line for each thing that keeps it from being as it should be."""

    name: str
    exists: bool
    ready: int = 0
    wanted: int = 0
    image: str = ""
    model: str = ""
    version: str = ""
    profile: str = ""
    problems: Sequence[str] = ()
    uris: Mapping[str, str] = field(default_factory=dict)


class Target(ABC, Generic[S]):
    """One endpoint at one target. ``spec`` is what it is to be. A context manager, which closes what it opened."""

    name: ClassVar[str]
    needs: ClassVar[str | None] = None
    """Says how to install what it needs."""
    spec_type: ClassVar[type[DeploymentSpec]]

    def __init__(self, spec: S) -> None:
        self.spec = spec

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what was opened."""

    @cached_property
    def shipped(self) -> Shipped:
        """How containers get the model; looked up once."""
        return shipped(self.spec)

    @abstractmethod
    def plan(self) -> Plan:
        """What the target is to have. Nothing is connected to but the model's registry.

        Raises SpecError, also for a model that containers could not reach; ModelNotFoundError.
        """

    @abstractmethod
    def difference(self) -> Sequence[Change]:
        """What applying the plan would change. Raises DeployError where the target does not answer or refuses it."""

    @abstractmethod
    def apply(self, say: Say) -> None:
        """Make it so: what is there by this name is updated in place. Raises as :meth:`difference` does."""

    @abstractmethod
    def wait(self, say: Say, timeout: float) -> None:
        """Return when every replica answers. Raises DeployError, saying why they do not, after ``timeout`` seconds or
        as soon as waiting is in vain."""

    @abstractmethod
    def status(self) -> Status:
        """How it is now."""

    @abstractmethod
    def address(self) -> str:
        """The URL that the endpoint's paths begin with, for clients."""

    def uris(self) -> Mapping[str, str]:
        """Where clients send items, and where the description of that is."""
        base = f"{self.address()}/api/v1/service/{self.spec.name}"
        return {"scoring_uri": f"{base}/score", "swagger_uri": f"{base}/swagger.json"}


class Fleet(ABC):
    """All endpoints that Tally has made at a place. A context manager, which closes what it opened. place: for people.

    Each method raises DeployError where the place does not answer.
    """

    place: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give back what was opened."""

    @abstractmethod
    def list(self) -> Sequence[Status]:
        """All, by name."""

    @abstractmethod
    def get(self, name: str) -> Status:
        """One. Raises DeployError where Tally has made none of that name."""

    @abstractmethod
    def parts(self, name: str) -> Sequence[str]:
        """What of it would be deleted. Raises DeployError where Tally has made none of that name."""

    @abstractmethod
    def delete(self, name: str) -> Sequence[str]:
        """Take it away, and what Tally made for it; nothing else. Returns what that was. Raises as :meth:`parts`."""


class _Dumper(yaml.SafeDumper):
    """Writes lists within their keys, and never an alias."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(documents: Sequence[Mapping[str, Any]], *, sort: bool = False) -> str:
    """Documents as YAML, keys in their order unless they are to be sorted."""
    return yaml.dump_all(
        map(dict, documents), Dumper=_Dumper, sort_keys=sort, allow_unicode=True, width=120, explicit_start=True
    )
