"""Training models: styles, classifiers, detectors of anomalies, or with one's own script; each training is a run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tally.training.runs.tracking import Run as Run
    from tally.training.runs.tracking import run as run

__all__ = ["Run", "run"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the submodules need little of this.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("tally.training.runs.tracking"), name)
    raise AttributeError(f"module 'tally.training' has no attribute {name!r}")
