"""``tally pipeline``: run Argo workflow files on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tally.cli import installation
from tally.cli.console import say, table, text_pairs
from tally.cli.values import moment
from tally.masking import mask
from tally.text import expanded, local_time, visible

if TYPE_CHECKING:
    from tally.database.leased import Lease
    from tally.pipelines.facade import Pipelines
    from tally.pipelines.options import Options
    from tally.pipelines.store import Node, RunRecord

FOLLOW_SECONDS = 0.2
FAILED, LAST_LINES = 3, 5
"""Steps that have failed, and the lines of each, that are shown when a run ends."""
RUN_STATES = ("running", "waiting", "interrupted", "failed", "error", "cancelled", "succeeded")
"""Those of ``tally.pipelines.store``, which takes time to import; a test keeps them the same."""


@click.group()
def pipeline() -> None:
    """Run Argo workflow files on this machine; the same files run on a cluster with 'argo submit'.

    RUN is a run's id, the beginning of it, or its name.
    """


def _given_here(command: Any) -> Any:
    """Options for what a cluster would give."""
    for option in reversed(
        (
            click.option("--workflow", metavar="NAME", help="Which one, of several workflows in the file."),
            click.option("--entrypoint", metavar="TEMPLATE", help="Begin with this template instead."),
            click.option(
                "--volume", "volumes", multiple=True, metavar="NAME=FOLDER", help="A folder, for a volume or a claim."
            ),
            click.option(
                "--secret", "secrets", multiple=True, metavar="NAME=FOLDER",
                help="A file for each key of a Secret; NAME=env: keys are environment variables.",
            ),
            click.option(
                "--config-map", "config_maps", multiple=True, metavar="NAME=FOLDER", help="The same, for a ConfigMap."
            ),
            click.option(
                "--venv", "venvs", multiple=True, metavar="TEMPLATE=FOLDER",
                help="The virtual environment that stands for a template's image.",
            ),
            click.option("--podman", is_flag=True, help="Run templates in their images, but those with --venv."),
            click.option(
                "--share", "shares", multiple=True, metavar="FOLDER",
                help="A folder that steps see: below /tmp, which is their own, or, with --podman, any.",
            ),
            click.option(
                "--context", metavar="NAME", help="The kubeconfig's context that resource templates act on."
            ),
            click.option("--namespace", metavar="NAME", help="Of that cluster.  [default: the context's]"),
            click.option(
                "--semaphore", "semaphores", multiple=True, metavar="KEY=NUMBER", help="How many may hold a semaphore."
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _options(given: dict[str, Any], **more: Any) -> Options:
    from tally.errors import SpecError
    from tally.pipelines.options import ENVIRONMENT, Options

    folders: dict[str, Any] = {}
    for name, flag in (
        ("volumes", "--volume"),
        ("secrets", "--secret"),
        ("config_maps", "--config-map"),
        ("venvs", "--venv"),
    ):
        found = text_pairs(flag, given[name])
        folders[name] = {
            key: value if value == ENVIRONMENT else str(expanded(value).absolute()) for key, value in found.items()
        }
    semaphores: dict[str, int] = {}
    for key, value in text_pairs("--semaphore", given["semaphores"]).items():
        if not str(value).isdigit() or int(value) < 1:
            raise SpecError(f"--semaphore {key}={value}: should be a whole number from 1")
        semaphores[key] = int(value)
    shares = (*(str(expanded(each).absolute()) for each in given["shares"]), *_here())
    same = {name: given[name] for name in ("podman", "entrypoint", "context", "namespace")}
    return Options(**folders, shares=shares, semaphores=semaphores, **same, **more)


@pipeline.command(short_help="What of a workflow runs here, and why not.")
@click.argument("file", type=click.Path())
@_given_here
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.pass_context
def check(context: click.Context, /, file: str, workflow: str | None, as_json: bool, **given: Any) -> None:
    """Say of each template whether it runs on this machine, what it needs otherwise, and what is passed over.

    Unknown fields, references to nothing and expressions that cannot be read are told with their line. The exit code is
    1 if something cannot be run here.
    """
    from tally.pipelines.support.check import check as look_at
    from tally.pipelines.workflow import load

    installation.check_here("pipeline check")
    found = load(file, workflow)
    report = look_at(found, _options(given))
    if as_json:
        verdicts = [{"template": each.name or None, "kind": each.kind, "reasons": each.reasons, "notes": each.notes}
                    for each in (report.workflow, *report.templates)]  # fmt: skip
        say(json.dumps({"runs": not report.reasons, "templates": verdicts}))
    else:
        rows = [
            (each.name, each.kind, "runs here" if not each.reasons else "does not run here")
            for each in report.templates
        ]
        table(("TEMPLATE", "KIND", "VERDICT"), rows)
        for reason in dict.fromkeys(report.reasons):
            say(reason)
        for note in dict.fromkeys(report.notes):
            say(f"note: {note}")
    context.exit(1 if report.reasons else 0)


@pipeline.command(short_help="Run a workflow file.")
@click.argument("file", type=click.Path())
@click.option(
    "-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A parameter of the workflow."
)
@_given_here
@click.option("--parallel", type=click.IntRange(1, 10_000), help="Steps at once.  [default: one a core, at least 8]")
@click.option("--cached", is_flag=True, help="Do not do again what was done with the same command, inputs and code.")
@click.option(
    "--from", "since", metavar="STEP", help="As --cached, up to this step; it and what comes after is done again."
)
@click.option("-q", "--quiet", is_flag=True, help="Say only how it ended.")
@click.pass_context
def run(
    context: click.Context,
    /,
    file: str,
    parameters: tuple[str, ...],
    workflow: str | None,
    parallel: int | None,
    cached: bool,
    since: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Run an Argo workflow file here, in the foreground. What cannot be run here is refused before anything starts.

    \b
    tally pipeline run train.yaml -p image-dir=photos/ -p learning-rate=0.05

    Ctrl-C puts it down: 'tally pipeline resume RUN' goes on. So it does after a crash, and steps that are done are not
    done again. The exit code is 0 if the run succeeded.
    """
    installation.check_here("pipeline run")
    options = _options(given, parallel=parallel, cached=cached, since=since)
    values = {name: _placed(name, value, options) for name, value in text_pairs("-p", parameters).items()}
    pipelines = installation.pipelines()
    lease, notes = pipelines.start(file, values, options, name=workflow)
    if not quiet:
        for note in notes:
            say(f"note: {note}", err=True)
        record = pipelines.store.get(lease.id)
        say(f"run {record.id}: {record.name}", err=True)
    context.exit(_drive(pipelines, lease, quiet=quiet))


