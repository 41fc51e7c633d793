"""What is left behind that does not belong there: in a bucket, in the database, in folders, among the processes.

Every function lists it, as lines that say what and where; an empty list is what a test wants.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

CACHED = ("objects", "models")
"""What docs/ says is kept in the cache: objects that were fetched whole, and the content of models."""

_UNFINISHED = (".tally-tmp-", ".download-", ".part")


# -- in a bucket ---------------------------------------------------------------------------------------------


def objects_of(s3: Any, bucket: str) -> dict[str, int]:
    """Every object of a bucket, with its size. s3: a client of boto3, which is not what Tally itself uses."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}


def result_of(s3: Any, bucket: str, out: str) -> dict[str, int | None]:
    """The names that a finished output stands for, by its manifest, with their sizes where it tells them.

    out: ``folder`` or ``name.suffix`` of one file.
    """
    merged = "." in out.rpartition("/")[2]
    folder = out.rpartition("/")[0] if merged else out
    under = f"{folder}/" if folder else ""
    name = f"{out}.manifest.json" if merged else f"{out}/_manifest.json"
    manifest = json.loads(s3.get_object(Bucket=bucket, Key=name)["Body"].read())
    files = [*manifest["files"], *([manifest["dead_file"]] if manifest["dead_file"] else [])]
    names: dict[str, int | None] = {under + file["path"]: file["bytes"] for file in files}
    return names | {name: None} | ({} if merged else {f"{out}/_SUCCESS": 0})


def in_bucket(s3: Any, bucket: str, given: Iterable[str], *outs: str) -> list[str]:
    """Objects that neither were given nor belong to a result, those that are missing, and uploads never ended."""
    found = objects_of(s3, bucket)
    result = {name: size for out in outs for name, size in result_of(s3, bucket, out).items()}
    uploads = s3.list_multipart_uploads(Bucket=bucket).get("Uploads", ())
    given = set(given)
    return [
        *(f"left in the bucket: {name}" for name in sorted(found.keys() - given - result.keys())),
        *(f"missing in the bucket: {name}" for name in sorted((given | result.keys()) - found.keys())),
        *(
            f"{name} has {found[name]} bytes, the manifest says {size}"
            for name, size in sorted(result.items())
            if size is not None and found.get(name, size) != size
        ),
        *(f"an upload was begun and never ended: {upload['Key']}" for upload in uploads),
    ]


# -- in the database -----------------------------------------------------------------------------------------


def in_database(url: str) -> list[str]:
    """What finished jobs leave in the tables: owners, leases, chunks at work, payloads, rows of no job.

    And whether the chunks of each job are its items, every one of them once.
    """
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    found: list[str] = []
    with engine.connect() as connection:

        def rows(statement: str) -> Sequence[sa.RowMapping]:
            return connection.execute(sa.text(statement)).mappings().all()

        for job in rows("SELECT * FROM jobs"):
            name = f"job {job['id']}"
            if job["state"] != "finished" or job["error"]:
                found.append(f"{name} is {job['state']}: {job['error']}")
            found += [
                f"{name} has {column}: {job[column]}"
                for column in ("owner", "owner_host", "owner_pid", "owner_started", "lease_until")
                if job[column] is not None
            ]
            expected = 0
            for chunk in rows(f"SELECT * FROM chunks WHERE job_id = '{job['id']}' ORDER BY generation, first, id"):
                what = f"{name}, chunk {chunk['id']} of items {chunk['first']}+{chunk['count']}"
                if chunk["state"] != "done":
                    found.append(f"{what} is {chunk['state']}")
                if chunk["payload"] is not None:
                    found.append(f"{what} still has what it was read from")
                if not chunk["attempt"] or chunk["output"] is None:
                    found.append(f"{what} has no output")
                if chunk["first"] != expected:
                    found.append(f"{what}: items {expected} to {chunk['first']} are missing or there twice")
                expected = chunk["first"] + chunk["count"]
            if (expected, expected) != (job["items"], job["done"]):
                found.append(f"{name}: chunks of {expected} items, {job['items']} planned, {job['done']} done")
            dead = connection.scalar(sa.text(f"SELECT count(*) FROM dead_items WHERE job_id = '{job['id']}'")) or 0
            if dead != job["dead"]:
                found.append(f"{name}: {dead} dead items, {job['dead']} counted")
        for table in ("chunks", "dead_items", "alerts"):
            lost = rows(f"SELECT count(*) AS number FROM {table} WHERE job_id NOT IN (SELECT id FROM jobs)")
            if lost[0]["number"]:
                found.append(f"{table}: {lost[0]['number']} rows of no job")
        if engine.dialect.name == "postgresql":
            others = rows(
                "SELECT state, query FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            found += [f"a connection is still open ({other['state']}): {other['query']}" for other in others]
            found += [f"a prepared transaction: {each['gid']}" for each in rows("SELECT gid FROM pg_prepared_xacts")]
    engine.dispose()
    return found


# -- in folders ----------------------------------------------------------------------------------------------


def in_temporary(folder: Path, known: Callable[[Path], bool] = lambda path: False) -> list[str]:
    """Everything in the folder for temporary files. known: what belongs to somebody else (Ray's own session)."""
    return [f"left in the folder for temporary files: {path}" for path in _files(folder, known)]


def in_home(home: Path, jobs: Iterable[str]) -> list[str]:
    """What is in a state folder and is neither the database, nor the log of one of these jobs, nor the cache."""
    jobs = set(jobs)
    found = []
    for path in _files(home):
        name = path.relative_to(home)
        top = name.parts[0]
        log = top == "logs" and (path.is_dir() or (name.stem in jobs and len(name.parts) == 2))
        cached = top == "cache" and not in_cache_name(name)
        if not (log or cached or top.startswith("tally.db")):
            found.append(f"left in the state folder: {path}")
    return found


def in_cache_name(name: Path) -> str | None:
    """Why a file (relative to the state folder) does not belong into the cache, or None."""
    if len(name.parts) < 3 or name.parts[1] not in CACHED:
        return "nothing of that kind is kept"
    if any(part.startswith(_UNFINISHED) or part.endswith(".part") for part in name.parts):
        return "it was never finished"
    return None


def _files(folder: Path, known: Callable[[Path], bool] = lambda path: False) -> list[Path]:
    """Files, and folders that hold none."""
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if not known(here / name)]
        found += [here / name for name in files if not known(here / name)]
        if not folders and not files and here != folder:
            found.append(here)
    return sorted(found)


# -- among the processes -------------------------------------------------------------------------------------


def marked(name: str, value: str) -> list[psutil.Process]:
    """The processes that were started with this variable in their environment, and are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(name) == value:
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


def processes(name: str, value: str, seconds: float = 30) -> list[str]:
    """Those of them that do not end by themselves within this time."""
    _, alive = psutil.wait_procs(marked(name, value), timeout=seconds)
    return [f"still running: {process.pid} {line_of(process)}" for process in alive]


def line_of(process: psutil.Process) -> str:
    """Its command line, or nothing where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
