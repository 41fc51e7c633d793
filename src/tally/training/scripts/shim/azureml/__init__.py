"""Of Azure ML's packages, what training scripts use; see :mod:`tally.training.scripts.azureml`."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from tally.training.scripts.azureml import missing


class _Missing(MetaPathFinder):
    """Says of modules that are not here why."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if fullname.startswith("azureml."):
            raise ModuleNotFoundError(str(missing(parent, name)), name=fullname)
        return None


sys.meta_path.append(_Missing())
