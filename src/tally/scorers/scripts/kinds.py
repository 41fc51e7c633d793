"""The kinds of model that are Python code: scripts and classes."""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from tally.errors import (
    ModelChangedError,
    ModelLoadError,
    ModelNotFoundError,
    TallyError,
    error_line,
    is_interrupt,
)
from tally.models.base import Candidate, Kind, ModelRequest, covering, merged
from tally.models.hashing import content_hash, known_hash
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.scripts.classes import check_options, import_class, local_modules, not_a_package, scorer_class
from tally.scorers.scripts.script import ScriptScorer, form_of, outline


class _CodeFile(Kind):
    """A Python file, and the modules beside it that it imports."""

    def companions(self, path: Path) -> list[str]:
        return [str(each.relative_to(path.parent)) for each in local_modules(path)[1:]]

    def package(self, ref: ModelRef) -> dict[str, Any]:
        fields = {"entry": ref.entry, "options": dict(ref.options)}
        if ref.artifacts != ".":
            artifacts = ref.location / ref.artifacts
            inside = artifacts.is_relative_to(ref.location)
            fields["artifacts"] = str(artifacts.relative_to(ref.location)) if inside else artifacts.name
        return fields

    def _covered(self, found: Candidate, artifacts: str | None) -> tuple[str, ...]:
        """The files that the hash covers, with the artifacts."""
        assert found.folder is not None
        files = found.files or (found.path.name, *self.companions(found.path))
        return files if artifacts is None else covering(files, found.folder, found.folder / artifacts)


class ScriptKind(_CodeFile):
    """A file with ``init()`` and ``run()``; it is not run before a worker loads it."""

    def recognises(self, path: Path) -> bool:
        return outline(path).is_script

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        assert found.folder is not None
        artifacts = request.artifacts or found.artifacts
        files = self._covered(found, artifacts)
        options = self.inspect(found.path, merged(found.declared, request.settings), trusted=request.trust)
        assumed: tuple[str, ...] = ()
        if artifacts is None and not found.files:
            warning = f"AZUREML_MODEL_DIR: no --artifacts given, assumed {found.folder}; "
            assumed = (warning + "weights that the script reads there are not part of the model's hash",)
        return ModelRef(
            kind=self.name,
            name=found.path.stem,
            location=found.folder,
            entry=found.entry,
            files=files,
            artifacts=artifacts or ".",
            hash=content_hash(found.folder, files),
            options=options,
            trusted=request.trust,
            assumed=assumed,
        )

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        from tally.scorers.scripts.options import ScriptOptions  # pydantic takes time, and workers need none of it

        found = ScriptOptions.checked(path, options)
        if found["form"] == "auto":
            found["form"] = form_of(path)
        return found

    def create(self, ref: ModelRef) -> Scorer:
        return ScriptScorer(ref.location / ref.entry, **ref.options)


class PythonKind(_CodeFile):
    """A subclass of Scorer: in a file (``file.py:Class``), or in a module that can be imported (``module:Class``)."""

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        if ".py" not in found.entry:
            return self._imported(found, request)
        assert found.folder is not None
        artifacts = request.artifacts or found.artifacts
        files = self._covered(found, artifacts)
        digest = content_hash(found.folder, files)
        scorer = scorer_class(found.path, found.entry.rpartition(".py:")[2] if ":" in found.entry else "")
        return ModelRef(
            kind=self.name,
            name=found.path.stem,
            location=found.folder,
            entry=f"{found.path.relative_to(found.folder)}:{scorer.__name__}",
            files=files,
            artifacts=artifacts or ".",
            hash=digest,
            options=check_options(scorer, merged(found.declared, request.settings), str(found.path)),
            trusted=request.trust,
        )

    def _imported(self, found: Candidate, request: ModelRequest) -> ModelRef:
        """The hash covers the file of the class's module, or all of the package that names the class."""
        if found.folder is None and str(Path.cwd()) not in sys.path and _is_here(found.entry):
            sys.path.insert(0, str(Path.cwd()))  # as "python -m" does
        scorer = import_class(found.entry, found.folder, renewed=True)
        options = check_options(scorer, merged(found.declared, request.settings), found.entry)
        source = inspect.getsourcefile(scorer)
        if source is None:
            raise ModelLoadError(f"{found.entry} has no source file")
        root = Path(source).absolute().parents[scorer.__module__.count(".") + (Path(source).name == "__init__.py")]
        files = found.files or (str(Path(source).absolute().relative_to(root)),)
        location = found.folder or root
        if request.artifacts is not None:
            files = covering(files, location, Path(request.artifacts))
        return ModelRef(
            kind=self.name,
            name=scorer.__name__,
            location=location,
            entry=found.entry,
            files=files,
            artifacts=request.artifacts or found.artifacts or ".",
            hash=content_hash(location, files),
            options=options,
            trusted=request.trust,
        )

    def create(self, ref: ModelRef) -> Scorer:
        options = dict(ref.options)
        size = options.pop("batch_size", None)
        file, separator, name = ref.entry.rpartition(".py:")
        found = scorer_class(ref.location / f"{file}.py", name) if separator else _imported_here(ref)
        try:
            scorer = found(**options)
        except TallyError:
            raise
        except BaseException as error:
            if is_interrupt(error):
                raise
            raise ModelLoadError(f"{ref.entry}: making the scorer failed: {error_line(error)}") from error
        if size is not None:
            scorer.batch_size = size
        return scorer

    def package(self, ref: ModelRef) -> dict[str, Any]:
        if ".py:" not in ref.entry:
            raise not_a_package(ref, "an importable class")
        return super().package(ref)


def _is_here(entry: str) -> bool:
    """Whether the module of ``module:Class`` is in the current folder."""
    return PathFinder.find_spec(entry.partition(":")[0].partition(".")[0], [str(Path.cwd())]) is not None


def _imported_here(ref: ModelRef) -> type[Scorer]:
    """The class ``module:Class``, as this machine has it. Only its own file travels with the reference."""
    try:
        found = import_class(ref.entry, ref.location)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error.message} on {platform.node()}",
            hint=f"{error.hint} Workers on other machines need it installed there, "
            "or make it a package: 'tally new package NAME'.",
        ) from None
    ours = Path(inspect.getsourcefile(found) or "").absolute()
    known = ref.location.joinpath(*found.__module__.split("."))
    wanted = known / "__init__.py" if known.is_dir() else known.with_name(f"{known.name}.py")
    if ours != wanted and ours.is_file() and wanted.is_file() and known_hash(ours) != known_hash(wanted):
        raise ModelChangedError(
            f"model {ref}: {ours} on {platform.node()} is not what the job began with",
            hint=f"Install the same version of {found.__module__.partition('.')[0]} on every machine.",
        )
    return found
