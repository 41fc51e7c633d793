"""``tally runs`` and ``tally tensorboard``: look at trainings, compare them, do one again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tally.cli import installation
from tally.cli.console import say, table
from tally.cli.foreground import duration
from tally.cli.values import Choice
from tally.text import local_time, visible

if TYPE_CHECKING:
    from tally.training.runs.store import RunRecord

RUN_STATES = ("running", "interrupted", "failed", "killed", "finished")
"""Those of ``tally.training.runs.store``, which takes time to import; a test keeps them the same."""
SHOWN_METRICS = 3
"""Metrics of a run that the list shows."""


@click.group()
def runs() -> None:
    """Look at trainings, compare them, do one again.

    RUN is a run's id, or the beginning of it.
    """


@runs.command("list")
@click.option("-n", "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="How many at most.")
@click.option("--state", type=Choice(RUN_STATES), help="Only runs in this state.")
@click.option("--kind", help="Only runs of this kind: script, retrain, style, anomaly.")
@click.option("--sweep", help="Only trials of this sweep.")
@click.option("--text", help="Only runs with this in their id or name.")
@click.option("--after", metavar="PAGE", help="Continue the list: the value printed at the end of the page before.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(as_json: bool, **wanted: Any) -> None:
    """List the newest runs. Filters combine: a run must match all of them."""
    page = installation.runs().list(**wanted)
    if as_json:
        for each in page.runs:
            say(json.dumps(each.to_dict()))
    elif page.runs:
        rows = [
            (each.id, each.state, each.kind, each.name, _some(each), _time(each), local_time(each.created_at))
            for each in page.runs
        ]
        table(("RUN", "STATE", "KIND", "NAME", "METRICS", "TIME", "CREATED"), rows)
    else:
        asked = any(value is not None for name, value in wanted.items() if name != "limit")
        say("no run matches" if asked else "no runs yet; begin one: tally train --help", err=True)
    if page.next is not None:
        say(f"there are more; the next page: --after {page.next}", err=True)


@runs.command(short_help="All that is known of a run.")
@click.argument("run")
@click.option("--metric", help="Print the values of this metric, one STEP and VALUE a line.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(run: str, metric: str | None, as_json: bool) -> None:
    """Parameters, metrics, files, models, code, data, environment, cost and error of a run."""
    from tally.training.runs.store import plain

    store = installation.runs()
    record = store.get(run)
    if metric is not None:
        curve = store.values(record.id, [metric])[metric]
        for step, number in zip(curve.steps, curve.values, strict=True):
            say(f"{step}\t{number:g}" if not as_json else json.dumps({"step": step, "value": plain(number)}))
        return
    if as_json:
        say(json.dumps(record.to_dict()))
        return
    for name, value in _facts(record):
        say(f"{name:<12} {visible(value)}")
    if record.error:
        say(f"{'error':<12} " + record.error.replace("\n", "\n" + " " * 13))


@runs.command(short_help="Parameters and metrics of runs side by side.")
@click.argument("run", nargs=-1)
@click.option("--sweep", help="All trials of this sweep.")
@click.option("--metric", help="Order by the last value of this metric, the best first.")
@click.option("--lowest", is_flag=True, help="With --metric: the lowest value is the best.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def compare(run: tuple[str, ...], sweep: str | None, metric: str | None, lowest: bool, as_json: bool) -> None:
    """What differs between runs: parameters, and the last value of each metric."""
    from tally.errors import SpecError
    from tally.training.runs.compare import best_first, differing

    store = installation.runs()
    records = [store.get(each) for each in run]
    if sweep is not None:
        records += store.list(sweep=sweep, limit=10_000).runs
    if not records:
        raise SpecError(
            "nothing to compare", hint="Name runs, or a sweep: tally runs compare RUN RUN, or --sweep SWEEP"
        )
    if metric is not None:
        records = best_first(records, metric, lowest=lowest)
    if as_json:
        for each in records:
            last = {name: figures.to_json()[0] for name, figures in each.metrics.items()}
            say(json.dumps({"id": each.id, "name": each.name, "parameters": dict(each.parameters), "metrics": last}))
        return
    parameters, metrics = differing(records)
    if not parameters and len(records) > 1:
        say("their parameters are the same", err=True)
    rows = [
        (each.id, each.name, each.state, *(_shown(each.parameters.get(name)) for name in parameters),
         *(f"{each.metrics[name].last:g}" if name in each.metrics else "-" for name in metrics))
        for each in records
    ]  # fmt: skip
    table(("RUN", "NAME", "STATE", *parameters, *metrics), rows)


@runs.command(short_help="Do a run again.")
@click.argument("run")
@click.option("--run", "start", is_flag=True, help="Run the command now.")
def reproduce(run: str, start: bool) -> int:
    """Print the command that gives the same, and what is different here from what it was then; --run runs it."""
    from tally.training.runs.reproduce import recipe

    installation.check_here("runs reproduce")
    found = recipe(installation.runs().get(run))
    for each in found.differences:
        say(f"not as it was: {each}", err=True)
    say(found.shown)
    return found.start() if start else 0


@runs.command(short_help="Bring runs to an MLflow server.")
@click.argument("run", nargs=-1)
@click.option("--sweep", help="All trials of this sweep.")
@click.option("--to", "uri", required=True, metavar="URL", help="The tracking server, http://HOST:5000.")
@click.option("--experiment", default="tally", show_default=True, help="What MLflow is to call them together.")
def mirror(run: tuple[str, ...], sweep: str | None, uri: str, experiment: str) -> None:
    """Bring runs to an MLflow tracking server: parameters, metrics by step, tags, files. Again, it brings what is new.

    With TALLY_MLFLOW=URL in the environment, every run is brought there when it ends.
    """
    from tally.errors import SpecError
    from tally.training.runs.mlflow_mirror import mirror as bring

    installation.check_here("runs mirror")
    store = installation.runs()
    records = [store.get(each) for each in run]
    if sweep is not None:
        records += store.list(sweep=sweep, limit=10_000).runs
    if not records:
        raise SpecError("no run is named", hint="tally runs mirror RUN --to URL, or --sweep SWEEP")
    for each in records:
        say(f"run {each.id} is run {bring(store, each, uri, experiment=experiment)} there")


@runs.command(short_help="Forget a run, with its files.")
@click.argument("run")
@click.option("--keep-files", is_flag=True, help="Leave the files of the run where they are.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def delete(run: str, keep_files: bool, dry_run: bool) -> None:
    """Forget a run, and remove its files where Tally has made their folder. Models that it registered stay."""
    store = installation.runs()
    record = store.get(run)
    made = store.has_made(record)
    files = made and not keep_files
    what = f"run {record.id}" + (f", and its files in {record.folder}" if files else "")
    left = f"; its files stay in {record.folder}" if not files and (made or Path(record.folder).exists()) else ""
    if dry_run:
        say(f"would remove {what}{left}")
        return
    store.remove(record, keep_files=keep_files)
    say(f"{what} is deleted{left}")


@click.command(short_help="Look at runs in TensorBoard.")
@click.argument("run", nargs=-1)
@click.option("--sweep", help="All trials of this sweep.")
@click.option("--text", help="Only runs with this in their id or name.")
@click.option("-n", "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="The newest runs.")
@click.option("--follow", is_flag=True, help="Show runs that begin later, too.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where it listens.")
@click.option("--port", type=click.IntRange(0, 65535), default=6006, show_default=True, help="0: any that is free.")
def tensorboard(
    run: tuple[str, ...], sweep: str | None, text: str | None, limit: int, follow: bool, host: str, port: int
) -> int:
    """Start TensorBoard with the event files of runs: of those that are named, of a sweep, or of the newest."""
    from tally.errors import SpecError
    from tally.training.runs.tensorboard import show as show_runs

    store = installation.runs()
    if run and follow:
        raise SpecError("--follow shows runs that begin later: name none", hint="Leave the runs or --follow out.")

    def newest() -> list[RunRecord]:
        return store.list(sweep=sweep, text=text, limit=limit).runs

    records = [store.get(each) for each in run] or newest()
    return show_runs(
        records, host=host, port=port, say=lambda line: say(line, err=True), later=newest if follow else None
    )


def _some(record: RunRecord) -> str:
    """A few of its metrics."""
    names = list(record.metrics)[:SHOWN_METRICS]
    more = len(record.metrics) - len(names)
    shown = ", ".join(f"{name} {record.metrics[name].last:.4g}" for name in names)
    return shown + (f" and {more} more" if more else "") or "-"


def _time(record: RunRecord) -> str:
    return duration(record.cost["seconds"]) if "seconds" in record.cost else "-"


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    from tally.training.runs.origin import typed
    from tally.training.runs.tracking import artifacts, logged_pictures

    folder = Path(record.folder)
    facts = [("run", record.id), ("name", record.name), ("kind", record.kind), ("state", record.state)]
    if record.sweep:
        facts.append(("sweep", record.sweep))
    facts += [("parameter", f"{name} = {_shown(value)}") for name, value in record.parameters.items()]
    for name, each in record.metrics.items():
        spread = (
            f" (step {each.step}; {each.least:g} to {each.most:g} in {each.count:,} steps)" if each.count > 1 else ""
        )
        facts.append(("metric", f"{name} = {each.last:g}{spread}"))
    facts += [("tag", f"{name} = {text}") for name, text in record.tags.items()]
    facts += [("model", each) for each in record.models]
    facts += [("created", local_time(record.created_at)), ("finished", local_time(record.finished_at))]
    if cost := record.cost:
        peak = f", {cost['peak_bytes'] / 1e6:,.0f} MB at most" if "peak_bytes" in cost else ""
        facts.append(
            ("cost", f"{duration(cost['seconds'])}, {duration(cost['processor_seconds'])} of processors{peak}")
        )
    facts.append(("command", typed(record.command)))
    code = record.code
    if "hash" in code:
        commit = (
            f", commit {code['commit'][:9]}{' and changes' if code.get('dirty') else ''}" if "commit" in code else ""
        )
        facts.append(("code", f"{code['file']} ({code['hash'][:19]}, {code['files']:,} files{commit})"))
    for name, found in record.data.items():
        known = (
            f" ({found['hash'][:19]}, {found['files']:,} files, {found['bytes']:,} bytes)" if "hash" in found else ""
        )
        facts.append(("data", f"{name}: {found['place']}{known}"))
    if environment := record.environment:
        where = f"{environment['platform']} on {environment['host']}"
        facts.append(
            ("environment", f"Python {environment['python']}, {len(environment['packages'])} packages, {where}")
        )
    files = artifacts(folder) if folder.is_dir() else []
    pictures = sum(len(each) for each in logged_pictures(folder).values())
    facts.append(
        (
            "files",
            f"{folder}: {len(files):,} files, {pictures:,} pictures" if folder.is_dir() else f"{folder} is not here",
        )
    )
    facts += [("file", each) for each in files[:20]]
    if record.state in ("interrupted", "failed", "killed"):
        facts.append(("next", f"tally runs reproduce {record.id}"))
    return facts
