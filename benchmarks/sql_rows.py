"""A million rows into a table of PostgreSQL: ``tally score --push`` against ``COPY`` by hand.

    python benchmarks/sql_rows.py [--rows 1000000] [--rounds 3] [--server postgresql://postgres@127.0.0.1/postgres]

Contenders: Tally, which pushes rows as they are committed, each once; Tally into Parquet, and a script of twenty lines
that copies the Parquet into the table when it is finished. It makes a database of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import sqlalchemy as sa

from _machine import TALLY, environment, introduce, scratch, show, take_turns
from tally.push.base import Parcel
from tally.push.factory import open_receiver
from tally.push.target import Push

CAVEATS = """
The model does nothing but tell a number and a word of each row: what is measured is everything around it. All tables
have the primary key of Tally's: the item's key, and the number of its row.

"whole": the whole command, or both commands. "loading": from Parquet to what is committed in the table, in one process:
Tally's receiver, a parcel of 131,072 rows at a time, each in a transaction that replaces what is there of its items;
by hand, one COPY of all rows in CSV, which pyarrow writes. By hand, nothing is known of a row that is there already: it
begins with an empty table, and ends with an error where it is run again.
"""
DATABASE = "tally_benchmark_sql_rows"
MODEL = """
import pyarrow as pa
import pyarrow.compute as pc

import tally


class Words(tally.Scorer):
    input = "table"
    features = ("n",)
    batch_size = 16_384
    columns = {"score": "float64", "label": "string"}

    def score(self, batch):
        score = pc.multiply(batch["n"].cast("double"), 0.1)
        label = pc.if_else(pc.equal(pc.bit_wise_and(batch["n"], 1), 0), "cat", "dog")
        return tally.TableResult(pa.table({"score": score, "label": label}))
"""
TABLE = (
    "DROP TABLE IF EXISTS found; CREATE TABLE found (key text, item_row int, score float8, label text, "
    "PRIMARY KEY (key, item_row))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server", default="postgresql://postgres@127.0.0.1/postgres")
    given = parser.parse_args()
    introduce(f"sql_rows: {given.rows:,} rows into a table of PostgreSQL", CAVEATS)
    url = sa.make_url(given.server).set(database=DATABASE).render_as_string(hide_password=False)
    with psycopg.connect(given.server, autocommit=True) as server:
        server.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
        server.execute(f"CREATE DATABASE {DATABASE}")
        try:
            with scratch() as folder:
                os.environ.update(environment(folder / "home"))
                os.environ["RESULTS"] = url
                figures = take_turns(contenders(folder, url, given.rows), given.rounds)
        finally:
            server.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")
    for measure in ("whole", "loading"):
        show(measure, figures[measure], first="COPY by hand", unit="s")


def contenders(folder: Path, url: str, rows: int) -> dict[str, Callable[[], Mapping[str, float]]]:
    """Each cleans up what the one before has left, which does not count."""
    pq.write_table(pa.table({"n": range(rows)}), folder / "in.parquet")
    (folder / "words.py").write_text(MODEL)

    def scored(out: Path, *more: str) -> float:
        begun = time.perf_counter()
        command = [*TALLY, "score", str(folder / "in.parquet"), "--model", str(folder / "words.py"), "--quiet"]
        subprocess.run([*command, "--out", str(out), "--overwrite", *more], check=True)
        return time.perf_counter() - begun

    def pushed() -> Mapping[str, float]:
        empty(url)
        whole = scored(folder / "pushed", "--push", "env:RESULTS#found")
        check(url, rows)
        empty(url)
        begun = time.perf_counter()
        receiver = open_receiver(Push(url="env:RESULTS#found"), {})
        for part in parts(folder / "pushed"):
            for start in range(0, part.num_rows, 131_072):
                some = part.slice(start, 131_072)
                assert not receiver.deliver(Parcel("p", some["key"].to_pylist(), some))
        receiver.close()
        loading = time.perf_counter() - begun
        check(url, rows)
        return {"whole": whole, "loading": loading}

    def by_hand() -> Mapping[str, float]:
        empty(url)
        scoring = scored(folder / "by-hand")
        begun = time.perf_counter()
        subprocess.run([sys.executable, __file__, "copy", str(folder / "by-hand"), url], check=True)
        copying = time.perf_counter() - begun
        check(url, rows)
        empty(url)
        begun = time.perf_counter()
        copy(folder / "by-hand", url)
        return {"whole": scoring + copying, "loading": time.perf_counter() - begun}

    return {"COPY by hand": by_hand, "Tally": pushed}


def parts(out: Path) -> list[pa.Table]:
    return [pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))]


def copy(out: Path, url: str) -> None:
    """What one would write without Tally."""
    statement = "COPY found (key, score, label, item_row) FROM STDIN (FORMAT csv)"
    with psycopg.connect(url) as connection, connection.cursor() as cursor, cursor.copy(statement) as target:
        for part in parts(out):
            table = part.select(["key", "score", "label"])
            numbered = table.append_column("item_row", pa.array([0] * table.num_rows, pa.int32()))
            for batch in numbered.to_batches(max_chunksize=65_536):
                buffer = pa.BufferOutputStream()
                pc.write_csv(batch, buffer, pc.WriteOptions(include_header=False))
                target.write(memoryview(buffer.getvalue()))


def empty(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in TABLE.split("; "):
            connection.execute(statement)


def check(url: str, rows: int) -> None:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT count(*), count(DISTINCT key), sum(score) FROM found").fetchone()
    assert found is not None
    assert found[:2] == (rows, rows)
    assert abs(found[2] - 0.1 * rows * (rows - 1) / 2) < 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["copy"]:
        copy(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
