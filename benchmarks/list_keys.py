"""A million keys of a simulated bucket: listed bare by obstore, by Tally's store, and planned as chunks of photos.

    python benchmarks/list_keys.py [--keys 1000000] [--rounds 3]

The bucket is a small server of this file that speaks S3's ListObjectsV2 and makes its keys up.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import psutil

from _machine import introduce, show, take_turns

BUCKET = "simulated"
FOLDER = 10_000
PAGE = 1000
ROUNDS = 3
CAVEATS = """
The server is a process of this machine with no network between, and takes part of its cores; most of the time is its
own. A real service answers a page of 1,000 keys in 50 to 200 ms, one page after the other: 5,000 to 20,000 keys/s,
whatever reads them.

Contenders list the same keys, one after the other in processes of their own. Planning is what "tally score" does with
them: photos by suffix, chunks of 256, names packed for the database. The database is not in it.

Memory is the resident set of the contender's process, at the first key and after each quarter of the keys.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.keys)
    elif given.contender:
        measure(CONTENDERS[given.contender], given.keys)
    else:
        compare(given.keys, given.rounds)


def compare(keys: int, rounds: int) -> None:
    introduce(f"{keys:,} keys of a simulated bucket", CAVEATS)
    memory: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}

    def one(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--contender", name, "--keys", str(keys)]
        told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
        memory[name].append([float(each) for each in told[1:]])
        return {"listing": float(told[0])}

    with server(keys) as url:
        environment = os.environ | {
            "AWS_ENDPOINT": url,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        runs = take_turns({name: partial(one, name) for name in CONTENDERS}, rounds)
    show("listing", runs["listing"], first="obstore", unit="keys/s", digits=0)
    print("memory, MiB: at the first key, and growth until each quarter (the largest of all rounds)")
    for name, rows in memory.items():
        first = max(row[0] for row in rows)
        growth = [max(row[quarter] - row[0] for row in rows) for quarter in range(1, 5)]
        print(f"  {name:<10} {first:8.1f}   " + "  ".join(f"{each:+.1f}" for each in growth))


# -- contenders -----------------------------------------------------------------------------------------


def bare() -> Iterator[int]:
    import obstore
    from obstore.store import from_url

    store = from_url(f"s3://{BUCKET}", client_options={"allow_http": True})
    for page in obstore.list(store, chunk_size=PAGE):
        yield len(page)


def listed() -> Iterator[int]:
    from tally.storage import open_store

    for _ in open_store(f"s3://{BUCKET}").list():
        yield 1


def planned() -> Iterator[int]:
    from tally.sources.base import ChunkLimit
    from tally.sources.files import FileSource

    source = FileSource.describe([f"s3://{BUCKET}"], "image")
    source.prepare()
    for chunk in source.plan(None, 0, lambda: ChunkLimit(256, 1 << 40)):
        yield chunk.count


CONTENDERS: dict[str, Callable[[], Iterator[int]]] = {"obstore": bare, "store": listed, "planning": planned}


def measure(contender: Callable[[], Iterator[int]], keys: int) -> None:
    """Print keys per second, and the resident set in MiB at the start and after each quarter."""
    process = psutil.Process()
    found, began, memory = 0, 0.0, []
    marks = [keys * quarter // 4 for quarter in range(1, 5)]
    for count in contender():
        if not found:
            began = time.perf_counter()
            memory.append(process.memory_info().rss / 2**20)
            first = count
        found += count
        while marks and found >= marks[0]:
            del marks[0]
            memory.append(process.memory_info().rss / 2**20)
    seconds = time.perf_counter() - began
    if found != keys:
        raise SystemExit(f"{found:,} of {keys:,} keys were listed")
    print((found - first) / seconds, *memory)


# -- the simulated bucket -------------------------------------------------------------------------------


@contextmanager
def server(keys: int) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", "--keys", str(keys)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


def serve(keys: int) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Bucket, keys)) as listener:
        print(listener.server_address[1], flush=True)
        listener.serve_forever()


def name_of(number: int) -> str:
    return f"photos/{number // FOLDER:05d}/{number:08d}.jpg"


def number_after(name: str) -> int:
    """The number of the first key beyond a name that is a key."""
    found = re.fullmatch(r"photos/\d+/(\d+)\.jpg", name)
    return int(found[1]) + 1 if found else 0


class Bucket(BaseHTTPRequestHandler):
    """Lists, and nothing else."""

    protocol_version = "HTTP/1.1"

    def __init__(self, keys: int, *arguments: Any) -> None:
        self.keys = keys
        super().__init__(*arguments)

    def do_GET(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        after = asked.get("continuation-token") or asked.get("start-after", "")
        start = number_after(after)
        stop = min(start + PAGE, self.keys)
        page = [name_of(number) for number in range(start, stop)]
        more = stop < self.keys and bool(page)
        body = "".join(
            f"<Contents><Key>{quote(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"0123456789abcdef"</ETag><Size>100000</Size></Contents>'
            for name in page
        )
        token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if more else ""
        text = (
            f"<ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(page)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{body}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


if __name__ == "__main__":
    main()
