"""From what a user calls a model to a reference that names its content.

:func:`resolve` turns a path, a registry name, a URL or a Python object into a :class:`ModelRef`, which is
small, JSON-able and names the content by its hash. Workers turn that into a scorer
(:mod:`tally.models.load`).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from tally.errors import (
    ModelLoadError,
    ModelNotFoundError,
    SpecError,
    StorageError,
    TallyError,
    UntrustedModelError,
)
from tally.models.hashing import check_content, content_hash, external_data
from tally.models.mirror import carried_to, carry, fetched, is_here
from tally.models.package import read_package, script_options, sidecar
from tally.models.reference import FILES, Kind, ModelRef
from tally.scorers.base import Scorer
from tally.scorers.scripts.classes import check_options, import_class, local_modules, scorer_class
from tally.text import closest

SUPPORTED = (
    ".onnx and .skops files, .py files (init() and run(), or a Scorer), and folders with a tally.yaml or an MLmodel"
)
PICKLES = frozenset({".pkl", ".pickle", ".joblib", ".pt", ".pth", ".th"})
"""Suffixes of files whose opening can run code that they carry."""
_ESTIMATORS = frozenset({".skops", ".joblib", ".pkl", ".pickle"})

_PLACEHOLDER = re.compile(r"\{[^{}]+\}")
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


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
        ``package.module:Class``, ``models:/name``, ``models:/name/3``, ``models:/name@alias``, a file or folder in
        a bucket, an ``https://`` URL that ends in ``#sha256=...``, or a Scorer (an object or a class); with ``by``,
        columns of a table, also one file for each key, ``models/{column}.skops``.
    labels, artifacts: paths, or URLs in a bucket.
    settings: options that override what the package declares; keys may be dotted
        (``{"preprocess.channels": "bgr"}``).
    trust: allow artifacts whose opening runs code that they carry (pickles).

    Raises SpecError, ModelNotFoundError, ModelLoadError, ModelChangedError, UntrustedModelError.
    """
    given = _Given(task, _given_file(labels), _given_folder(artifacts), settings, by, trust)
    if given.artifacts is not None and not Path(given.artifacts).is_dir():
        raise SpecError(f"there is no folder {given.artifacts!r}", hint="--artifacts names the folder of weights.")
    if given.labels is not None and not Path(given.labels).is_file():
        raise SpecError(f"there is no file {given.labels!r}", hint="--labels names a text file, one label per line.")
    if not isinstance(model, (str, Path)):
        return _from_object(model, given)
    return _from_text(str(model), given)


def _from_text(text: str, given: _Given) -> ModelRef:
    """A model by what the user wrote."""
    if text.startswith("models:/"):
        return _from_registry(text, given)
    if _URL.match(text):
        return _from_url(text, given)
    path = _absolute(text)
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


def _given_file(place: str | Path | None) -> str | None:
    if place is None or not _URL.match(str(place)):
        return None if place is None else str(_absolute(place))
    from tally.models.download import file

    return str(file(str(place)))


def _given_folder(place: str | Path | None) -> str | None:
    if place is None or not _URL.match(str(place)):
        return None if place is None else str(_absolute(place))
    from tally.models.download import folder

    return str(folder(str(place)))


def _from_url(url: str, given: _Given) -> ModelRef:
    """A model on the web, in a bucket, or a ``file://``."""
    from tally.models.download import download, model
    from tally.storage import local_of

    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return _from_path(download(url), given)
    if scheme == "file":
        return _from_text(local_of(url), given)
    if _PLACEHOLDER.search(url):
        return _keyed(url, given)
    path, origin = model(url)
    with _told_as(path if path.is_dir() else path.parent, origin):
        ref = _from_path(path, given)
    return _at_origin(ref, path if path.is_dir() else path.parent, origin)


def _at_origin(ref: ModelRef, folder: Path, origin: str) -> ModelRef:
    """The reference of a model whose folder was fetched. What lies elsewhere (labels, say) has no place there."""
    assumed = tuple(line.replace(str(folder), origin) for line in ref.assumed)
    alone = not any(os.path.isabs(each) for each in ref.files)  # noqa: PTH117
    return replace(ref, assumed=assumed, origin=origin if alone else None)


@contextmanager
def _told_as(folder: Path, origin: str) -> Iterator[None]:
    """What goes wrong is told of the place that the user gave, not of the copy in the cache."""
    try:
        yield
    except TallyError as error:
        error.message = error.message.replace(str(folder), origin)
        if error.hint is not None:
            error.hint = error.hint.replace(str(folder), origin)
        raise


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - keeps links, drops ".."


def _not_found(text: str, path: Path) -> ModelNotFoundError:
    hint = (
        f"A model is one of {SUPPORTED}, package.module:Class, models:/name, or a URL: s3://, az://, gs:// or https://."
    )
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
        return _file(path.parent, path.name, (), sidecar(path), given)
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


def _from_package(folder: Path, given: _Given) -> ModelRef:
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
    covered = files or (name, *(external_data(path) if kind.startswith("onnx") else ()))
    labels = given.labels or options.get("labels")
    if isinstance(labels, str):
        from tally.scorers.vision.processing import read_labels

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
        from tally.scorers.tabular.onnx import takes_table

        return "onnx_table" if takes_table(path) else "onnx"
    if path.name == "MLmodel":
        return "pyfunc"
    return "packed" if suffix == ".parquet" else "sklearn"


