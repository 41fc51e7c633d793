"""Small pictures as files, in tar shards, in ZIPs, in compressed tars and in Parquet, through the same classifier.

python benchmarks/shards.py [--pictures 20000] [--shards 20] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from _machine import TALLY, cores, environment, follow, introduce, scratch, shapes_pictures, show, take_turns
from photos import HERE, available, describe

CAVEATS = """
The same pictures (tally:shapes, a few kilobytes each) and the same toy model, whose work for one is small: what is
measured is what it takes to get at the pictures. With a larger model the forms differ less.

Everything is in the page cache of one machine. From a bucket, shards save requests, and differ more.

"Whole command" is from the start of the command until the results are on the disk: the interpreter, planning, starting
processes and loading the model are in it. Tally's database exists before.

The Parquet file has row groups of 1,000 pictures, not compressed, as Hugging Face writes it.

webdataset: WebDataset and a DataLoader, whose processes, one per core, read and decode; the model is in the main one.
ray-tar, ray-parquet: Ray Data's readers, and an actor per core. Both decode alike, in the same batches, and hold their
results in memory until the end: only Tally writes them while it runs, and could be killed and resumed.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with scratch() as folder:
        introduce(f"{given.pictures:,} pictures as files, in {given.shards} shards, and in Parquet", CAVEATS)
        files = shapes_pictures(folder / "files", given.pictures)
        names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
        parts = [names[at :: given.shards] for at in range(given.shards)]
        forms = {"files": files}
        for form, pack in PACKERS.items():
            forms[form] = folder / form
            forms[form].mkdir()
            for number, part in enumerate(parts):
                pack(files, part, forms[form] / f"shard-{number:06}")
        env = environment(folder / "home")
        contenders = {form: partial(score, source, folder, env, len(names)) for form, source in forms.items()}
        describe("tally:shapes", folder / "model.json")
        os.environ["BENCH_CORES"] = str(cores())
        if available("webdataset", "pip install webdataset torch"):
            contenders["webdataset"] = partial(other, "webdataset", forms["tar"], folder, len(names))
        if available("ray", "pip install 'ray[data]'"):
            for form in ("tar", "parquet"):
                contenders[f"ray-{form}"] = partial(other, f"ray-{form}", forms[form], folder, len(names))
        score(forms["files"], folder, env, len(names))  # makes the database, and warms the cache
        figures = take_turns(contenders, given.rounds)
        show("whole command", figures["whole"], first="files", unit="pictures/s", digits=0)
        show("steady state", figures["steady"], first="files", unit="pictures/s", digits=0)


def score(source: Path, folder: Path, env: dict[str, str], count: int) -> dict[str, float]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [*TALLY, "score", str(source), "--model", "tally:shapes", "--out", str(out), "--overwrite"]
    return follow(command, env, count)


def other(name: str, source: Path, folder: Path, count: int) -> dict[str, float]:
    command = [sys.executable, HERE / "_shard_contenders.py", name, source, folder / "model.json", count]
    return follow([*map(str, command), str(folder / f"{name}-found.parquet")], dict(os.environ), count)


def tar(files: Path, names: list[str], place: Path, mode: str = "w", suffix: str = ".tar") -> None:
    with tarfile.open(f"{place}{suffix}", mode) as archive:
        for name in names:
            archive.add(files / name, arcname=name)


def zipped(files: Path, names: list[str], place: Path) -> None:
    with zipfile.ZipFile(f"{place}.zip", "w") as archive:
        for name in names:
            archive.write(files / name, arcname=name)


def parquet(files: Path, names: list[str], place: Path) -> None:
    rows = [{"image": {"bytes": (files / name).read_bytes(), "path": name}} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), f"{place}.parquet", row_group_size=1000, compression="none")


PACKERS: dict[str, Callable[[Path, list[str], Path], None]] = {
    "tar": tar,
    "tar.gz": partial(tar, mode="w:gz", suffix=".tar.gz"),
    "zip": zipped,
    "parquet": parquet,
}


if __name__ == "__main__":
    main()
