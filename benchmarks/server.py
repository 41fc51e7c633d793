"""How long the server's pages and answers take: at rest, and beside a job that has both cores.

    python benchmarks/server.py [--jobs 100000] [--rows 10000000] [--asked 60]

First the store is filled with ended jobs, and one job is run whose result has many rows. Then each page and each route
is asked for again and again, one after another: first at rest, then while a job scores with a worker for each core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from time import perf_counter
from urllib.parse import quote
from urllib.request import Request, urlopen

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from _machine import environment, introduce, scratch, served, settle
from tally.database.tables import jobs
from tally.jobs.facade import Jobs
from tally.jobs.store import new_id

TALLY = [sys.executable, "-m", "tally"]
CAVEATS = """
The server, its database (SQLite), the job and whoever asks share the machine. One request at a time, over loopback,
each with a connection of its own. A page is its HTML alone: what it fetches later is asked for by itself.

The ended jobs are copies of one small job's row, with ids, places and times of their own.

Percentiles are of the requests of one route; the last line is of all requests together.
"""
SCORER = """
import pyarrow as pa
import pyarrow.compute as pc
from tally import Scorer

class Sum(Scorer):
    input = "table"
    batch_size = 65536
    features = ["a", "b"]
    columns = {"sum": "float64", "label": "string"}

    def score(self, batch):
        sums = pc.add(batch["a"], batch["b"])
        return pa.table({"sum": sums, "label": pc.if_else(pc.greater(sums, 1), "high", "low")})
"""
BUSY = """
from tally import Scorer

class Busy(Scorer):
    input = "path"
    columns = {"total": "int64"}

    def score(self, batch):
        return [{"total": sum(range(100_000))} for _ in batch]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--asked", type=int, default=60, help="requests for each route, at rest and under load")
    given = parser.parse_args()
    with scratch() as folder:
        os.environ.update(environment(folder / "home"))
        introduce(f"server: {given.jobs:,} jobs, a result of {given.rows:,} rows", CAVEATS)
        began = perf_counter()
        large = large_result(folder, given.rows)
        print(f"a job with {given.rows:,} rows ran in {perf_counter() - began:.1f} s")
        began = perf_counter()
        fill(given.jobs)
        print(f"{given.jobs:,} jobs were written in {perf_counter() - began:.1f} s\n", flush=True)
        with serving() as (url, key):
            routes = routes_of(large, given.rows)
            settle()
            show("at rest", ask(url, key, routes, given.asked))
            with loaded(folder) as job:
                before = Jobs().get(job).done
                shown = perf_counter()
                answers = ask(url, key, routes, given.asked)
                record, passed = Jobs().get(job), perf_counter() - shown
                assert record.state == "running", f"the job is {record.state}: give it more items"
                show("beside a job with every core", answers)
                busy = psutil.cpu_percent(interval=2.0)
                print(
                    f"the job scored {(record.done - before) / passed:,.0f} items/s meanwhile; cores busy: {busy:.0f} %"
                )


def large_result(folder: Path, rows: int) -> str:
    """The id of a job whose result has so many rows."""
    (folder / "sums.py").write_text(SCORER)
    source = folder / "rows.parquet"
    group = 500_000
    with pq.ParquetWriter(source, pa.schema({"id": pa.int64(), "a": pa.float64(), "b": pa.float64()})) as writer:
        for first in range(0, rows, group):
            ids = range(first, min(first + group, rows))
            part = {"id": list(ids), "a": [each % 97 / 97 for each in ids], "b": [each % 89 / 89 for each in ids]}
            writer.write_table(pa.table(part))
    command = ["score", str(source), "--model", str(folder / "sums.py"), "--out", f"{folder / 'sums'}/", "-q"]
    subprocess.run([*TALLY, *command], check=True)
    return Jobs().store.newest(limit=1)[0].id


