"""One model for each of 10,000 sensors: Tally's packed artifact beside loading and predicting one after another.

    python benchmarks/many_models.py [--models 10000] [--rows 100] [--fitted-to 100] [--rounds 5] [--few 1000]
                                     [--without command]

Models are pipelines of a StandardScaler and a OneClassSVM, each fitted to readings of its own.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import joblib
import numpy as np
import pyarrow as pa
import skops.io
from pyarrow import parquet
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from _machine import TALLY, environment, introduce, scratch, show, take_turns
from tally.scorers.per_key import packed

Array: TypeAlias = np.ndarray[Any, Any]

NU = 0.1
"""Makes about 20 support vectors of 100 rows, 40 of 200, 70 of 500."""
BATCH = 65_536
CAVEATS = """
Everything is on one core, and BLAS keeps to one thread. Files lie in the page cache. Imports and reading the readings
are not counted, except of the whole command, which is counted from its start to its end, with its coordinator and
workers on all cores.

"pickle, one after another" opens each model's file and calls predict on that model's rows, as the original system did
for a job of each sensor. joblib and skops do the same with fewer models, and their figures are per model, too.

"packed" reads the file of all models, finds each row's model by its key, and computes decision values and predictions
in batches of 65,536 rows, as a worker does. Predictions of all contenders are compared: they have to be the same.

Models have one feature and as many support vectors as is said below. With many more of either, less of the time is
overhead of calls, and the ratio gets smaller: try --fitted-to 500.

Decision values of "packed" are compared with scikit-learn's: to 1e-9 of them and 1e-14 of the sum of coefficients.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100, help="of each model")
    parser.add_argument("--fitted-to", type=int, default=100, metavar="ROWS", help="makes support vectors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--few", type=int, default=1000, help="models for joblib and skops")
    parser.add_argument("--without", choices=["command"], help="leave the whole command out")
    given = parser.parse_args()
    few = min(given.few, given.models)
    introduce(f"many models: {given.models:,} models, {given.rows} rows each", CAVEATS)
    with scratch() as folder:
        vectors = make(folder, given.models, few, given.fitted_to)
        readings, values = read(folder, given.models, given.rows)
        expected, decisions, allowed = reference(folder, values)
        size = (folder / "packed" / packed.FILE).stat().st_size
        print(f"  {vectors / given.models:.1f} support vectors a model; {size / 1e6:.1f} MB packed", flush=True)
        print(f"  {100 * expected.mean():.2f} % of the rows are anomalies\n", flush=True)

        def alone(suffix: str, load: Callable[[Path], Any], count: int) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                start = time.perf_counter()
                found = [load(folder / suffix / f"{i}.{suffix}").predict(values[i]) for i in range(count)]
                spent = time.perf_counter() - start
                check(np.concatenate(found) == -1, expected[: count * given.rows], suffix)
                return {"models": count / spent}

            return run

        def together() -> dict[str, float]:
            start = time.perf_counter()
            options = packed.inspect(folder / "packed" / packed.FILE, {}, trusted=False)
            scorer = packed.PackedScorer(options)
            scorer.load(folder / "packed", "cpu")
            loaded = time.perf_counter()
            parts = [scorer.score(readings[i : i + BATCH]) for i in range(0, len(readings), BATCH)]
            spent = time.perf_counter() - start
            found = pa.concat_tables(parts)
            check(found.column("anomaly").to_numpy(), expected, "packed")
            difference = np.abs(found.column("score").to_numpy() - decisions)
            if (difference > allowed).any():
                sys.exit(f"decision values differ by up to {difference.max():.1e}")
            return {"models": given.models / spent, "loading": 1000 * (loaded - start)}

        def command() -> dict[str, float]:
            out = folder / "out" / "predictions.parquet"
            line = [*TALLY, "score", str(folder / "readings.parquet"), "--model", str(folder / "packed")]
            start = time.perf_counter()
            ran = subprocess.run(
                [*line, "--out", str(out), "--quiet"], env=environment(folder / "home"), capture_output=True, text=True
            )
            spent = time.perf_counter() - start
            if ran.returncode:
                sys.exit(f"{' '.join(line)} failed:\n{ran.stdout}{ran.stderr}")
            check(parquet.read_table(out).column("anomaly").to_numpy(), expected, "tally score")
            shutil.rmtree(out.parent)
            shutil.rmtree(folder / "home")
            return {"models": given.models / spent}

        contenders = {
            "packed": together,
            "tally score, the whole command": command,
            "pickle, one after another": alone("pickle", unpickle, given.models),
            f"joblib, {few:,} models": alone("joblib", joblib.load, few),
            f"skops, {few:,} models": alone("skops", skops.io.load, few),
        }
        together()  # is it right? And some modules are imported when they are first needed.
        if given.without:
            del contenders["tally score, the whole command"]
        figures = take_turns(contenders, given.rounds)
        show("load and score", figures["models"], first="packed", unit="models/s", digits=0)
        show("loading alone", figures["loading"], first="packed", unit="ms", digits=1)


