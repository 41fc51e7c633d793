"""From what a user calls a model to a reference that names its content.

:func:`resolve` turns a path, a registry name, a URL or a Python object into a :class:`ModelRef`, which is
small, JSON-able and names the content by its hash. Workers turn that into a scorer
(:mod:`tally.models.load`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally import demo
from tally.errors import ModelLoadError, ModelNotFoundError, SpecError, UntrustedModelError
from tally.models import hub, kinds
from tally.models.base import Candidate, Flag, Form, Kind, ModelRequest
from tally.models.contents import content_of
from tally.models.mirror import at_mirror, errors_name
from tally.models.package import read_package, sidecar
from tally.models.readable import check_readable
from tally.models.reference import ModelRef
from tally.models.route import is_route
from tally.text import closest, expanded

if TYPE_CHECKING:
    from tally.models.registry import Registry
    from tally.scorers.base import Scorer

_PLACEHOLDER = re.compile(r"\{[^{}]+\}")
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
BUNDLED = "tally:"
"""Before the name of a model that comes with Tally: see :mod:`tally.demo`."""
_FLAGS: tuple[Flag, ...] = ("task", "labels", "artifacts")


def resolve(
    model: str | Path | Scorer | type[Scorer] | Callable[[Any], Any],
    *,
    task: str | None = None,
    labels: str | Path | None = None,
    artifacts: str | Path | None = None,
    settings: Mapping[str, Any] = {},
    by: Sequence[str] = (),
    trust: bool = False,
) -> ModelRef:
    """Find a model, check it without scoring anything, and name it by its content.

    model: a file of one of the :mod:`~tally.models.kinds` of model, a folder with ``tally.yaml`` or one that a
        framework made, ``package.module:Class``, ``models:/name``, ``models:/name/3``, ``models:/name@alias``,
        ``tally:shapes``, ``hf:org/name@revision``, a file or folder in a bucket, an ``https://`` URL that ends in
        ``#sha256=...``, a Scorer (an object or a class), or a function; with ``by``, columns of a table, also one file
        for each key, ``models/{column}.skops``.
    labels, artifacts: paths, or URLs in a bucket; artifacts may also be ``models:/name``.
    settings: options that override what the package declares; keys may be dotted
        (``{"preprocess.channels": "bgr"}``).
    trust: allow artifacts whose opening runs code that they carry (pickles).

    Raises SpecError, ModelNotFoundError, ModelLoadError, ModelChangedError, UntrustedModelError.
    """
    request = ModelRequest(task, _local_file(labels), _local_folder(artifacts), settings, by, trust)
    if request.artifacts is not None and not Path(request.artifacts).is_dir():
        raise SpecError(f"there is no folder {request.artifacts!r}", hint="--artifacts names the folder of weights.")
    if request.labels is not None and not Path(request.labels).is_file():
        raise SpecError(f"there is no file {request.labels!r}", hint="--labels names a text file, one label per line.")
    if not isinstance(model, (str, Path)):
        name = getattr(model, "__name__", type(model).__name__)
        return _resolved(kinds.of_form("object"), Candidate(f"the object {name}", name, value=model), request)
    return _from_text(str(model), request)


def check_there(model: str) -> None:
    """Raises ModelNotFoundError where a model that is named in a text is plainly not there.

    Nothing is opened, fetched or run: what is there may still be no model. Templates, and pages of the web, are not
    looked for. Raises StorageError where a bucket does not answer.
    """
    if _PLACEHOLDER.search(model):
        return
    if model.startswith("models:/"):
        from tally.models.registry import open_registry

        open_registry().get(model)
    elif model.startswith(BUNDLED):
        _bundled(model)
    elif model.startswith(hub.PREFIX):
        hub.parsed(model)
    elif _URL.match(model):
        from tally.models import download
        from tally.storage import local_of

        scheme = model.partition(":")[0].lower()
        if scheme == "file":
            check_there(local_of(model))
        elif scheme not in ("http", "https"):
            download.check_there(model)
    elif not _absolute(model).exists():
        file, separator, _ = model.rpartition(".py:")
        if separator and _absolute(f"{file}.py").is_file():
            return
        if separator or not _IMPORTABLE.fullmatch(model):
            raise _not_found(*((f"{file}.py", _absolute(f"{file}.py")) if separator else (model, _absolute(model))))
        module = model.partition(":")[0].partition(".")[0]
        if find_spec(module) is None and PathFinder.find_spec(module, [str(Path.cwd())]) is None:
            raise ModelNotFoundError(
                f"{model}: there is no module {module!r}",
                hint=f"It is looked for in {Path.cwd()} and among what is installed in {sys.prefix}.",
            )


def refreshed(ref: ModelRef) -> ModelRef:
    """The model with what has been added since it was resolved, such as files of keys that had none. The rest must not
    have changed. Raises ModelChangedError."""
    return kinds.get(ref.kind).refreshed(ref)


def _from_text(text: str, request: ModelRequest) -> ModelRef:
    """A model by what the user wrote."""
    if is_route(text):
        return _in_form("route", text, "a model that messages choose", request)
    if text.startswith("models:/"):
        return _from_registry(text, request)
    if text.startswith(BUNDLED):
        return _from_path(_bundled(text), request)
    if text.startswith(hub.PREFIX):
        folder, commit = hub.fetched(text)
        ref = _from_path(folder, request)
        said = () if text.endswith(commit) else (f"{text} is now at commit {commit} (name it with @ to stay there)",)
        return replace(ref, assumed=(*said, *ref.assumed))
    if _URL.match(text):
        return _from_url(text, request)
    path = _absolute(text)
    if path.exists():
        return _from_path(path, request)
    if _PLACEHOLDER.search(text):
        return _in_form("template", text, "a model for each key", request)
    file, separator, name = text.rpartition(".py:")
    if separator:
        path = _absolute(f"{file}.py")
        if path.is_file():
            return _from_code(Candidate(f"the Python file {path.name}", f"{path.name}:{name}", path.parent), request)
        text = f"{file}.py"
    elif _IMPORTABLE.fullmatch(text):
        return _in_form("class", text, f"the class {text}", request)
    raise _not_found(text, path)


def _bundled(text: str) -> Path:
    name = text.removeprefix(BUNDLED)
    try:
        return demo.model(name)
    except KeyError:
        raise ModelNotFoundError(
            f"no model {name!r} comes with Tally; there are {', '.join(BUNDLED + each for each in demo.MODELS)}"
        ) from None


def _local_file(place: str | Path | None) -> str | None:
    if place is None or not _URL.match(str(place)):
        return None if place is None else str(_absolute(place))
    from tally.models.download import file

    return str(file(str(place)))


def _local_folder(place: str | Path | None) -> str | None:
    if place is not None and str(place).startswith("models:/"):
        from tally.models.registry import open_registry

        registry = open_registry()
        return str(registry.fetch(registry.get(str(place))))
    if place is None or not _URL.match(str(place)):
        return None if place is None else str(_absolute(place))
    from tally.models.download import folder

    return str(folder(str(place)))


def _from_url(url: str, request: ModelRequest) -> ModelRef:
    """A model on the web, in a bucket, or a ``file://``."""
    from tally.models.download import download, model
    from tally.storage import local_of

    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return _from_path(download(url), request)
    if scheme == "file":
        return _from_text(local_of(url), request)
    if _PLACEHOLDER.search(url):
        return _in_form("template", url, "a model for each key", request)
    path, mirror = model(url)
    folder = path if path.is_dir() else path.parent
    with errors_name(mirror, instead_of=folder):
        ref = _from_path(path, request)
    return at_mirror(ref, folder, mirror)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(expanded(path)))  # noqa: PTH100 - keeps links, drops ".."