def _placed(name: str, value: str, options: Options) -> str:
    """A parameter's value: where it is a path of this folder, the whole path, as steps run elsewhere."""
    from tally.errors import SpecError
    from tally.pipelines.steps.room import PRIVATE, is_below

    if "://" in value or "\n" in value or len(value) > 4096:
        return value
    path = expanded(value) if value.startswith("~") else Path(value)
    if (("/" in value or value in (".", "..")) and not path.is_absolute() and path.exists()) or value.startswith("~/"):
        value = str(path.absolute()) + ("/" if value.endswith("/") else "")
        say(f"-p {name}: {value}", err=True)
        if options.podman and not any(is_below(value, each) for each in options.shares):
            raise SpecError(
                f"-p {name}={value}: steps in images do not see it", hint=f"Let them see it: --share {value}"
            )
    if is_below(value, PRIVATE) and not any(is_below(value, each) for each in options.shares):
        raise SpecError(
            f"-p {name}={value}: steps have a {PRIVATE} of their own, where this is not",
            hint=f"Put it elsewhere, or let steps see it: --share {value}",
        )
    return value


def _here() -> list[str]:
    """The current folder, if it is one that steps see though it is below theirs."""
    from tally.pipelines.steps.room import PRIVATE, is_below

    here = str(Path.cwd())
    return [here] if is_below(here, PRIVATE) and here != PRIVATE else []


