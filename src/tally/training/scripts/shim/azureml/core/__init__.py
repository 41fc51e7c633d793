"""``azureml.core``: see :mod:`tally.training.scripts.azureml`."""

from typing import Any

from tally.training.scripts.azureml import PROVIDED, missing


def __getattr__(name: str) -> Any:
    if name in PROVIDED:
        return PROVIDED[name]
    if name.startswith("__"):
        raise AttributeError(name)
    raise missing(__name__, name)
