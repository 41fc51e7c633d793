"""``tally train``: make a model from one's own data."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tally.training.style import Step


@click.group()
def train() -> None:
    """Train a model from your own data."""


@train.command(short_help="A style, from one picture.")
@click.option("--style", required=True, type=click.Path(path_type=Path), help="The picture whose style is learnt.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the model package.")
@click.option(
    "--content", type=click.Path(path_type=Path), help="Folder of photos to practise on.  [default: drawn pictures]"
)
@click.option("--steps", default=1000, show_default=True, help="More steps, a closer likeness.")
@click.option(
    "--size", default=384, show_default=True, help="The style picture's shorter side in pixels: more, larger strokes."
)
@click.option("--strength", default=1.0, show_default=True, help="Of the style against the content.")
@click.option("--vgg", type=click.Path(path_type=Path), help="Weights of torchvision's vgg16 or vgg19, to judge with.")
@click.option("--seed", default=1, show_default=True, help="The same seed, the same model.")
@click.option("--name", help="In the registry.  [default: the name of the out folder]")
def style(
    style: Path,
    out: Path,
    content: Path | None,
    steps: int,
    size: int,
    strength: float,
    vgg: Path | None,
    seed: int,
    name: str | None,
) -> None:
    """Train a network that restyles pictures and videos after one picture.

    It is small enough for video on a CPU, takes any size, and becomes a model package that is registered.

    \b
    pip install 'tally-scoring[train]'
    tally train style --style waves.jpg --out models/waves
    tally score clip.mp4 --model models:/waves --out styled.mp4
    """
    from tally.models.registry import open_registry
    from tally.training.style import Training, registry_name

    name = registry_name(name or out.absolute().name)
    training = Training(
        style=style, out=out, content=content, steps=steps, size=size, strength=strength, vgg=vgg, seed=seed
    )
    show = _Progress(training.events)
    try:
        trained = training.run(show)
    except KeyboardInterrupt:
        show.end()
        click.echo(f"stopped after {show.done} of {steps} steps: no model was written", err=True)
        raise click.Abort from None
    show.end()
    added = open_registry().add(name, out, metadata=trained)
    click.echo(f"wrote {out} ({(out / training.file).stat().st_size / 1000:.0f} kB)")
    click.echo(f"{'is already' if added.existed else 'registered as'} {added}")
    click.echo(f"  Use it: tally score SOURCE --model {added} --out OUT", err=True)


class _Progress:
    """One line that is rewritten on a terminal; elsewhere a line at each tenth."""

    def __init__(self, events: Path) -> None:
        self.done = 0
        self._events = events
        self._begun = time.monotonic()
        self._shown = 0.0
        self._terminal = sys.stderr.isatty()

    def __call__(self, step: Step) -> None:
        if not self.done:
            click.echo(f"watch it: tensorboard --logdir {self._events}", err=True)
        self.done = step.done
        now = time.monotonic()
        if self._terminal:
            due = now - self._shown > 0.2 or step.done == step.of
        else:
            due = 10 * step.done // step.of > 10 * (step.done - 1) // step.of
        if not due:
            return
        self._shown = now
        rate = step.done / (now - self._begun)
        left = round((step.of - step.done) / rate)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in step.losses.items())
        line = f"{step.done}/{step.of} steps, {rate:.1f} steps/s, {left // 60}:{left % 60:02d} left, {losses}"
        click.echo(f"\r{line}\x1b[K" if self._terminal else line, err=True, nl=not self._terminal)

    def end(self) -> None:
        """Leave the line."""
        if self._terminal and self.done:
            click.echo(err=True)
