"""``azureml.core.run``: see :mod:`tally.training.scripts.azureml`."""

from tally.training.scripts.azureml import Run

__all__ = ["Run"]
