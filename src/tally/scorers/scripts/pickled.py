"""Scorers that are objects or classes of the calling program, pickled for the workers."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal, cast

import cloudpickle

from tally.config import make_private, settings
from tally.errors import ModelChangedError, ModelLoadError, SpecError, StorageError, error_line, is_interrupt
from tally.models import kinds
from tally.models.base import Candidate, Kind, ModelRequest, covering
from tally.models.hashing import check_content, content_hash, known_hash
from tally.models.reference import ModelRef
from tally.scorers.base import Input, Results, Scorer
from tally.scorers.scripts.classes import check_options, code_of, not_a_package, source_of
from tally.storage.publish import write_whole

PICKLED = "scorer.pkl"
MODULES = "modules.json"
"""Beside it: what the modules that it refers to, and that are not installed, hold by their SHA-256. A pickle only names
them, and is the same when they have changed."""


_SAVED = {
    "sklearn": "Save it, and give its path: skops.io.dump(model, 'model.skops').",
    "torch": "Export it, and give its path, with trust=True: "
    "torch.export.save(torch.export.export(model.eval(), (example,)), 'model.pt2').",
    "keras": "Save it, and give its path: model.save('model.keras').",
    "xgboost": "Save it, and give its path: model.save_model('model.json').",
    "lightgbm": "Save it, and give its path: model.booster_.save_model('model.txt').",
    "catboost": "Save it, and give its path: model.save_model('model.cbm').",
    "onnxruntime": "Give the path of its file.",
}
"""What to do with a model that a library has made, by the library's name."""


class Function(Scorer):
    """A function of a batch. The settings beside it declare what the attributes of a Scorer's class declare."""

    def __init__(
        self,
        function: Callable[[Any], Results],
        *,
        input: Input = "image",  # noqa: A002  # the scorer's word
        output: Literal["rows", "image"] = "rows",
        size: Sequence[int] | None = None,
        columns: Mapping[str, str] | None = None,
        features: int | Sequence[str] | None = None,
    ) -> None:
        self._function, self.input, self.output = function, input, output
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.columns, self.features = columns, features

    def score(self, batch: Any) -> Results:
        return self._function(batch)


class ObjectKind(Kind):
    """A Scorer of the calling program, object or class, or a function: workers get it pickled, from a private file."""

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        if inspect.isroutine(found.value) or isinstance(found.value, functools.partial):
            return self._function(found.value, request)
        return self._scorer(found.value, request)

    def _function(self, function: Any, request: ModelRequest) -> ModelRef:
        """The function's scorer, which has the function's name."""
        name = named(function)
        settings = check_options(Function, {**request.settings, "function": function}, name)
        size = {"batch_size": settings.pop("batch_size")} if "batch_size" in settings else {}
        ref = self._scorer(Function(**settings), replace(request, settings=size))
        guessed = (
            f"{name} was taken for a function of a list of pictures: settings={{'input': 'bytes'}}, 'path' or 'table' "
            "gives it something else"
        )
        return replace(ref, name=name, assumed=() if "input" in settings else (guessed,))

    def _scorer(self, model: Any, request: ModelRequest) -> ModelRef:
        kind = model if isinstance(model, type) else type(model)
        if not issubclass(kind, Scorer):
            libraries = (each.__module__.partition(".")[0] for each in kind.__mro__)
            library = next((each for each in libraries if each in _SAVED), None)
            raise SpecError(
                "a model is a path, a name, a tally.Scorer or a function of a batch, not "
                + (repr(model) if library is None else f"an object of {library}, {kind.__qualname__}"),
                hint=_SAVED.get(library or "", f"Supported paths are {kinds.supported()}."),
            )
        if isinstance(model, type):
            options = check_options(kind, request.settings, kind.__name__)
        elif unknown := [name for name in request.settings if name != "batch_size"]:
            raise SpecError(
                f"{kind.__name__} is a finished object: {', '.join(unknown)} can no longer be set",
                hint="Give the class instead of an object, or set it when making the object.",
            )
        else:
            options = dict(request.settings)
        folder = store(model, kind.__name__)
        files: tuple[str, ...] = (PICKLED, MODULES) if (folder / MODULES).is_file() else (PICKLED,)
        if request.artifacts is not None:
            files = covering(files, folder, Path(request.artifacts))
        return ModelRef(
            kind=self.name,
            name=kind.__name__,
            location=folder,
            entry=PICKLED,
            files=files,
            artifacts=request.artifacts or ".",
            hash=content_hash(folder, files),
            options=options,
            trusted=True,
        )

    def create(self, ref: ModelRef) -> Scorer:
        options = dict(ref.options)
        size = options.pop("batch_size", None)
        check_content(ref.name, ref.location, ref.files, ref.hash)  # before anything in it runs
        scorer = load(ref.location / ref.entry, ref.name, options)
        if MODULES in ref.files:
            _check_modules(ref.name, json.loads((ref.location / MODULES).read_text()))
        if size is not None:
            scorer.batch_size = size
        return scorer

    def package(self, ref: ModelRef) -> dict[str, Any]:
        raise not_a_package(ref, "a Python object")


