"""The last layer: one linear layer and a softmax, trained by plain gradient descent in NumPy.

What a step does depends on the parameters, the seed and the step's number alone, so that a training that is continued
from any checkpoint ends with the same weights, digit by digit, and so do trainings that run side by side.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tally.errors import ModelError, StorageError
from tally.optional import needed
from tally.training.retrain.examples import Examples, Indices, Matrix, Parameters
from tally.training.retrain.sampling import Drawn, Sampler

DEVIATION = 0.001
"""Standard deviation of the first weights."""
KEEP_SECONDS = 2.0
"""Between two checkpoints, at least."""
_START = 0
"""The purpose of the random numbers that make the first weights; :mod:`~tally.training.retrain.sampling` has others."""


@dataclass(frozen=True, slots=True)
class Head:
    """weights: ``float32[features, classes]``. biases: ``float32[classes]``."""

    weights: Matrix
    biases: Matrix

    def logits(self, features: Matrix) -> Matrix:
        """``float32[n, features]`` to ``float32[n, classes]``."""
        found: Matrix = features @ self.weights
        found += self.biases
        return found

    def copy(self) -> Head:
        return Head(self.weights.copy(), self.biases.copy())


@dataclass(frozen=True, slots=True)
class Batch:
    """What one evaluation found for some pictures. logits, probabilities: ``float32[n, classes]``."""

    accuracy: float
    cross_entropy: float
    logits: Matrix
    probabilities: Matrix

    @classmethod
    def of(cls, head: Head, features: Matrix, labels: Indices) -> Batch:
        return cls.from_logits(head.logits(features), labels)

    @classmethod
    def from_logits(cls, logits: Matrix, labels: Indices) -> Batch:
        shifted = logits - logits.max(axis=1, keepdims=True)
        powers = np.exp(shifted)
        sums = powers.sum(axis=1, keepdims=True)
        losses = np.log(sums[:, 0]) - shifted[np.arange(len(labels)), labels]
        accuracy = float((logits.argmax(axis=1) == labels).mean())
        return cls(accuracy, float(losses.mean(dtype=np.float64)), logits, powers / sums)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """After step number ``step``, counted from 0. train: the step's own pictures. validation: None without any."""

    step: int
    head: Head
    train: Batch
    validation: Batch | None

    @property
    def metrics(self) -> dict[str, float]:
        """accuracy and cross_entropy, and with validation_ before their names those of validation."""
        found = {"accuracy": self.train.accuracy, "cross_entropy": self.train.cross_entropy}
        if (validation := self.validation) is not None:
            found |= {
                "validation_accuracy": validation.accuracy,
                "validation_cross_entropy": validation.cross_entropy,
            }
        return found


@dataclass(slots=True)
class State:
    """A training between two steps: all that it needs to go on.

    done: steps. best: the head with the lowest validation loss, ``lowest``, which was found ``waited`` evaluations
    ago; only with early stopping.
    """

    done: int
    head: Head
    best: Head | None = None
    lowest: float = float("inf")
    best_step: int = -1
    waited: int = 0

    def to_bytes(self) -> bytes:
        return packed(self.arrays())

    @classmethod
    def from_file(cls, path: Path) -> State:
        """Raises ModelError if it is damaged."""
        return cls.from_arrays(unpacked(path), path)

    def arrays(self) -> dict[str, Any]:
        """What :meth:`from_arrays` takes."""
        arrays: dict[str, Any] = {
            "numbers": np.array([self.done, self.lowest, self.best_step, self.waited], np.float64),
            "weights": self.head.weights,
            "biases": self.head.biases,
        }
        if self.best is not None:
            arrays |= {"best_weights": self.best.weights, "best_biases": self.best.biases}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], path: Path) -> State:
        """path: of the checkpoint that they are of. Raises ModelError if some are missing."""
        try:
            done, lowest, best_step, waited = arrays["numbers"].tolist()
            best = Head(arrays["best_weights"], arrays["best_biases"]) if "best_weights" in arrays else None
            head = Head(arrays["weights"], arrays["biases"])
        except (KeyError, ValueError):
            raise _damaged(path) from None
        return cls(int(done), head, best, lowest, int(best_step), int(waited))


