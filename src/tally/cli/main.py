"""The ``tally`` command. Each group is imported only when it is used: ``tally --help`` has to be instant."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any, cast

import click

from tally import garbage

if TYPE_CHECKING:
    from tally.errors import TallyError

COMMANDS = {
    "demo": ("tally.cli.demo:demo", "See a first job run, from nothing."),
    "score": ("tally.cli.score:score", "Score a collection of files, frames or rows with a model."),
    "run": ("tally.cli.score:run", "Run the job that a YAML file describes."),
    "jobs": ("tally.cli.jobs:jobs", "List, follow, stop, resume and retry jobs."),
    "schedule": ("tally.cli.schedule:schedule", "Run jobs on time: hourly, nightly, for days gone by."),
    "train": ("tally.cli.train:train", "Train a model from your own data."),
    "sweep": ("tally.cli.sweep:sweep", "Train many times over a space of parameters; keep the best."),
    "pipeline": ("tally.cli.pipeline:pipeline", "Run Argo workflow files on this machine."),
    "runs": ("tally.cli.runs:runs", "Look at trainings, compare them, do one again."),
    "tensorboard": ("tally.cli.runs:tensorboard", "Look at trainings in TensorBoard."),
    "watch": ("tally.cli.watch:watch", "Start a job for each upload to a folder or a bucket."),
    "queue": ("tally.cli.queue:queue", "Look into a queue of messages; put dead ones back."),
    "inject": ("tally.cli.queue:inject", "List a bucket or a folder into a queue."),
    "up": ("tally.cli.up:up", "Start the server: API and pages."),
    "migrate": ("tally.cli.up:migrate", "Bring the database's schema up to date."),
    "keys": ("tally.cli.up:keys", "Say who may use the server."),
    "serve": ("tally.cli.serve:serve", "Serve models online: HTTP and gRPC."),
    "deploy": ("tally.cli.deploy:deploy", "Keep a model online: here, on Kubernetes or Azure."),
    "cluster": ("tally.cli.cluster:cluster", "Tally on Kubernetes: plan, apply, check, scale."),
    "endpoints": ("tally.cli.endpoints:endpoints", "List, scale, change and end kept endpoints."),
    "predict": ("tally.cli.predict:predict", "Have an endpoint score files."),
    "load": ("tally.cli.predict:load", "See how much load an endpoint takes."),
    "query": ("tally.cli.query:query", "Ask a job's results with SQL."),
    "models": ("tally.cli.models:models", "Keep models under names, versions and aliases."),
    "new": ("tally.cli.new:new", "Start a scorer or a model package from a template."),
    "simulate": ("tally.cli.simulate:simulate", "Make data to try things with."),
    "notebook": ("tally.cli.notebook:notebook", "Open worked notebooks; values for a JupyterHub."),
    "doctor": ("tally.cli.doctor:doctor", "Check this installation, and say what is missing."),
    "coordinate": ("tally.cli.score:coordinate", "Drive one job that exists already."),
}
HIDDEN = {"coordinate"}


def coloured() -> bool | None:
    """False where nobody wants colours (https://no-color.org, a dumb terminal); None: on terminals alone."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


class LazyGroup(click.Group):
    """Knows names and one-line helps of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from tally.text import did_you_mean

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}" + did_you_mean(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items() if name not in HIDDEN])


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from tally.version import shown

        click.echo(f"tally {shown()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A first try: tally demo   With yours: tally score photos/ --model model.onnx --out predictions/",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--server", metavar="URL", envvar="TALLY_SERVER", help="Work on this server (see 'tally up').")
@click.option("--key", metavar="KEY", help="The key for it; better kept in TALLY_KEY, where nobody sees it.")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens inside.")
@click.pass_context
def cli(ctx: click.Context, server: str | None, key: str | None, verbose: bool) -> None:
    """Score large collections with machine-learning models, and never lose or repeat an item."""
    ctx.color = coloured()
    if server is not None:
        from tally.cli import installation

        installation.use(installation.Server(server, key), ctx.invoked_subcommand)
    if verbose:
        from tally.logs import log_to_stderr

        log_to_stderr()


class _Visible:
    """A file that cannot be told by a name in a message what a terminal is to do."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> int:
        from tally.text import visible

        return int(self._file.write(visible(text, lines=True)))

    def flush(self) -> None:
        self._file.flush()


def _show(error: TallyError) -> None:
    from tally.text import visible

    with suppress(OSError):  # where nothing can be told, the exit code does
        click.echo(
            click.style("error: ", fg="red", bold=True) + visible(error.message, lines=True), err=True, color=coloured()
        )
        if error.hint:
            click.echo(visible(f"  {error.hint}", lines=True), err=True)


def _fill_standard_descriptors() -> None:
    """A caller may have closed them. The next file opened would get their number, and what a model prints with it."""
    for each in range(3):
        try:
            os.fstat(each)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - it stays open


def command() -> None:
    """The process ``tally``."""
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise  # somebody else's, which Python tells
        garbage.leave(ended.code or 0)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrongly used, 130 interrupted."""
    from tally.errors import SpecError, TallyError

    _fill_standard_descriptors()
    garbage.look_rarely()
    if "_TALLY_COMPLETE" in os.environ:
        from tally.cli import completion

        completion.install()
    try:
        code = cli.main(prog_name="tally", standalone_mode=False)
    except click.ClickException as error:
        with suppress(OSError):  # where nothing can be told, the exit code does
            error.show(cast(IO[Any], _Visible(sys.stderr)))
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except TallyError as error:
        _show(error)
        sys.exit(2 if isinstance(error, SpecError) else 1)
    except RecursionError:
        _show(TallyError("something given is nested too deeply"))
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output has gone (head, less): nothing to report, and nobody to report it to.
        sys.stderr.close()
        sys.exit(1)
    except UnicodeEncodeError as error:  # a name that is no text, where one is needed
        _show(TallyError(f"{str(error.object)[:100]!r} is not valid UTF-8"))
        sys.exit(2)
    except OSError as error:  # where nobody expected it: a full disk, a folder of somebody else's
        from tally.storage import unexpected

        _show(unexpected(error))
        sys.exit(1)
    except Exception as error:  # a fault of ours
        import logging

        from tally.errors import error_line

        logging.getLogger("tally").info("the fault", exc_info=True)
        hint = "Please report it, with what 'tally -v' and the same command say."
        _show(TallyError(f"a fault in Tally: {error_line(error)}", hint=hint))
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
