"""What a scoring script finds around itself, and no other script in the process does.

Scripts are written for a process of their own, but a process has one ``sys.argv``, one ``sys.path``, one table of
modules and one ``AZUREML_MODEL_DIR``. :class:`Surroundings` keeps those of one script, puts them in place while its
code runs, and takes them away afterwards, with the modules that it imported from beside itself. The working directory
and all other environment variables are the process's: what a script changes there, the others see.

Threads: the code of one script runs at a time in a process, and other scripts wait. A thread that a script leaves
behind when its call ends finds the process's own surroundings.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Outside:
    """What was in place before the script's. modules: those hidden meanwhile. last_module: the newest in the table."""

    argv: list[str]
    path: list[str]
    variables: dict[str, str | None]
    modules: dict[str, ModuleType]
    last_module: str


class Surroundings:
    """One script's own ``sys.argv``, ``sys.path``, modules, and those environment variables that ``variables`` names.

    What the script changes in them lasts from one call to its next. Modules that it imports from its folder, or from a
    folder that it put on ``sys.path``, are its own; all others are shared with the process.
    """

    _current: ClassVar[Surroundings | None] = None

    def __init__(self, script: Path, *, arguments: Sequence[str] = (), variables: Mapping[str, str]) -> None:
        self._folder = str(script.parent)
        self._argv = [str(script), *arguments]
        self._path = [self._folder]
        self._variables: dict[str, str | None] = dict(variables)
        self._modules: dict[str, ModuleType] = {}
        self._beside = names_beside(script.parent)
        self._outside: _Outside | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put them in place until the end. May be nested: in itself, and in those of other scripts."""
        with _lock:
            outer = Surroundings._current
            if outer is self:
                yield
                return
            if outer is not None:
                outer._leave()
            self._enter()
            try:
                yield
            finally:
                self._leave()
                if outer is not None:
                    outer._enter()

    def _enter(self) -> None:
        argv, path = sys.argv, sys.path
        sys.argv = self._argv
        known = set(self._path)
        self._path += [each for each in path if each not in known]
        sys.path = self._path
        variables = _exchange(self._variables)
        foreign = {name for name in self._beside if self._is_foreign(home_of(name))}
        hidden = [name for name in list(sys.modules) if name.partition(".")[0] in foreign] if foreign else []
        hidden += [name for name in self._modules if name in sys.modules and name not in hidden]
        modules = {name: sys.modules.pop(name) for name in hidden}
        sys.modules.update(self._modules)
        self._outside = _Outside(argv, path, variables, modules, next(reversed(sys.modules)))
        Surroundings._current = self

    def _leave(self) -> None:
        outside = self._outside
        assert outside is not None
        own = {name for name in self._modules if name in sys.modules} | self._imported(outside)
        self._modules = {name: sys.modules.pop(name) for name in own}
        sys.modules.update(outside.modules)
        self._variables = _exchange(outside.variables)
        self._path, sys.path = sys.path, outside.path
        self._argv, sys.argv = sys.argv, outside.argv
        Surroundings._current = None

    def _imported(self, outside: _Outside) -> set[str]:
        """Those of its own modules that the script has imported since it was entered."""
        found: set[str] = set()
        if next(reversed(sys.modules)) == outside.last_module:
            return found
        folders = {str(Path(each).absolute()) for each in set(self._path).difference(outside.path)} | {self._folder}
        for name in reversed(list(sys.modules)):
            if name == outside.last_module:
                break
            home = home_of(name)
            if home in folders and not is_system(home):
                found.add(name)
        return found

    def _is_foreign(self, home: str | None) -> bool:
        """Whether a module found there hides the one of the same name that stands beside the script."""
        return home is not None and home != self._folder and not is_system(home)


def _exchange(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set environment variables, or remove them (None). Returns what they were."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


def names_beside(folder: Path) -> set[str]:
    """The modules and packages, with and without ``__init__.py``, that can be imported from a folder."""
    found = set()
    with os.scandir(folder) as entries:  # a scorer may lie beside a million files
        for each in entries:
            if each.name.endswith(".py"):
                found.add(each.name[:-3])
            elif each.is_dir() and any(any(Path(each.path).glob(depth)) for depth in ("*.py", "*/*.py")):
                found.add(each.name)
    return {name for name in found if not name.startswith("__")} - {"tally"}


def home_of(name: str) -> str | None:
    """The folder in which a module, or the package that it belongs to, was found; None if there is no such module."""
    module = sys.modules.get(name.partition(".")[0])
    places = list(getattr(module, "__path__", None) or [])
    place = places[0] if places else getattr(module, "__file__", None)
    return str(Path(place).absolute().parent) if isinstance(place, str) else None


def is_system(folder: str | None) -> bool:
    """Whether it holds Python's own modules or installed ones, which are never loaded twice."""
    return (
        folder is None
        or folder == str(Path(os.__file__).parent)
        or folder.endswith(("site-packages", "dist-packages", "lib-dynload"))
    )
