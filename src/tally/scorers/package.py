"""From what a user calls a model to a loaded scorer.

:func:`resolve` turns a path, a registry name, a URL or a Python object into a :class:`ModelRef`, which is
small, JSON-able and names the content by its hash. Workers turn that into a scorer with :func:`load`,
which refuses content that has changed since.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import inspect
import json
import mmap
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from tally.config import settings as environment
from tally.errors import (
    ModelLoadError,
    ModelNotFoundError,
    SpecError,
    StorageError,
    TallyError,
    UntrustedModelError,
)
from tally.scorers.base import Scorer
from tally.scorers.content import check_content, content_hash
from tally.suggest import closest, did_you_mean

Kind: TypeAlias = Literal["onnx", "onnx_table", "sklearn", "pyfunc", "packed", "keyed", "script", "python", "object"]

SUPPORTED = (
    ".onnx and .skops files, .py files (init() and run(), or a Scorer), and folders with a tally.yaml or an MLmodel"
)
FILES = (".onnx", ".skops", ".joblib", ".pkl", ".pickle", ".parquet", "MLmodel")
"""What the names of models that are files end with."""
PICKLES = frozenset({".pkl", ".pickle", ".joblib", ".pt", ".pth", ".th"})
"""Suffixes of files whose opening can run code that they carry."""
_ESTIMATORS = frozenset({".skops", ".joblib", ".pkl", ".pickle"})

BATCH_LIMIT = 65_536
"""Items in one batch, at most."""

_PLACEHOLDER = re.compile(r"\{[^{}]+\}")
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model, resolved: all that a worker needs to load it. JSON-able (:meth:`to_dict`).

    location: absolute local folder that ``files`` are relative to.
    entry: what to load: a file in it, ``file.py:Class`` or ``module:Class``.
    files: the files and folders that the hash covers; absolute ones lie elsewhere.
    artifacts: folder handed to ``Scorer.load``, relative to ``location`` unless absolute.
    options: the scorer's options, fully resolved. declared: what a package or the user said of them.
    hash: ``sha256:...`` of every file's relative path and content; see :func:`content_hash`.
    version: in the registry; None for a model that does not come from it.
    trusted: the user allowed code that the artifacts carry to run.
    assumed: one line for the user for each thing that was guessed.
    """

    kind: Kind
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

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "location": str(self.location),
            "files": list(self.files),
            "assumed": list(self.assumed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelRef:
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


@dataclass(frozen=True, slots=True)
class _Given:
    """What the user said beside the model."""

    task: str | None
    labels: str | None
    artifacts: str | None
    settings: Mapping[str, Any]
    by: Sequence[str]
    trust: bool

    def only_for(self, names: Sequence[str], what: str, why: str) -> None:
        """Raises SpecError if any of the flags ``names`` was given: ``what`` has no use for it."""
        if wrong := [f"--{name}" for name in names if getattr(self, name) is not None]:
            raise SpecError(f"{' and '.join(wrong)} cannot be used with {what}", hint=why)


def resolve(
    model: str | Path | Scorer | type[Scorer],
    *,
    task: str | None = None,
    labels: str | Path | None = None,
    artifacts: str | Path | None = None,
    settings: Mapping[str, Any] = {},
    by: Sequence[str] = (),
    trust: bool = False,
) -> ModelRef:
    """Find a model, check it without scoring anything, and name it by its content.

    model: a ``.onnx`` or ``.skops`` file, a ``.py`` file, a folder with ``tally.yaml`` or ``MLmodel``,
        ``package.module:Class``, ``models:/name``, ``models:/name/3``, ``models:/name@alias``, an ``https://`` URL
        that ends in ``#sha256=...``, or a Scorer (an object or a class); with ``by``, columns of a table, also one
        file for each key, ``models/{column}.skops``.
    settings: options that override what the package declares; keys may be dotted
        (``{"preprocess.channels": "bgr"}``).
    trust: allow artifacts whose opening runs code that they carry (pickles).

    Raises SpecError, ModelNotFoundError, ModelLoadError, ModelChangedError, UntrustedModelError.
    """
    given = _Given(
        task,
        None if labels is None else str(_absolute(labels)),
        None if artifacts is None else str(_absolute(artifacts)),
        settings,
        by,
        trust,
    )
    if given.artifacts is not None and not Path(given.artifacts).is_dir():
        raise SpecError(f"there is no folder {given.artifacts!r}", hint="--artifacts names the folder of weights.")
    if given.labels is not None and not Path(given.labels).is_file():
        raise SpecError(f"there is no file {given.labels!r}", hint="--labels names a text file, one label per line.")
    if not isinstance(model, (str, Path)):
        return _from_object(model, given)
    text = str(model)
    if text.startswith("models:/"):
        return _from_registry(text, given)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        from tally.scorers.download import download

        return _from_path(download(text), given)
    path = _absolute(model)
    if path.exists():
        return _from_path(path, given)
    if _PLACEHOLDER.search(text):
        return _keyed(text, given)
    file, separator, name = text.rpartition(".py:")
    if separator:
        path = _absolute(f"{file}.py")
        if path.is_file():
            return _code(path.parent, f"{path.name}:{name}", given)
        text = f"{file}.py"
    elif _IMPORTABLE.fullmatch(text):
        return _from_import(text, given)
    raise _not_found(text, path)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - keeps links, drops ".."


def _not_found(text: str, path: Path) -> ModelNotFoundError:
    hint = f"A model is one of {SUPPORTED}, package.module:Class, models:/name, or an https:// URL."
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:
        names = []
    if (close := closest(path.name, names)) is not None:
        hint = f"Did you mean {os.path.join(os.path.dirname(text), close)}?"  # noqa: PTH118, PTH120
    elif re.fullmatch(r"[a-z0-9][a-z0-9._-]*(@[\w.-]+)?", text) and "." not in text:
        hint = f"A registered model is written models:/{text}; 'tally models list' shows them."
    return ModelNotFoundError(f"there is no model at {text!r}", hint=hint)


def _from_path(path: Path, given: _Given) -> ModelRef:
    if path.is_dir():
        return _from_package(path, given)
    if path.name == "tally.yaml":
        return _from_package(path.parent, given)
    _check_readable(path, given.trust)
    suffix = path.suffix.lower()
    if suffix == ".py":
        return _code(path.parent, path.name, given)
    if path.name.endswith(FILES) or suffix in FILES:
        return _file(path.parent, path.name, (), _sidecar(path), given)
    raise ModelLoadError(
        f"{path}: {suffix + ' files' if suffix else 'files without a suffix'} cannot be scored",
        hint=f"Supported are {SUPPORTED}.",
    )


def _check_readable(path: Path, trust: bool) -> None:
    """Refuse what is no model at all, and what would run code when opened."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise ModelLoadError(f"{path} is empty (0 bytes)", hint="Was it copied or downloaded completely?")
    if head.startswith(b"version https://git-lfs"):
        raise ModelLoadError(
            f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the model itself",
            hint="Fetch the content with 'git lfs pull' in the repository that it comes from.",
        )
    # Pickles begin with the byte 0x80 and the number of their protocol.
    if path.suffix.lower() in PICKLES or head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        if not trust:
            raise UntrustedModelError(
                f"{path} is a pickle: opening it runs whatever code it carries",
                hint="If you know who made it, give --trust. Better: save it with skops, or export it to ONNX.",
            )
        if path.suffix.lower() not in _ESTIMATORS:
            raise ModelLoadError(
                f"{path}: pickles of this kind cannot be scored, not even trusted ones",
                hint=f"Supported are {SUPPORTED}. Of pickles, those of scikit-learn are that end in .pkl, .pickle or "
                ".joblib. Export the model to ONNX, or open it in a script's init().",
            )


def _sidecar(path: Path) -> dict[str, Any]:
    """The options declared beside a model, in ``model.onnx.yaml``."""
    from tally.scorers.package_file import read_yaml

    declared = path.with_name(path.name + ".yaml")
    return read_yaml(declared) if declared.is_file() else {}


def _from_package(folder: Path, given: _Given) -> ModelRef:
    from tally.scorers.package_file import read_package

    described = folder / "tally.yaml"
    if not described.is_file() and (folder / "MLmodel").is_file():
        return replace(_file(folder, "MLmodel", (".",), {}, given), name=folder.name)
    if not described.is_file():
        models = sorted(each.name for each in folder.iterdir() if each.suffix.lower() in (".onnx", ".py"))[:3]
        raise ModelLoadError(
            f"{folder} is a folder without a tally.yaml",
            hint=f"Give a file in it ({', '.join(models)}), or make a package: tally new package NAME --from FILE"
            if models
            else "A model package is a folder with a tally.yaml: 'tally new package NAME' writes one.",
        )
    package = read_package(described)
    if package.requires_trust and not given.trust:
        raise UntrustedModelError(
            f"{folder}: the package says that it needs trust: it runs code that its artifacts carry",
            hint="If you know who made it, give --trust.",
        )
    options = package.options
    if package.batch_size is not None:
        options = {**options, "batch_size": package.batch_size}
    if package.file is not None:
        _check_readable(folder / package.file, given.trust)
        ref = _file(folder, package.file, (".",), options, given)
    else:
        entry = package.entry or ""
        if ".py" in entry:
            ref = _code(folder, entry, given, (".",), options, package.artifacts)
        else:
            ref = _imported(folder, entry, (".",), options, given, package.artifacts)
    if package.kind not in (None, ref.kind):
        raise SpecError(f"{described}: kind: is {package.kind}, but what it names is of kind {ref.kind}")
    return replace(ref, name=package.name or folder.name)


def _merged(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the dotted settings put in their places."""
    merged = copy.deepcopy(dict(options))
    problems = []
    for key, value in settings.items():
        *path, last = key.split(".")
        inner: Any = merged
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                problems.append(f"{key}: {part} is a value ({inner!r}) and has nothing inside it")
                break
        else:
            inner[last] = value
    if problems:
        raise SpecError(problems)
    return merged


def _file(folder: Path, name: str, files: tuple[str, ...], declared: Mapping[str, Any], given: _Given) -> ModelRef:
    """A model that is a file, or the folder that ``MLmodel`` describes."""
    path = folder / name
    kind = _kind(path)
    given.only_for(["artifacts"], f"the model {name}", "It is for scripts; external weights are found by themselves.")
    if not kind.startswith("onnx"):
        given.only_for(["task", "labels"], f"the model {name}", "They describe ONNX models.")
    options = _merged(declared, given.settings)
    if given.task is not None:
        options["task"] = given.task
    covered = files or (name, *(_external_data(path) if kind.startswith("onnx") else ()))
    labels = given.labels or options.get("labels")
    if isinstance(labels, str):
        from tally.scorers.vision import read_labels

        covered = _cover(covered, folder, folder / labels)
        place = folder / labels
        # Scorers know only the model's own folder.
        inside = place.is_relative_to(path.parent) and ".." not in place.parts
        options["labels"] = str(place.relative_to(path.parent)) if inside else read_labels(place)
    resolved = _inspect(kind, path, options, given.trust)
    assumed = tuple(resolved.pop("assumed", ()))
    return ModelRef(
        kind=kind,
        name=path.stem,
        location=folder,
        entry=name,
        files=covered,
        artifacts=str(Path(name).parent),
        hash=content_hash(folder, covered),
        options=resolved,
        declared=options,
        trusted=given.trust,
        assumed=assumed,
    )


def _kind(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        from tally.scorers.onnx_table import takes_table

        return "onnx_table" if takes_table(path) else "onnx"
    if path.name == "MLmodel":
        return "pyfunc"
    return "packed" if suffix == ".parquet" else "sklearn"


def _inspect(kind: Kind, path: Path, options: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
    """The scorer's options, completed from what the model says about itself."""
    if kind == "onnx":
        from tally.scorers import onnx

        return onnx.inspect(path, options)
    if kind == "onnx_table":
        from tally.scorers import onnx_table

        return onnx_table.inspect(path, options)
    if kind == "pyfunc":
        from tally.scorers import pyfunc

        return pyfunc.inspect(path.parent, options, trusted=trusted)
    if kind == "packed":
        from tally.scorers import packed

        return packed.inspect(path, options, trusted=trusted)
    from tally.scorers import sklearn

    return _remembered(path, options, trusted, lambda: sklearn.inspect(path, options, trusted=trusted))


def _remembered(
    path: Path, options: Mapping[str, Any], trusted: bool, inspect: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What was found out about this very content before: opening a scikit-learn model imports all of scikit-learn,
    which takes seconds, and workers do it anyway."""
    from importlib import metadata

    from tally.storage import cache_folder

    versions = []
    for name in ("tally-scoring", "scikit-learn", "skops"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(metadata.version(name))
    facts = [versions, str(path), content_hash(path.parent, (path.name,)), dict(options), trusted]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    known = cache_folder() / "inspected" / f"{digest}.json"
    with suppress(OSError, ValueError):
        return cast("dict[str, Any]", json.loads(known.read_text("utf-8")))
    found = inspect()
    with suppress(StorageError):  # it is found out again
        _write_private(known, json.dumps(found).encode())
    return found


def _keyed(template: str, given: _Given) -> ModelRef:
    """One model file for each key of a table."""
    from tally.scorers import keyed

    if not given.by:
        columns = ",".join(each[1:-1] for each in _PLACEHOLDER.findall(template))
        raise SpecError(
            f"{template!r} names a model for each key, and no columns make keys",
            hint=f"Say which: --model-per {columns}='{template}'",
        )
    given.only_for(["task", "labels", "artifacts"], "a model for each key", "They describe one model.")
    folder, files = keyed.find(str(_absolute(template)), given.by)
    if not given.trust:  # one that is damaged is its key's trouble alone
        for name in files:
            with suppress(ModelLoadError):
                _check_readable(folder / name, given.trust)
    within = str(_absolute(template).relative_to(folder))
    options = keyed.inspect(within, given.by, folder, files, _merged({}, given.settings), trusted=given.trust)
    assumed = tuple(options.pop("assumed", ()))
    return ModelRef(
        kind="keyed",
        name=template,
        location=folder,
        entry=within,
        files=files,
        hash=content_hash(folder, files),
        options=options,
        trusted=given.trust,
        assumed=assumed,
    )


def _cover(files: tuple[str, ...], folder: Path, path: Path) -> tuple[str, ...]:
    """The files to hash, and one more."""
    if not path.is_relative_to(folder):
        return (*files, str(path))
    return files if "." in files else (*files, str(path.relative_to(folder)))


def _external_data(path: Path) -> list[str]:
    """Files beside an ONNX model that hold its large weights.

    Each tensor names its file in a protobuf entry ``{key: "location", value: name}``. Searching for that
    entry's bytes finds them without reading gigabytes of protobuf into memory.
    """
    names: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in re.finditer(rb"\x0a\x08location\x12([\x80-\xff]?[\x00-\x7f])", content):
            low, *high = match[1]
            length = (low & 0x7F) | (high[0] << 7 if high else 0)
            names.add(os.fsdecode(content[match.end() : match.end() + length]))
    return sorted(name for name in names if not os.path.isabs(name) and (path.parent / name).is_file())  # noqa: PTH117


def _code(
    folder: Path,
    name: str,
    given: _Given,
    files: tuple[str, ...] = (),
    declared: Mapping[str, Any] = {},
    artifacts: str | None = None,
) -> ModelRef:
    """A Python file: a script, or one that defines a Scorer."""
    from tally.scorers.script import outline

    given.only_for(["task", "labels"], f"the Python file {name}", "They describe ONNX models; code knows its own.")
    file, _, wanted = name.partition(":")
    path = folder / file
    options = _merged(declared, given.settings)
    assumed: tuple[str, ...] = ()
    covered = files or tuple(str(each.relative_to(folder)) for each in _local_modules(path))
    place = given.artifacts or artifacts
    if place is not None:
        covered = _cover(covered, folder, folder / place)
    kind: Kind
    if not wanted and outline(path).is_script:
        kind, entry, resolved = "script", file, _script(path, options)
        if place is None and not files:
            warning = f"AZUREML_MODEL_DIR: no --artifacts given, assumed {folder}; "
            assumed = (warning + "weights that the script reads there are not part of the model's hash",)
    else:
        scorer = _scorer_class(path, wanted)
        kind, entry, resolved = (
            "python",
            f"{file}:{scorer.__name__}",
            _check_options(scorer, options, str(path)),
        )
    return ModelRef(
        kind=kind,
        name=path.stem,
        location=folder,
        entry=entry,
        files=covered,
        artifacts=place or ".",
        hash=content_hash(folder, covered),
        options=resolved,
        trusted=given.trust,
        assumed=assumed,
    )


def _local_modules(path: Path) -> list[Path]:
    """The file, and the modules beside it that it imports, and that they import."""
    from modulefinder import ModuleFinder

    from tally.scorers.script import outline

    outline(path)  # says what is wrong if it is not Python
    finder = ModuleFinder(path=[str(path.parent)])
    finder.run_script(str(path))
    found = {Path(file) for each in finder.modules.values() if (file := getattr(each, "__file__", None))}
    return [path, *sorted(found - {path})]


def _script(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    from tally.scorers.package_file import script_options
    from tally.scorers.script import form_of

    resolved = script_options(path, options).model_dump(exclude_none=True)
    if resolved["form"] == "auto":
        resolved["form"] = form_of(path)
    return resolved


def _scorer_class(path: Path, wanted: str) -> type[Scorer]:
    """The one Scorer that a file defines, or the one called ``wanted``."""
    from tally.scorers.script import load_module

    module = load_module(path)
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Scorer) and value.__module__ == module.__name__
    }
    if wanted:
        if wanted not in found:
            raise ModelLoadError(f"{path} defines no Scorer called {wanted!r}{did_you_mean(wanted, list(found))}")
        return found[wanted]
    if len(found) != 1:
        raise ModelLoadError(
            f"{path} defines {', '.join(found)}: which one is meant?"
            if found
            else f"{path} defines neither init() and run(), nor a subclass of tally.Scorer",
            hint=f"Name it: {path.name}:{next(iter(found))}" if found else "'tally new scorer NAME' writes one.",
        )
    return next(iter(found.values()))


def _check_options(scorer: type[Scorer], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options are the constructor's keyword arguments, besides ``batch_size``."""
    parameters = inspect.signature(scorer).parameters
    known = [name for name, each in parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    problems = [
        f"{where}: {scorer.__name__} has no option {name!r}" + did_you_mean(name, [*known, "batch_size"])
        for name in options
        if name not in known and name != "batch_size" and not open_ended
    ]
    problems += [
        f"{where}: {scorer.__name__} needs the option {name!r}"
        for name in known
        if parameters[name].default is inspect.Parameter.empty and name not in options
    ]
    size = options.get("batch_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= BATCH_LIMIT:
        problems.append(f"{where}: batch_size must be a whole number from 1 to {BATCH_LIMIT}, not {size!r}")
    if problems:
        raise SpecError(problems, hint="An option of a scorer is a keyword argument of its constructor.")
    return dict(options)


def _from_import(text: str, given: _Given) -> ModelRef:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as "python -m" does
    return _imported(None, text, (), {}, given)


def _imported(
    folder: Path | None,
    text: str,
    files: tuple[str, ...],
    declared: Mapping[str, Any],
    given: _Given,
    artifacts: str | None = None,
) -> ModelRef:
    """A class ``module:Class``; its module's file counts for the hash, or the whole package it is part of."""
    given.only_for(["task", "labels"], f"the class {text}", "They describe ONNX models; code knows its own.")
    scorer = _import(text, folder)
    options = _check_options(scorer, _merged(declared, given.settings), text)
    source = inspect.getsourcefile(scorer)
    if source is None:
        raise ModelLoadError(f"{text} has no source file")
    root = Path(source).absolute().parents[scorer.__module__.count(".") + (Path(source).name == "__init__.py")]
    covered = files or (str(Path(source).absolute().relative_to(root)),)
    location = folder or root
    if given.artifacts is not None:
        covered = _cover(covered, location, Path(given.artifacts))
    return ModelRef(
        kind="python",
        name=scorer.__name__,
        location=location,
        entry=text,
        files=covered,
        artifacts=given.artifacts or artifacts or ".",
        hash=content_hash(location, covered),
        options=options,
        trusted=given.trust,
    )


def _import(text: str, folder: Path | None) -> type[Scorer]:
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        ours = error.name is not None and (module == error.name or module.startswith(error.name + "."))
        raise ModelNotFoundError(
            f"{text}: there is no module {error.name!r}",
            hint=f"It is looked for in {Path.cwd()} and among what is installed in {sys.prefix}."
            if ours
            else f"Install {error.name!r} into the environment that runs Tally ({sys.prefix}).",
        ) from None
    except Exception as error:
        raise ModelLoadError(f"{text}: importing {module} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Scorer) or found is Scorer:
        scorers = [
            key
            for key, value in vars(sys.modules[module]).items()
            if isinstance(value, type) and issubclass(value, Scorer)
        ]
        what = "is not a subclass of tally.Scorer" if found is not None else f"does not exist in {module}"
        raise ModelLoadError(f"{text}: {name} {what}{did_you_mean(name, scorers)}")
    return found


def _from_object(model: object, given: _Given) -> ModelRef:
    """A live Scorer, carried to the workers by its pickled form in a private file."""
    kind = model if isinstance(model, type) else type(model)
    if not issubclass(kind, Scorer):
        raise SpecError(
            f"a model is a path, a name or a tally.Scorer, not {model!r}",
            hint=f"Supported paths are {SUPPORTED}.",
        )
    given.only_for(["task", "labels"], f"the object {kind.__name__}", "They describe ONNX models; code knows its own.")
    if isinstance(model, type):
        options = _check_options(kind, given.settings, kind.__name__)
    elif unknown := [name for name in given.settings if name != "batch_size"]:
        raise SpecError(
            f"{kind.__name__} is a finished object: {', '.join(unknown)} can no longer be set",
            hint="Give the class instead of an object, or set it when making the object.",
        )
    else:
        options = dict(given.settings)
    content = _pickled(model, kind.__name__)
    folder = environment().home / "objects" / hashlib.sha256(content).hexdigest()
    _write_private(folder / "scorer.pkl", content)
    files: tuple[str, ...] = ("scorer.pkl",)
    if given.artifacts is not None:
        files = _cover(files, folder, Path(given.artifacts))
    return ModelRef(
        kind="object",
        name=kind.__name__,
        location=folder,
        entry="scorer.pkl",
        files=files,
        artifacts=given.artifacts or ".",
        hash=content_hash(folder, files),
        options=options,
        trusted=True,
    )


def _pickled(model: object, name: str) -> bytes:
    import cloudpickle

    try:
        content = cast("bytes", cloudpickle.dumps(model))
    except Exception as error:
        raise SpecError(
            f"{name} cannot be sent to worker processes: {type(error).__name__}: {error}",
            hint="Open files, sessions and locks in load(), which runs in the worker.",
        ) from error
    # Cloudpickle marks classes of notebooks and __main__ with random ids, which would give the same program
    # another hash in every run. Ids derived from the content serve their purpose as well.
    tracked = getattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS", {})
    marks = [mark for mark in (each.encode() for each in tracked.values()) if mark in content]
    marks.sort(key=content.index)
    bare = functools.reduce(lambda text, mark: text.replace(mark, b"0" * 32), marks, content)
    for number, mark in enumerate(marks):
        digest = hashlib.sha256(bare + bytes([number % 256])).hexdigest()[:32]
        content = content.replace(mark, digest.encode())
    return content


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read, whole or not at all."""
    if path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}",
            hint="Set TALLY_HOME to a folder that can be written to.",
        ) from error


def _from_registry(text: str, given: _Given) -> ModelRef:
    from tally.models.registry import open_registry

    registry = open_registry()
    found = registry.get(text)
    version = registry.verify(found.name, found.version)
    ref = _from_package(version.location, given)
    return replace(ref, name=version.name, version=version.version)


def create(ref: ModelRef) -> Scorer:
    """The scorer, not loaded: tells its input, size, batch size, output and columns."""
    options = dict(ref.options)
    path = ref.location / ref.entry
    scorer: Scorer
    if ref.kind == "script":
        from tally.scorers.script import ScriptScorer

        return ScriptScorer(path, **options)
    if ref.kind not in ("object", "python"):
        return _ready_made(ref.kind, options)
    size = options.pop("batch_size", None)
    if ref.kind == "object":
        scorer = _unpickled(ref, options)
    else:
        scorer = _constructed(ref, options)
    if size is not None:
        scorer.batch_size = size
    return scorer


def _ready_made(kind: Kind, options: dict[str, Any]) -> Scorer:
    if kind == "onnx":
        from tally.scorers.onnx import OnnxVisionScorer

        return OnnxVisionScorer(options)
    if kind == "onnx_table":
        from tally.scorers.onnx_table import OnnxTableScorer

        return OnnxTableScorer(options)
    if kind == "pyfunc":
        from tally.scorers.pyfunc import PyfuncScorer

        return PyfuncScorer(options)
    if kind == "packed":
        from tally.scorers.packed import PackedScorer

        return PackedScorer(options)
    if kind == "keyed":
        from tally.scorers.keyed import KeyedScorer

        return KeyedScorer(options)
    from tally.scorers.sklearn import SklearnScorer

    return SklearnScorer(options)


def _constructed(ref: ModelRef, options: Mapping[str, Any]) -> Scorer:
    file, separator, name = ref.entry.rpartition(".py:")
    found = _scorer_class(ref.location / f"{file}.py", name) if separator else _import(ref.entry, ref.location)
    try:
        return found(**options)
    except TallyError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{ref.entry}: making the scorer failed: {type(error).__name__}: {error}") from error


def _unpickled(ref: ModelRef, options: Mapping[str, Any]) -> Scorer:
    import cloudpickle

    # Before anything in it runs.
    check_content(ref.name, ref.location, ref.files, ref.hash)
    try:
        found = cloudpickle.loads((ref.location / ref.entry).read_bytes())
        return cast("Scorer", found(**options) if isinstance(found, type) else found)
    except Exception as error:
        raise ModelLoadError(
            f"{ref.name} cannot be brought back: {type(error).__name__}: {error}",
            hint="The modules that it uses must be importable in the workers too.",
        ) from error


def refreshed(ref: ModelRef) -> ModelRef:
    """The model with what has come since it was resolved: files of keys that had none. The others must not have
    changed. Raises ModelChangedError."""
    if ref.kind != "keyed":
        return ref
    verify(ref)
    said = {name: value for name in ("features", "batch_size") if (value := ref.options.get(name)) is not None}
    given = _Given(None, None, None, said, ref.options["by"], ref.trusted)
    return replace(_keyed(str(ref.location / ref.entry), given), name=ref.name)


def verify(ref: ModelRef) -> None:
    """Raises ModelChangedError unless the content is still what it was when the model was resolved."""
    check_content(str(ref), ref.location, ref.files, ref.hash)


def load(ref: ModelRef, device: str) -> Scorer:
    """The scorer, loaded on ``device``, after checking that the content is still what it was.

    Raises ModelChangedError, ModelLoadError.
    """
    verify(ref)
    scorer = create(ref)
    try:
        scorer.load(ref.location / ref.artifacts, device)
    except TallyError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelLoadError(
            f"{ref}: load() failed: {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        ) from error
    return scorer