def named(model: object) -> str:
    """What a Scorer, object or class, or a function is called."""
    if isinstance(model, functools.partial):
        return named(model.func)
    own = model if isinstance(model, type) or inspect.isroutine(model) else type(model)
    return own.__name__.strip("<>")


def store(model: object, name: str) -> Path:
    """A folder of this user that holds a Scorer, object or class, in ``PICKLED``.

    The same model has the same folder, and so the content that was stored first: where its code stands, in which line
    of which file or cell, makes no other model of it. What the modules hold that it refers to does.
    Raises SpecError for what cannot be pickled, StorageError.
    """
    pickler = _Pickler()
    content = _pickled(model, name, pickler)
    identity = _pickled(model, name, _Pickler(placeless=True)) if pickler.met_code else content
    code = code_of(pickler.modules)
    modules = json.dumps({each: digest.hex() for each, digest in sorted(code.items())}).encode() if code else b""
    folder = settings().home / "objects" / hashlib.sha256(identity + modules).hexdigest()
    if modules:
        _write_private(folder / MODULES, modules)
    _write_private(folder / PICKLED, content)
    return folder


def _check_modules(name: str, wanted: Mapping[str, str]) -> None:
    """Raises ModelChangedError if a module is not what it was when the job began."""
    for module, digest in wanted.items():
        file = source_of(module)
        if file is not None and known_hash(file).hex() != digest:
            raise ModelChangedError(
                f"model {name}: it changed since the job began: {file} is not what it was",
                hint="Bring the old content back, or start a new job with the content that is there now.",
            )


def load(path: Path, name: str, options: Mapping[str, Any]) -> Scorer:
    """The object, or one that a pickled class makes with these options. The caller checks the file's content before.

    Raises ModelLoadError.
    """
    try:
        found = cloudpickle.loads(path.read_bytes())
        return cast("Scorer", found(**options) if isinstance(found, type) else found)
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise ModelLoadError(
            f"{name} cannot be unpickled: {error_line(error)}",
            hint="The modules that it uses must be importable in the workers too.",
        ) from error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """met_code: whether it has pickled code by its value. modules: those that the pickle refers to. placeless: leave
    out where that code stands."""

    def __init__(self, *, placeless: bool = False) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file)
        self._placeless, self.met_code = placeless, False
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType):
            self.modules.add(obj.__name__)
        elif isinstance(obj, type) or inspect.isroutine(obj):
            self.modules.add(str(obj.__module__))
        if isinstance(obj, CodeType):
            self.met_code = True
            if self._placeless:
                bare = obj.replace(co_filename="", co_firstlineno=1, co_linetable=b"")
                return self.dispatch_table[CodeType](bare)
        return super().reducer_override(obj)


def _pickled(model: object, name: str, pickler: _Pickler) -> bytes:
    try:
        pickler.dump(model)
        content = pickler.file.getvalue()
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
    """Write a file that only this user can read, unless it is there."""
    if path.is_file():
        return
    try:
        make_private(path.parent)
        write_whole(path, content, private=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}",
            hint="Set TALLY_HOME to a folder that can be written to.",
        ) from error
