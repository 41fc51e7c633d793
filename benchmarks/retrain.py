"""Steps of retraining per second, beside a bare NumPy loop over the same bottlenecks.

python benchmarks/retrain.py [--steps 4000] [--pictures 3670] [--features 2048] [--classes 5] [--rounds 3]
    [--only bare-one-thread]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import numpy as np

from _machine import Runs, introduce, show
from tally.storage.publish import write_whole
from tally.training.retrain.examples import Examples, Parameters
from tally.training.retrain.head import one_thread, train
from tally.training.retrain.summaries import Summaries
from tally.training.runs.events import can_write
from tally.training.runs.store import Value
from tally.training.runs.tracking import run

CAVEATS = """
The bottlenecks are made up: as many, and as wide, as those of TensorFlow's flowers (3,670 pictures, five classes) from
Inception v3. No picture is read and no backbone runs: these are the steps alone.

"tally run" is what `tally train retrain` does from its first step to its last: metrics for the database, TensorBoard's
event files with histograms, checkpoints. "tally function" is the trainer that trials of a sweep call. "bare" is a loop
as one writes it: it draws the class and then a picture, as TensorFlow's retrain.py does, evaluates every tenth step, as
the others do, and keeps nothing. NumPy has as many threads as it likes there; in "bare-one-thread" it has one, as in
Tally.

All of them take turns in one process. Whatever else the machine does disturbs them: processor seconds, of all threads,
less than seconds.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 4000, "pictures": 3670, "features": 2048, "classes": 5, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="contenders beside Tally, with commas between them")
    given = parser.parse_args()
    introduce(
        f"retrain: {given.steps:,} steps, {given.pictures:,} pictures, {given.features:,} features, "
        f"{given.classes} classes, batches of 100",
        CAVEATS,
    )
    examples = made_up(given.pictures, given.features, given.classes)
    parameters = Parameters(how_many_training_steps=given.steps)
    contenders: dict[str, Callable[[], object]] = {
        "tally run": lambda: whole(examples, parameters),
        "tally function": lambda: train(examples, parameters),
        "bare": lambda: bare(examples, parameters),
        "bare-one-thread": lambda: bare(examples, parameters, alone=True),
    }
    if given.only:
        contenders = {
            name: each for name, each in contenders.items() if name.startswith("tally") or name in given.only.split(",")
        }
    seconds: Runs = {name: [] for name in contenders}
    processor: Runs = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as folder:
        os.environ |= {"TALLY_HOME": folder, "TALLY_DATABASE": ""}
        for number in range(given.rounds + 1):
            for name, contender in contenders.items():
                found = measured(contender)
                if number:  # the first round imports, and makes the database
                    seconds[name].append(found[0])
                    processor[name].append(found[1])
    show("whole training", seconds, first="tally run", unit="s", digits=3)
    show("whole training, of processors", processor, first="tally run", unit="s", digits=3)


Seconds = tuple[float, float]
"""By the clock, and of processors."""


def measured(contender: Callable[[], object]) -> Seconds:
    """Those of the whole call, unless it returns its own."""
    began = time.perf_counter(), time.process_time()
    found = contender()
    if isinstance(found, tuple):
        return found
    return time.perf_counter() - began[0], time.process_time() - began[1]


def made_up(pictures: int, features: int, classes: int) -> Examples:
    rng = np.random.default_rng(1)
    labels = rng.integers(classes, size=pictures)
    centres = rng.exponential(0.4, (classes, features))
    values = (centres[labels] * rng.exponential(1, (pictures, features))).astype(np.float32)
    part = rng.random(pictures)
    rows = {"training": part >= 0.2, "validation": part < 0.1, "testing": (part >= 0.1) & (part < 0.2)}
    return Examples(values, labels, {name: np.flatnonzero(where) for name, where in rows.items()}, classes)  # type: ignore[misc]


def whole(examples: Examples, parameters: Parameters) -> Seconds:
    """As :mod:`tally.training.retrain.retraining` trains; returns the seconds from the first step to the last file."""
    with run("benchmark", {"learning_rate": parameters.learning_rate}, kind="retrain") as begun:
        began = time.perf_counter(), time.process_time()
        summaries = Summaries(begun.folder / "events", parameters.how_many_training_steps) if can_write() else None

        def report(step: int, metrics: Mapping[str, float]) -> None:
            at = time.time()
            begun.book.record([Value(name, step, value, at) for name, value in metrics.items()])

        trained = train(
            examples,
            parameters,
            report,
            observe=None if summaries is None else summaries.evaluation,
            keep=lambda state: write_whole(begun.folder / "checkpoint.npz", state.to_bytes()),
        )
        write_whole(begun.folder / "checkpoint.npz", trained.state.to_bytes())
        if summaries is not None:
            summaries.close()
        return time.perf_counter() - began[0], time.process_time() - began[1]


def bare(examples: Examples, parameters: Parameters, *, alone: bool = False) -> None:
    """The loop."""
    features, labels, classes = examples.features, examples.labels, examples.classes
    training, validation = examples.parts["training"], examples.parts["validation"]
    by_class = [training[labels[training] == each] for each in range(classes)]
    counts = np.array([len(each) for each in by_class])
    flat, starts = np.concatenate(by_class), np.cumsum(counts) - counts
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal((features.shape[1], classes)) * 0.001).astype(np.float32)
    biases = np.zeros(classes, np.float32)
    rate, size, rows = np.float32(parameters.learning_rate), parameters.train_batch_size, np.arange(1_000_000)

    def softmax(x: np.ndarray) -> np.ndarray:
        logits = x @ weights + biases
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    with one_thread() if alone else nullcontext():
        for step in range(parameters.how_many_training_steps):
            drawn = rng.integers(classes, size=size)
            batch = flat[starts[drawn] + (rng.random(size) * counts[drawn]).astype(np.int64)]
            x, y = features[batch], labels[batch]
            slopes = softmax(x)
            slopes[rows[:size], y] -= 1
            slopes /= size
            weights -= rate * (x.T @ slopes)
            biases -= rate * slopes.sum(axis=0)
            if step % parameters.eval_step_interval == 0:
                chosen = validation[rng.integers(len(validation), size=parameters.validation_batch_size)]
                for some, right in ((x, y), (features[chosen], labels[chosen])):
                    found = softmax(some)
                    float((found.argmax(axis=1) == right).mean())
                    -np.log(found[rows[: len(right)], right]).mean()


if __name__ == "__main__":
    main()
