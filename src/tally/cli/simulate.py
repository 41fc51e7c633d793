"""``tally simulate``: data to try things with."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import click

from tally.cli.console import say
from tally.cli.values import duration, share
from tally.errors import SpecError


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


@simulate.command(short_help="Pictures of eight shapes, which the model tally:shapes tells apart.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A folder.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="How many.")
@click.option("--labels", type=click.Path(path_type=Path), help="Also write which shape each shows: a .csv file.")
@click.option("--seed", default=7, show_default=True, help="The same seed, the same pictures.")
def pictures(out: Path, count: int, labels: Path | None, seed: int) -> None:
    """Pictures of eight drawn shapes, one in each JPEG: of any size, colour, angle and place, some lying on their side.

    \b
    tally simulate pictures --out pictures --count 200
    tally score pictures --model tally:shapes --out predictions
    """
    from tally.demo.pictures import SHAPES, draw
    from tally.storage import failure

    try:
        draw(out, count, seed, labels)
    except OSError as error:
        raise failure("write", str(error.filename or out), error) from error
    say(f"{count} pictures of {len(SHAPES)} shapes in {out}")


@simulate.command(short_help="A clip with sound.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A .mp4 file.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="How long.")
@click.option("--size", default="320x180", show_default=True, help="Width and height in pixels, even numbers.")
@click.option("--fps", default="25", show_default=True, help="Frames per second: 25, or 30000/1001.")
@click.option("--seed", default=7, show_default=True, help="The same seed, the same clip.")
def clip(out: Path, seconds: float, size: str, fps: str, seed: int) -> None:
    """A drawn clip with sound: a bay under a low sun, a balloon, a boat and birds.

    \b
    tally simulate clip --out clip.mp4
    tally score clip.mp4 --model tally:strokes --out styled.mp4
    """
    from fractions import Fraction

    from tally.demo.clip import draw_clip
    from tally.storage import failure

    try:
        width, height = (int(side) for side in size.split("x"))
        rate = Fraction(fps)
    except (ValueError, ZeroDivisionError):
        raise SpecError(f"--size {size} --fps {fps}: write them as --size 320x180 --fps 25") from None
    if min(width, height) < 16 or width % 2 or height % 2:
        raise SpecError(f"--size: width and height are even numbers from 16 on, not {size}")
    if not (0 < seconds < float("inf")) or rate <= 0:
        raise SpecError(f"--seconds and --fps: more than 0, not {seconds:g} and {fps}")
    if out.suffix != ".mp4":
        raise SpecError(f"--out: a name that ends in .mp4, not {out.name!r}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        count = draw_clip(out, seconds, (width, height), rate, seed)
    except OSError as error:
        raise failure("write", str(out), error) from error
    say(f"{out}: {count} frames of {width}x{height}, {float(rate):g} per second, with sound")