def _inspect(kind: Kind, path: Path, options: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
    """The scorer's options, completed from what the model says about itself."""
    if kind == "onnx":
        from tally.scorers.onnx import scorer as onnx

        return onnx.inspect(path, options)
    if kind == "onnx_table":
        from tally.scorers.tabular import onnx as onnx_table

        return onnx_table.inspect(path, options)
    if kind == "pyfunc":
        from tally.scorers.tabular import pyfunc

        return pyfunc.inspect(path.parent, options, trusted=trusted)
    if kind == "packed":
        from tally.scorers.per_key import packed

        return packed.inspect(path, options, trusted=trusted)
    from tally.scorers.tabular import sklearn

    return _remembered(path, options, trusted, lambda: sklearn.inspect(path, options, trusted=trusted))


def _remembered(
    path: Path, options: Mapping[str, Any], trusted: bool, inspect: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What was found out about this very content before: opening a scikit-learn model imports all of scikit-learn,
    which takes seconds, and workers do it anyway."""
    from importlib import metadata

    from tally.storage import cache_folder, open_store

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
        open_store(known.parent).write(known.name, json.dumps(found).encode())
    return found


def _keyed(template: str, given: _Given) -> ModelRef:
    """One model file for each key of a table."""
    from tally.scorers.per_key import files as keyed

    if not given.by:
        columns = ",".join(each[1:-1] for each in _PLACEHOLDER.findall(template))
        raise SpecError(
            f"{template!r} names a model for each key, and no columns make keys",
            hint=f"Say which: --model-per {columns}='{template}'",
        )
    given.only_for(["task", "labels", "artifacts"], "a model for each key", "They describe one model.")
    local, origin = keyed.local_template(template, given.by)
    folder, files = keyed.find(str(_absolute(local)), given.by)
    if not given.trust:  # one that is damaged is its key's trouble alone
        for name in files:
            with suppress(ModelLoadError):
                _check_readable(folder / name, given.trust)
    within = str(_absolute(local).relative_to(folder))
    with _told_as(folder, origin or str(folder)):
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
        origin=origin,
    )


def _cover(files: tuple[str, ...], folder: Path, path: Path) -> tuple[str, ...]:
    """The files to hash, and one more."""
    if not path.is_relative_to(folder):
        return (*files, str(path))
    return files if "." in files else (*files, str(path.relative_to(folder)))


def _code(
    folder: Path,
    name: str,
    given: _Given,
    files: tuple[str, ...] = (),
    declared: Mapping[str, Any] = {},
    artifacts: str | None = None,
) -> ModelRef:
    """A Python file: a script, or one that defines a Scorer."""
    from tally.scorers.scripts.script import outline

    given.only_for(["task", "labels"], f"the Python file {name}", "They describe ONNX models; code knows its own.")
    file, _, wanted = name.partition(":")
    path = folder / file
    options = _merged(declared, given.settings)
    assumed: tuple[str, ...] = ()
    covered = files or tuple(str(each.relative_to(folder)) for each in local_modules(path))
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
        scorer = scorer_class(path, wanted)
        kind, entry, resolved = (
            "python",
            f"{file}:{scorer.__name__}",
            check_options(scorer, options, str(path)),
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


def _script(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    from tally.scorers.scripts.script import form_of

    resolved = script_options(path, options).model_dump(exclude_none=True)
    if resolved["form"] == "auto":
        resolved["form"] = form_of(path)
    return resolved


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
    scorer = import_class(text, folder)
    options = check_options(scorer, _merged(declared, given.settings), text)
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
        options = check_options(kind, given.settings, kind.__name__)
    elif unknown := [name for name in given.settings if name != "batch_size"]:
        raise SpecError(
            f"{kind.__name__} is a finished object: {', '.join(unknown)} can no longer be set",
            hint="Give the class instead of an object, or set it when making the object.",
        )
    else:
        options = dict(given.settings)
    from tally.scorers.scripts import pickled as live

    folder = live.store(model, kind.__name__)
    files: tuple[str, ...] = (live.PICKLED,)
    if given.artifacts is not None:
        files = _cover(files, folder, Path(given.artifacts))
    return ModelRef(
        kind="object",
        name=kind.__name__,
        location=folder,
        entry=live.PICKLED,
        files=files,
        artifacts=given.artifacts or ".",
        hash=content_hash(folder, files),
        options=options,
        trusted=True,
    )


def _from_registry(text: str, given: _Given) -> ModelRef:
    from tally.models.registry import open_registry

    registry = open_registry()
    version = registry.get(text)
    folder = registry.fetch(version)
    ref = replace(_from_package(folder, given), name=version.name, version=version.version)
    origin = registry.origin(version)
    return ref if origin is None else _at_origin(ref, folder, origin)


def refreshed(ref: ModelRef) -> ModelRef:
    """The model with what has come since it was resolved: files of keys that had none. The others must not have
    changed. Raises ModelChangedError."""
    if ref.kind != "keyed":
        return ref
    said = {name: value for name in ("features", "batch_size") if (value := ref.options.get(name)) is not None}
    given = _Given(None, None, None, said, ref.options["by"], ref.trusted)
    if _URL.match(ref.name):
        found = _keyed(ref.name, given)
        check_content(str(ref), found.location, ref.files, ref.hash)
        return found
    if not is_here(ref, any):
        fetched(ref)
        return ref  # what is new comes to another machine
    check_content(str(ref), ref.location, ref.files, ref.hash)
    found = replace(_keyed(str(ref.location / ref.entry), given), name=ref.name)
    place = carried_to(ref)
    return found if place is None else carry(found, place)
