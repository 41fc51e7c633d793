"""The contract of a kind of model: how a model of it is recognised, inspected and made into a scorer.

A framework's :class:`Kind` stands in the framework's own file, beside its scorer, and :mod:`tally.models.kinds` lists
it. What a user calls a model becomes a :class:`Candidate` (:mod:`tally.models.resolve`), the candidate's kind makes it
a :class:`~tally.models.reference.ModelRef`, and any machine makes that a scorer (:mod:`tally.models.load`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from tally.errors import SpecError
from tally.models.hashing import content_hash
from tally.models.labels import read_labels
from tally.models.reference import ModelRef

if TYPE_CHECKING:
    from tally.scorers.base import Scorer

Flag: TypeAlias = Literal["task", "labels", "artifacts"]
"""An option of the user that only some kinds take."""

Form: TypeAlias = Literal["template", "class", "object", "route"]
"""How a model is given where no file's name tells: ``models/{column}.skops``, ``module:Class``, a Python object,
``models:/{meta:model}``."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What is known of a kind without importing its framework.

    claims: what the names of its models end in (``.onnx``, lower case), or the file that makes a folder one
        (``model.json``).
    flags: the user's options that it takes.
    extra: what pip installs for it (``tally-scoring[sklearn]``).
    runs_code: opening a model may run code that the model carries, which takes the user's trust.
    pickles: those of ``claims`` that are pickles, and refused unopened without trust.
    weights: those of ``claims`` that may hold weights alone; of pickles among them, only these are read.
    forms: what its models are by their content (:mod:`tally.models.contents`), under names that no kind claims.
    entry: it is code, which ``tally.yaml`` names under ``entry:``, not under ``file:``.
    form: how its models are given besides.
    scores: False for what is kept as a model, and scores nothing.
    """

    claims: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    extra: str | None = None
    runs_code: bool = False
    pickles: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    entry: bool = False
    form: Form | None = None
    scores: bool = True

    def claims_name(self, name: str) -> bool:
        """Whether a file of this name may be a model of the kind, or make its folder one."""
        return any(is_suffix(each) and name.lower().endswith(each) for each in self.claims) or (
            name.rpartition("/")[2] in self.markers
        )

    @property
    def markers(self) -> tuple[str, ...]:
        """The files that make a folder a model."""
        return tuple(each for each in self.claims if not is_suffix(each))


def is_suffix(claim: str) -> bool:
    return claim.startswith(".")


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What the user says beside the model. Paths are absolute.

    settings: options, keys may be dotted. by: the columns that make a key. trust: code that it carries may run.
    """

    task: str | None = None
    labels: str | None = None
    artifacts: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    by: Sequence[str] = ()
    trust: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may be a model.

    shown: what messages call it. folder: absolute; None for a class that is imported from anywhere, and an object.
    entry: a file in the folder, ``file.py:Class``, ``module:Class``, or a template as the user wrote it.
    files: what the hash covers; where it is empty, the kind says. declared, artifacts: as a package says.
    value: the object.
    """

    shown: str
    entry: str
    folder: Path | None = None
    files: tuple[str, ...] = ()
    declared: Mapping[str, Any] = field(default_factory=dict)
    artifacts: str | None = None
    value: object = None

    @property
    def path(self) -> Path:
        """The file, without the class that the entry may name."""
        assert self.folder is not None
        file, separator, _ = self.entry.rpartition(".py:")
        return self.folder / (f"{file}.py" if separator else self.entry)


class Kind:
    """A kind of model. Subclass it: :meth:`create` is needed, the rest has defaults for models that are files.

    name: by which jobs, packages and the registry know the kind.
    traits: a kind of an installed package sets them in its class.
    reads_files: :meth:`create` looks at the model's files, which are then fetched before.
    comments: explanations of options, for a package that ``tally new`` writes.
    """

    traits: Traits = Traits()
    reads_files: ClassVar[bool] = True
    comments: ClassVar[Mapping[str, str]] = {}

    def __init__(self, name: str, traits: Traits | None = None) -> None:
        self.name = name
        if traits is not None:
            self.traits = traits

    def recognises(self, path: Path) -> bool:
        """Whether a file whose name the kind claims is a model of it. Raises ModelLoadError for a damaged one."""
        return True

    def companions(self, path: Path) -> Sequence[str]:
        """Names of the files that a model file says are part of it, relative to its folder, there or not."""
        return ()

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        """The scorer's options, JSON-able, completed from what the model says about itself.

        options: given by the user and the package. ``assumed`` in the result holds a sentence for the user for each
        thing that was guessed. Raises SpecError with every problem, ModelLoadError, UntrustedModelError.
        """
        return dict(options)

    def create(self, ref: ModelRef) -> Scorer:
        """The scorer, not loaded: it tells its input, size, batch size, output and columns."""
        raise NotImplementedError(f"{type(self).__name__} must define create(ref)")

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        """The reference. Raises SpecError with every problem, ModelLoadError, UntrustedModelError."""
        assert found.folder is not None
        folder, path = found.folder, found.path
        options = merged(found.declared, request.settings)
        if request.task is not None:
            options["task"] = request.task
        there = [name for name in self.companions(path) if (path.parent / name).is_file()]
        files = found.files or (found.entry, *there)
        labels = (request.labels or options.get("labels")) if "labels" in self.traits.flags else None
        if isinstance(labels, str):
            place = folder / labels
            files = covering(files, folder, place)
            # Scorers know only the model's own folder.
            inside = place.is_relative_to(path.parent) and ".." not in place.parts
            options["labels"] = str(place.relative_to(path.parent)) if inside else read_labels(place)
        artifacts = (request.artifacts or found.artifacts) if "artifacts" in self.traits.flags else None
        if artifacts is not None:
            files = covering(files, folder, folder / artifacts)
        digest = content_hash(folder, files)
        resolved = dict(self.inspect(path, options, trusted=request.trust))
        assumed = tuple(resolved.pop("assumed", ()))
        return ModelRef(
            kind=self.name,
            name=path.stem,
            location=folder,
            entry=found.entry,
            files=files,
            artifacts=artifacts or str(Path(found.entry).parent),
            hash=digest,
            options=resolved,
            declared=options,
            trusted=request.trust,
            assumed=assumed,
        )

    def refreshed(self, ref: ModelRef) -> ModelRef:
        """The reference with what has been added to the model since it was resolved. Raises ModelChangedError."""
        return ref

    def package(self, ref: ModelRef) -> dict[str, Any]:
        """The fields of a ``tally.yaml`` that describe the model beside its files.

        Raises SpecError, with what to do instead, for models that cannot be a package.
        """
        return {"file": ref.entry, "options": dict(ref.declared)}

    def starting_options(self, ref: ModelRef) -> dict[str, Any]:
        """The options that a new package is written with for its author to check; ``comments`` explain them."""
        return dict(ref.declared)


def merged(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the dotted settings put in their places. Raises SpecError."""
    found = copy.deepcopy(dict(options))
    problems = []
    for key, value in settings.items():
        *path, last = key.split(".")
        inner: Any = found
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                problems.append(f"{key}: {part} is a value ({inner!r}) and has nothing inside it")
                break
        else:
            inner[last] = value
    if problems:
        raise SpecError(problems)
    return found


def covering(files: tuple[str, ...], folder: Path, path: Path) -> tuple[str, ...]:
    """The files that a hash covers, and one more. files: relative to ``folder``, or absolute."""
    if not path.is_relative_to(folder):
        return (*files, str(path))
    return files if "." in files else (*files, str(path.relative_to(folder)))
