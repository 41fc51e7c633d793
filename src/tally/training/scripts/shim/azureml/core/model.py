"""``azureml.core.model``: see :mod:`tally.training.scripts.azureml`."""

from tally.training.scripts.azureml import Model

__all__ = ["Model"]
