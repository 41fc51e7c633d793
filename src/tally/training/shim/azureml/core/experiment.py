"""``azureml.core.experiment``: see :mod:`tally.training.azureml`."""

from tally.training.azureml import Experiment

__all__ = ["Experiment"]
