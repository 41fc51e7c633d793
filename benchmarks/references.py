"""A million references to pictures, in lists of four forms: how long it takes until all are planned, and memory.

python benchmarks/references.py [--references 1000000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil

from _machine import introduce, scratch, show, take_turns

FORMS = ("txt", "csv", "jsonl", "parquet")
CAVEATS = """
The references are URLs of a bucket, which planning does not look at; each list but the text has a column of labels,
which is kept. Planning is what "tally score --items" does with a list: it is read once to see that no two items have
the same key, and once more for chunks of 256. Database and workers are not in it.

Each run is a process of its own. Time is from opening the list to the last chunk, imports included. Memory is the
resident set of the process, after the first chunk and after each quarter of the references.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan is not None:
        plan(given.plan, given.references)
        return
    introduce(f"{given.references:,} references", CAVEATS)
    memory: dict[str, list[list[float]]] = {form: [] for form in FORMS}
    with scratch() as folder:

        def one(form: str) -> dict[str, float]:
            command = [sys.executable, __file__, "--plan", str(folder / f"list.{form}")]
            command += ["--references", str(given.references)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            memory[form].append([float(each) for each in told[1:]])
            return {"planned": float(told[0])}

        make(folder, given.references)
        runs = take_turns({form: partial(one, form) for form in FORMS}, given.rounds)
    show("planned after", runs["planned"], first="txt", unit="s")
    print("memory, MiB: after the first chunk, and growth until each quarter (the largest of all rounds)")
    for form, rows in memory.items():
        growth = [max(row[quarter] - row[0] for row in rows) for quarter in range(1, 5)]
        print(f"  {form:<10} {max(row[0] for row in rows):8.1f}   " + "  ".join(f"{each:+.1f}" for each in growth))


def make(folder: Path, count: int) -> None:
    """Write the lists."""
    import duckdb

    reference = "format('s3://bucket/photos/{:05d}/{:08d}.jpg', i // 10000, i)"
    rows = f"SELECT {reference} AS image, i % 10 AS label FROM range({count}) AS rows(i)"
    with duckdb.connect() as connection:
        for form, options in (
            ("csv", "FORMAT csv, HEADER true"),
            ("jsonl", "FORMAT json"),
            ("parquet", "FORMAT parquet"),
        ):
            connection.execute(f"COPY ({rows}) TO '{folder / f'list.{form}'}' ({options})")
        connection.execute(f"COPY (SELECT image FROM ({rows})) TO '{folder / 'list.txt'}' (FORMAT csv, HEADER false)")


def plan(place: Path, count: int) -> None:
    """Print the seconds that it takes, and the resident set in MiB after the first chunk and after each quarter."""
    began = time.perf_counter()
    from tally.sources.base import ChunkLimit
    from tally.sources.lists import open_list
    from tally.sources.references import ReferenceSource

    keep = [] if place.suffix == ".txt" else ["label"]
    named = None if place.suffix == ".txt" else "image"
    source = ReferenceSource.describe(open_list(str(place), item_column=named, keep=keep), "image")
    source = source.located(str(place.with_name(f"work-{place.suffix[1:]}-{began}")))
    source.prepare()
    process, found, memory = psutil.Process(), 0, []
    marks = [1, *(count * quarter // 4 for quarter in range(1, 5))]
    for chunk in source.plan(None, 0, lambda: ChunkLimit(256, 1 << 40)):
        found += chunk.count
        while marks and found >= marks[0]:
            del marks[0]
            memory.append(process.memory_info().rss / 2**20)
    if found != count:
        raise SystemExit(f"{found:,} of {count:,} references were planned")
    print(time.perf_counter() - began, *memory)


if __name__ == "__main__":
    main()
