"""What the benchmarks share: the machine they ran on, runs side by side, and how figures are printed.

Contenders take turns (A B C, A B C ...), so that what disturbs the machine disturbs all of them. What counts is the
ratio of medians; absolute figures belong to one machine on one day. Nothing here passes or fails.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

from tally.engines.local import LocalEngine

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TALLY_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
TALLY = [sys.executable, "-m", "tally"]
"""The command, run by the Python that runs the benchmark."""

_PACKAGES = ("numpy", "onnxruntime", "pillow", "pyarrow", "sqlalchemy", "pebble", "ray", "celery", "redis")

Runs = dict[str, list[float]]
"""Contender to one figure per run."""


def cores() -> int:
    """Cores that this process may use."""
    return LocalEngine().default_slots()


def introduce(title: str, caveats: str) -> None:
    """Print what is measured, where, and what to keep in mind: paragraphs with an empty line between them."""
    memory = psutil.virtual_memory().total / 2**30
    busy = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    print(title)
    print(f"  date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(f"  machine   {cores()} cores, {memory:.1f} GiB, {_processor()}, {platform.system()} {platform.release()}")
    print(f"  load      {busy} when it began (1, 5, 15 minutes)")
    _print("software", f"Python {platform.python_version()}, {', '.join(_versions())}")
    for caveat in caveats.strip().split("\n\n"):
        _print("caveat", caveat)
    print(flush=True)


def _print(name: str, text: str) -> None:
    indent = " " * 12
    print(textwrap.fill(" ".join(text.split()), 118, initial_indent=f"  {name:10}", subsequent_indent=indent))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _versions() -> Iterator[str]:
    for name in ("tally-scoring", *_PACKAGES):
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def take_turns(contenders: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, Runs]:
    """Run each contender once per round, in turns, each on a quiet machine; measure to contender to figures."""
    figures: dict[str, Runs] = {}
    for number in range(1, rounds + 1):
        for name, run in contenders.items():
            settle()
            for measure, figure in run().items():
                figures.setdefault(measure, {}).setdefault(name, []).append(figure)
        if sys.stderr.isatty():
            print(f"  round {number} of {rounds} is done", file=sys.stderr, flush=True)
    return figures


def settle() -> None:
    """Wait until the machine has nothing else to do, or for half a minute: also for what the last one left behind."""
    for _ in range(30):
        if psutil.cpu_percent(interval=1.0) < 15:
            return
    print("  the machine did not come to rest: this run is disturbed", flush=True)


def show(measure: str, runs: Runs, *, first: str, unit: str, digits: int = 2) -> None:
    """Print each contender's runs and median, and the ratios of the medians to that of ``first``."""
    width = max(map(len, runs))
    print(f"{measure} ({unit})")
    for name, figures in runs.items():
        each = "  ".join(f"{figure:,.{digits}f}" for figure in figures)
        print(f"  {name:{width}}  median {statistics.median(figures):,.{digits}f}   runs  {each}")
    median = statistics.median(runs[first])
    for name, figures in runs.items():
        if name != first:
            rounds = "  ".join(f"{a / b:.3f}" for a, b in zip(runs[first], figures, strict=True))
            ratio = median / statistics.median(figures)
            print(f"  ratio of medians, {first} / {name}: {ratio:.3f}   round by round  {rounds}")
    print(flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as folder:
        yield Path(folder)


def environment(home: Path) -> dict[str, str]:
    """The environment of a ``tally`` that keeps its state in ``home``."""
    return {**os.environ, "TALLY_HOME": str(home), "TALLY_DATABASE": "", "PYTHONUNBUFFERED": "1"}


def shapes_pictures(folder: Path, count: int) -> Path:
    """Generate pictures for the toy classifier of ``examples/shapes``."""
    script = REPOSITORY / "examples" / "shapes" / "make_pictures.py"
    command = [sys.executable, script, folder, "--count", str(count), "--seed", "7"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder
