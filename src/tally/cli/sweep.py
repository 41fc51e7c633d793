"""``tally sweep``: train many times over a space of parameters, and keep the best."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from tally.cli import installation
from tally.cli.console import say, table, text_pairs
from tally.cli.promoting import promoting, tell_verdict
from tally.cli.train_retrain import described, driven
from tally.cli.train_retrain import retrain as train_retrain
from tally.cli.train_script import script as train_script
from tally.cli.values import Choice, engine_name
from tally.text import local_time, visible

if TYPE_CHECKING:
    from tally.training.sweeps.sampling import Past
    from tally.training.sweeps.store import SweepRecord, TrialRecord
    from tally.training.sweeps.sweep import Outcome, Sweep, Watcher

F = TypeVar("F", bound=Callable[..., Any])

RETRAIN_METRICS = ("validation_cross_entropy", "validation_accuracy", "cross_entropy", "accuracy")
"""Those of ``tally.training.retrain.retraining``, which takes time to import; a test keeps them the same."""
_NOT_SWEPT = frozenset(
    (
        "resume",
        "register",
        "alias",
        "gate",
        "name",
        "engine",
        "out",
        "output_graph",
        "output_labels",
        "summaries_dir",
        "final_test",
        "fine_tune",
    )
) | {"print_misclassified_test_images"}
"""Options of ``tally train retrain`` that a sweep does not take."""

_NOT_OF_A_SCRIPT = frozenset(("script", "parameters", "name", "register", "alias", "gate", "resume"))
"""Parameters of ``tally train script`` that a sweep has of its own, or does not take."""


@click.group()
def sweep() -> None:
    """Train many times over a space of parameters, several at once, and keep the best.

    Each trial is a run: see 'tally runs' and 'tally tensorboard --sweep SWEEP'. SWEEP is a sweep's id, or the beginning
    of it.
    """


_engine = click.option(
    "--engine",
    default="local",
    show_default=True,
    callback=engine_name,
    help="Who runs trials: local (this machine), ray (a cluster whose machines see the same files).",
)


def _common(command: F) -> F:
    """The options of every sweep."""
    for option in reversed(
        (
            click.option(
                "-p",
                "--param",
                "texts",
                multiple=True,
                metavar="NAME=VALUES",
                help="a,b,c: these values; LOW..HIGH[:STEP]: a range; log:LOW..HIGH: even in its logarithm.",
            ),
            click.option("--trials", type=int, help="How many.  [default: 20; of a grid: all]"),
            click.option("--parallel", type=int, help="Trials at once.  [default: one for each core]"),
            _engine,
            click.option(
                "--sampler",
                type=Choice(["tpe", "random", "grid"]),
                default="tpe",
                show_default=True,
                help="tpe learns from trials that have ended; grid: every combination.",
            ),
            click.option("--sweep-seed", default=1, show_default=True, help="The same seed, the same parameters."),
            click.option("--prune", is_flag=True, help="Stop trials that are worse than the median of others."),
            promoting("--register-best"),
            click.option("--name", help="Name of the sweep.  [default: its id]"),
        )
    ):
        command = option(command)
    return command


def _with_options_of_script(command: click.Command) -> click.Command:
    """Add the argument and options of ``tally train script``."""
    argument = copy.copy(next(each for each in train_script.params if each.name == "script"))
    argument.required = True
    command.params += [argument]
    command.params += [each for each in train_script.params if each.name not in _NOT_OF_A_SCRIPT]
    return command


def _with_options_of_retrain(command: click.Command) -> click.Command:
    """Add the options of ``tally train retrain``."""
    for each in train_retrain.params:
        if each.name in _NOT_SWEPT:
            continue
        option = copy.copy(each)
        if option.name == "validation_batch_size":
            # A few that are drawn at random compare trials by chance.
            option.default = -1
        command.params.append(option)
    return command


@click.command(short_help="Retrainings of a classifier's last layer.")
@_common
@click.option(
    "--metric",
    type=Choice(RETRAIN_METRICS),
    default=RETRAIN_METRICS[0],
    show_default=True,
    help="What trials are compared by.",
)
@click.option("--prune-after", type=int, help="No trial is pruned before this step.  [default: a tenth of all]")
@click.pass_context
def retrain(
    context: click.Context,
    /,
    texts: tuple[str, ...],
    workers: int | None,
    device: str,
    sweep_seed: int,
    prune_after: int | None,
    parallel: int | None,
    engine: str,
    metric: str,
    **given: Any,
) -> None:
    """Sweep the parameters of 'tally train retrain', whose flags it takes, too.

    What the backbone makes of each picture is computed once, for all trials. The test pictures are looked at once, for
    the best.

    \b
    pip install 'tally-scoring[sweep]'
    tally sweep retrain --image_dir photos/ --backbone features.onnx -p learning_rate=log:1e-4..1 \\
        -p train_batch_size=25,50,100 --trials 30 --parallel 2 --prune --register-best pets
    """
    from tally.errors import SpecError
    from tally.jobs.stop import Stop
    from tally.training.retrain.retraining import METRICS
    from tally.training.retrain.retraining import Watcher as Preparing
    from tally.training.sweeps.retrain import RetrainTrials
    from tally.training.sweeps.sweep import Sweep

    installation.check_here("sweep retrain")
    swept = {each.partition("=")[0].strip() for each in texts}
    problems = [
        f"--{each}: is swept with -p {each}=..., too"
        for each in sorted(swept & given.keys())
        if context.get_parameter_source(each) is not ParameterSource.DEFAULT
    ]
    problems += [f"--{each}: is needed" for each in ("image_dir", "backbone") if not given[each]]
    if workers is not None and workers < 1:
        problems.append(f"--workers: at least 1, not {workers}")
    if problems:
        raise SpecError(problems)
    own = {each: given.pop(each) for each in ("trials", "sampler", "prune", "name", "register", "alias", "gate")}
    nothing = {"out": None, "output_graph": None, "output_labels": None, "summaries_dir": None, "final_test": True}
    stop = Stop()
    training = RetrainTrials(
        described(given | nothing), workers=workers, device=device, watcher=Preparing(say=_note, drive=driven(stop))
    )
    if prune_after is None:
        prune_after = training.given.parameters.how_many_training_steps // 10
    wanted = Sweep(
        training=training, texts=texts, metric=metric, lowest=METRICS[metric], seed=sweep_seed,
        prune_after=prune_after, **own,
    )  # fmt: skip
    _run(wanted, stop, parallel=parallel, engine=engine)


@click.command(short_help="Your own training script.", context_settings={"allow_interspersed_args": True})
@_common
@click.option("--metric", required=True, help="What trials are compared by: a name that the script logs.")
@click.option("--lowest", is_flag=True, help="The lowest value is the best, as of a loss.")
@click.option("--prune-after", default=0, show_default=True, help="No trial is pruned before this step.")
@click.option(
    "--checkpoints",
    is_flag=True,
    help="The script goes on from what it has left in outputs/: a trial that is lost does so in its run.",
)
def script(
    texts: tuple[str, ...],
    sweep_seed: int,
    parallel: int | None,
    engine: str,
    metric: str,
    lowest: bool,
    prune_after: int,
    checkpoints: bool,
    script: Path,
    data: tuple[str, ...],
    **given: Any,
) -> None:
    """Sweep the parameters of a training script, as 'tally train script' runs it: -p NAME=VALUES becomes --NAME VALUE.

    It logs by tally.training.run(), or in Azure ML's way. Trials are compared by the last value of --metric.

    \b
    pip install 'tally-scoring[sweep]'
    tally sweep script train.py -p lr=log:1e-4..1 -p epochs=5 --metric loss --lowest --trials 30 --prune
    """
    from tally.jobs.stop import Stop
    from tally.training.scripts.script import ScriptTraining
    from tally.training.sweeps.script import ScriptTrials
    from tally.training.sweeps.sweep import Sweep

    installation.check_here("sweep script")
    own = {each: given.pop(each) for each in ("trials", "sampler", "prune", "name", "register", "alias", "gate")}
    training = ScriptTraining(script=script, data=text_pairs("--data", data), **given)
    wanted = Sweep(
        training=ScriptTrials(training, goes_on=checkpoints), texts=texts, metric=metric, lowest=lowest,
        seed=sweep_seed, prune_after=prune_after, **{**own, "name": own["name"] or script.stem},
    )  # fmt: skip
    _run(wanted, Stop(), parallel=parallel, engine=engine)


sweep.add_command(_with_options_of_retrain(retrain))
sweep.add_command(_with_options_of_script(script))


@sweep.command(short_help="Go on with a sweep that was interrupted.")
@click.argument("sweep_id", metavar="SWEEP")
@click.option("--parallel", type=int, help="Trials at once.  [default: one for each core]")
@_engine
def resume(sweep_id: str, parallel: int | None, engine: str) -> None:
    """Go on with a sweep that was interrupted or killed, or has failed.

    Trials that have ended stay. Those that were running begin again with the same parameters, from their checkpoints.
    """
    from tally.jobs.stop import Stop
    from tally.training.retrain.retraining import Watcher as Preparing
    from tally.training.sweeps.kinds import restored

    installation.check_here("sweep resume")
    record = installation.sweeps().get(sweep_id)
    stop = Stop()
    _run(
        restored(record, Preparing(say=_note, drive=driven(stop))),
        stop,
        parallel=parallel,
        engine=engine,
        resume=record.id,
    )


@sweep.command("list")
@click.option("-n", "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="How many at most.")
@click.option("--after", metavar="PAGE", help="Continue the list: the value printed at the end of the page before.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(limit: int, after: str | None, as_json: bool) -> None:
    """List the newest sweeps."""
    found = installation.sweeps().list(after=after, limit=limit)
    if as_json:
        for each in found.sweeps:
            say(json.dumps(each.to_dict()))
    elif found.sweeps:
        rows = []
        for each in found.sweeps:
            best = "-" if each.best_value is None else f"{each.spec['metric']} {each.best_value:.4g}"
            rows.append(
                (each.id, each.state, each.kind, each.name, _counts(each), best, each.model or "-",
                 local_time(each.created_at))
            )  # fmt: skip
        table(("SWEEP", "STATE", "KIND", "NAME", "TRIALS", "BEST", "MODEL", "CREATED"), rows)
    else:
        say("no sweeps yet; begin one: tally sweep --help", err=True)
    if found.next is not None:
        say(f"there are more; the next page: --after {found.next}", err=True)


@sweep.command(short_help="All that is known of a sweep, and its trials.")
@click.argument("sweep_id", metavar="SWEEP")
@click.option("--best", is_flag=True, help="Order the trials, the best first.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(sweep_id: str, best: bool, as_json: bool) -> None:
    """A sweep's space, state and trials."""
    store = installation.sweeps()
    record = store.get(sweep_id)
    trials = list(store.trials(record.id))
    if best:
        sign = 1 if record.spec["lowest"] else -1
        trials.sort(key=lambda each: (each.state != "finished", sign * (each.value or 0), each.number))
    if as_json:
        say(json.dumps(record.to_dict() | {"trials": [each.to_dict() for each in trials]}))
        return
    for name, value in _facts(record, trials):
        say(f"{name:<12} {visible(value)}")
    names = list(dict.fromkeys(name for each in trials for name in each.parameters))
    rows = [
        (str(each.number), each.state if record.alive or each.state != "running" else "interrupted",
         *(_shown(each.parameters.get(name)) for name in names), _shown(each.value), _shown(each.step), each.run_id,
         each.error or "")
        for each in trials
    ]  # fmt: skip
    if rows:
        say()
        table(("TRIAL", "STATE", *names, record.spec["metric"], "STEP", "RUN", "ERROR"), rows)


