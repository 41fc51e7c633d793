"""The sweep of benchmarks/sweep.py as one writes it by hand: ``_sweep_by_hand.py HOW GIVEN.json``.

HOW: joblib (Optuna, bottlenecks computed once), original (the same, but each trial computes its own), ray (Ray Tune).
Prints the lowest validation loss, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # trials run beside each other

import numpy as np  # noqa: E402 - it looks at them once


def bottlenecks(given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Features, labels, and which pictures are in which part."""
    import onnxruntime
    from PIL import Image

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(given["backbone"], options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    planes_first = entry.shape[1] == 3
    size = entry.shape[2] if isinstance(entry.shape[2], int) else 224
    features, labels, parts = [], [], []
    for path, label, part in given["pictures"]:
        pixels = np.asarray(Image.open(path).convert("RGB").resize((size, size)), np.float32)
        batch = pixels.transpose(2, 0, 1)[None] if planes_first else pixels[None]
        found = session.run(None, {entry.name: np.ascontiguousarray(batch)})[0]
        features.append(found.reshape(len(found), found.shape[1], -1).mean(axis=2)[0])
        labels.append(label)
        parts.append(part)
    where = np.array(parts)
    rows = {each: np.flatnonzero(where == each) for each in ("training", "validation")}
    return np.stack(features).astype(np.float32), np.array(labels), rows


def train(data: Any, rate: float, size: int, steps: int, report: Any = lambda loss: None) -> float:
    """Plain gradient descent on the last layer; returns the last loss of all validation pictures. report: is told of
    every tenth evaluation."""
    features, labels, parts = data
    classes = int(labels.max()) + 1
    training, validation = parts["training"], parts["validation"]
    by_class = [training[labels[training] == each] for each in range(classes)]
    counts = np.array([len(each) for each in by_class])
    flat, starts = np.concatenate(by_class), np.cumsum(counts) - counts
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal((features.shape[1], classes)) * 0.001).astype(np.float32)
    biases = np.zeros(classes, np.float32)
    x_valid, y_valid = features[validation], labels[validation]
    rows, loss = np.arange(size), 0.0

    def softmax(x: np.ndarray) -> np.ndarray:
        logits = x @ weights + biases
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    for step in range(steps):
        drawn = rng.integers(classes, size=size)
        batch = flat[starts[drawn] + (rng.random(size) * counts[drawn]).astype(np.int64)]
        x, y = features[batch], labels[batch]
        slopes = softmax(x)
        slopes[rows, y] -= 1
        slopes /= size
        weights -= np.float32(rate) * (x.T @ slopes)
        biases -= np.float32(rate) * slopes.sum(axis=0)
        if step % 10 == 0 or step == steps - 1:
            found = softmax(x_valid)[np.arange(len(y_valid)), y_valid]
            loss = float(-np.log(np.maximum(found, 1e-30)).mean())
            if step % 100 == 0 or step == steps - 1:
                report(loss)
    return loss


def by_joblib(given: dict[str, Any], *, own: bool) -> float:
    import optuna
    from joblib import Parallel, delayed

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for each in given["trials"]:
        study.enqueue_trial(each)
    asked = [study.ask() for _ in given["trials"]]
    values = [
        (each.suggest_float("learning_rate", 1e-4, 1, log=True),
         each.suggest_categorical("train_batch_size", [25, 50, 100]))
        for each in asked
    ]  # fmt: skip
    data = None if own else bottlenecks(given)

    found = Parallel(n_jobs=given["parallel"])(
        delayed(one)(given if own else None, data, rate, size, given["steps"]) for rate, size in values
    )
    for trial, loss in zip(asked, found, strict=True):
        study.tell(trial, loss)
    return float(study.best_value)


def one(given: dict[str, Any] | None, data: Any, rate: float, size: int, steps: int) -> float:
    return train(data if given is None else bottlenecks(given), rate, size, steps)


def by_ray_tune(given: dict[str, Any]) -> float:
    import ray
    from ray import tune

    ray.init(num_cpus=given["parallel"], include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    data = bottlenecks(given)

    def trial(config: dict[str, Any], data: Any) -> None:
        drawn = config["drawn"]
        train(data, drawn["learning_rate"], drawn["train_batch_size"], given["steps"],
              lambda loss: tune.report({"loss": loss}))  # fmt: skip

    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, data=data), {"cpu": 1}),
        param_space={"drawn": tune.grid_search(given["trials"])},
        tune_config=tune.TuneConfig(metric="loss", mode="min"),
        run_config=tune.RunConfig(storage_path=given["folder"], verbose=0),
    )
    found = tuner.fit().get_best_result()
    ray.shutdown()
    return float(found.metrics["loss"])


def main() -> None:
    how, path = sys.argv[1:]
    given = json.loads(Path(path).read_text())
    match how:
        case "ray":
            loss = by_ray_tune(given)
        case _:
            loss = by_joblib(given, own=how == "original")
    print(json.dumps({"loss": loss}))


if __name__ == "__main__":
    main()
