"""``azureml.core.dataset``: see :mod:`tally.training.azureml`."""

from tally.training.azureml import Dataset

__all__ = ["Dataset"]
