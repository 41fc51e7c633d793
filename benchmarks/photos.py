"""Photos through a classifier: Tally beside a bare loop, Ray Data, and Celery with Redis.

    python benchmarks/photos.py [--data DIR] [--rounds 5] [--copies 10]

Without the data, pictures of shapes and the toy model ``tally:shapes`` take the photos' place.
Ray and Celery are no dependencies of Tally; what cannot be imported is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _machine import (
    DATA,
    TALLY,
    cores,
    environment,
    finished,
    follow,
    introduce,
    scratch,
    served,
    shapes_pictures,
    show,
    take_turns,
)
from tally import demo
from tally.models.load import create
from tally.models.resolve import resolve

HERE = Path(__file__).resolve().parent
CAVEATS = """
Every contender reads, decodes (tally.media.images.decode), preprocesses and batches alike, runs ONNX Runtime on two
pictures at once, and with one thread in one process per core. The files are in the page cache.

Only Tally writes its results durably while it runs, and could be killed and resumed at any moment. The others hold
them in memory until the end.

"Whole process" is from the start of the command until the results are on the disk: the interpreter, imports, starting
processes and loading the model are in it, taking everything down again is not. Tally's database exists before.

"Steady state" is from the first line of progress (after a tenth of the pictures) to the last: no startup is in it.

"tally, warm" is a job of a server that has had one of the same model before, and keeps its workers: from the request
until a client sees its end, results on the disk.

The bare loop forks its processes after the imports, and so pays for these once; Tally's workers are processes of
their own, and each pays.

Ray Data: one actor per core, one block per batch. Celery: a prefork worker, one task per batch, results through Redis.
"""


def describe(model: Path, path: Path) -> dict[str, Any]:
    """Write into a file what other contenders need to know of a model; returns it."""
    ref = resolve(model, task="classify")
    scorer: Any = create(ref)
    described = {
        "file": str(ref.location / ref.artifacts / scorer.options.file),
        "preprocess": scorer.options.preprocess.model_dump(mode="json"),
        "size": scorer.size,
        "batch_size": scorer.batch_size,
    }
    path.write_text(json.dumps(described))
    return described


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with images/imagenet and models/classify")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=10, help="how often each of the 100 photos is taken")
    parser.add_argument("--only", help="contenders to run beside tally, e.g. bare,ray")
    given = parser.parse_args()
    with scratch() as folder:
        model, photos = material(given.data, folder, given.copies)
        described = describe(model, folder / "model.json")
        os.environ["BENCH_CORES"] = str(cores())
        count = len(list(photos.iterdir()))
        introduce(
            f"photos: {count:,} pictures through {Path(described['file']).name}, batch {described['batch_size']}",
            CAVEATS,
        )
        labels: dict[str, dict[str, int]] = {}

        def other(name: str) -> Callable[[], dict[str, float]]:
            command = [sys.executable, HERE / "_contenders.py", name, folder / "model.json", photos]

            def run() -> dict[str, float]:
                out = folder / f"{name}.parquet"
                figures = follow([*map(str, command), str(out)], dict(os.environ), count)
                labels[name] = read(out)
                return figures

            return run

        env = environment(folder / "home")
        subprocess.run([*TALLY, "jobs", "list"], env=env, check=True, capture_output=True)
        few = folder / "few"
        few.mkdir()
        for path in sorted(photos.iterdir())[:32]:
            shutil.copyfile(path, few / path.name)

        def tally() -> dict[str, float]:
            out = folder / "out"
            command = [*TALLY, "score", str(photos), "--model", str(model), "--task", "classify", "--out", str(out)]
            figures = follow(command, env, count)
            usage = json.loads((out / "_manifest.json").read_text())["usage"]
            labels["tally"] = read(out)
            shutil.rmtree(out)
            return figures | {"session": count / usage["seconds"]}

        def warm() -> dict[str, float]:
            """A job of a server that keeps the workers of one before."""
            job = {"model": str(model), "task": "classify", "overwrite": True}
            with served(env) as client:
                finished(client, source=[str(few)], out=str(folder / "few-out"), **job)
                seconds = finished(client, every=0.1, source=[str(photos)], out=str(folder / "warm-out"), **job)
            labels["tally, warm"] = read(folder / "warm-out")
            for out in ("few-out", "warm-out"):
                shutil.rmtree(folder / out)
            return {"whole": count / seconds}

        contenders: dict[str, Callable[[], dict[str, float]]] = {
            "tally": tally,
            "tally, warm": warm,
            "bare": other("bare"),
        }
        if available("ray", "pip install 'ray[data]'"):
            contenders["ray"] = other("ray")
        if available("celery", "pip install 'celery[redis]'") and redis_there():
            contenders["celery"] = other("celery")
        if given.only:
            wanted = ["tally", "tally, warm", *given.only.split(",")]
            contenders = {name: run for name, run in contenders.items() if name in wanted}
        figures = take_turns(contenders, given.rounds)
        show("whole process", figures["whole"], first="tally", unit="pictures/s", digits=1)
        show("steady state", figures["steady"], first="tally", unit="pictures/s", digits=1)
        mine = {name: runs for name, runs in figures["cpu"].items() if name in ("tally", "bare")}
        show("processor time of all processes, startup included", mine, first="tally", unit="s")
        show(
            "the job's own session, startup of workers included",
            figures["session"],
            first="tally",
            unit="pictures/s",
            digits=1,
        )
        compare(labels, count)


def material(data: Path, folder: Path, copies: int) -> tuple[Path, Path]:
    """The model and a folder of pictures."""
    originals = sorted((data / "images" / "imagenet").glob("*.JPEG"))
    model = data / "models" / "classify" / "mobilenet_v2_fp32.onnx"
    photos = folder / "photos"
    if not originals or not model.is_file():
        print(f"no photos at {data} (--data, or TALLY_TEST_DATA): using generated pictures and the toy model\n")
        return demo.model("shapes"), shapes_pictures(photos, 100 * copies)
    photos.mkdir()
    for copy in range(copies):
        for original in originals:
            shutil.copyfile(original, photos / f"{copy:02d}-{original.name}")
    return model, photos


def read(out: Path) -> dict[str, int]:
    """Key to the index of its best class."""
    import pyarrow.parquet as pq

    table = pq.read_table(out, columns=["key", "index"])
    return dict(zip(table["key"].to_pylist(), table["index"].to_pylist(), strict=True))


def compare(labels: dict[str, dict[str, int]], count: int) -> None:
    expected = labels["tally"]
    for name, found in labels.items():
        if name != "tally":
            same = sum(found.get(key) == index for key, index in expected.items())
            print(f"top-1 of tally and {name}: equal for {same:,} of {count:,} pictures")
    print(flush=True)


def available(module: str, how: str) -> bool:
    if importlib.util.find_spec(module) is not None:
        return True
    print(f"{module} is left out: not installed in {sys.prefix}. To have it: {how}", flush=True)
    return False


def redis_there() -> bool:
    try:
        socket.create_connection(("127.0.0.1", 6379), timeout=2).close()
    except OSError:
        print("celery is left out: no Redis server at 127.0.0.1:6379 (its database 9 would be used, and flushed)")
        return False
    return True


if __name__ == "__main__":
    main()