def _drive(pipelines: Pipelines, lease: Lease, *, quiet: bool) -> int:
    """Drive a run in the foreground, and say how it ended; the exit code."""
    from tally.errors import PipelineError, StorageError
    from tally.pipelines.tree import SIGNS

    def tell(node: Node) -> None:
        if not quiet and node.kind != "StepGroup":
            told = f"  {node.message}" if node.message else ""
            say(f"{SIGNS[node.phase]} {_shown(node.name)}{told}", err=True)

    try:
        state = pipelines.drive(lease, tell)
    except (PipelineError, StorageError) as error:
        error.hint = f"What is done is not done again. Go on with: tally pipeline resume {lease.id}"
        raise
    record = pipelines.store.get(lease.id)
    if state == "waiting":
        for node in pipelines.waiting(record.id):
            say(f"{_shown(node.name)} waits for you", err=True)
        say(f"run {record.id} goes on with: tally pipeline resume {record.id}", err=True)
        return 0
    if state == "interrupted":
        say(f"run {record.id} is interrupted; go on with: tally pipeline resume {record.id}", err=True)
        return 130
    ended = {"succeeded": "has succeeded", "cancelled": "is cancelled"}.get(state, "has failed")
    say(f"run {record.id} {ended}" + (f": {record.error}" if record.error else ""), err=True)
    if state == "succeeded":
        return 0
    for name, line in _last_words(pipelines, record.id):
        say(f"  {name}: {line}", err=True)
    say(f"  More: tally pipeline show {record.id}   tally pipeline logs {record.id}", err=True)
    return 1


def _last_words(pipelines: Pipelines, run_id: str) -> Iterator[tuple[str, str]]:
    """The last lines of steps that have failed."""
    from tally.jobs.printed import tail

    failed = [(node, files) for node, files in pipelines.logs(run_id) if node.failed]
    for node, files in failed[-FAILED:]:
        for line in [line for file in files for line in tail(file, LAST_LINES)][-LAST_LINES:]:
            yield _shown(node.display), line


