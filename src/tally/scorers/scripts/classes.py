"""Scorers that are classes: in a Python file, or in a module that can be imported."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Mapping
from importlib.machinery import PathFinder, all_suffixes
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tally.errors import ModelChangedError, ModelLoadError, ModelNotFoundError, SpecError, error_line, is_interrupt
from tally.models.hashing import known_hash
from tally.models.reference import BATCH_LIMIT, ModelRef
from tally.scorers.base import Scorer
from tally.scorers.scripts.isolation import is_system
from tally.scorers.scripts.script import load_module, outline
from tally.scorers.scripts.sources import (
    compile_from,
    digest_now,
    digest_of,
    digest_of_class,
    is_for_models,
    is_own,
    put_first,
)
from tally.text import did_you_mean


class _Loaded(NamedTuple):
    """A module that is in use, and the files that it and its neighbours came from: path to SHA-256."""

    module: ModuleType
    files: dict[Path, bytes]

    def is_current(self) -> bool:
        return all(digest_now(file) == digest for file, digest in self.files.items())


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
    put_first(path.parent)
    files = {each: known_hash(each) for each in local_modules(path)}
    forgot = _forget_changed(str(path.parent), files)
    known = _loaded.get(path)
    if known is not None and not forgot and files.items() <= known.files.items() and known.is_current():
        return known.module
    module = load_module(path)
    beside = {Path(file): digest for _, file, digest in _modules_in(str(path.parent)) if digest is not None}
    _loaded[path] = _Loaded(module, beside | files)
    return module


def _modules_in(folder: str) -> list[tuple[str, str, bytes | None]]:
    """Name, file and content when it was loaded, of each module that came from the folder, but for scorers' files."""
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and is_own(file, folder) and not name.startswith(("tally.", "__")):
            found.append((name, file, digest_of(module)))
    return found


def _forget_changed(folder: str, files: Collection[Path] = ()) -> bool:
    """Whether a module of the folder is not what it was: Python would not import it again by itself.

    Forgets those that changed, and with them what may have imported them: ``files``, and all that were loaded for
    models.
    """
    modules = _modules_in(folder)
    changed = {name for name, file, digest in modules if digest != digest_now(file)}
    if changed:
        for name, file, _ in modules:
            if name in changed or Path(file) in files or is_for_models(sys.modules[name]):
                del sys.modules[name]
        importlib.invalidate_caches()
    return bool(changed)


def import_class(text: str, folder: Path | None, *, renewed: bool = False) -> type[Scorer]:
    """The Scorer ``module:Class``. folder: made importable. renewed: what changed there is imported again.

    Raises ModelNotFoundError, ModelLoadError, and ModelChangedError if the class's file changed after its import.
    """
    if folder is None:
        compile_from(Path.cwd())
    elif is_system(str(folder)):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    else:
        put_first(folder)
        if renewed:
            _forget_changed(str(folder))
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
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise ModelLoadError(f"{text}: importing {module} failed: {error_line(error)}") from error
    if not isinstance(found, type) or not issubclass(found, Scorer) or found is Scorer:
        scorers = [
            key
            for key, value in vars(sys.modules[module]).items()
            if isinstance(value, type) and issubclass(value, Scorer)
        ]
        what = "is not a subclass of tally.Scorer" if found is not None else f"does not exist in {module}"
        raise ModelLoadError(f"{text}: {name} {what}{did_you_mean(name, scorers)}")
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    if file is not None and digest_of_class(found) != digest_now(file):
        raise ModelChangedError(
            f"{text}: {file} was changed since this process imported it",
            hint="Start a new process; in Jupyter, restart the kernel.",
        )
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
    finder = _Finder(path=[str(path.parent)])
    finder.run_script(str(path))
    return [path, *sorted({*finder.files().values()} - {path})]


def code_of(names: Collection[str]) -> dict[str, bytes]:
    """Of modules that are imported: name to SHA-256 of their files and of those that they import from the same root,
    but for what is installed."""
    found: dict[str, bytes] = {}
    for name in sorted(names):
        file = source_of(name)
        if file is None or name.partition(".")[0] in ("tally", "__main__"):
            continue
        above = name.count(".") + (file.name == "__init__.py")
        root = str(file.parents[above])
        if is_system(root):
            continue
        finder = _Finder(path=[root])
        try:
            finder.import_hook(name)
        except Exception:  # it is no module any more, or none that can be looked through
            found[name] = known_hash(file)
        found |= {each: known_hash(path) for each, path in finder.files().items()}
    return found


def source_of(name: str) -> Path | None:
    """The file that a module came from, or would come from; None for what is not written in Python, or not known."""
    module = sys.modules.get(name)
    spec = PathFinder.find_spec(name) if module is None and "." not in name else None
    file = getattr(module, "__file__", None) if spec is None else spec.origin
    return Path(file) if isinstance(file, str) and file.endswith(".py") and Path(file).is_file() else None


class _Finder(ModuleFinder):
    """One that knows folders without ``__init__.py``."""

    def files(self) -> dict[str, Path]:
        """The files of the modules that were found, by the modules' names."""
        return {name: Path(file) for name, each in self.modules.items() if (file := getattr(each, "__file__", None))}

    def find_module(self, name: str, path: Any, parent: Any = None) -> Any:
        spec = PathFinder.find_spec(name, self.path if path is None else path)
        if spec is None or spec.loader is not None or not spec.submodule_search_locations:
            return super().find_module(name, path, parent)
        if path is None:
            elsewhere = PathFinder.find_spec(name, [each for each in sys.path if is_system(each)])
            if name in sys.builtin_module_names or (elsewhere is not None and elsewhere.loader is not None):
                raise ImportError(name)  # an installed module comes before such a folder
        return None, next(iter(spec.submodule_search_locations)), ("", "", _PACKAGE)

    def load_package(self, fqname: str, pathname: str) -> Any:
        if any((Path(pathname) / f"__init__{suffix}").is_file() for suffix in all_suffixes()):
            return super().load_package(fqname, pathname)
        module: Any = self.add_module(fqname)
        module.__path__ = [pathname]
        return module


_PACKAGE = 5  # modulefinder's own word for a folder


def not_a_package(ref: ModelRef, what: str) -> SpecError:
    """The error of registering a model that has no file of its own."""
    return SpecError(
        f"{ref.name} is {what}, which a registry cannot keep",
        hint="Register the .py file that defines it, or a package: 'tally new package NAME'.",
    )
