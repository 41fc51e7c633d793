"""``tally train script``: run one's own training script, whose run is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tally.cli.console import literal_pairs, say, text_pairs
from tally.cli.promoting import promoting, tell_verdict
from tally.cli.values import duration

if TYPE_CHECKING:
    from tally.training.promotion import Promotion
    from tally.training.runs.tracking import Run
    from tally.training.scripts.script import ScriptTraining


@click.command(
    short_help="Your own training script.",
    context_settings={"allow_interspersed_args": True},
)
@click.argument("script", required=False, type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-p",
    "--param",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="Becomes --NAME VALUE; without VALUE, --NAME.",
)
@click.option(
    "--train-set",
    "train_sets",
    nargs=2,
    multiple=True,
    metavar="LABELS IMAGES",
    help="A table of labels and a folder of images: they become --train_sets LABELS IMAGES ...",
)
@click.option(
    "--test-set", "test_sets", nargs=2, multiple=True, metavar="LABELS IMAGES", help="The same for --test_sets."
)
@click.option("--data", multiple=True, metavar="NAME=PLACE", help="Other data that the run is of, by name.")
@click.option("--resume", metavar="RUN", help="Go on with a run that was interrupted or killed, or has failed.")
@promoting()
@click.option("--name", help="Of the run.  [default: the script's]")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Whose files the script finds in its current folder.  [default: the script's]",
)
@click.option(
    "--time-limit", callback=duration, metavar="TIME", help="Kill it, with all its children, after this time."
)
@click.pass_context
def script(
    context: click.Context,
    /,
    script: Path | None,
    arguments: tuple[str, ...],
    parameters: tuple[str, ...],
    train_sets: tuple[tuple[str, str], ...],
    test_sets: tuple[tuple[str, str], ...],
    data: tuple[str, ...],
    resume: str | None,
    register: str | None,
    alias: str | None,
    gate: tuple[str, ...],
    name: str | None,
    folder: Path | None,
    time_limit: float | None,
) -> int:
    """Run a training script in a process of its own, and keep its run: parameters, metrics, pictures, files, output.

    It logs by tally.training.run(), or in Azure ML's way: Run.get_context(), log, register_model. --register names the
    model that it registers, which --gate is about. ARGUMENTS after -- are passed on as they are. What it writes to
    outputs/ and logs/ becomes part of the run.

    \b
    tally train script train.py -p lr=0.01 -p epochs=5
    tally train script train.py --train-set labels.csv images/ --test-set test.csv images/
    tally train script --resume RUN
    """
    from tally.errors import SpecError
    from tally.training.promotion import Promotion
    from tally.training.runs.reproduce import recipe
    from tally.training.runs.store import RunStore
    from tally.training.scripts.script import ScriptTraining, resumed

    if resume is not None:
        said = [
            each
            for each in context.params
            if each not in ("resume", "register", "alias", "gate") and not _is_default(context, each)
        ]
        if said:
            raise SpecError(f"--resume: the run has been given all else already; leave out {', '.join(sorted(said))}")
        resume, training = resumed(resume)
        record = RunStore.open().get(resume)
        promotion = Promotion.of_kept(Path(record.folder), register, alias, gate, say=lambda line: say(line, err=True))
        for each in recipe(record).differences:
            say(f"not as it was: {each}", err=True)
        return _run(training, promotion, resume)
    promotion = Promotion.of(register, alias, gate)
    if script is None:
        raise SpecError("SCRIPT or --resume RUN: one of them is needed")
    texts = literal_pairs("-p", [each if "=" in each else f"{each}=" for each in parameters])
    training = ScriptTraining(
        script=script,
        parameters={key: value if isinstance(value, str) else value[-1] for key, value in texts.items()},
        train_sets=train_sets,
        test_sets=test_sets,
        data=text_pairs("--data", data),
        arguments=arguments,
        folder=folder,
        name=name,
        time_limit=time_limit,
    )
    return _run(training, promotion)


def _is_default(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.DEFAULT


def _run(training: ScriptTraining, promotion: Promotion | None, resume: str | None = None) -> int:
    def begun(run: Run) -> None:
        say(f"run {run.id} {'goes on' if run.resumed else 'begins'}; its files are in {run.folder}", err=True)

    ended = training.run(_echo, begun=begun, promotion=promotion, resume=resume)
    say(f"run {ended.run_id} is {ended.state}" + (f": {ended.error}" if ended.error else ""), err=True)
    if ended.promoted is not None:
        tell_verdict(ended.promoted.verdict)
    say(f"  Look at it: tally runs show {ended.run_id}", err=True)
    if ended.state != "finished":
        say(f"  Go on with it: tally train script --resume {ended.run_id}", err=True)
    return 0 if ended.state == "finished" else 130 if ended.by_user else 1


def _echo(printed: bytes) -> None:
    """What the script prints, as it is: it is the user's own."""
    sys.stdout.flush()
    try:
        os.write(sys.stdout.fileno(), printed)
    except (OSError, ValueError):  # nobody reads it, or there is no such file (in a test)
        pass
