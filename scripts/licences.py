"""List what Tally installs, with licences and sizes: docs/reference/licences.md.

    python scripts/licences.py

Run it before a release, in an environment on Linux that has Tally with all of its extras: it reads what is installed
there.
"""

from __future__ import annotations

import re
import tomllib
from collections import deque
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "reference" / "licences.md"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
TALLY = "tally-scoring"
BEGINNING = """# Packages: licences and sizes

What `pip install tally-scoring` brings, and what each extra adds. The list was made by `scripts/licences.py` on Linux
(x86-64). It says what each package declares about itself.

Tally's own licence is Apache-2.0, and its wheel holds none of these packages. If you pass an installation on, in an
image for example, read these licences first:

- **`av`** declares BSD-3-Clause. Its wheels also hold FFmpeg with libx264 and libx265, and these two are GPL.
- **`pillow-heif`** (extra `pictures`) declares BSD-3-Clause. Its wheels also hold libheif and libde265, which are LGPL,
  and libx265, which is GPL.
- **`pebble`** and **`psycopg`** are LGPL. Tally uses them unchanged, as installed packages.

"""
SIZES = """
## Size of the plain install

The wheel of Tally has 2 MB. The plain install has {total} MB in all. The table counts files in MB (10⁶ bytes), with the
bytecode that pip writes.

| package | MB | what needs it |
|---|---|---|
"""
ENDING = """
`du` shows some tens of MB more for a new virtual environment: it has pip, too, and `du` counts whole blocks of the
disk.

Five packages make {share} % of that: Arrow, FFmpeg, ONNX Runtime, DuckDB and NumPy. Each wheel comes whole, and pip
cannot leave out a part. This is what they are large for, and why Tally has them without an extra:

| package | in it | without it |
|---|---|---|
| pyarrow | Arrow and Parquet, 105 MB; Arrow Flight and S3, 51 MB; tests, headers | no results: they are Parquet |
| av | codecs; x265 alone has 20 MB | no videos |
| onnxruntime | the runtime, twice: for Python, and for programs in C | no model, the bundled ones neither |
| duckdb | one library | no `tally query`, which the demo shows; no CSV, no conditions |
| numpy | arrays, and OpenBLAS with 28 MB | nothing works |

Only `av` could become an extra: {without_av} MB would be left. It is not one, because then the first clip of a newcomer
would be refused.

Where space is short, in an image for example, these cuts are possible:

- `pip install --no-compile` writes no bytecode: {bytecode} MB less here. Each start then compiles anew and is slower,
  unless Python may write the bytecode later.
- The folders `pyarrow/include` and `pyarrow/tests` serve only those who compile against Arrow, or test it.
- `onnxruntime/capi/libonnxruntime.so*` serves programs in C: 35 MB.
- Tally itself loads none of `libarrow_flight*`, `libarrow_python_flight*`, `_flight*`, `libarrow_s3*` and `_s3fs*` in
  `pyarrow`: 51 MB. Code of your own may, if it reads `s3://` by `pandas` or `pyarrow`.
"""
USES = {
    "pyarrow": "tables, Parquet",
    "onnxruntime": "ONNX models",
    "av": "videos",
    "numpy": "arrays: all models",
    "duckdb": "`tally query`, CSV, conditions, windows",
    "sqlalchemy": "the database of jobs",
    "obstore": "buckets",
    "pillow": "pictures",
    "alembic": "the database of jobs",
    "pydantic": "job files",
    "pyyaml": "job files, packages",
    "rich": "progress, tables on a terminal",
    "click": "the command line",
    TALLY: "itself",
}

TEXTS = {
    "Apache-2.0": "Apache License",
    "MPL-2.0": "Mozilla Public License",
    "MIT": "Permission is hereby granted, free of charge",
}


def needed(lines: list[str]) -> dict[str, Distribution]:
    """The installed packages that these requirements bring, by their names."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = deque((line, "") for line in lines)
    while waiting:
        line, extra = waiting.popleft()
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            found[name] = package = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed here: install all extras first") from None
        for asked in {"", *requirement.extras} - {asked for known, asked in seen if known == name}:
            seen.add((name, asked))
            waiting.extend((each, asked) for each in package.requires or ())
    return found


def licence(package: Distribution) -> str:
    lines = package.metadata.get_all("Classifier") or []
    classes = [line.rpartition(" :: ")[2] for line in lines if line.startswith("License :: OSI Approved ::")]
    short = (package.metadata["License"] or "").strip().partition("\n")[0]
    if len(short) > 60:  # its whole text
        short = ""
    if not (declared := package.metadata["License-Expression"] or ", ".join(classes) or short):
        files = [file for file in package.files or () if file.name.upper().startswith("LICEN")]
        text = files[0].read_text("utf-8") if files else ""
        declared = next((name for name, phrase in TEXTS.items() if phrase in text), "?")
    return str(declared)


def megabytes(package: Distribution, suffix: str = "") -> float:
    paths = [Path(str(package.locate_file(file))) for file in package.files or () if str(file).endswith(suffix)]
    return sum(path.stat().st_size for path in paths if path.exists()) / 1e6


def page() -> str:
    plain = needed(PROJECT["dependencies"])
    extras = {extra: needed(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
    everything = plain | {name: package for each in extras.values() for name, package in each.items()}
    lines = ["| package | version | licence | comes with |", "|---|---|---|---|"]
    for name, package in sorted(everything.items()):
        users = [f"`{extra}`" for extra, packages in sorted(extras.items()) if name in packages]
        where = "the plain install" if name in plain else ", ".join(users)
        lines.append(f"| {name} | {package.version} | {licence(package).replace('|', '/')} | {where} |")

    sizes = {name: megabytes(package) for name, package in plain.items()}
    # Of Tally itself, what stands in its folder: an editable installation lists no files.
    source = [file for file in (REPOSITORY / "src").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    sizes[TALLY] = sum(file.stat().st_size for file in source) / 1e6
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)
    total, top = sum(sizes.values()), sum(sizes[name] for name in largest[:5])
    shown = [name for name in largest if sizes[name] >= 1]
    rows = [f"| {name} | {sizes[name]:.0f} | {USES.get(name, 'another of these packages')} |" for name in shown]
    rows.append(f"| {len(sizes) - len(shown)} more | {total - sum(sizes[name] for name in shown):.0f} | |")
    bytecode = sum(megabytes(package, ".pyc") for package in plain.values())
    return (
        BEGINNING
        + "\n".join(lines)
        + "\n"
        + SIZES.format(total=round(total))
        + "\n".join(rows)
        + "\n"
        + ENDING.format(share=round(100 * top / total), bytecode=round(bytecode), without_av=round(total - sizes["av"]))
    )


if __name__ == "__main__":
    PAGE.write_text(re.sub(r" +\n", "\n", page()), "utf-8")
