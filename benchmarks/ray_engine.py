"""Tally on Ray beside Tally on its own worker processes, Ray Data and a bare loop: photos, and tasks that do nothing.

    python benchmarks/ray_engine.py [--data DIR] [--rounds 5] [--copies 10] [--tasks 5000] [--running]

With --running, a cluster has been started before (of one node, this machine), and every contender with Ray joins it.
Without the data, pictures of shapes and the toy model ``tally:shapes`` take the photos' place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from _contenders import Model, Progress, ray_answer, save, scored_by_ray
from _machine import DATA, TALLY, cores, environment, follow, free_port, introduce, scratch, show, take_turns
from photos import compare, describe, material, read
from tally.engines.base import Engine, Limits
from tally.media.images import decode
from tally.scorers.base import Item
from tally.scorers.vision.outputs import probabilities
from tally.testing import tasks

HERE = Path(__file__).resolve().parent
OWN = """
Each contender that uses Ray starts one of its own (without a dashboard) and ends it, within the whole process; nothing
else runs beside.
"""
RUNNING = """
Contenders that use Ray join a cluster that runs already, of this machine alone; it also runs while the others have
their turn. Tally's coordinator is a job of that cluster, and the command follows it.
"""
CAVEATS = """
Everything runs on this one machine: no network is between the workers and what they read.

All read the same files from the page cache, decode (tally.media.images.decode), preprocess and batch alike, and run
ONNX Runtime with one thread in one process per core.

Only Tally writes its results durably while it runs. Ray Data and the bare loop hold them in memory until the end.

"Whole process" is from the start of the command until the results are on the disk.

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
    parser.add_argument("--running", action="store_true", help="on a cluster that has been started before")
    given = parser.parse_args()
    os.environ |= {"BENCH_CORES": str(cores()), "RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    with scratch() as folder, running(folder) if given.running else nullcontext():
        model, photos = material(given.data, folder, given.copies)
        described = describe(model, folder / "model.json")
        count = len(list(photos.iterdir()))
        introduce(
            f"ray engine: {count:,} pictures through {Path(described['file']).name}, batch {described['batch_size']}; "
            f"{given.tasks:,} empty tasks",
            CAVEATS + (RUNNING if given.running else OWN),
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


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """A cluster of this machine. It has one CPU more than there are, which Ray Data reads with."""
    dashboard = free_port()
    start = ["start", "--head", "--block", "--port", "0", f"--num-cpus={cores() + 1}", f"--dashboard-port={dashboard}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", *start, "--disable-usage-stats"]
    with subprocess.Popen([*command, f"--temp-dir={folder / 'ray'}"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = (re.search(r"--address='([^']+)'", line) for line in process.stdout)
            os.environ["RAY_ADDRESS"] = next(each[1] for each in found if each is not None)
            os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
            yield
        finally:
            process.terminate()


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
        values = [probabilities(each, softmax=False) for each in scores]
        best = [int(each.argmax()) for each in values]
        names = [Path(path).name for path in batch["path"]]
        return ray_answer(
            [(name, index, float(each[index])) for name, index, each in zip(names, best, values, strict=True)]
        )


def as_ray_data(model: str, photos: str, out: str) -> None:
    """Somebody's script."""
    import ray

    described = json.loads(Path(model).read_text())
    count = len(list(Path(photos).iterdir()))
    # One more than there are: actors that hold all of them would leave none to read with, and wait for ever.
    own: dict[str, Any] = {"num_cpus": cores() + 1, "include_dashboard": False}
    address = os.environ["RAY_ADDRESS"]
    ray.init(address, log_to_driver=False, logging_level="error", **(own if address == "local" else {}))
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_binary_files(
        photos, include_paths=True, override_num_blocks=-(-count // described["batch_size"])
    )
    rows = scored_by_ray(dataset, RayModel, described, Progress(count))
    save(rows, out)
    print("saved", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-ray-data"]:
        as_ray_data(*sys.argv[2:])
    elif sys.argv[1:2] == ["--as-tasks"]:
        as_tasks(sys.argv[2], int(sys.argv[3]))
    else:
        main()
