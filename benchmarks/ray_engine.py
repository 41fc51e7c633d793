"""Tally on Ray beside Tally on its own worker processes, Ray Data and a bare loop: photos, and tasks that do nothing.

    python benchmarks/ray_engine.py [--data DIR] [--rounds 5] [--copies 10] [--tasks 5000]

Without the data, pictures of shapes and the toy model of ``examples/shapes`` take the photos' place.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _contenders import Model, Progress, save
from _machine import DATA, TALLY, cores, environment, follow, introduce, scratch, show, take_turns
from photos import compare, describe, material, read
from tally.engines.base import Engine, Limits
from tally.media.images import decode
from tally.scorers.base import Item
from tally.scorers.vision.outputs import probabilities
from tally.testing import tasks

HERE = Path(__file__).resolve().parent
CAVEATS = """
Everything runs on this one machine: no network is between the workers and what they read. Each contender that uses
Ray starts one of its own (without a dashboard) and ends it; nothing else runs beside.

All read the same files from the page cache, decode (tally.media.images.decode), preprocess and batch alike, and run
ONNX Runtime with one thread in one process per core.

Only Tally writes its results durably while it runs. Ray Data and the bare loop hold them in memory until the end.

"Whole process" is from the start of the command until the results are on the disk: starting Ray is in it.

"Steady state" is from the first line of progress (after a tenth of the pictures) to the last: no startup is in it.

Ray Data: read_binary_files, then map_batches with one actor per core and the model loaded once in each; the files'
content travels through Ray's object store, as is usual there. One block for each batch, so that all actors are busy. It
is told of one CPU more than there are, to read with.

Ray's workers run with the priority of other processes here; Ray's default is nice 15.

"Empty tasks": one worker per core, all tasks submitted at once, from the first submission to the last result. Each
worker had answered before. A job has one task for each chunk of items.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with images/imagenet and models/classify")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=10, help="how often each of the 100 photos is taken")
    parser.add_argument("--tasks", type=int, default=5000)
    given = parser.parse_args()
    os.environ |= {"BENCH_CORES": str(cores()), "RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    with scratch() as folder:
        model, photos = material(given.data, folder, given.copies)
        described = describe(model, folder / "model.json")
        count = len(list(photos.iterdir()))
        introduce(
            f"ray engine: {count:,} pictures through {Path(described['file']).name}, batch {described['batch_size']}; "
            f"{given.tasks:,} empty tasks",
            CAVEATS,
        )
        labels: dict[str, dict[str, int]] = {}
        env = environment(folder / "home")
        subprocess.run([*TALLY, "jobs", "list"], env=env, check=True, capture_output=True)

        def tally(name: str, engine: str) -> Callable[[], dict[str, float]]:
            out = folder / f"out-{engine}"
            command = [*TALLY, "score", str(photos), "--model", str(model), "--task", "classify", "--out", str(out)]
            command += ["--engine", engine, "--workers", str(cores())]

            def run() -> dict[str, float]:
                figures = follow(command, env, count)
                labels[name] = read(out)
                shutil.rmtree(out)
                return figures

            return run

        def other(name: str, *command: str | Path) -> Callable[[], dict[str, float]]:
            out = folder / f"{name}.parquet"
            whole = [sys.executable, *map(str, command), str(folder / "model.json"), str(photos), str(out)]

            def run() -> dict[str, float]:
                figures = follow(whole, dict(os.environ), count)
                labels[name] = read(out)
                return figures

            return run

        figures = take_turns(
            {
                "tally": tally("tally", "ray"),
                "tally, local engine": tally("tally, local engine", "local"),
                "ray data": other("ray data", __file__, "--as-ray-data"),
                "bare loop": other("bare loop", HERE / "_contenders.py", "bare"),
            },
            given.rounds,
        )
        show("whole process", figures["whole"], first="tally", unit="pictures/s", digits=1)
        show("steady state", figures["steady"], first="tally", unit="pictures/s", digits=1)
        compare(labels, count)

        def empty(engine: str) -> Callable[[], dict[str, float]]:
            command = [sys.executable, __file__, "--as-tasks", engine, str(given.tasks)]
            return lambda: {"rate": float(subprocess.run(command, check=True, capture_output=True).stdout)}

        figures = take_turns({"ray": empty("ray"), "local": empty("local")}, given.rounds)
        show("empty tasks", figures["rate"], first="ray", unit="tasks/s", digits=0)


def as_tasks(engine: str, count: int) -> None:
    """Print how many empty tasks the engine runs per second."""
    from tally.engines.local import LocalEngine
    from tally.engines.ray.engine import RayEngine

    one: Engine = RayEngine() if engine == "ray" else LocalEngine()
    one.start(tasks.setup, (), slots=cores(), limits=Limits())
    try:
        seen: set[int] = set()
        while len(seen) < cores():
            seen |= {each.result().pid for each in [one.submit(tasks.describe) for _ in range(2 * cores())]}
        began = time.perf_counter()
        futures = [one.submit(tasks.echo, number) for number in range(count)]
        for future in futures:
            future.result()
        print(count / (time.perf_counter() - began))
    finally:
        one.stop()


class RayModel(Model):
    """The model, given what was read."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        tensors = []
        for path, content in zip(batch["path"], batch["bytes"], strict=True):
            pixels, info = decode(content, self.size)
            tensors.append(self.prepare(Item(path, pixels, info)).tensor)
        (scores,) = self.session.run(None, {self.input: np.stack(tensors)})
        values = [probabilities(each) for each in scores]
        best = [int(each.argmax()) for each in values]
        return {
            "name": np.array([Path(path).name for path in batch["path"]]),
            "index": np.array(best),
            "score": np.array([float(each[index]) for each, index in zip(values, best, strict=True)]),
            "at": np.full(len(best), time.time()),
        }


def as_ray_data(model: str, photos: str, out: str) -> None:
    """Somebody's script."""
    import ray

    described = json.loads(Path(model).read_text())
    count = len(list(Path(photos).iterdir()))
    # One more than there are: actors that hold all of them would leave none to read with, and wait for ever.
    ray.init("local", num_cpus=cores() + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_binary_files(
        photos, include_paths=True, override_num_blocks=-(-count // described["batch_size"])
    ).map_batches(
        RayModel,
        fn_constructor_args=(described,),
        batch_size=described["batch_size"],
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=cores()),
    )
    rows = []
    finished = []
    for batch in dataset.iter_batches(batch_size=None):
        rows += zip(batch["name"].tolist(), batch["index"].tolist(), batch["score"].tolist(), strict=True)
        finished += [(float(at), 1) for at in batch["at"]]
    progress = Progress(count)
    # Batches are handed over later than they are done, several at once: what counts is when the actor was done.
    for at, one in sorted(finished):
        progress(one, at)
    save(rows, out)
    print("saved", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-ray-data"]:
        as_ray_data(*sys.argv[2:])
    elif sys.argv[1:2] == ["--as-tasks"]:
        as_tasks(sys.argv[2], int(sys.argv[3]))
    else:
        main()
