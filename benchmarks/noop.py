"""A million empty files through a scorer that does nothing: Tally's own cost per item, and its memory.

python benchmarks/noop.py [--items 10000,100000,1000000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import atexit
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from _machine import TALLY, environment, introduce, scratch, show, take_turns

SCORER = Path(__file__).resolve().parent / "_noop_scorer.py"
FOLDER = 1000
"""Files in one folder."""
CAVEATS = """
The items are empty files in folders of 1,000. The scorer is not given their content (input = "path") and returns one
small row for each. The results are durable Parquet.

"End to end" is the whole command, from its start to its end. "Session" leaves out the interpreter, imports and the
assembling of the results.

Peak memory is that of the coordinator's process alone (VmHWM), without its workers.

The database of jobs is looked at during the run, to see when the first items were committed and planning ended.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="10000,100000,1000000")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sizes = [int(size) for size in given.items.split(",")]
    introduce(f"noop: {', '.join(f'{size:,}' for size in sizes)} items", CAVEATS)
    with scratch() as folder:
        environment_ = environment(folder / "home")
        subprocess.run([*TALLY, "jobs", "list"], env=environment_, check=True, capture_output=True)

        def contender(size: int) -> Callable[[], dict[str, float]]:
            files = make(folder / f"files-{size}", size)
            return lambda: score(files, size, folder, environment_)

        figures = take_turns({f"{size:,} items": contender(size) for size in sizes}, given.rounds)
        largest = f"{sizes[-1]:,} items"
        show("end to end", figures["whole"], first=largest, unit="items/s", digits=0)
        show("session", figures["session"], first=largest, unit="items/s", digits=0)
        show("peak resident memory of the coordinator", figures["peak"], first=largest, unit="MiB", digits=1)
        show("first items committed after", figures["first"], first=largest, unit="s from the start of the command")
        show("planning ended after", figures["planned"], first=largest, unit="s from the start of the command")
        show("share of the items committed when planning ended", figures["overlap"], first=largest, unit="%", digits=1)


def make(folder: Path, count: int) -> Path:
    """Make that many empty files, in nested folders."""
    for start in range(0, count, FOLDER):
        inner = folder / f"{start // FOLDER:04d}"
        inner.mkdir(parents=True)
        for number in range(start, min(start + FOLDER, count)):
            (inner / f"{number:07d}.dat").touch()
    return folder


def score(files: Path, count: int, folder: Path, env: dict[str, str]) -> dict[str, float]:
    """One run."""
    out, peak = folder / "out", folder / "peak"
    command = [sys.executable, __file__, "--as-tally", str(peak)]
    command += ["score", str(files), "--model", str(SCORER), "--out", str(out), "--quiet"]
    began = time.time()
    process = subprocess.Popen(command, env=env)
    first, planned, committed = watch(folder / "home" / "tally.db", process)
    elapsed = time.time() - began
    if process.wait():
        sys.exit(f"{' '.join(command)} failed")
    manifest = json.loads((out / "_manifest.json").read_text())
    if manifest["counts"]["rows"] != count:
        sys.exit(f"{manifest['counts']['rows']:,} rows for {count:,} items")
    shutil.rmtree(out)
    return {
        "whole": count / elapsed,
        "session": count / manifest["usage"]["seconds"],
        "peak": int(peak.read_text()) / 1024,
        "first": first - began,
        "planned": planned - began,
        "overlap": 100 * committed / count,
    }


def watch(database: Path, process: subprocess.Popen[bytes]) -> tuple[float, float, int]:
    """When the newest job first had items done; when it was planned, and how many items were done then."""
    first = planned = 0.0
    committed = 0
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, isolation_level=None)
    before = connection.execute("SELECT count(*) FROM jobs").fetchone()[0]
    query = "SELECT planned, done FROM jobs ORDER BY created_at DESC LIMIT 1"
    while process.poll() is None:
        time.sleep(0.01)
        with suppress(sqlite3.OperationalError):
            if connection.execute("SELECT count(*) FROM jobs").fetchone()[0] == before:
                continue
            is_planned, done = connection.execute(query).fetchone()
            if done and not first:
                first = time.time()
            if is_planned and not planned:
                planned, committed = time.time(), done
    connection.close()
    return first, planned, committed


def as_tally(peak: str, arguments: list[str]) -> None:
    """The command itself, leaving behind how much memory its process held at most, in KiB."""
    from tally.cli.main import main as tally

    def leave() -> None:
        status = Path("/proc/self/status")
        if status.exists():
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
            assert found is not None
            held = int(found[1])
        else:
            import resource

            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        Path(peak).write_text(str(held))

    atexit.register(leave)
    sys.argv = ["tally", *arguments]
    tally()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-tally"]:
        as_tally(sys.argv[2], sys.argv[3:])
    else:
        main()
