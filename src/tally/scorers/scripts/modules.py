"""Python files of models as modules that other processes can import too.

multiprocessing and joblib name a function by its module, and the process that is to run it imports that. So a file's
module has a name below this one, which says where the file is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from tally.scorers.scripts import azureml
from tally.scorers.scripts.sources import SourceLoader, compile_from

PREFIX = f"{__name__}."
"""What the names of such modules begin with."""
_NAMED = re.compile(r"_((?:[0-9a-f]{2})+)$")
__path__: list[str] = []  # a package, to which the finder below adds


def name_of(path: Path) -> str:
    """The name of the module that a file is."""
    stem = re.sub(r"\W", "_", path.stem)
    return f"{PREFIX}{stem}_{os.fsencode(path.absolute()).hex()}"


def spec_of(path: Path) -> ModuleSpec | None:
    """How to load it: from its source. None if Python does not load files of that kind."""
    compile_from(path.parent)
    return spec_from_file_location(name_of(path), path, loader=SourceLoader(name_of(path), str(path)))


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(PREFIX):
            return None
        if (named := _NAMED.search(fullname)) is None:
            raise ImportError("attempted relative import with no known parent package")
        azureml.provide()
        return spec_of(Path(os.fsdecode(bytes.fromhex(named[1]))))


sys.meta_path.append(_Finder())
