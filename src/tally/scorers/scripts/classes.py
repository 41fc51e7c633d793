"""Scorers that are classes: in a Python file, or in a module that can be imported."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tally.errors import ModelLoadError, ModelNotFoundError, SpecError
from tally.models.hashing import known_hash
from tally.models.reference import BATCH_LIMIT, ModelRef
from tally.scorers.base import Scorer
from tally.scorers.scripts.script import load_module, outline
from tally.text import did_you_mean


class _Loaded(NamedTuple):
    """A module that is in use, and the files that it and its neighbours came from: path to SHA-256."""

    module: ModuleType
    files: dict[Path, bytes]


_loaded: dict[Path, _Loaded] = {}


def scorer_class(path: Path, wanted: str) -> type[Scorer]:
    """The one Scorer that a file defines, or the one called ``wanted``.

    A process runs the file once, and again if it, or a module beside it that it imports, has changed.
    Raises ModelLoadError.
    """
    module = _module(path)
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


def _module(path: Path) -> ModuleType:
    files = {each: known_hash(each) for each in local_modules(path)}
    known = _loaded.get(path)
    if known is not None and known.files == files:
        return known.module
    if any(each.files.get(file, digest) != digest for each in _loaded.values() for file, digest in files.items()):
        # Python would not import a changed neighbour again by itself.
        ours = {str(file) for file in files}
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) in ours:
                del sys.modules[name]
        importlib.invalidate_caches()
    module = load_module(path)
    _loaded[path] = _Loaded(module, files)
    return module


def import_class(text: str, folder: Path | None) -> type[Scorer]:
    """The Scorer ``module:Class``. folder: made importable. Raises ModelNotFoundError, ModelLoadError."""
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


def check_options(scorer: type[Scorer], options: Mapping[str, Any], where: str) -> dict[str, Any]:
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


def local_modules(path: Path) -> list[Path]:
    """The file, and the modules beside it that it imports, and that they import."""

    outline(path)  # says what is wrong if it is not Python
    finder = ModuleFinder(path=[str(path.parent)])
    finder.run_script(str(path))
    found = {Path(file) for each in finder.modules.values() if (file := getattr(each, "__file__", None))}
    return [path, *sorted(found - {path})]


def not_a_package(ref: ModelRef, what: str) -> SpecError:
    """The error of registering a model that has no file of its own."""
    return SpecError(
        f"{ref.name} is {what}, which a registry cannot keep",
        hint="Register the .py file that defines it, or a package: 'tally new package NAME'.",
    )
