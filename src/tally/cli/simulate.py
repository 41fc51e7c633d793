"""``tally simulate``: data to try things with."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import click

from tally.cli.console import say
from tally.cli.values import duration, share


@click.group()
def simulate() -> None:
    """Make data to try things with."""


@simulate.command(short_help="Readings of many sensors, with anomalies that are known.")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="A folder, or a .parquet or .csv file."
)
@click.option("--devices", default=10, show_default=True, help="How many devices.")
@click.option("--sensors", default=5, show_default=True, help="Sensors of each device (the column Tag).")
@click.option("--hours", default=24.0, show_default=True, help="How long.")
@click.option(
    "--every", callback=duration, default="60s", show_default=True, help="Time between two readings of a sensor."
)
@click.option(
    "--start",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"]),
    default="2026-01-01T00:00:00",
    show_default=True,
    help="Time of the first reading.",
)
@click.option(
    "--anomalies", callback=share, default="0.1%", show_default=True, help="Share of anomalous readings, about."
)
@click.option("--gaps", callback=share, default="0.1%", show_default=True, help="Share of missing readings, about.")
@click.option(
    "--disorder",
    callback=share,
    default="0%",
    show_default=True,
    help="Share of readings that come twice, or from a clock that was set back.",
)
@click.option(
    "--labels", type=click.Path(path_type=Path), help="Also write which readings are anomalous: .parquet or .csv."
)
@click.option("--seed", default=1, show_default=True, help="The same seed, the same readings.")
def readings(
    out: Path,
    devices: int,
    sensors: int,
    hours: float,
    every: float,
    start: datetime,
    anomalies: float,
    gaps: float,
    disorder: float,
    labels: Path | None,
    seed: int,
) -> None:
    """Make readings of many sensors: columns TS, Device, Tag and Value.

    Each sensor has a level, a daily rhythm, noise and a slow drift of its own. Anomalies are spikes, shifts of the
    level, values that are stuck, and dropouts to zero.

    \b
    tally simulate readings --devices 1000 --sensors 5 --hours 24 --out readings/
    tally simulate readings --anomalies 1% --labels truth.csv --out readings.csv
    """
    from tally.training.anomaly.synthetic_readings import Readings

    simulated = Readings(
        out=out,
        devices=devices,
        sensors=sensors,
        hours=hours,
        every=every,
        start=start,
        anomalies=anomalies,
        gaps=gaps,
        disorder=disorder,
        labels=labels,
        seed=seed,
    )
    begun = time.monotonic()
    counts = simulated.write()
    seconds = time.monotonic() - begun
    say(
        f"wrote {out}: {counts['rows']:,} readings of {devices * sensors:,} sensors, {counts['anomalies']:,} of them "
        f"anomalous, in {seconds:.1f} s"
    )
    if labels is not None:
        say(f"wrote {labels}: which ones, and how")