@sweep.command(short_help="Forget a sweep, with its runs.")
@click.argument("sweep_id", metavar="SWEEP")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def delete(sweep_id: str, dry_run: bool) -> None:
    """Forget a sweep with the runs of its trials, and remove the folders that Tally has made for them. Models that
    were registered stay."""
    store = installation.sweeps()
    record = store.get(sweep_id)
    count = len(installation.runs().list(sweep=record.id, limit=100_000).runs)
    made = store.has_made(record)
    what = f"sweep {record.id}, with {count:,} runs" + (f" and its files in {record.folder}" if made else "")
    left = f"; {record.model} stays" if record.model else ""
    if dry_run:
        say(f"would remove {what}{left}")
        return
    store.remove(record)
    say(f"{what} is deleted{left}")


def _run(wanted: Sweep, stop: Any, *, parallel: int | None, engine: str, resume: str | None = None) -> None:
    from tally.jobs.signals import stop_on_signals
    from tally.training.sweeps.sweep import sweep as run_sweep

    show = _Shown(wanted)
    try:
        with stop_on_signals(stop):
            outcome = run_sweep(
                wanted, parallel=parallel, engine=engine, resume=resume, stop=stop, watcher=show.watcher()
            )
    except KeyboardInterrupt:
        if show.sweep is not None:
            say(f"sweep {show.sweep} is put down; {show.done:,} of {show.count:,} trials have ended", err=True)
            say(f"  Go on with: tally sweep resume {show.sweep}", err=True)
        raise click.Abort from None
    _tell(outcome, wanted)


