"""``azureml.core.workspace``: see :mod:`tally.training.azureml`."""

from tally.training.azureml import Workspace

__all__ = ["Workspace"]
