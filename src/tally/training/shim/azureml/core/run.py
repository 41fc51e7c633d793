"""``azureml.core.run``: see :mod:`tally.training.azureml`."""

from tally.training.azureml import Run

__all__ = ["Run"]