def _note(line: str) -> None:
    say(line, dim=True, err=True)


class _Shown:
    """Shows a sweep: a line for each trial that has ended."""

    def __init__(self, wanted: Sweep) -> None:
        self._wanted = wanted
        self.sweep: str | None = None
        self.done = self.count = 0

    def watcher(self) -> Watcher:
        from tally.training.sweeps.sweep import Watcher

        return Watcher(say=_note, begun=self._begun, decided=self._decided)

    def _begun(self, sweep: str, folder: Path, count: int) -> None:
        self.sweep, self.count = sweep, count
        say(f"sweep {sweep}, {count:,} trials; watch it: tensorboard --logdir {folder / 'tensorboard'}", err=True)

    def _decided(self, number: int, past: Past) -> None:
        self.done += 1
        values = ", ".join(f"{name} {_shown(each)}" for name, each in past.parameters.items())
        match past.state:
            case "finished":
                how = f"{self._wanted.metric} {_shown(past.value)}"
            case "pruned":
                how = f"pruned at step {past.step}, {self._wanted.metric} {_shown(past.value)}"
            case _:
                how = f"failed; tally sweep show {self.sweep} tells why"
        say(f"[{self.done}/{self.count}] trial {number} ({values}): {how}", err=True)


def _tell(outcome: Outcome, wanted: Sweep) -> None:
    say(f"sweep {outcome.sweep}: {_counts(installation.sweeps().get(outcome.sweep))}", err=True)
    best = outcome.trials[outcome.best]
    values = ", ".join(f"{name} {_shown(each)}" for name, each in best.parameters.items())
    say(f"best: trial {outcome.best}, {wanted.metric} {_shown(best.value)} ({values})")
    say(f"run {outcome.run}" + (f"; registered as {outcome.model}" if outcome.model else ""))
    tell_verdict(outcome.verdict)
    say(f"  Look at it: tally runs show {outcome.run}", err=True)
    say(f"  Compare: tally runs compare --sweep {outcome.sweep} --metric {wanted.metric}"
        + (" --lowest" if wanted.lowest else ""), err=True)  # fmt: skip


