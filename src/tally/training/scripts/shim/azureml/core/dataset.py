"""``azureml.core.dataset``: see :mod:`tally.training.scripts.azureml`."""

from tally.training.scripts.azureml import Dataset

__all__ = ["Dataset"]