def _not_found(text: str, path: Path) -> ModelNotFoundError:
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:
        names = []
    if (close := closest(path.name, names)) is not None:
        hint = f"Did you mean {os.path.join(os.path.dirname(text), close)}?"  # noqa: PTH118, PTH120
    elif re.fullmatch(r"[a-z0-9][a-z0-9._-]*(@[\w.-]+)?", text) and "." not in text:
        hint = f"A registered model is written models:/{text}; 'tally models list' shows them."
    else:
        hint = (
            f"A model is one of {kinds.supported()}, package.module:Class, models:/name, or a URL: "
            "s3://, az://, gs:// or https://."
        )
    return ModelNotFoundError(f"there is no model at {text!r}", hint=hint)


def _from_path(path: Path, request: ModelRequest) -> ModelRef:
    if path.is_dir():
        return _from_folder(path, request)
    claimed = None if path.name == "tally.yaml" else kinds.claiming(path.name)
    if path.name == "tally.yaml" or (claimed is not None and path.name in claimed.markers):
        return _from_folder(path.parent, request)
    check_readable(path, trusted=request.trust)
    if claimed is not None and claimed.entry:
        return _from_code(Candidate(f"the Python file {path.name}", path.name, path.parent), request)
    return _from_file(Candidate(f"the model {path.name}", path.name, path.parent, declared=sidecar(path)), request)


