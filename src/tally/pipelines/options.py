"""How a workflow is run here: what a cluster would give it."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tally.errors import SpecError
from tally.pipelines.document import Document
from tally.text import did_you_mean

ENVIRONMENT = "env"
"""The source of a secret whose keys are environment variables."""


@dataclass(frozen=True, slots=True)
class Options:
    """volumes: folders of this machine, by the names of volumes or claims. secrets, config_maps: a folder with a file
    for each key, or ``env``, by name. venvs: virtual environments, by template. podman: whether templates run in their
    images, except those with a virtual environment. shares: folders that steps see at their own paths, below ``/tmp``
    or in images. semaphores: limits, by key. parallel: steps at once. context, namespace: the cluster that ``resource``
    templates act on; None: there is none.
    """

    volumes: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    config_maps: Mapping[str, str] = field(default_factory=dict)
    venvs: Mapping[str, str] = field(default_factory=dict)
    shares: tuple[str, ...] = ()
    podman: bool = False
    semaphores: Mapping[str, int] = field(default_factory=dict)
    parallel: int | None = None
    context: str | None = None
    namespace: str | None = None
    entrypoint: str | None = None
    cached: bool = False
    since: str | None = None

    @property
    def at_once(self) -> int:
        """How many steps run at once, where the workflow does not say less."""
        return self.parallel or max(8, os.cpu_count() or 1)

    def in_image(self, template: Mapping[str, Any]) -> bool:
        """Whether a template is run in its image."""
        return self.podman and template.get("name", "") not in self.venvs

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"shares": list(self.shares)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Options:
        known = {each.name for each in fields(cls)}
        found: dict[str, Any] = {key: value for key, value in given.items() if key in known}
        return cls(**found | {"shares": tuple(given.get("shares", ()))})


class Keys:
    """Keys of Secrets and ConfigMaps: from documents beside the workflow, from folders, from the environment."""

    def __init__(self, options: Options, documents: Iterable[Document]) -> None:
        self._given = {"Secret": options.secrets, "ConfigMap": options.config_maps}
        self._documents = {(each.kind, str(each.name)): each.value for each in documents}

    def get(self, kind: str, name: str, key: str) -> str:
        """The value of a key. Raises SpecError, which says how to give it."""
        source = self._given[kind].get(name)
        if source == ENVIRONMENT:
            if key in os.environ:
                return os.environ[key]
            raise SpecError(f"{kind} {name!r}: there is no environment variable {key!r}", hint=f"Set {key}")
        keys = self.all(kind, name)
        if key not in keys:
            raise SpecError(f"{kind} {name!r} has no key {key!r}{did_you_mean(key, keys)}", hint=_how(kind))
        return keys[key]

    def has(self, kind: str, name: str, key: str) -> bool:
        try:
            self.get(kind, name, key)
        except SpecError:
            return False
        return True

    def all(self, kind: str, name: str) -> dict[str, str]:
        """All keys. Raises SpecError, also where they come from the environment, which cannot be listed."""
        source = self._given[kind].get(name)
        if source == ENVIRONMENT:
            raise SpecError(
                f"all keys of the {kind} {name!r} are asked for", hint=f"Give a folder: {_flag(kind)} NAME=FOLDER"
            )
        if source is not None:
            folder = Path(source)
            try:
                return {each.name: each.read_text("utf-8") for each in sorted(folder.iterdir()) if each.is_file()}
            except (OSError, UnicodeDecodeError) as error:
                raise SpecError(f"{_flag(kind)} {name}={source}: cannot be read: {error}") from None
        value = self._documents.get((kind, name))
        if value is None:
            raise SpecError(f"{kind} {name!r} is not known here", hint=_how(kind))
        found = {key: str(each) for key, each in (value.get("stringData") or {}).items()}
        if wrong := [key for key in (*found, *(value.get("data") or {})) if "/" in key or key in (".", "..")]:
            raise SpecError(f"{kind} {name!r}: {wrong[0]!r} is no key")
        for key, each in (value.get("data") or {}).items():
            try:
                found[key] = base64.b64decode(each, validate=True).decode() if kind == "Secret" else str(each)
            except (binascii.Error, ValueError):
                raise SpecError(f"{kind} {name!r}: {key} is not base64") from None
        return found


def _flag(kind: str) -> str:
    return "--secret" if kind == "Secret" else "--config-map"


def _how(kind: str) -> str:
    return f"Give a folder with a file for each key: {_flag(kind)} NAME=FOLDER, or {_flag(kind)} NAME=env"
