"""Ten million files in one folder: planning, the coordinator's memory, and how soon a job of that size is shown.

python benchmarks/many_files.py [--files 10000000]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx2

from _machine import TALLY, environment, introduce, scratch, served
from noop import SCORER, watch
from tally.jobs.facade import Jobs
from tally.server.pages.job import CELLS, STRETCHES

LINKS = 50_000
"""Names of one file, as file systems allow: millions of files would need as many inodes."""
ASKED = 20
CAVEATS = """
The files are empty, and 50,000 of them are names of one (hard links). The scorer is not given their content (input =
"path") and returns one small row for each. The results are durable Parquet.

"Planned" is from the start of the command until the last chunk is in the database, reading the folder included: names
are wanted sorted, so the first chunk waits for all of them. The coordinator's memory is the most that its process held
(VmHWM), without its workers.

"Shown" is asked of a server on this database, one request after the other, once the job is finished.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000_000)
    given = parser.parse_args()
    introduce(f"{given.files:,} files in one folder", CAVEATS)
    with scratch() as folder:
        env = environment(folder / "home")
        subprocess.run([*TALLY, "jobs", "list"], env=env, check=True, capture_output=True)
        files, peak = make(folder / "files", given.files), folder / "peak"
        command = [sys.executable, str(Path(__file__).with_name("noop.py")), "--as-tally", str(peak)]
        command += ["score", str(files), "--model", str(SCORER), "--out", str(folder / "out"), "--quiet"]
        began = time.time()
        process = subprocess.Popen(command, env=env)
        first, planned, _ = watch(folder / "home" / "tally.db", process)
        if process.wait():
            sys.exit(f"{' '.join(command)} failed")
        whole = time.time() - began
        print(f"  first items committed after  {first - began:6.1f} s")
        print(f"  planned after                {planned - began:6.1f} s, {given.files / (planned - began):9,.0f}/s")
        print(f"  whole command                {whole:6.1f} s, {given.files / whole:9,.0f} files/s")
        print(f"  the coordinator held at most {int(peak.read_text()) / 1024:6.1f} MiB")
        for what, seconds in shown(env).items():
            print(f"  {what:28} {1000 * median(seconds):6.1f} ms median, {1000 * max(seconds):6.1f} ms at most")


def make(folder: Path, count: int) -> Path:
    folder.mkdir()
    origin = ""
    for number in range(count):
        name = f"{folder}/{number:08d}.dat"
        if number % LINKS == 0:
            Path(name).touch()
            origin = name
        else:
            os.link(origin, name)
    return folder


def shown(env: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of requests about the newest job."""
    os.environ |= {name: value for name, value in env.items() if name.startswith("TALLY_")}
    with served(env) as client:
        job = client.list().jobs[0].id
        asked: dict[str, Callable[[], object]] = {
            "GET /jobs": client.list,
            "GET /jobs/{job} (jobs show)": lambda: client.get(job),
            "the page of the job": lambda: ask(client.url, env["TALLY_KEY"], f"/jobs/{job}"),
            "its map of chunks and rates": lambda: glance(job),
        }
        return {what: [timed(ask) for _ in range(ASKED)] for what, ask in asked.items()}


def ask(url: str, key: str, path: str) -> None:
    httpx2.get(url + path, headers={"Authorization": f"Bearer {key}"}).raise_for_status()


def glance(job: str) -> None:
    """What the page is sent once it is open, and again while the job runs."""
    store = Jobs().store
    store.cells(job, limit=CELLS)
    store.pace(job, running=False, limit=STRETCHES)


def timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
