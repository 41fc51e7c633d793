"""``tally train``: make a model from one's own data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tally.cli import options
from tally.cli.console import literal_pairs, say
from tally.cli.progress import Line
from tally.cli.promoting import promoting, promotion_of, tell
from tally.cli.train_labels import labels
from tally.cli.train_retrain import retrain
from tally.cli.train_script import script
from tally.cli.values import Choice, duration, names, share

if TYPE_CHECKING:
    from tally.training.anomaly import training as anomalies
    from tally.training.style.training import Step

SHOWN = 5
"""The most keys without a model that are named."""


@click.group()
def train() -> None:
    """Train a model from your own data."""


train.add_command(retrain)
train.add_command(script)
train.add_command(labels)


@train.command(short_help="A style, from one picture.")
@click.option("--style", required=True, type=click.Path(path_type=Path), help="The picture whose style is learnt.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the model package.  [default: the run]")
@click.option(
    "--content", type=click.Path(path_type=Path), help="Folder of photos to practise on.  [default: drawn pictures]"
)
@click.option("--steps", default=1000, show_default=True, help="Steps of training: more give a closer likeness.")
@click.option(
    "--size",
    default=384,
    show_default=True,
    help="The style picture's shorter side in pixels; a larger number gives larger strokes.",
)
@click.option("--strength", default=1.0, show_default=True, help="How strong the style is, compared with the content.")
@click.option("--vgg", type=click.Path(path_type=Path), help="Weights of torchvision's vgg16 or vgg19, to judge with.")
@click.option("--seed", default=1, show_default=True, help="The same seed, the same model.")
@promoting("--name", default="the name of the out folder")
def style(
    style: Path,
    out: Path | None,
    content: Path | None,
    steps: int,
    size: int,
    strength: float,
    vgg: Path | None,
    seed: int,
    register: str | None,
    alias: str | None,
    gate: tuple[str, ...],
) -> None:
    """Train a network that restyles pictures and videos after one picture.

    It is small enough for video on a CPU, takes any size, and becomes a model package that is registered.

    \b
    pip install 'tally-scoring[train]'
    tally train style --style waves.jpg --out models/waves
    tally score clip.mp4 --model models:/waves --out styled.mp4
    """
    from tally.training.runs.store import EVENTS
    from tally.training.runs.tracking import run
    from tally.training.style.training import METRICS, Training, train

    promotion = promotion_of(register, out, alias, gate, metrics=METRICS)
    training = Training(
        style=style, out=out, content=content, steps=steps, size=size, strength=strength, vgg=vgg, seed=seed
    )
    show = _Progress()
    given: dict[str, Any] = {"style": style.name, "content": content and content.name, "steps": steps, "size": size}
    given |= {"strength": strength, "vgg": vgg and vgg.name, "seed": seed}
    places = {"style": style, "content": content, "vgg": vgg}
    data = {each: place for each, place in places.items() if place is not None}
    try:
        with run(promotion.name, given, kind="style", data=data) as tracked:
            show.events = training.events if out is not None else tracked.folder / EVENTS
            promoted, package = train(training, tracked, promotion, listen=show)
    except KeyboardInterrupt:
        show.end()
        say(f"stopped after {show.done} of {steps} steps: no model was written", err=True)
        raise click.Abort from None
    finally:
        show.end()
    say(f"wrote {package} ({(package / training.file).stat().st_size / 1000:.0f} kB)")
    tell(promoted)


@train.command(short_help="Detectors of anomalies, one for each key of a table.")
@click.argument("source", nargs=-1, required=True)
@click.option("--by", required=True, callback=names, help="Columns that make a key, e.g. Device,Tag.")
@click.option("--value", "values", required=True, callback=names, help="Columns of readings, e.g. Value.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the model package.  [default: the run]")
@click.option(
    "--kind",
    type=Choice(["ocsvm", "isolation-forest"]),
    default="ocsvm",
    show_default=True,
    help="One-class SVMs, which are scored thousands at once, or isolation forests.",
)
@click.option(
    "--nu", callback=share, default="0.01", show_default=True, help="Share of the training rows that may be anomalous."
)
@click.option(
    "--gamma",
    default="scale",
    show_default=True,
    help="SVMs only: scale, auto or a number; higher follows the training data more closely.",
)
@click.option("--time", help="Column of timestamps.")
@options.in_tables
@click.option("--window", callback=duration, help="First gather readings over this time, e.g. 5m.")
@click.option(
    "--aggregate",
    callback=names,
    default="mean",
    show_default=True,
    help="Windows only: mean,max,std,median,p95 and others.",
)
@click.option("--where", help="Train only with the rows for which this SQL condition holds.")
@click.option(
    "--csv", "csv_options", multiple=True, metavar="KEY=VALUE", help="How to read CSV, e.g. delim=';' or header=false."
)
@click.option(
    "--max-rows",
    default=2000,
    show_default=True,
    help="At most this many rows for each key, spread evenly over its data.",
)
@click.option("-w", "--workers", type=int, help="Worker processes; one per core by default.")
@click.option("--seed", default=1, show_default=True, help="The same seed, the same models.")
@promoting("--name", default="the name of the out folder")
def anomaly(
    source: tuple[str, ...],
    out: Path | None,
    kind: Any,
    nu: float,
    gamma: str,
    max_rows: int,
    seed: int,
    register: str | None,
    alias: str | None,
    gate: tuple[str, ...],
    csv_options: tuple[str, ...],
    **given: Any,
) -> None:
    """Train a detector of anomalies for each key of a table: each device, each sensor.

    SOURCE is a table (Parquet, CSV, JSON Lines, Arrow), a folder, a glob or a bucket URL; there may be several. Keys
    with too few readings are named and left out. All models are in one file.

    \b
    tally train anomaly readings/ --by Device,Tag --value Value --out models/pumps
    tally train anomaly readings/ --by Device,Tag --value Value --time TS --window 5m --aggregate mean,min,max \\
        --out models/pumps
    """
    from tally.jobs.spec import CSV_VALUES
    from tally.training.anomaly.training import METRICS, Recipe, Training, train
    from tally.training.runs.tracking import run

    promotion = promotion_of(register, out, alias, gate, metrics=METRICS)
    recipe = Recipe(kind=kind, nu=nu, gamma=_gamma(gamma), max_rows=max_rows, seed=seed)
    training = Training(
        sources=source, out=out, recipe=recipe, csv=literal_pairs("--csv", csv_options, CSV_VALUES), **given
    )
    show = _Keys()
    asked = {each: value for each, value in given.items() if value not in (None, ())}
    asked |= {"kind": kind, "nu": nu, "gamma": recipe.gamma, "max_rows": max_rows, "seed": seed, "source": list(source)}
    try:
        with run(promotion.name, asked, kind="anomaly") as tracked:
            trained, promoted, package = train(
                training, tracked, promotion, listen=show, say=lambda line: say(line, dim=True, err=True)
            )
    except KeyboardInterrupt:
        say(f"\nstopped after {show.done:,} keys: no model was written", err=True)
        raise click.Abort from None
    finally:
        show.end()
    figures = trained.facts["metrics"]
    for key, reason in [*trained.failed.items()][:SHOWN]:
        say(f"no model for {key}: {reason}", err=True)
    if len(trained.failed) > SHOWN:
        say(f"... and for {len(trained.failed) - SHOWN:,} other keys", err=True)
    if figures["rows_left_out"]:
        say(f"{figures['rows_left_out']:,} rows without a value or with one that is not finite were left out", err=True)
    size = (package / training.file).stat().st_size
    say(
        f"wrote {package}: {figures['keys']:,} models from {figures['rows_used']:,} of {figures['rows']:,} rows, "
        f"{figures['anomalous_share']:.2%} of them anomalous ({size / 1000:,.0f} kB)"
    )
    tell(promoted)


def _gamma(text: str) -> Any:
    if text in ("scale", "auto"):
        return text
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither scale, auto nor a number", param_hint="--gamma") from None


class _Progress(Line):
    """Shows the steps of a training."""

    def __init__(self) -> None:
        super().__init__()
        self.events: Path | None = None

    def __call__(self, step: Step) -> None:
        if not self.done:
            say(f"watch it: tensorboard --logdir {self.events}", err=True)
        self.tell(step.done, step.of, "steps", ", ".join(f"{name} {loss:.3f}" for name, loss in step.losses.items()))


class _Keys(Line):
    """Shows how many keys are done."""

    def __call__(self, step: anomalies.Step) -> None:
        self.tell(step.done, step.of, "keys", f"{step.rows:,} rows, {step.failed:,} without a model")
