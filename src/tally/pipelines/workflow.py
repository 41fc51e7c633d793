"""A workflow with all that it refers to: its templates, and those of WorkflowTemplates in files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tally.errors import SpecError
from tally.pipelines import document
from tally.pipelines.document import Document, Where
from tally.storage import failure
from tally.text import did_you_mean

Template: TypeAlias = Mapping[str, Any]
"""An object of Argo's, checked field by field: see :mod:`tally.pipelines.document`."""

LEAVES = ("container", "script", "containerSet", "resource", "data", "http", "suspend", "plugin")
GROUPS = ("steps", "dag")
_SUFFIXES = (".yaml", ".yml")
_MOST_FILES = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """A template, and where it is: owner is the WorkflowTemplate that it is part of, or empty for the workflow."""

    template: Template
    owner: str
    where: Where
    document: Document

    @property
    def kind(self) -> str:
        """Which of the kinds of templates it is; empty if none."""
        return next((each for each in (*GROUPS, *LEAVES) if each in self.template), "")


@dataclass(slots=True)
class Workflow:
    """main: the document that is run. spec: its spec, with what it takes from a WorkflowTemplate."""

    main: Document
    libraries: Mapping[str, Document]
    others: tuple[Document, ...] = ()
    spec: dict[str, Any] = field(init=False)
    _base: Document = field(init=False)
    _base_where: Where = field(init=False)

    def __post_init__(self) -> None:
        where: Where = ("spec",)
        own: Mapping[str, Any] = self.main.value.get("spec") or {}
        if self.main.kind == "CronWorkflow":
            where, own = ("spec", "workflowSpec"), own.get("workflowSpec") or {}
        self._base, self._base_where = self.main, where
        self.spec = dict(own)
        if reference := own.get("workflowTemplateRef"):
            self._base, self._base_where = self.libraries[reference["name"]], ("spec",)
            self.spec = _laid_over(self._base.value.get("spec") or {}, own)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.main.value.get("metadata") or {}

    def template(self, holder: Mapping[str, Any], owner: str, where: Where, inside: Document) -> Found:
        """What a step, task or hook runs. Raises SpecError."""
        if "inline" in holder:
            return Found(self._whole(holder["inline"]), owner, (*where, "inline"), inside)
        if reference := holder.get("templateRef"):
            library = self.libraries[reference["name"]]
            return self._named(
                reference.get("template", ""), reference["name"], library, inside.at((*where, "templateRef"))
            )
        return self.named(holder.get("template", ""), owner, inside.at(where))

    def named(self, name: str, owner: str = "", at: str = "") -> Found:
        """A template by its name. owner: the WorkflowTemplate that it is part of. Raises SpecError."""
        if owner:
            return self._named(name, owner, self.libraries[owner], at)
        for number, each in enumerate(self.spec.get("templates") or ()):
            if each.get("name") == name:
                return Found(self._whole(each), "", (*self._base_where, "templates", number), self._base)
        raise self._missing(name, self.spec, at or self.main.file)

    def _named(self, name: str, owner: str, library: Document, at: str) -> Found:
        spec = library.value.get("spec") or {}
        for number, each in enumerate(spec.get("templates") or ()):
            if each.get("name") == name:
                return Found(self._whole(each), owner, ("spec", "templates", number), library)
        raise self._missing(name, spec, f"{at}: in {owner}")

    def _whole(self, template: Template) -> Template:
        """A template with what the workflow says of all, where it does not say it itself; it stays of its kind."""
        own = next((each for each in (*GROUPS, *LEAVES) if each in template), None)
        defaults = self.spec.get("templateDefaults") or {}
        kept = {key: each for key, each in defaults.items() if key == own or key not in (*GROUPS, *LEAVES)}
        return _over(kept, template) if kept else template

    @staticmethod
    def _missing(name: str, spec: Mapping[str, Any], at: str) -> SpecError:
        known = [each.get("name", "") for each in spec.get("templates") or ()]
        what = f"there is no template {name!r}" if name else "a template has to be named"
        return SpecError(f"{at}: {what}{did_you_mean(name, known)}")

    def to_json(self) -> dict[str, Any]:
        documents = [self.main, *self.libraries.values(), *self.others]
        return {"documents": [{"file": each.file, "kind": each.kind, "value": each.value} for each in documents],
                "libraries": len(self.libraries)}  # fmt: skip