def check(found: Array, expected: Array, name: str) -> None:
    if not np.array_equal(found, expected):
        sys.exit(f"{name}: {(found != expected).sum():,} predictions are wrong")


def unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)


def key(number: int) -> tuple[int, int]:
    """Device and tag of a model: five sensors a device."""
    return number // 5, number % 5


def fit(number: int, rows: int) -> Pipeline:
    """A model of its own readings: a level, a spread and a skew."""
    random = np.random.default_rng(number)
    spread = random.uniform(0.5, 5)
    values = random.uniform(10, 100) + spread * random.gamma(random.uniform(2, 20), 0.3, rows)
    return make_pipeline(StandardScaler(), OneClassSVM(nu=NU)).fit(values[:, None])


def make(folder: Path, models: int, few: int, rows: int) -> int:
    """Fit the models and write them in every form; returns how many support vectors they have together."""
    for name in ("pickle", "joblib", "skops"):
        (folder / name).mkdir()
    vectors = 0

    def written(fitted: Iterator[Pipeline]) -> Iterator[packed.Model]:
        nonlocal vectors
        for number, model in enumerate(fitted):
            (folder / "pickle" / f"{number}.pickle").write_bytes(pickle.dumps(model))
            if number < few:
                joblib.dump(model, folder / "joblib" / f"{number}.joblib")
                skops.io.dump(model, folder / "skops" / f"{number}.skops")
            vectors += len(model[-1].support_)
            device, tag = key(number)
            yield packed.Model({"Device": device, "Tag": tag}, model)

    with ProcessPoolExecutor() as pool:
        fitted = pool.map(fit, range(models), [rows] * models, chunksize=100)
        packed.write(folder / "packed", written(fitted), by=("Device", "Tag"))
    return vectors


def read(folder: Path, models: int, rows: int) -> tuple[pa.Table, list[Array]]:
    """Readings, as a table (also written as Parquet) and as one matrix for each model."""
    values = []
    for number in range(models):
        mean = unpickle(folder / "pickle" / f"{number}.pickle")[0]
        random = np.random.default_rng(10**9 + number)
        values.append((mean.mean_ + 1.2 * mean.scale_ * random.normal(size=rows)).round(2)[:, None])
    numbers = np.repeat(np.arange(models), rows)
    device, tag = key(numbers)  # type: ignore[arg-type]
    table = pa.table({"Device": device, "Tag": tag, "Value": np.concatenate(values)[:, 0]})
    parquet.write_table(table, folder / "readings.parquet")
    return table, values


def reference(folder: Path, values: list[Array]) -> tuple[Array, Array, Array]:
    """Which rows scikit-learn calls anomalies, its decision values, and how far others may be from those."""
    models = [unpickle(folder / "pickle" / f"{number}.pickle") for number in range(len(values))]
    predicted = [model.predict(rows) for model, rows in zip(models, values, strict=True)]
    decided = [model.decision_function(rows) for model, rows in zip(models, values, strict=True)]
    allowed = [
        1e-9 * np.abs(each) + 1e-14 * np.abs(model[-1].dual_coef_).sum()
        for model, each in zip(models, decided, strict=True)
    ]
    return np.concatenate(predicted) == -1, np.concatenate(decided), np.concatenate(allowed)


if __name__ == "__main__":
    main()
