"""A model, resolved: the reference that jobs, workers and the registry pass on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

BATCH_LIMIT = 65_536
"""Items in one batch, at most."""

_RENAMED = {"origin": "mirror"}
"""Fields of references in older databases, by the names that they have now."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model, resolved: all that a worker needs to load it. JSON-able (:meth:`to_dict`).

    kind: a name in :mod:`tally.models.kinds`.
    location: absolute local folder that ``files`` are relative to.
    entry: what to load: a file in it, ``file.py:Class`` or ``module:Class``.
    files: the files and folders that the hash covers; absolute ones lie elsewhere.
    artifacts: folder handed to ``Scorer.load``, relative to ``location`` unless absolute.
    options: the scorer's options, fully resolved. declared: what a package or the user said of them.
    hash: ``sha256:...`` of every file's relative path and content; see :func:`content_hash`.
    mirror: URL or path of a folder with the same content, from where machines without ``location`` fetch it.
    version: in the registry; None for a model that does not come from it.
    trusted: the user allowed code that the artifacts carry to run.
    assumed: one line for the user for each thing that was guessed.
    """

    kind: str
    name: str
    location: Path
    entry: str
    hash: str
    options: dict[str, Any] = field(default_factory=dict)
    declared: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = (".",)
    artifacts: str = "."
    version: int | None = None
    trusted: bool = False
    assumed: tuple[str, ...] = ()
    mirror: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "location": str(self.location),
            "files": list(self.files),
            "assumed": list(self.assumed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelRef:
        """A reference as :meth:`to_dict` wrote it, in this version of Tally or an earlier one."""
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        known = {each.name for each in fields(cls)}
        return cls(
            **{
                **{name: value for name, value in values.items() if name in known},
                "location": Path(values["location"]),
                "files": tuple(values["files"]),
                "assumed": tuple(values["assumed"]),
            }
        )

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})" if self.version is not None else self.name
