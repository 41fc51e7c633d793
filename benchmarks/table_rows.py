"""A hundred million rows of Parquet through one scikit-learn model: rows per second, and memory while it lasts.

    python benchmarks/table_rows.py [--rows 100000000] [--rounds 3] [--interval 0.5]

Contenders: ``tally score``; the same as a script of thirty lines (DuckDB, scikit-learn, pyarrow) in one process; and
that script with a process for each core, each with its share of the row groups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import psutil

from _machine import TALLY, cores, environment, introduce, scratch, show, take_turns

SCRIPT = Path(__file__).resolve().parent / "_table_script.py"
CAVEATS = """
Seven columns are generated: a timestamp, two keys and four features (float64). All contenders read five of them
and write one key, whether the row is an anomaly, and its score, as Parquet with Zstandard. Tally writes each row's key
(file and number of the row) besides, and what it needs to go on after a crash; the scripts start again.

The model is a StandardScaler and a linear one-class SVM (SGDOneClassSVM), which costs little: what is measured is
everything around it.

Times are of whole commands. Memory is the proportional set size (PSS) of a contender's processes together, sampled;
quarters are of its running time. In the first one processes start.

Tally's coordinator remembers what it has found out about a model: in its first round it opens the model, which imports
scikit-learn, and later it does not. Its workers, and the scripts, do so in each round.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two looks at the memory")
    given = parser.parse_args()
    introduce(f"table_rows: {given.rows:,} rows through one model", CAVEATS)
    with scratch() as folder:
        os.environ.update(environment(folder / "home"))
        subprocess.run([*TALLY, "jobs", "list"], check=True, capture_output=True)
        source, model = make(folder / "readings.parquet", given.rows), train(folder / "model.skops")
        print(f"source: {source.stat().st_size / 1e9:.2f} GB, {row_groups(source)} row groups\n", flush=True)
        contenders = {
            "Tally": lambda: measure([tally(source, model, folder / "out")], folder, given),
            "script": lambda: measure([script(source, model, folder / "out.parquet")], folder, given),
            f"script x {cores()}": lambda: measure(shared(source, model, folder), folder, given),
        }
        figures = take_turns(contenders, given.rounds)
        show("whole command", figures["rate"], first="Tally", unit="rows/s", digits=0)
        show("peak memory, second quarter", figures["early"], first="Tally", unit="MiB", digits=0)
        show("peak memory, last quarter", figures["late"], first="Tally", unit="MiB", digits=0)
        show("peak memory", figures["peak"], first="Tally", unit="MiB", digits=0)


def make(path: Path, rows: int) -> Path:
    """Readings of 1,000 devices."""
    query = f"""
        COPY (
            SELECT TIMESTAMP '2026-01-01' + INTERVAL (i // 5000) SECOND AS TS, (i % 1000)::INT AS Device,
                (i % 5)::INT AS Tag, random() AS a, random() AS b, sin(i / 1000) AS c, random() * random() AS d
            FROM range({rows}) AS rows(i)
        ) TO '{path}' (COMPRESSION zstd)
    """
    with duckdb.connect(config={"memory_limit": "2GB", "temp_directory": str(path.parent)}) as connection:
        connection.execute("SET preserve_insertion_order = false")
        connection.execute(query)
    return path


def train(path: Path) -> Path:
    import numpy as np
    import skops.io
    from sklearn.linear_model import SGDOneClassSVM
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(1)
    training = generator.random((5000, 4)) * [1, 1, 2, 1] - [0, 0, 1, 0]
    skops.io.dump(make_pipeline(StandardScaler(), SGDOneClassSVM(nu=0.05, random_state=1)).fit(training), path)
    return path


def row_groups(source: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(source).num_row_groups)


def tally(source: Path, model: Path, out: Path) -> list[str]:
    features = "--set=features=[a,b,c,d]"
    return [*TALLY, "score", *map(str, (source, "--model", model, "--keep", "Device", features, "--out", out)), "-q"]


def script(source: Path, model: Path, out: Path, *part: int) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, (source, model, out, *part))]


def shared(source: Path, model: Path, folder: Path) -> list[list[str]]:
    count = row_groups(source)
    bounds = [count * number // cores() for number in range(cores() + 1)]
    return [
        script(source, model, folder / f"out-{number}.parquet", first, last)
        for number, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def measure(commands: Sequence[list[str]], folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Run a contender; rows per second, and peaks of its memory in MiB."""
    began = time.monotonic()
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    ended = threading.Event()
    held: list[float] = []

    def look() -> None:
        while not ended.wait(given.interval):
            held.append(sum(map(memory, processes)) / 2**20)

    watcher = threading.Thread(target=look)
    watcher.start()
    codes = [process.wait() for process in processes]
    took = time.monotonic() - began
    ended.set()
    watcher.join()
    rows = written(folder)
    if any(codes) or rows != given.rows:
        sys.exit(f"{commands[0][:4]} failed: exit codes {codes}, {rows:,} rows")
    quarter = max(1, len(held) // 4)
    return {
        "rate": given.rows / took,
        "early": max(held[quarter : 2 * quarter]),
        "late": max(held[-quarter:]),
        "peak": max(held),
    }


def memory(process: subprocess.Popen[bytes]) -> float:
    """Bytes that a process and its children hold, shared ones divided among them."""
    try:
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0.0
    for each in family:
        try:
            info = each.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(info, "pss", info.rss)
    return total


def written(folder: Path) -> int:
    """How many rows there are in the output, which is removed."""
    out = folder / "out"
    if out.exists():
        rows = json.loads((out / "_manifest.json").read_text())["counts"]["rows"]
        shutil.rmtree(out)
        return int(rows)
    rows = 0
    for file in folder.glob("out*.parquet"):
        rows += duckdb.sql(f"SELECT count(*) FROM read_parquet('{file}')").fetchall()[0][0]
        file.unlink()
    return rows


if __name__ == "__main__":
    main()
