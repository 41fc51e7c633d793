"""How soon after ``tally score`` the first rows are durably on the disk.

python benchmarks/first_row.py [--data DIR] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _machine import DATA, TALLY, environment, introduce, scratch, shapes_pictures, show, take_turns
from tally import demo

CAVEATS = """
From the start of the command to the first attempt's file under out/_tally/attempts, which appears under its name once
it is flushed to the disk. It holds one batch of rows, and is committed some milliseconds later.

The database of jobs exists before; the files are in the page cache; the folder is looked at every millisecond.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with images/imagenet and models/classify")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    introduce("first row", CAVEATS)
    photos, mobilenet = (
        given.data / "images" / "imagenet",
        given.data / "models" / "classify" / "mobilenet_v2_fp32.onnx",
    )
    with scratch() as folder:
        env = environment(folder / "home")
        subprocess.run(
            [*TALLY, "jobs", "list"], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def contender(source: Path, model: Path) -> Callable[[], dict[str, float]]:
            out = folder / "out"
            command = [*TALLY, "score", str(source), "--model", str(model), "--out", str(out), "--quiet"]
            return lambda: score(command, out, env)

        shapes = shapes_pictures(folder / "pictures", 200)
        contenders = {"shapes": contender(shapes, demo.model("shapes"))}
        if photos.is_dir() and mobilenet.is_file():
            contenders["mobilenet_v2_fp32"] = contender(photos, mobilenet)
        else:
            print(f"mobilenet_v2_fp32 is left out: no photos at {given.data} (--data, or TALLY_TEST_DATA)")
        figures = take_turns(contenders, given.rounds)
    for measure, runs in figures.items():
        show(measure, runs, first="shapes", unit="s from the start of the command")


def score(command: list[str], out: Path, env: dict[str, str]) -> dict[str, float]:
    """One run: when the first rows were there, and when the command ended."""
    attempts = out / "_tally" / "attempts"
    began = time.perf_counter()
    first = None
    process = subprocess.Popen(command, env=env)
    while process.poll() is None:
        if first is None and written(attempts):
            first = time.perf_counter() - began
        time.sleep(0.001)
    ended = time.perf_counter() - began
    if process.returncode or first is None:
        sys.exit(f"{' '.join(command)} failed, or was over before it was seen")
    shutil.rmtree(out)
    return {"first rows": first, "whole command": ended}


def written(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.endswith(".parquet") and not entry.name.startswith(".") for entry in entries)
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main()
