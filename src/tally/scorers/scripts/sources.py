"""Code of models is compiled from its source, whatever Python's cache of bytecode holds.

That cache goes by a source's size and whole second of modification, a model's hash by its content: code from the
cache may be older than the hash says.
"""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType
from weakref import WeakKeyDictionary

import tally
from tally.models.hashing import known_hash
from tally.scorers.base import DEFINED_BY, Scorer
from tally.scorers.scripts.isolation import home_of, is_system, names_beside

_folders: set[str] = set()
_importable: set[str] = set()
_aside: dict[str, dict[str, ModuleType]] = {}
_TALLY = str(Path(tally.__file__).absolute().parent)
_STANDARD = str(Path(os.__file__).parent)
_first_seen: WeakKeyDictionary[ModuleType, bytes] = WeakKeyDictionary()


class SourceLoader(SourceFileLoader):
    """Neither reads nor writes the cache. digest: SHA-256 of the source that was compiled."""

    digest: bytes | None = None

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        content = self.get_data(path)
        self.digest = sha256(content).digest()
        code: CodeType = self.source_to_code(content, path)
        return code


def compile_from(folder: Path) -> None:
    """From now on modules in this folder, and in folders below it, are compiled from their source."""
    if is_system(str(folder)):
        return
    if _finder not in sys.path_hooks:
        sys.path_hooks.insert(0, _finder)
    new = {str(folder.absolute()), str(folder.resolve())} - _folders
    if new:
        _folders.update(new)
        for place in [each for each in list(sys.path_importer_cache) if is_model_code(str(Path(each).absolute()))]:
            sys.path_importer_cache.pop(place, None)


def put_first(folder: Path) -> None:
    """Importable from now on is what lies in this folder, before what lies in folders of other models.

    What was imported from those under a name that this folder has too is put aside until it is their turn.
    """
    compile_from(folder)
    here = str(folder)
    if here not in sys.path or here in _importable:
        _importable.add(here)
        sys.path[:] = [here, *(each for each in sys.path if each != here)]
    strange = _folders - {str(folder.absolute()), str(folder.resolve())}
    homes = {name: home_of(name) for name in names_beside(folder) if name in sys.modules} if strange else {}
    others = {name: home for name, home in homes.items() if home is not None and home != here and home in _folders}
    for name in list(sys.modules) if others else ():
        if (home := others.get(name.partition(".")[0])) is not None:
            _aside.setdefault(home, {})[name] = sys.modules.pop(name)
    for name, module in _aside.pop(here, {}).items():
        sys.modules.setdefault(name, module)


def is_model_code(path: str) -> bool:
    """Whether a file or folder lies in a folder of models, and is not something installed there."""
    return not is_below(path, _TALLY) and any(is_own(path, folder) for folder in _folders)


def is_own(path: str, folder: str) -> bool:
    """Whether it lies in the folder, and is not something installed there, as in an environment's folder."""
    if not is_below(path, folder) or is_below(path, _STANDARD):
        return False
    return not any(is_system(part) for part in Path(path[len(folder) :]).parts)


def is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _finder(folder: str) -> FileFinder:
    """An entry of ``sys.path_hooks``."""
    if not is_model_code(str(Path(folder).absolute())) or not Path(folder).is_dir():
        raise ImportError(folder)
    return FileFinder(
        folder,
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (SourceLoader, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )


def digest_of(module: ModuleType) -> bytes | None:
    """SHA-256 of the file that a module was loaded from; for one that Python loaded, as it was when first asked for."""
    spec = getattr(module, "__spec__", None)
    loader = getattr(spec, "loader", None)
    if isinstance(loader, SourceLoader):
        return loader.digest
    if module not in _first_seen and (now := digest_now(getattr(module, "__file__", None))) is not None:
        _first_seen[module] = now
    return _first_seen.get(module)


def digest_of_class(found: type[Scorer]) -> bytes | None:
    """SHA-256 of the file that defines it, as it was then."""
    module = sys.modules[found.__module__]
    return digest_of(module) if is_for_models(module) else (DEFINED_BY.get(found) or digest_of(module))


def is_for_models(module: ModuleType) -> bool:
    """Whether it was compiled from its source."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), SourceLoader)


def digest_now(file: str | Path | None) -> bytes | None:
    """SHA-256 of a file; None if it cannot be read."""
    try:
        return None if file is None else known_hash(Path(file))
    except OSError:
        return None
