"""``azureml.core.workspace``: see :mod:`tally.training.scripts.azureml`."""

from tally.training.scripts.azureml import Workspace

__all__ = ["Workspace"]