@pipeline.command("list")
@click.option("-n", "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="How many at most.")
@click.option("--state", type=click.Choice(RUN_STATES), help="Only runs in this state.")
@click.option("--text", help="Only runs with this in their id or name.")
@click.option(
    "--since",
    callback=moment,
    metavar="TIME",
    help="Only runs created at or after this time: 2026-11-28, or 2d for the last two days.",
)
@click.option("--until", callback=moment, metavar="TIME", help="Only runs created before this time.")
@click.option("--after", metavar="PAGE", help="Continue the list: the value printed at the end of the page before.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(as_json: bool, **wanted: Any) -> None:
    """List the newest runs. Filters combine: a run must match all of them."""
    found = installation.pipelines().store.list(**wanted)
    if as_json:
        from tally.jobs.spec import shown

        for each in found.runs:
            say(json.dumps(shown(each.to_dict())))
    elif found.runs:
        table(("RUN", "NAME", "STATE", "STARTED", "TIME"), [
            (each.id, each.name, each.state, local_time(each.created_at), _time(each)) for each in found.runs
        ])  # fmt: skip
    else:
        asked = any(value is not None for name, value in wanted.items() if name != "limit")
        say("no run matches" if asked else "no runs yet; begin one: tally pipeline run FILE", err=True)
    if found.next is not None:
        say(f"there are more; the next page: --after {found.next}", err=True)


def _shown(text: str) -> str:
    """A text of a workflow as a terminal may have it: without passwords, and without what would move the cursor."""
    return visible(mask(text))


def _time(record: RunRecord) -> str:
    from tally.cli.foreground import duration

    if record.finished_at is None and not record.alive:
        return "-"
    return duration((record.finished_at or time.time()) - record.created_at)


@pipeline.command(short_help="The tree of a run's steps.")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="The run and its nodes, as one JSON object.")
def show(run: str, as_json: bool) -> None:
    """What is known of a run: its state, its parameters, and its steps as 'argo get' draws them."""
    from tally.pipelines.tree import rows

    store = installation.pipelines().store
    record = store.get(run)
    nodes = store.nodes(record.id)
    if as_json:
        from tally.jobs.spec import shown

        say(json.dumps(shown(record.to_dict()) | {"nodes": [shown(each.to_dict()) for each in nodes]}))
        return
    facts = [("Name", record.name), ("Run", record.id), ("Status", record.state), ("Message", record.error or ""),
             ("Created", local_time(record.created_at)), ("Finished", local_time(record.finished_at)),
             ("Duration", _time(record)), ("Folder", record.folder)]  # fmt: skip
    for name, value in facts:
        if value and value != "-":
            say(f"{name + ':':<18} {_shown(value)}")
    if record.parameters:
        say("Parameters:")
        for name, value in record.parameters.items():
            say(f"  {name + ':':<16} {_shown(value)}")
    outputs = next((each.outputs.get("parameters") for each in nodes if not each.parent), None)
    if outputs:
        say("Output Parameters:")
        for name, value in outputs.items():
            say(f"  {name + ':':<16} {_shown(value)}")
    say()
    table(("STEP", "TEMPLATE", "DURATION", "MESSAGE"), list(rows(nodes)))


@pipeline.command(short_help="What the steps of a run have printed.")
@click.argument("run")
@click.argument("step", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until the run is over.")
def logs(run: str, step: str | None, follow: bool) -> None:
    """Print what steps have printed, each line after the name of its step; of one step, its lines alone.

    STEP is a step's name, or its template's. What a step prints for others to use comes after the rest.
    """
    from tally.errors import SpecError
    from tally.pipelines.store import ENDED

    if not follow:
        for node, lines in installation.pipelines().printed(run, step):
            for line in lines:
                say(line if step else f"{_shown(node.display)}: {line}")
        return
    installation.check_here("pipeline logs --follow")
    pipelines = installation.pipelines()
    record = pipelines.store.get(run)
    printed: dict[Path, int] = {}
    while True:
        over = (found := pipelines.store.get(record.id)).state in ENDED or not found.alive
        try:
            for node, files in pipelines.logs(record.id, step):
                for file in files:
                    name = None if step else _shown(node.display)
                    _print_new(file, printed, name, all_of_it=over)
        except SpecError:
            if over:
                raise
        if over:
            return
        time.sleep(FOLLOW_SECONDS)


def _print_new(file: Path, printed: dict[Path, int], name: str | None, *, all_of_it: bool) -> None:
    with file.open("rb") as opened:
        opened.seek(printed.get(file, 0))
        for line in opened:
            if not line.endswith(b"\n") and not all_of_it:
                break
            printed[file] = printed.get(file, 0) + len(line)
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            say(f"{name}: {text}" if name is not None else text)


@pipeline.command(short_help="Go on with a run that waits or was interrupted.")
@click.argument("run")
@click.argument("step", required=False)
@click.option(
    "-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A value that a step waits for."
)
@click.option("-q", "--quiet", is_flag=True, help="Say only how it ended.")
@click.pass_context
def resume(context: click.Context, run: str, step: str | None, parameters: tuple[str, ...], quiet: bool) -> None:
    """Go on with a run. Steps that wait for a person go on, or STEP alone; what is done is not done again."""
    pipelines = installation.pipelines()
    record = pipelines.store.get(run)
    values = text_pairs("-p", parameters)
    for node in pipelines.answer(record.id, values, step):
        say(f"{_shown(node.name)} goes on", err=True)
    if (lease := pipelines.resume(record.id)) is not None:
        context.exit(_drive(pipelines, lease, quiet=quiet))
    say(f"run {record.id} goes on in another process", err=True)


@pipeline.command(short_help="Stop a run; its exit handler is run.")
@click.argument("run")
@click.option("-q", "--quiet", is_flag=True, help="Say only how it ended.")
@click.pass_context
def cancel(context: click.Context, run: str, quiet: bool) -> None:
    """End the steps of a run, then run its exit handler. Where no process drives the run, this one does."""
    pipelines = installation.pipelines()
    record = pipelines.store.get(run)
    lease = pipelines.cancel(record.id)
    if lease is None:
        say(f"run {record.id} is told to stop", err=True)
        return
    _drive(pipelines, lease, quiet=quiet)
    context.exit(0)


@pipeline.command(short_help="Forget a run, with its logs and artifacts.")
@click.argument("run", nargs=-1, required=True)
def delete(run: tuple[str, ...]) -> None:
    """Delete runs that no process drives, with their logs and artifacts, and what was remembered of their steps."""
    pipelines = installation.pipelines()
    for each in run:
        record = pipelines.store.get(each)
        pipelines.delete(record.id)
        say(f"deleted {record.id}", err=True)
