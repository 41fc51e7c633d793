"""``azureml.core.experiment``: see :mod:`tally.training.scripts.azureml`."""

from tally.training.scripts.azureml import Experiment

__all__ = ["Experiment"]
