"""Real series with labelled anomalies: how many of these are found by a detector for each series.

    python benchmarks/nab.py [--data DIR] [--nu 0.01] [--gamma scale]

The series are those of the Numenta Anomaly Benchmark that are in the data: realKnownCause and realAWSCloudwatch
(https://github.com/numenta/NAB). Both commands run as a user runs them: tally train anomaly, tally score.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, csv, parquet

GROUPS = ("realKnownCause", "realAWSCloudwatch")
EARLY = 0.15
"""The share of each series' rows, its first ones, that is trained with; NAB has the same share."""
VARIANTS: dict[str, list[str]] = {
    "each value": [],
    "hours": ["--time", "timestamp", "--window", "1h", "--aggregate", "mean,min,max"],
}
"""What the models look at, as options of both commands."""

CAVEATS = """
Trained with the first 15 % of each series' rows, without labels; the rest is scored. A labelled window counts if it
ends after the first row that is scored. It is found if any row in it is called anomalous.

"right" is the share of anomalous rows (precision), or of runs, that are in a window. A run is anomalous rows of a
series that follow each other; one of them in a window is enough. "labelled" is the share of the rows that are in
windows: the precision of a detector that knows nothing. "chance" is how many windows such a one would find on average,
if it called as many rows anomalous.

This is not NAB's score, which rewards early detection and weighs false alarms.
"""

Windows = Mapping[str, Sequence[tuple[np.datetime64, np.datetime64]]]


@dataclass(frozen=True)
class Found:
    """What was found in one series. rows, anomalous: of the part that was scored. right: anomalous rows in windows.
    chance: how many windows would be found on average, if as many rows were called anomalous at random.
    """

    rows: int
    anomalous: int
    right: int
    runs: int
    right_runs: int
    windows: int
    found: int
    chance: float
    labelled: int


def read(nab: Path) -> tuple[pa.Table, pa.Table, Windows]:
    """The early part of all series, the rest of them (series, timestamp, value), and labelled windows by series."""
    early, late = [], []
    for path in sorted(path for group in GROUPS for path in (nab / group).glob("*.csv")):
        table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types={"value": pa.float64()}))
        table = table.add_column(0, "series", pa.array([f"{path.parent.name}/{path.stem}"] * table.num_rows))
        cut = int(EARLY * table.num_rows)
        early.append(table.slice(0, cut))
        late.append(table.slice(cut))
    labels = json.loads((nab / "labels" / "combined_windows.json").read_text("utf-8"))
    windows = {
        name.removesuffix(".csv"): [(np.datetime64(start, "us"), np.datetime64(end, "us")) for start, end in spans]
        for name, spans in labels.items()
    }
    return pa.concat_tables(early), pa.concat_tables(late), windows


def commands(folder: Path, variant: str, nu: float = 0.01, gamma: str = "scale") -> list[list[str]]:
    """Arguments of ``tally`` that train with ``early.parquet`` and score ``late.parquet`` of a folder."""
    name = variant.replace(" ", "-")
    early, late, model, out = (str(folder / each) for each in ("early.parquet", "late.parquet", f"m-{name}", name))
    keep = [] if VARIANTS[variant] else ["--keep", "timestamp"]
    recipe = ["--nu", str(nu), "--gamma", gamma]
    train = ["train", "anomaly", early, "--by", "series", "--value", "value", "--out", model, *recipe]
    score = ["score", late, "--model", model, "--out", f"{out}.parquet", "--quiet", *keep]
    return [[*each, *VARIANTS[variant]] for each in (train, score)]


def measure(results: pa.Table, late: pa.Table, windows: Windows) -> dict[str, Found]:
    """What was found in each series. results: series, timestamp, anomaly, in the order of the series."""
    found = {}
    for name in late["series"].unique().to_pylist():
        first = late.filter(compute.equal(late["series"], name))["timestamp"].to_numpy()[0]
        mine = results.filter(compute.equal(results["series"], name))
        times, anomaly = mine["timestamp"].to_numpy(), mine["anomaly"].to_numpy(zero_copy_only=False)
        spans = [span for span in windows[name] if span[1] >= first]
        within = [(times >= start) & (times <= end) for start, end in spans]
        labelled = np.any(within, axis=0) if within else np.zeros(len(times), bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], anomaly.astype(np.int8), [0]])))
        runs = [slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
        found[name] = Found(
            rows=len(times),
            anomalous=int(anomaly.sum()),
            right=int((anomaly & labelled).sum()),
            runs=len(runs),
            right_runs=sum(bool(labelled[run].any()) for run in runs),
            windows=len(spans),
            found=sum(bool(anomaly[each].any()) for each in within),
            chance=float(sum(1 - (1 - anomaly.mean()) ** each.sum() for each in within)),
            labelled=int(labelled.sum()),
        )
    return found


def _line(name: str, each: Found) -> str:
    def share(part: int, whole: int) -> str:
        return f"{part / whole:9.1%}" if whole else f"{'-':>9}"

    return (
        f"  {name:<52}{each.rows:>7,}{share(each.labelled, each.rows)}{each.anomalous:>10,}"
        f"{share(each.anomalous, each.rows)}{f'{each.found}/{each.windows}':>7}{each.chance:>7.1f}"
        f"{share(each.right, each.anomalous)}{each.runs:>7,}{share(each.right_runs, each.runs)}"
    )


def _total(found: Mapping[str, Found]) -> Found:
    return Found(*(sum(getattr(each, name) for each in found.values()) for name in Found.__dataclass_fields__))


def main() -> None:
    from _machine import DATA, TALLY, environment, introduce, scratch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sensors/nab")
    parser.add_argument("--nu", type=float, default=0.01)
    parser.add_argument("--gamma", default="scale")
    given: Any = parser.parse_args()
    early, late, windows = read(given.data / "sensors" / "nab")
    series = len(late["series"].unique())
    introduce(f"NAB: {series} series, one-class SVM, nu {given.nu:g}, gamma {given.gamma}", CAVEATS)
    with scratch() as folder:
        parquet.write_table(early, folder / "early.parquet")
        parquet.write_table(late, folder / "late.parquet")
        for variant in VARIANTS:
            for command in commands(folder, variant, given.nu, given.gamma):
                ran = subprocess.run([*TALLY, *command], capture_output=True, text=True, env=environment(folder))
                if ran.returncode:
                    sys.exit(f"tally {' '.join(command)} failed:\n{ran.stderr}")
            found = measure(parquet.read_table(folder / f"{variant.replace(' ', '-')}.parquet"), late, windows)
            print(f"{variant}: tally train anomaly ... {' '.join(VARIANTS[variant])}".rstrip(" ."))
            print(
                f"  {'':<52}{'rows':>7}{'labelled':>9}{'anomalous':>10}{'share':>9}{'found':>7}{'chance':>7}"
                f"{'right':>9}{'runs':>7}{'right':>9}"
            )
            for name, each in found.items():
                print(_line(name, each))
            print(_line("all", _total(found)))
            print()


if __name__ == "__main__":
    main()