def _counts(record: SweepRecord) -> str:
    counts = record.counts
    found = [f"{counts[each]:,} {each}" for each in ("finished", "pruned", "failed", "running") if each in counts]
    return ", ".join(found) or "none"


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(record: SweepRecord, trials: Sequence[TrialRecord]) -> list[tuple[str, str]]:
    from tally.training.sweeps.store import best_of

    spec = record.spec
    facts = [("sweep", record.id), ("name", record.name), ("kind", record.kind), ("state", record.state)]
    if record.error:
        facts.append(("error", record.error))
    facts += [("parameter", each) for each in spec["texts"]]
    facts.append(("sampler", f"{spec['sampler']}, seed {spec['seed']}"))
    facts.append(("metric", f"{spec['metric']}, the {'lowest' if spec['lowest'] else 'highest'} is the best"))
    if spec["prune"]:
        facts.append(("pruning", f"from step {spec['prune_after']}"))
    facts.append(("trials", _counts(record)))
    if (best := best_of(record, trials)) is not None:
        facts.append(("best", f"trial {best.number}" + (" so far" if record.best is None else "")))
    if record.model:
        facts.append(("model", record.model))
    facts += [("created", local_time(record.created_at)), ("finished", local_time(record.finished_at))]
    facts.append(("folder", record.folder))
    if record.state in ("interrupted", "failed"):
        facts.append(("next", f"tally sweep resume {record.id}"))
    return facts
