"""Model packages: reading a ``tally.yaml``, with every problem reported, and writing a model as a package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tally import plain_yaml
from tally.errors import SpecError
from tally.models import kinds
from tally.models.hashing import content_files
from tally.models.labels import read_labels
from tally.models.reference import BATCH_LIMIT, ModelRef
from tally.text import did_you_mean, finding


class Package(BaseModel):
    """The fields of a ``tally.yaml``.

    kind: as :mod:`tally.models.kinds` names it.
    file: a model file, or the one that makes a folder a model; or entry: ``file.py``, ``file.py:Class`` or
        ``module:Class``. All paths are relative to the package.
    artifacts: folder handed to ``Scorer.load``; the package itself by default.
    options: of the scorer. requires_trust: the model runs code that its artifacts carry (pickles).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(default=None, min_length=1)
    description: str | None = None
    kind: str | None = None
    file: str | None = None
    entry: str | None = None
    artifacts: str | None = None
    batch_size: int | None = Field(default=None, ge=1, le=BATCH_LIMIT)
    options: dict[str, Any] = {}
    requires_trust: bool = False


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SpecError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    try:
        values = plain_yaml.load(text)
    except ValueError as error:
        raise SpecError(f"{path} is not valid YAML: {error}", hint=plain_yaml.HINT) from None
    if not isinstance(values, dict):
        raise SpecError(
            f"{path} must hold fields (name: value), not {type(values).__name__}",
            hint="'tally new package NAME' writes one that works, with all options.",
        )
    return values


def sidecar(path: Path) -> dict[str, Any]:
    """The options declared beside a model, in ``model.onnx.yaml``. Raises SpecError."""
    declared = path.with_name(path.name + ".yaml")
    options = read_yaml(declared) if declared.is_file() else {}
    if isinstance(labels := options.get("labels"), str) and not is_inside(path.parent, path.parent / labels):
        raise SpecError(
            f"{declared}: labels: {labels!r} lies outside the model's folder", hint="--labels names a file anywhere."
        )
    return options


def read_package(path: Path) -> Package:
    """A ``tally.yaml``, checked, also that what it names is there. Raises SpecError with every problem."""
    raw = read_yaml(path)
    problems: list[str] = []
    try:
        package = Package.model_validate(raw)
    except ValidationError as error:
        problems += problems_of(error, list(Package.model_fields))
    if (raw.get("file") is None) == (raw.get("entry") is None):
        problems.append("name the model with either file (an .onnx file, say) or entry (a .py file, or module:Class)")
    if isinstance(kind := raw.get("kind"), str) and not kinds.has_files(kind):
        known = [each for each in kinds.names() if kinds.has_files(each)]
        problems.append(f"kind: there is no kind {kind!r}{did_you_mean(kind, known)} (there are {', '.join(known)})")
    for name in ("file", "entry", "artifacts"):
        if isinstance(value := raw.get(name), str):
            problems += _misplaced(path.parent, name, value)
    options = raw.get("options")
    labels = options.get("labels") if isinstance(options, dict) else None
    if isinstance(labels, str) and not is_inside(path.parent, path.parent / labels):
        problems.append(f"options.labels: {labels!r} lies outside the package")
    if problems and isinstance(kind, str) and all(each.startswith(("kind:", "file:")) for each in problems):
        known = kinds.names()  # which looks at every installed package
        if kind not in known and not did_you_mean(kind, known):
            kinds.get(kind)  # raises that no installed package brings it: the rest follows from that
    if problems:
        raise SpecError([f"{path}: {problem}" for problem in problems])
    return package


def _misplaced(folder: Path, name: str, value: str) -> list[str]:
    """What is wrong with a path that a package names."""
    place = value
    if name == "entry":
        file, separator, _ = value.rpartition(".py:")
        if separator:
            place = f"{file}.py"
        elif ":" in value:
            return []  # module:Class
    if name in ("file", "entry"):
        claimed = kinds.claiming_file(folder / place)
        if claimed is None or claimed.entry != (name == "entry"):
            return [f"{name}: {value!r} does not end in {' or '.join(kinds.claims(entry=name == 'entry'))}"]
    if os.path.isabs(place) or os.path.normpath(place).startswith(".."):  # noqa: PTH117 - links of a model are followed
        return [f"{name}: {value!r} lies outside the package"]
    if (folder / place).is_dir() if name == "artifacts" else (folder / place).is_file():
        return []
    there = sorted(each.name for each in folder.iterdir())
    return [f"{name}: there is no {place!r} in the package{did_you_mean(place, there)}"]


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a path is in a folder, links followed. What labels say is shown, whatever file it is that they name."""
    return path.resolve().is_relative_to(folder.resolve())


def problems_of(error: ValidationError, known: Sequence[str]) -> list[str]:
    """One line for each of pydantic's findings."""
    found = []
    for each in error.errors():
        where = ".".join(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            found.append(f"{where}: there is no such field{did_you_mean(where, known)}")
        else:
            found.append(f"{where}: {finding(each)}")
    return found


def problems_in(model: type[BaseModel], options: Mapping[str, Any]) -> list[str]:
    """One line for each thing that is wrong with options that a model of pydantic's describes."""
    try:
        model.model_validate(dict(options))
    except ValidationError as error:
        return problems_of(error, list(model.model_fields))
    return []


def write_package(ref: ModelRef, folder: Path) -> None:
    """Copy a model's files to a new folder, with a ``tally.yaml`` that says all that was resolved.

    Files become read-only. Raises SpecError for models that are not files of their own.
    """
    kind = kinds.get(ref.kind)
    described = kind.package(ref)
    folder.mkdir()
    options = _said(described.pop("options"))
    # What belongs to a model file and lies elsewhere are labels, which the options hold too.
    files = [each for each in ref.files if kind.traits.entry or not Path(each).is_absolute()]
    for name, path in content_files(ref.location, files):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    yaml_file = folder / "tally.yaml"
    fields: dict[str, Any] = plain_yaml.load(yaml_file.read_text("utf-8")) if yaml_file.exists() else {}
    fields |= {"kind": ref.kind, "options": options}
    if ref.trusted and kind.traits.runs_code:
        fields["requires_trust"] = True
    fields |= described
    labels = options.get("labels")
    if "labels" in kind.traits.flags and isinstance(labels, Sequence) and not isinstance(labels, str):
        options["labels"] = _write_labels(labels, folder / ref.artifacts)
    if (size := options.pop("batch_size", None)) is not None:
        fields["batch_size"] = size
    yaml_file.write_text(plain_yaml.dump(fields), "utf-8")
    for parent, _, names in os.walk(folder):
        for name in names:
            Path(parent, name).chmod(0o444)


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that have no value."""
    return {
        name: _said(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if value is not None
    }


def _write_labels(labels: Sequence[str], folder: Path) -> str | list[str]:
    """Labels as the name of a new file, or themselves where a file could not hold them."""
    path = folder / "labels.txt"
    if path.exists():
        return [*labels]
    path.write_text("".join(f"{label}\n" for label in labels), "utf-8")
    if read_labels(path) == [*labels]:
        return path.name
    path.unlink()
    return [*labels]