def _from_folder(folder: Path, request: ModelRequest) -> ModelRef:
    """A package, or a folder that a framework makes."""
    described = folder / "tally.yaml"
    if described.is_file():
        return _from_package(described, request)
    if (marker := kinds.marker_in(folder)) is not None:
        found = _from_file(Candidate(f"the model {folder.name}", marker, folder, files=(".",)), request)
        return replace(found, name=folder.name)
    models = sorted(each.name for each in folder.iterdir() if kinds.claiming(each.name) is not None)[:3]
    raise ModelLoadError(
        f"{folder} is a folder without a tally.yaml",
        hint=f"Give a file in it ({', '.join(models)}), or make a package: tally new package NAME --from FILE"
        if models
        else "A model package is a folder with a tally.yaml: 'tally new package NAME' writes one.",
    )


def _from_package(described: Path, request: ModelRequest) -> ModelRef:
    folder, package = described.parent, read_package(described)
    if package.requires_trust and not request.trust:
        raise UntrustedModelError(
            f"{folder}: the package says that it needs trust: it runs code that its artifacts carry",
            hint="If you know who made it, give --trust.",
        )
    options = package.options
    if package.batch_size is not None:
        options = {**options, "batch_size": package.batch_size}
    name = package.file or package.entry or ""
    found = Candidate(f"the model {name}", name, folder, (".",), options, package.artifacts)
    if package.file is not None:
        check_readable(folder / package.file, trusted=request.trust)
        ref = _from_file(found, request, package.kind)
    elif ".py" in name:
        ref = _from_code(replace(found, shown=f"the Python file {name}"), request)
    else:
        ref = _resolved(kinds.of_form("class"), replace(found, shown=f"the class {name}"), request)
    if package.kind not in (None, ref.kind):
        raise SpecError(f"{described}: kind: is {package.kind}, but what it names is of kind {ref.kind}")
    return replace(ref, name=package.name or folder.name)


def _from_file(found: Candidate, request: ModelRequest, wanted: str | None = None) -> ModelRef:
    kind = kinds.of_file(found.path, wanted)
    if kind is None:
        suffix, content = found.path.suffix.lower(), content_of(found.path)
        supported = f"Supported are {kinds.supported()}. Packages that add other kinds must be installed here."
        what = f"this is {content.name}, and " if content is not None else ""
        raise ModelLoadError(
            f"{found.path}: {what}{suffix + ' files' if suffix else 'files without a suffix'} cannot be scored",
            hint=f"{content.hint} {supported}" if content is not None else supported,
        )
    return _resolved(kind, found, request)


def _from_code(found: Candidate, request: ModelRequest) -> ModelRef:
    """A Python file: one that names a class is of the kind that is given as a class."""
    kind = kinds.of_form("class") if ":" in found.entry else kinds.of_file(found.path)
    assert kind is not None
    return _resolved(kind, found, request)


def _in_form(form: Form, text: str, shown: str, request: ModelRequest) -> ModelRef:
    return _resolved(kinds.of_form(form), Candidate(shown, text), request)


def _resolved(kind: Kind, found: Candidate, request: ModelRequest) -> ModelRef:
    """The reference, unless the user gave an option that the kind does not take."""
    if wrong := [flag for flag in _FLAGS if getattr(request, flag) is not None and flag not in kind.traits.flags]:
        raise SpecError(
            f"{' and '.join(f'--{flag}' for flag in wrong)} cannot be used with {found.shown}",
            hint=" ".join(f"--{flag} is for models of kind {', '.join(kinds.taking(flag))}." for flag in wrong),
        )
    return kind.resolve(found, request)


def _from_registry(text: str, request: ModelRequest) -> ModelRef:
    from tally.models.registry import open_registry

    return registered(open_registry(), text, lambda folder: _from_folder(folder, request))


def registered(registry: Registry, uri: str, opened: Callable[[Path], ModelRef]) -> ModelRef:
    """A model of the registry. opened: resolves the folder that its version is in, wherever that is to happen.

    Raises ModelNotFoundError, and what ``opened`` raises.
    """
    version = registry.get(uri)
    folder = registry.fetch(version)
    ref = replace(opened(folder), name=version.name, version=version.version)
    mirror = registry.mirror(version)
    return ref if mirror is None else at_mirror(ref, folder, mirror)