def fill(count: int) -> None:
    """Write so many ended jobs, copies of the last one."""
    with Jobs().store.engine.begin() as connection:
        [row] = connection.execute(sa.select(jobs)).mappings().all()
        made: list[dict[str, object]] = []
        for number in range(count):
            job, place = new_id(), f"{row['place']}-{number}"
            at = row["created_at"] - 60.0 * (number + 1)
            times = {"created_at": at, "started_at": at + 1, "finished_at": at + 31}
            small = {"done": 1000, "rows": 1000, "items": 1000, "manifest": None, "search": f"{job} {place}"}
            made.append({**row, "id": job, "place": place, "fingerprint": f"{number:064x}", **times, **small})
            if len(made) == 5000 or number == count - 1:
                connection.execute(sa.insert(jobs), made)
                made.clear()


@contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """A server's address, and the first admin's key."""
    env = dict(os.environ)
    with served(env) as client:
        yield client.url, env["TALLY_KEY"]


@contextmanager
def loaded(folder: Path) -> Iterator[str]:
    """A job that scores meanwhile, with a worker for each core: its id."""
    (folder / "busy.py").write_text(BUSY)
    items = folder / "items"
    items.mkdir()
    for number in range(100_000):
        (items / f"{number:06}").touch()
    command = ["score", str(items), "--model", str(folder / "busy.py"), "--out", f"{folder / 'busy'}/", "-q"]
    process = subprocess.Popen([*TALLY, *command])
    try:
        store = Jobs().store
        while not (newest := store.newest(limit=1)[0]).done or newest.state != "running":
            if process.poll() is not None:
                raise SystemExit(f"the job ended with {process.returncode}")
            psutil.cpu_percent(interval=0.2)
        yield newest.id
    finally:
        process.terminate()
        process.wait(60)


def routes_of(job: str, rows: int) -> dict[str, Request]:
    """What is asked for, by its name. The key is added later."""
    api = f"/api/v1/jobs/{job}"
    sql = "select label, count(*) n, avg(sum) mean from results group by label order by label"
    asked = {
        "page: overview": "/",
        "page: job": f"/jobs/{job}",
        "page: first rows": f"/jobs/{job}/rows",
        "page: labels": f"/jobs/{job}/labels",
        "page: SQL, grouped": f"/jobs/{job}/sql?sql={quote(sql)}",
        "api: jobs": "/api/v1/jobs?limit=100",
        "api: jobs, searched": "/api/v1/jobs?limit=100&search=sums-77",
        "api: job": api,
        "api: rows, the last": f"{api}/rows?after={rows - 100}",
        "api: figures": "/api/v1/figures",
        "api: SQL, grouped": f"{api}/query",
        "metrics": "/metrics",
        "healthz": "/healthz",
    }
    posted = {"api: SQL, grouped": json.dumps({"sql": sql}).encode()}
    return {
        name: Request(path if "://" in path else f"http://server{path}", data=posted.get(name))
        for name, path in asked.items()
    }


def ask(url: str, key: str, routes: Mapping[str, Request], times: int) -> dict[str, list[float]]:
    """Milliseconds of each request, from its connection to the last byte of its answer."""
    took: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(times + 1):
        for name, route in routes.items():
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            request = Request(route.full_url.replace("http://server", url.rstrip("/")), route.data, headers)
            began = perf_counter()
            with urlopen(request, timeout=60) as answer:
                answer.read()
            took[name].append((perf_counter() - began) * 1000)
    return {name: figures[1:] for name, figures in took.items()}  # the first one warms up


def show(when: str, took: Mapping[str, list[float]]) -> None:
    print(f"{when} (ms)")
    width = max(map(len, took))
    for name, figures in {**took, "all": list(chain(*took.values()))}.items():
        parts = statistics.quantiles(figures, n=100, method="inclusive")
        print(f"  {name:{width}}  p50 {parts[49]:7.1f}   p95 {parts[94]:7.1f}   p99 {parts[98]:7.1f}")
    print(flush=True)


if __name__ == "__main__":
    main()
