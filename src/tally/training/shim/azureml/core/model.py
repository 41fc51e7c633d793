"""``azureml.core.model``: see :mod:`tally.training.azureml`."""

from tally.training.azureml import Model

__all__ = ["Model"]
