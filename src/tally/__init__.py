"""Tally scores large collections with machine-learning models, and never loses or repeats an item."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tally import training as training
    from tally.api import Job as Job
    from tally.api import jobs as jobs
    from tally.api import score as score
    from tally.client import Client as Client
    from tally.errors import ItemError as ItemError
    from tally.errors import TallyError as TallyError
    from tally.scorers.base import Item as Item
    from tally.scorers.base import Pictured as Pictured
    from tally.scorers.base import Scorer as Scorer
    from tally.scorers.base import TableResult as TableResult

_EXPORTS = {
    "Client": "tally.client",
    "Item": "tally.scorers.base",
    "ItemError": "tally.errors",
    "Job": "tally.api",
    "Pictured": "tally.scorers.base",
    "Scorer": "tally.scorers.base",
    "TableResult": "tally.scorers.base",
    "TallyError": "tally.errors",
    "score": "tally.api",
}

# From 1.31 on, ONNX Runtime reports its use to its maker, and keeps a database for that in the user's cache, unless it
# is told otherwise before it is imported. Set the variable to 0 to allow that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Client",
    "Item",
    "ItemError",
    "Job",
    "Pictured",
    "Scorer",
    "TableResult",
    "TallyError",
    "jobs",
    "score",
    "training",
]


def __getattr__(name: str) -> Any:
    # Imported when first used: 'import tally' and 'tally --help' stay fast.
    if name == "__version__":
        from importlib.metadata import version

        return version("tally-scoring")
    if name in ("jobs", "training"):  # packages; the first can be called
        from importlib import import_module

        return import_module(f"tally.{name}")
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tally' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