def semaphore_key(semaphore: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """A semaphore's key, and where its limit is, if in a ConfigMap."""
    if reference := semaphore.get("configMapKeyRef"):
        return str(reference.get("key", "")), reference
    return str((semaphore.get("database") or {}).get("key", "")), None


def from_json(given: Mapping[str, Any]) -> Workflow:
    """What :meth:`Workflow.to_json` gave."""
    main, *rest = [Document(each["file"], each["kind"], each["value"]) for each in given["documents"]]
    libraries = {str(each.name): each for each in rest[: given["libraries"]]}
    return Workflow(main, libraries, tuple(rest[given["libraries"] :]))


def load(path: str | Path, name: str | None = None) -> Workflow:
    """The workflow of a file, with what it refers to in this file and in those beside it.

    name: of one of several workflows in the file. Raises SpecError, StorageError.
    """
    documents = document.read(path)
    main = _main(documents, name, str(path))
    libraries: dict[str, Document] = {}
    waiting = [main]
    while waiting:
        inside = waiting.pop()
        for wanted, where in _references(inside.value):
            if wanted in libraries:
                continue
            libraries[wanted] = found = _library(wanted, documents, Path(path), inside.at(where))
            waiting.append(found)
    others = tuple(each for each in documents if each.kind in document.BESIDE)
    return Workflow(main, libraries, others)


def _main(documents: list[Document], name: str | None, path: str) -> Document:
    for kinds in (("Workflow",), ("CronWorkflow",), ("WorkflowTemplate", "ClusterWorkflowTemplate")):
        found = [each for each in documents if each.kind in kinds]
        if name is not None:
            found = [each for each in found if each.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(each.name) for each in found)
            raise SpecError(f"{path} holds several workflows: {names}", hint="Say which: --workflow NAME")
    if name is not None:
        known = [str(each.name) for each in documents if each.kind in document.KINDS]
        raise SpecError(f"{path}: there is no workflow {name!r}{did_you_mean(name, known)}")
    raise SpecError(f"{path}: there is no workflow in it, only: {', '.join(each.kind for each in documents)}")


def _references(value: Any, where: Where = ()) -> Iterator[tuple[str, Where]]:
    """The names of WorkflowTemplates in a value."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key in ("templateRef", "workflowTemplateRef") and isinstance(each, Mapping) and "name" in each:
                yield str(each["name"]), (*where, key, "name")
            elif key != "manifest":
                yield from _references(each, (*where, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _references(each, (*where, number))


def _library(name: str, documents: list[Document], path: Path, at: str) -> Document:
    kinds = ("WorkflowTemplate", "ClusterWorkflowTemplate")
    if "{{" in name:
        raise SpecError(f"{at}: the name of a WorkflowTemplate has to be written out here, not {name!r}")
    found = [each for each in documents if each.kind in kinds and each.name == name]
    if not found:
        for beside in _beside(path):
            try:
                text = beside.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if "WorkflowTemplate" in text and name in text:
                try:
                    parsed = document.parse(text, str(beside))
                except SpecError as error:
                    raise SpecError(
                        [f"{at}: the WorkflowTemplate {name!r} may be in {beside}, where:", *error.problems]
                    ) from None
                found += [each for each in parsed if each.kind in kinds and each.name == name]
    if not found:
        raise SpecError(
            f"{at}: there is no WorkflowTemplate {name!r}, neither in this file nor in those beside it",
            hint=f"Put a file with it into {path.resolve().parent}",
        )
    if len(found) > 1:
        raise SpecError(
            f"{at}: the WorkflowTemplate {name!r} is in several files: {', '.join(each.file for each in found)}"
        )
    return found[0]


def _beside(path: Path) -> list[Path]:
    try:
        found = sorted(each for each in path.resolve().parent.iterdir() if each.suffix in _SUFFIXES)
    except OSError as error:
        raise failure("list", str(path.resolve().parent), error) from None
    return [each for each in found[:_MOST_FILES] if each != path.resolve()]


def _laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A WorkflowTemplate's spec with what the workflow says of its own."""
    return dict(_over(base, {key: each for key, each in own.items() if key != "workflowTemplateRef"}))


_NAMED_BY = {"artifacts": "name", "env": "name", "parameters": "name", "sidecars": "name", "volumes": "name",
             "volumeMounts": "mountPath"}  # fmt: skip
"""Lists of Argo's and Kubernetes' whose members are told apart by a field; any other list is one value."""


def _over(base: Any, own: Any, key: str = "") -> Any:
    """What is said, and what stands below it where nothing is said, as Kubernetes merges them. key: where it stands."""
    if isinstance(base, Mapping) and isinstance(own, Mapping):
        return {**base, **{name: _over(base.get(name), each, name) for name, each in own.items()}}
    field_ = _NAMED_BY.get(key)
    if field_ is None or not (isinstance(base, list) and isinstance(own, list)):
        return own
    below = {each.get(field_): each for each in base}
    said = {each.get(field_): _over(below.get(each.get(field_)), each) for each in own}
    return list((below | said).values())
