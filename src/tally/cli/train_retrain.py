"""``tally train retrain``: the command, and what it shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tally.cli.console import pairs, say
from tally.cli.progress import Line
from tally.cli.promoting import promoting, tell_verdict
from tally.cli.values import engine_name

if TYPE_CHECKING:
    from tally.jobs.facade import Jobs
    from tally.jobs.store import JobRecord
    from tally.training.retrain.head import Evaluation
    from tally.training.retrain.retraining import Outcome, Retraining

_REPLACED = {
    "architecture": "the network is the backbone's file: --backbone FILE.onnx, or models:/NAME",
    "model_dir": "no network is downloaded: name its file with --backbone",
}
"""Flags of TensorFlow's ``retrain.py`` that mean nothing here, and what to say instead."""

_ON_RESUME = ("resume", "register", "alias", "gate", "workers", "device", "engine", "print_misclassified_test_images")
"""What may be said of a run that goes on: the rest is settled."""


def _refused(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        flag = str(parameter.name)
        raise click.UsageError(f"--{flag} is not taken: {_REPLACED[flag]}", context)


@click.command(short_help="A classifier's last layer, from pictures.")
@click.option("--image_dir", help="Folder, here or in a bucket, with a folder of pictures for each label.")
@click.option("--backbone", help="Network that gives features, of ONNX or PyTorch: a file, a package or models:/NAME.")
@click.option("--cut", metavar="VALUE", help="Value in a classifier that is its features: what follows is cut off.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Option of the backbone.")
@click.option("--trust", is_flag=True, help="Allow a backbone to run code that it carries.")
@click.option("--fine-tune", is_flag=True, help="Train the whole backbone, not the last layer alone: PyTorch only.")
@click.option("--resume", metavar="RUN", help="Go on with a run that was interrupted or killed.")
@promoting()
@click.option("--name", help="Name of the run.  [default: its id]")
@click.option("--how_many_training_steps", default=4000, show_default=True, help="Steps of training.")
@click.option("--learning_rate", default=0.01, show_default=True, help="How far each step goes.")
@click.option("--train_batch_size", default=100, show_default=True, help="Pictures in each step; -1: all.")
@click.option("--validation_batch_size", default=100, show_default=True, help="Pictures in each evaluation; -1: all.")
@click.option("--test_batch_size", default=-1, show_default=True, help="Pictures in the final test; -1: all.")
@click.option("--eval_step_interval", default=10, show_default=True, help="Steps between two evaluations.")
@click.option("--testing_percentage", default=10, show_default=True, help="Percentage of pictures to test with.")
@click.option("--validation_percentage", default=10, show_default=True, help="Percentage of pictures to validate with.")
@click.option("--flip_left_right", is_flag=True, help="Mirror half of the training pictures.")
@click.option("--random_crop", default=0, show_default=True, help="Percentage to crop training pictures by.")
@click.option("--random_scale", default=0, show_default=True, help="Percentage to enlarge training pictures by.")
@click.option("--random_brightness", default=0, show_default=True, help="Percentage to brighten or darken them by.")
@click.option("--print_misclassified_test_images", is_flag=True, help="Print which test pictures were mistaken.")
@click.option("--final-test/--no-final-test", default=True, show_default=True, help="Test once when it is trained.")
@click.option("--plain-sampling", is_flag=True, help="Draw pictures, not first the label and then a picture of it.")
@click.option(
    "--early-stopping",
    default=0,
    show_default=True,
    help="Evaluations without a lower loss after which to end; 0: never.",
)
@click.option("--keep-names", is_flag=True, help="Labels are the folders' names as they are.")
@click.option("--seed", default=1, show_default=True, help="The same seed, the same model.")
@click.option("--bottleneck_dir", type=click.Path(path_type=str), help="Cache of what the backbone makes of pictures.")
@click.option(
    "--summaries_dir", type=click.Path(path_type=str), help="Where TensorBoard's files go.  [default: the run]"
)
@click.option(
    "-o", "--out", "--saved_model_dir", "out", type=click.Path(path_type=str), help="Write the package there, too."
)
@click.option("--output_graph", type=click.Path(path_type=str), help="Write the ONNX file there, too.")
@click.option("--output_labels", type=click.Path(path_type=str), help="Write the labels there, too.")
@click.option("--final_tensor_name", default="final_result", show_default=True, help="Name of the ONNX file's output.")
@click.option("--architecture", callback=_refused, expose_value=False, hidden=True)
@click.option("--model_dir", callback=_refused, expose_value=False, hidden=True)
@click.option(
    "-w",
    "--workers",
    type=int,
    help="Processes for the backbone; one per core by default, and one or one per GPU with --fine-tune.",
)
@click.option("--device", default="auto", show_default=True, help="Of the backbone: auto, cpu, cuda[:N].")
@click.option(
    "--engine",
    default="local",
    show_default=True,
    callback=engine_name,
    help="Who runs the backbone: local (this machine), ray (a cluster).",
)
@click.pass_context
def retrain(
    context: click.Context,
    /,
    resume: str | None,
    register: str | None,
    alias: str | None,
    gate: tuple[str, ...],
    name: str | None,
    workers: int | None,
    device: str,
    engine: str,
    print_misclassified_test_images: bool,
    **given: Any,
) -> None:
    """Train the last layer of a classifier: folders of pictures in, one ONNX model out.

    The flags are those of TensorFlow's retrain.py. What the backbone makes of a picture is computed once, and kept for
    all later runs.

    \b
    pip install 'tally-scoring[retrain]'
    tally train retrain --image_dir photos/ --backbone features.onnx --register pets
    tally score new/ --model models:/pets --out found.csv
    """
    from tally.errors import SpecError
    from tally.jobs.signals import stop_on_signals
    from tally.jobs.stop import Stop
    from tally.training.promotion import Promotion
    from tally.training.retrain import retraining
    from tally.training.runs.store import RunStore

    problems = []
    promotion = None
    if resume is None:
        try:
            metrics = retraining.measures(final_test=given["final_test"])
            promotion = Promotion.of(register, alias, gate, metrics=metrics)
        except SpecError as error:
            problems += error.problems
    if workers is not None and workers < 1:
        problems.append(f"--workers: at least 1, not {workers}")
    if resume is not None:
        settled = [
            each
            for each in context.params
            if each not in _ON_RESUME and context.get_parameter_source(each) is not ParameterSource.DEFAULT
        ]
        if settled:
            flags = ", ".join(f"--{each}" for each in sorted(settled))
            problems.append(f"{flags}: a run that goes on has its parameters already")
    else:
        problems += [f"--{each}: is needed" for each in ("image_dir", "backbone") if not given[each]]
    if problems:
        raise SpecError(problems)
    if resume is not None:
        resume, wanted = retraining.resumed(resume)
        promotion = Promotion.of_kept(
            Path(RunStore.open().get(resume).folder), register, alias, gate,
            metrics=retraining.measures(final_test=wanted.final_test), say=lambda line: say(line, err=True),
        )  # fmt: skip
    else:
        wanted = described(given)
    show = _Shown(wanted.parameters.how_many_training_steps)
    stop = Stop()
    try:
        with stop_on_signals(stop):
            outcome = retraining.retrain(
                wanted, register=promotion, resume=resume, name=name, workers=workers, device=device, engine=engine,
                stop=stop,
                watcher=retraining.Watcher(
                    say=show.note, begun=show.begun, evaluated=show.evaluated, drive=driven(stop)
                ),
            )  # fmt: skip
    except KeyboardInterrupt:
        show.end()
        if show.run is not None:
            say(f"run {show.run} is put down after {show.done} steps", err=True)
            say(f"  Go on with: tally train retrain --resume {show.run}", err=True)
        raise click.Abort from None
    finally:
        show.end()
    _tell(outcome, wanted, misclassified=print_misclassified_test_images)


def described(given: dict[str, Any]) -> Retraining:
    """The retraining that the options describe. Raises SpecError with every problem."""
    from dataclasses import fields

    from tally.errors import SpecError
    from tally.training.retrain.distortions import Distortions
    from tally.training.retrain.examples import Parameters
    from tally.training.retrain.retraining import Retraining

    given = dict(given)
    given |= {"balanced": not given.pop("plain_sampling"), "settings": pairs("--set", given.pop("assignments"))}
    problems: list[str] = []
    parts: dict[str, Any] = {}
    for name, kind in (("parameters", Parameters), ("distortions", Distortions)):
        values = {each.name: given.pop(each.name) for each in fields(kind)}
        try:
            parts[name] = kind(**values)
        except SpecError as error:
            problems += error.problems
    try:
        wanted = Retraining(**given, **parts)
    except SpecError as error:
        problems += error.problems
    if problems:
        raise SpecError(problems)
    return wanted


def driven(stop: Any) -> Any:
    """Runs the job that computes bottlenecks, showing it as other jobs are."""

    def drive(jobs: Jobs, job: str) -> JobRecord:
        from tally.jobs.events import Events
        from tally.terminal import shown

        with shown(jobs.get(job)) as subscriber:
            return jobs.see_through(job, events=Events(subscriber), stop=stop)

    return drive


class _Shown:
    """Shows the run: lines as ``retrain.py`` printed them, one that is rewritten on a terminal."""

    def __init__(self, steps: int) -> None:
        self._steps, self._line = steps, Line()
        self._begun = False
        self.run: str | None = None
        self.done = 0

    def note(self, line: str) -> None:
        say(line, dim=True, err=True)

    def begun(self, run: str, events: Path) -> None:
        self.run = run
        say(f"run {run}; watch it: tensorboard --logdir {events}", err=True)

    def evaluated(self, found: Evaluation) -> None:
        if not self._begun:
            self._begun = True
            self._line.begin(found.step)
        self.done = found.step + 1
        more = f"Train accuracy = {found.train.accuracy:.1%}, Cross entropy = {found.train.cross_entropy:.6f}"
        if found.validation is not None:
            more += f", Validation accuracy = {found.validation.accuracy:.1%} (N={len(found.validation.logits)})"
        self._line.tell(self.done, self._steps, "steps", more)

    def end(self) -> None:
        """Leave the line. May be repeated."""
        self._line.end()
        self._line.done = 0


def _tell(outcome: Outcome, wanted: Retraining, *, misclassified: bool) -> None:
    trained = outcome.trained
    if trained.early:
        say(f"stopped early after {trained.state.done} steps; the weights are those of step {trained.step}", err=True)
    tested = outcome.tested
    if tested is not None:
        say(f"Final test accuracy = {tested.batch.accuracy:.1%} (N={len(tested.rows)})")
    elif wanted.final_test:
        say("no final test: there are no test pictures", err=True)
    if misclassified and tested is not None:
        say("=== MISCLASSIFIED TEST IMAGES ===")
        for path, label in outcome.misclassified():
            say(f"{path!s:>70}  {label}")
    for place in (wanted.out, wanted.output_graph, wanted.output_labels):
        if place is not None:
            say(f"wrote {place}")
    model = outcome.model or str(wanted.out or outcome.package)
    say(f"registered as {outcome.model}" if outcome.model else f"wrote {outcome.package}")
    if outcome.promoted is not None:
        tell_verdict(outcome.promoted.verdict)
    say(f"  Use it: tally score SOURCE --model {model} --out OUT", err=True)
    sys.stdout.flush()
