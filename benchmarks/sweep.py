"""The same sweep with Tally, by hand with Optuna and joblib, with Ray Tune, and with bottlenecks for each trial.

python benchmarks/sweep.py [--trials 30] [--steps 4000] [--rounds 3] [--only tally,joblib]

Needs data/images/retrain_cat_dog; Ray Tune needs 'ray[tune]'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _machine import DATA, TALLY, Runs, environment, introduce, scratch, settle, show
from tally.training.retrain import dataset
from tally.training.sweeps import sampling
from tally.training.sweeps.space import read

CAVEATS = """
Each contender is one command, from its start to its end, with nothing in any cache: 240 photos, a MobileNet that makes
their bottlenecks, and trials of a last layer with the same learning rates and batch sizes, drawn beforehand. None
prunes.
Every tenth step is evaluated with all validation pictures.

Tally does more than the others: a run for each trial with all metrics in a database, TensorBoard's event files with
histograms, checkpoints to go on from after a kill, pictures told apart by content, the best tested and made a package.
Its worker processes each decode and score pictures, too. "joblib" is Optuna's ask and tell around joblib's processes,
bottlenecks computed once in one process; nothing is kept. "ray tune" starts a Ray of this machine, and keeps what Tune
keeps by itself; each trial reports to it at every tenth evaluation only, as each report takes it milliseconds.
"original" is the way of retrain.py under a sweep: each trial computes its own bottlenecks.

What the contenders report as the lowest loss differs a little: pictures are resized by other means.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"trials": 30, "steps": 4000, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="contenders, with commas between them")
    given = parser.parse_args()
    introduce(f"sweep: {given.trials} trials of {given.steps:,} steps, 240 photos, two at once", CAVEATS)
    contenders: dict[str, Callable[[Path], float]] = {
        "tally": lambda folder: by_tally(folder, given, 2),
        "tally, one at once": lambda folder: by_tally(folder, given, 1),
        "joblib": lambda folder: by_hand(folder, given, "joblib"),
        "ray tune": lambda folder: by_hand(folder, given, "ray"),
        "original": lambda folder: by_hand(folder, given, "original"),
    }
    if find_spec("tensorboardX") is None:
        print("  without Ray Tune: pip install 'ray[tune]'\n")
        del contenders["ray tune"]
    if given.only:
        contenders = {name: each for name, each in contenders.items() if name in given.only.split(",")}
    seconds: Runs = {name: [] for name in contenders}
    best: dict[str, float] = {}
    for _ in range(given.rounds):
        for name, contender in contenders.items():
            settle()
            with scratch() as folder:
                began = time.perf_counter()
                best[name] = contender(folder)
                seconds[name].append(time.perf_counter() - began)
                print(f"  {name}: {seconds[name][-1]:.1f} s", flush=True)
    show("whole sweep", seconds, first=next(iter(contenders)), unit="s")
    print("lowest validation loss: " + ", ".join(f"{name} {loss:.3g}" for name, loss in best.items()))


PICTURES = DATA / "images" / "retrain_cat_dog"
BACKBONE = DATA / "models" / "classify" / "mobilenet_v2_fp32_features.onnx"
SPACE = ("learning_rate=log:1e-4..1", "train_batch_size=25,50,100")


def by_tally(folder: Path, given: argparse.Namespace, parallel: int) -> float:
    command = [*TALLY, "sweep", "retrain", "--image_dir", PICTURES, "--backbone", BACKBONE, "--sampler", "random"]
    command += ["--trials", given.trials, "--how_many_training_steps", given.steps, "--parallel", parallel]
    for each in SPACE:
        command += ["-p", each]
    env = environment(folder)
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split("validation_cross_entropy ")[1].split()[0])


def by_hand(folder: Path, given: argparse.Namespace, how: str) -> float:
    space = read(SPACE, {"learning_rate": float, "train_batch_size": int})
    trials: list[dict[str, Any]] = [
        sampling.draw("random", space, seed=1, number=number, past=[], lowest=True) for number in range(given.trials)
    ]
    found = dataset.read(PICTURES)
    wanted = {
        "trials": trials, "steps": given.steps, "parallel": 2, "folder": str(folder), "backbone": str(BACKBONE),
        "pictures": [(str(each.path), each.label, each.part) for each in found.pictures],
    }  # fmt: skip
    (folder / "given.json").write_text(json.dumps(wanted))
    command = [sys.executable, str(Path(__file__).with_name("_sweep_by_hand.py")), how, str(folder / "given.json")]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1])["loss"])


if __name__ == "__main__":
    main()
