"""Photos through a network of PyTorch: Tally beside a bare loop in a process for each core, and a DataLoader loop.

    python benchmarks/torch_photos.py [--data DIR] [--rounds 3] [--pictures 2000]

The network has the size of MobileNetV2 and random weights (a state dict, with its class beside it).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from _machine import DATA, TALLY, cores, environment, follow, introduce, scratch, shapes_pictures, show, take_turns
from _torch_network import Mobile
from photos import read

HERE = Path(__file__).resolve().parent
CAVEATS = """
All decode (tally.media.images.decode) and prepare pictures alike, in batches of 32. The bare loop and Tally run PyTorch
with one thread in one process for each core, on two pictures at once; the DataLoader loop has a worker for each core,
and gives the network as many threads and all 32. The files are in the page cache.

Only Tally writes its results durably while it runs. "Whole process" is from the start of the command until the results
are on the disk: each of Tally's workers imports PyTorch for itself, the bare loop forks after one import.

Tally looks at the network once, before, as on the first use of a model (--model is described then, and kept).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with images/imagenet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=2000)
    given = parser.parse_args()
    with scratch() as folder:
        photos = material(given.data, folder, given.pictures)
        count = len(list(photos.iterdir()))
        torch.manual_seed(0)
        shutil.copyfile(HERE / "_torch_network.py", folder / "net.py")
        torch.save(Mobile().eval().state_dict(), folder / "mobile.pth")
        os.environ["BENCH_CORES"] = str(cores())
        introduce(f"torch_photos: {count:,} pictures through a network of PyTorch, MobileNetV2's size", CAVEATS)
        env = environment(folder / "home")
        out = folder / "out"
        answers: dict[str, dict[str, int]] = {}

        def tally(source: Path = photos) -> dict[str, float]:
            command = [*TALLY, "score", str(source), "--model", str(folder / "mobile.pth"), "--task", "classify"]
            command += ["--set", "module=net.py:Mobile", "--set", "softmax=always", "--out", str(out)]
            figures = follow(command, env, len(list(source.iterdir())))
            answers["tally"] = read(out)
            shutil.rmtree(out)
            return figures

        def other(name: str) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                place = folder / f"{name}.parquet"
                command = [sys.executable, HERE / "_torch_contenders.py", name, folder / "mobile.pth", photos, place]
                figures = follow(list(map(str, command)), dict(os.environ), count)
                answers[name] = read(place)
                return figures

            return run

        subprocess.run([*TALLY, "jobs", "list"], env=env, check=True, capture_output=True)
        few = folder / "few"
        few.mkdir()
        for path in sorted(photos.iterdir())[:64]:
            shutil.copyfile(path, few / path.name)
        tally(few)
        figures = take_turns({"tally": tally, "bare": other("bare"), "loader": other("loader")}, given.rounds)
        show("whole process", figures["whole"], first="tally", unit="pictures/s", digits=1)
        show("steady state", figures["steady"], first="tally", unit="pictures/s", digits=1)
        show("processor time of all processes, startup included", figures["cpu"], first="tally", unit="s")
        for name in ("bare", "loader"):
            same = sum(answers[name].get(key) == index for key, index in answers["tally"].items())
            print(f"top-1 of tally and {name}: equal for {same:,} of {count:,} pictures")


def material(data: Path, folder: Path, count: int) -> Path:
    originals = sorted((data / "images" / "imagenet").glob("*.JPEG"))
    photos = folder / "photos"
    if not originals:
        print(f"no photos at {data} (--data, or TALLY_TEST_DATA): using generated pictures\n")
        return shapes_pictures(photos, count)
    photos.mkdir()
    for number in range(count):
        original = originals[number % len(originals)]
        shutil.copyfile(original, photos / f"{number:05d}-{original.name}")
    return photos


if __name__ == "__main__":
    main()
