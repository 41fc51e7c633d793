"""What a head is trained with: bottlenecks with their labels, and the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tally.errors import SpecError
from tally.training.retrain.dataset import PARTS, Dataset, Part

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How the head is trained. Raises SpecError with every problem.

    train_batch_size, validation_batch_size, test_batch_size: pictures that are drawn; -1: all. Where so many are drawn
        for validation or test that all would fit in, all are taken once.
    balanced: the class is drawn first, then a picture of it, as in TensorFlow's ``retrain.py``; otherwise pictures.
    early_stopping: end after so many evaluations without a lower validation loss, and keep the weights that had the
        lowest; 0: never.
    """

    how_many_training_steps: int = 4000
    learning_rate: float = 0.01
    train_batch_size: int = 100
    validation_batch_size: int = 100
    test_batch_size: int = -1
    eval_step_interval: int = 10
    balanced: bool = True
    early_stopping: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"--{name}: at least 1, not {getattr(self, name)}"
            for name in ("how_many_training_steps", "eval_step_interval")
            if getattr(self, name) < 1
        ]
        problems += [
            f"--{name}: 1 to 1,000,000, or -1 for all pictures, not {getattr(self, name)}"
            for name in ("train_batch_size", "validation_batch_size", "test_batch_size")
            if getattr(self, name) != -1 and not 1 <= getattr(self, name) <= 1_000_000
        ]
        if not 0 < self.learning_rate < float("inf"):
            problems.append(f"--learning_rate: more than 0, not {self.learning_rate:g}")
        problems += [
            f"--{name.replace('_', '-')}: 0 or more, not {getattr(self, name)}"
            for name in ("early_stopping", "seed")
            if getattr(self, name) < 0
        ]
        if problems:
            raise SpecError(problems)


@dataclass(frozen=True, slots=True)
class Examples:
    """Bottlenecks with their labels. Small enough to be sent to another process where the features are.

    features: ``float32[pictures, features]``. labels: ``int64[pictures]``, index of each one's class. parts: the
    pictures of each part, ``int64[n]``.
    """

    features: Matrix
    labels: Indices
    parts: Mapping[Part, Indices]
    classes: int

    @classmethod
    def of(cls, dataset: Dataset, features: Matrix) -> Examples:
        """features: in the order of the data set's pictures."""
        parts = np.array([PARTS.index(each.part) for each in dataset.pictures])
        return cls(
            features,
            np.array([each.label for each in dataset.pictures], np.int64),
            {part: np.flatnonzero(parts == at) for at, part in enumerate(PARTS)},
            len(dataset.labels),
        )