def packed(arrays: Mapping[str, Any]) -> bytes:
    """Arrays by name as the content of a checkpoint."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpacked(path: Path) -> dict[str, Any]:
    """The arrays of a checkpoint, which :func:`packed` made. Raises ModelError if it is damaged, StorageError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return dict(file)
    except Exception:  # whatever NumPy and zipfile make of damage; what they say of it leads nowhere
        raise _damaged(path) from None


def _damaged(path: Path) -> ModelError:
    return ModelError(
        f"the checkpoint {path} is damaged: it is no longer what was written",
        hint="Remove the file, and the run goes on from its first step; or begin a new run.",
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """head: the result. state: to go on from. stopped: ``report`` asked for it before the last step.

    step: the number of the step, counted from 0, that the head is of. evaluation: the last one of this call.
    """

    head: Head
    step: int
    state: State
    evaluation: Evaluation | None
    stopped: bool = False
    early: bool = False


class Batches(Protocol):
    """Gives the pictures of each step: ``float32[n, features]`` and ``int64[n]`` labels; arrays may be used again."""

    def __call__(self, step: int) -> tuple[Matrix, Indices]: ...


Report = Callable[[int, Mapping[str, float]], bool | None]
"""Is told the step and its metrics at each evaluation; stops the training by returning True."""


def train(
    examples: Examples,
    parameters: Parameters,
    report: Report = lambda step, metrics: None,
    *,
    begin: State | None = None,
    batches: Batches | None = None,
    observe: Callable[[Evaluation], None] | None = None,
    keep: Callable[[State], None] | None = None,
) -> Trained:
    """Train a head, from the start or from ``begin``.

    batches: where the training pictures of each step come from; None: drawn from the examples.
    observe: is shown each evaluation before ``report`` is told its metrics. keep: is given the state to go on from,
        at evaluations that are at least KEEP_SECONDS after the last time.

    Raises ModelError if the loss is not finite.
    """
    with one_thread(), np.errstate(over="ignore", invalid="ignore"):  # the loss tells
        batches = batches or Drawn(examples, parameters)
        state = begin or State(0, first_head(examples.features.shape[1], examples.classes, parameters.seed))
        # Classes first: BLAS makes narrow gradients in two thirds of the time then.
        by_class = np.ascontiguousarray(state.head.weights.T).copy()
        state.head = Head(by_class.T, state.head.biases.copy())
        validation = _Validation(examples, parameters)
        return _train(examples, parameters, state, batches, validation, report, observe, keep)


def _train(
    examples: Examples,
    parameters: Parameters,
    state: State,
    batches: Batches,
    validation: _Validation,
    report: Report,
    observe: Callable[[Evaluation], None] | None,
    keep: Callable[[State], None] | None,
) -> Trained:
    steps, every, patience = (
        parameters.how_many_training_steps,
        parameters.eval_step_interval,
        parameters.early_stopping,
    )
    weights, biases = state.head.weights, state.head.biases
    by_class = weights.T
    rate, kept = np.float32(parameters.learning_rate), time.monotonic()
    evaluation: Evaluation | None = None
    stopped, early = False, 0 < patience <= state.waited  # it had ended, and was killed after that
    for step in range(state.done, state.done if early else steps):
        features, labels = batches(step)
        count = len(labels)
        # In place: arrays this small are made more slowly than they are filled.
        slopes = features @ weights
        slopes += biases
        slopes -= slopes.max(axis=1, keepdims=True)
        np.exp(slopes, out=slopes)
        slopes /= slopes.sum(axis=1, keepdims=True)
        slopes[_counting(count), labels] -= 1
        slopes *= rate / np.float32(count)
        by_class -= slopes.T @ features
        biases -= slopes.sum(axis=0)
        state.done = step + 1
        if step % every and step != steps - 1:
            continue
        evaluation = Evaluation(step, state.head, Batch.of(state.head, features, labels), validation(state.head, step))
        if not np.isfinite(evaluation.train.cross_entropy):
            raise ModelError(
                f"the loss is {evaluation.train.cross_entropy} at step {step}", hint="Try a smaller --learning_rate."
            )
        if observe is not None:
            observe(evaluation)
        if patience and evaluation.validation is not None:
            early = has_waited(state, evaluation, patience)
        stopped = bool(report(step, evaluation.metrics))
        if keep is not None and (stopped or time.monotonic() - kept >= KEEP_SECONDS):
            keep(state)
            kept = time.monotonic()
        if stopped or early:
            break
    stopped = stopped and state.done < steps and not early
    if state.best is not None:
        return Trained(state.best, state.best_step, state, evaluation, stopped, early)
    return Trained(state.head, state.done - 1, state, evaluation, stopped, early)


def has_waited(state: State, evaluation: Evaluation, patience: int) -> bool:
    """Note whether the validation loss is the lowest; whether it has not been for too long."""
    assert evaluation.validation is not None
    if evaluation.validation.cross_entropy < state.lowest:
        state.lowest = evaluation.validation.cross_entropy
        state.best, state.best_step, state.waited = state.head.copy(), evaluation.step, 0
        return False
    state.waited += 1
    return state.waited >= patience


_COUNTED = np.arange(256)


def _counting(count: int) -> Indices:
    global _COUNTED
    if count > len(_COUNTED):
        _COUNTED = np.arange(count)
    return _COUNTED[:count]


class _Validation:
    """The validation pictures of each evaluation."""

    def __init__(self, examples: Examples, parameters: Parameters) -> None:
        self._examples = examples
        self._rows = rows = examples.parts["validation"]
        size = parameters.validation_batch_size
        self._sampler = None
        if 0 < size < len(rows):
            self._sampler = Sampler(examples, "validation", size, parameters)
        elif len(rows):
            self._all = examples.features[rows], examples.labels[rows]

    def __call__(self, head: Head, step: int) -> Batch | None:
        if not len(self._rows):
            return None
        if self._sampler is None:
            return Batch.of(head, *self._all)
        rows = self._sampler.rows(step)
        return Batch.of(head, self._examples.features[rows], self._examples.labels[rows])


def first_head(features: int, classes: int, seed: int) -> Head:
    """Weights from a normal distribution, cut off at two standard deviations, and biases of 0."""
    rng = np.random.default_rng([seed, _START])
    weights = rng.standard_normal((features, classes))
    while (beyond := np.abs(weights) > 2).any():
        weights[beyond] = rng.standard_normal(int(beyond.sum()))
    return Head((weights * DEVIATION).astype(np.float32), np.zeros(classes, np.float32))


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS on one thread: how sums are cut up among several shows in their last digit, and costs more than it gains."""
    with needed("training needs", "retrain", ModelError):
        from threadpoolctl import threadpool_limits
    with threadpool_limits(1, user_api="blas"):
        yield


@dataclass(frozen=True, slots=True)
class Tested:
    """The result for the test pictures.

    rows: which examples, ``int64[n]``. batch: what was found for them. confusion: ``int64[classes, classes]``, counts
    by label and by the class that was predicted.
    """

    rows: Indices
    batch: Batch
    confusion: Indices = field(repr=False)

    def wrong(self, labels: Sequence[int] | Indices) -> Indices:
        """Positions in ``rows`` of the pictures that were taken for another class. labels: of all examples."""
        return np.flatnonzero(self.batch.logits.argmax(axis=1) != np.asarray(labels)[self.rows])


def tested_rows(examples: Examples, parameters: Parameters) -> Indices:
    """The pictures of the final test."""
    rows = examples.parts["testing"]
    if 0 < parameters.test_batch_size < len(rows):
        return Sampler(examples, "testing", parameters.test_batch_size, parameters).rows(0)
    return rows


def evaluate(examples: Examples, head: Head, parameters: Parameters) -> Tested | None:
    """How the head does on the test pictures; None where there are none."""
    rows = tested_rows(examples, parameters)
    if not len(rows):
        return None
    with one_thread():
        batch = Batch.of(head, examples.features[rows], examples.labels[rows])
    confusion = np.zeros((examples.classes, examples.classes), np.int64)
    np.add.at(confusion, (examples.labels[rows], batch.logits.argmax(axis=1)), 1)
    return Tested(rows, batch, confusion)
