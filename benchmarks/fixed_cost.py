"""The part of a job that does not grow with its work, also beside another checkout of Tally.

python benchmarks/fixed_cost.py [--before CHECKOUT] [--data DIR] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _machine import (
    DATA,
    REPOSITORY,
    TALLY,
    environment,
    finished,
    introduce,
    scratch,
    served,
    shapes_pictures,
    show,
    take_turns,
)
from first_row import score
from tally import demo
from tally.client import Client

CAVEATS = """
Both checkouts run with the same Python and the same packages, in turns, and each has a database of its own, which
exists before; files are in the page cache.

"first row" is as in first_row.py. "fixed" is what a straight line through the times for 200 and for 3,200 pictures
(64 by 64 pixels, the toy classifier tally:shapes) gives for no pictures at all: start, import, load, submit, end.

"on a server" is the same for jobs of a server that has had one of the same model before: "fixed on a server" from the
request until a client that asks a hundred times a second sees that the job is finished, "command on a server" for the
whole of 'tally --server URL score'. A version that keeps workers warm has them warm, each other starts cold.

"ten rows by key" is the whole command for ten rows of a table with a packed model for each of ten keys. "interval" is
the whole of 'tally schedule backfill' of one interval, whose job scores one small file with a script, on one worker.
"""

FEW, MANY = 200, 3200
SCRIPT = """
import tally

class Lengths(tally.Scorer):
    input = "bytes"
    columns = {"length": "int64"}

    def score(self, batch):
        return [{"length": len(content)} for content in batch]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with; its src/ is used")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with images/imagenet and models/classify")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    introduce("fixed cost", CAVEATS)
    checkouts = {"after": REPOSITORY}
    if given.before is not None:
        checkouts["before"] = given.before.resolve()
    photos = given.data / "images" / "imagenet"
    mobilenet = given.data / "models" / "classify" / "mobilenet_v2_fp32.onnx"
    with scratch() as folder:
        few, many = shapes_pictures(folder / "few", FEW), shapes_pictures(folder / "many", MANY)
        table, packed = keyed(folder)
        contenders: dict[str, Callable[[], dict[str, float]]] = {}
        for name, checkout in checkouts.items():
            env = environment(folder / f"home-{name}") | {"PYTHONPATH": str(checkout / "src")}
            run = Runs(folder / f"work-{name}", env)
            measures: dict[str, Callable[[], float]] = {
                "fixed": lambda run=run: run.fixed(few, many),
                "fixed on a server": lambda run=run: run.on_server(few, many),
                "command on a server": lambda run=run: run.commands_on_server(few, many),
                "ten rows by key": lambda run=run: run.whole(table, packed, ".csv"),
                "interval": lambda run=run: run.interval(),
            }
            if photos.is_dir() and mobilenet.is_file():
                measures["first row, mobilenet"] = lambda run=run: run.first_row(photos, mobilenet)
            contenders[name] = lambda measures=measures: {each: measure() for each, measure in measures.items()}
        figures = take_turns(contenders, given.rounds)
    for measure, runs in figures.items():
        show(measure, runs, first="after", unit="s")


class Runs:
    """Commands of one checkout."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        folder.mkdir()
        self._folder, self._env = folder, env
        self._call("jobs", "list")
        (folder / "in").mkdir()
        (folder / "in" / "a.txt").write_text("a")
        (folder / "lengths.py").write_text(SCRIPT)
        (folder / "job.yaml").write_text(
            "source: in\nmodel: lengths.py\nout: hours/{interval_start_utc:%Y-%m-%dT%H%M}\nworkers: 1\n"
        )
        self._call("schedule", "add", "hourly", "job.yaml", "--cron", "0 * * * *")
        self._hour = self._outputs = 0

    def _call(self, *arguments: str) -> float:
        began = time.perf_counter()
        command = [*TALLY, *arguments]
        done = subprocess.run(command, cwd=self._folder, env=self._env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return time.perf_counter() - began

    def whole(self, source: Path, model: Path, suffix: str = "") -> float:
        """Seconds of the whole command. suffix: of the output, if it is one file."""
        self._outputs += 1
        out = f"out-{self._outputs}{suffix}"
        return self._call("score", str(source), "--model", str(model), "--out", out, "--quiet")

    def fixed(self, few: Path, many: Path) -> float:
        model = demo.model("shapes")
        return nothing(*(self.whole(source, model) for source in (few, many)))

    def on_server(self, few: Path, many: Path) -> float:
        with served(self._env) as client:
            self._job(client, few)
            return nothing(*(self._job(client, source) for source in (few, many)))

    def commands_on_server(self, few: Path, many: Path) -> float:
        with served(self._env) as client:
            model = demo.model("shapes")
            self._env["TALLY_SERVER"] = client.url
            try:
                _, *times = (self.whole(source, model) for source in (few, few, many))
                return nothing(*times)
            finally:
                del self._env["TALLY_SERVER"]

    def _job(self, client: Client, source: Path) -> float:
        self._outputs += 1
        out = str(self._folder / f"out-{self._outputs}")
        return finished(client, source=[str(source)], model=str(demo.model("shapes")), out=out)

    def first_row(self, photos: Path, model: Path) -> float:
        out = self._folder / "out"
        command = [*TALLY, "score", str(photos), "--model", str(model), "--out", str(out), "--quiet"]
        return score(command, out, self._env)["first rows"]

    def interval(self) -> float:
        self._hour += 1
        day, hour = divmod(self._hour, 24)
        begin, end = f"2026-01-{1 + day:02} {hour:02}:00", f"2026-01-{1 + day:02} {hour:02}:59"
        return self._call("schedule", "backfill", "hourly", "--from", begin, "--to", end)


def nothing(small: float, large: float) -> float:
    """What a straight line through the times for few and for many pictures gives for none."""
    return small - FEW * (large - small) / (MANY - FEW)


def keyed(folder: Path) -> tuple[Path, Path]:
    """A table of ten rows, and a packed artifact with a model for each of its ten keys."""
    table = folder / "readings.csv"
    lines = [
        f"{key},{value}"
        for key in range(10)
        for value in (1.0, 1.1, 0.9, 1.2, 0.8, 1.05, 0.95, 1.15, 0.85, 1.02, 0.98, 1.0)
    ]
    (folder / "training.csv").write_text("\n".join(["Device,Val", *lines]) + "\n")
    table.write_text("\n".join(["Device,Val", *(f"{key},1.0" for key in range(10))]) + "\n")
    out = folder / "pumps"
    env = environment(folder / "home-training") | {"PYTHONPATH": os.fspath(REPOSITORY / "src")}
    options = ["--by", "Device", "--value", "Val", "--out", str(out)]
    subprocess.run(
        [*TALLY, "train", "anomaly", str(folder / "training.csv"), *options], env=env, check=True, capture_output=True
    )
    return table, out


if __name__ == "__main__":
    main()
