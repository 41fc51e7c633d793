"""Which pictures a step sees: drawn at random with replacement, and the same for the same seed and step."""

from __future__ import annotations

from typing import Any

import numpy as np

from tally.training.retrain.dataset import PARTS, Part
from tally.training.retrain.examples import Examples, Indices, Matrix, Parameters

BLOCK = 32
"""Steps whose pictures are drawn at once: a generator for each would take as long as the step."""


class Sampler:
    """Draws ``size`` rows of the examples for each step."""

    def __init__(self, examples: Examples, part: Part, size: int, parameters: Parameters) -> None:
        rows = examples.parts[part]
        self._size, self._key = size, [parameters.seed, 1 + PARTS.index(part)]
        self._balanced = parameters.balanced
        order = np.argsort(examples.labels[rows], kind="stable")
        self._rows = rows[order]
        counts = np.bincount(examples.labels[rows], minlength=examples.classes)
        there = np.flatnonzero(counts)  # a class without a picture in this part cannot be drawn
        self._counts = counts[there]
        self._starts = (np.cumsum(counts) - counts)[there]
        self._block = -1
        self._drawn: np.ndarray[Any, Any] = np.empty((0, 0))

    def rows(self, step: int) -> Indices:
        """``int64[size]``"""
        block, at = divmod(step, BLOCK)
        if block != self._block:
            self._block, self._drawn = block, self._draw(block)
        found: Indices = self._drawn[at]
        return found

    def _draw(self, block: int) -> Indices:
        rng = np.random.default_rng([*self._key, block])
        shape = (BLOCK, self._size)
        if not self._balanced:
            return self._rows.take(rng.integers(len(self._rows), size=shape))
        classes = rng.integers(len(self._counts), size=shape)
        within = (rng.random(shape) * self._counts[classes]).astype(np.int64)
        return self._rows.take(self._starts[classes] + within)


class Drawn:
    """The training pictures of each step, from the examples."""

    def __init__(self, examples: Examples, parameters: Parameters) -> None:
        self._examples = examples
        size, rows = parameters.train_batch_size, examples.parts["training"]
        self._sampler = None
        if size == -1:
            self._all = examples.features[rows], examples.labels[rows]
        else:
            self._sampler = Sampler(examples, "training", size, parameters)
            self._features = np.empty((size, examples.features.shape[1]), np.float32)

    def __call__(self, step: int) -> tuple[Matrix, Indices]:
        if self._sampler is None:
            return self._all
        rows = self._sampler.rows(step)
        # clip: rows are right, and other modes copy once more
        self._examples.features.take(rows, axis=0, out=self._features, mode="clip")
        return self._features, self._examples.labels.take(rows)
