"""``tally demo``: a first job from nothing, typed for whoever looks on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import webbrowser
from importlib.util import find_spec
from pathlib import Path

import click

from tally.cli.console import say
from tally.errors import SpecError, TallyError
from tally.text import visible

_HERE = "tally-demo"
_BY_SHAPE = (
    "select label, count(*) as pictures, round(avg(score), 3) as sure from results group by label order by label"
)
_ONCE = "select count(*) as rows, count(distinct key) as pictures from results"


@click.command()
@click.argument("folder", default=_HERE, type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True, help="How many pictures.")
@click.option("--kill", is_flag=True, help="Kill the job at a third (kill -9), and have it go on.")
@click.option("--open", "pages", is_flag=True, help="Then start the server, and open the job's page.")
def demo(folder: Path, count: int, kill: bool, pages: bool) -> None:
    """Draw pictures, score them with a small model that comes with Tally, and ask the results with SQL.

    Each command is shown before it runs, as you would type it. All files are in FOLDER, tally-demo by default; the job
    is among yours, see 'tally jobs list'.

    \b
    tally demo --kill --open
    """
    if pages and find_spec("fastapi") is None:
        raise SpecError("--open starts the server, which needs more: pip install 'tally-scoring[server]'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(
            f"{folder} is there already, with something in it",
            hint=f"Name another folder, or remove it: rm -r {shlex.quote(str(folder))}",
        )
    pictures, out = str(folder / "pictures"), str(folder / "predictions")
    _run("simulate", "pictures", "--out", pictures, "--count", str(count))
    score = ("score", pictures, "--model", "tally:shapes", "--out", out)
    if not kill:
        _run(*score)
    elif _killed(score, out, count):
        _run("jobs", "resume", out)
        say("\nEach picture has one row, as if nothing had happened:")
        _run("query", out, _ONCE)
    _run("query", out, _BY_SHAPE)
    if pages:
        _open(out)
    else:
        server = "" if find_spec("fastapi") else "pip install 'tally-scoring[server]', then "
        say(f"\nThe job: tally jobs show {out}\nIn a browser: {server}tally up\nYour own model: tally score --help")


def _typed(line: str) -> None:
    click.echo("\n" + click.style(f"$ {visible(line)}", bold=True))
    sys.stdout.flush()  # before what the command says


def _started(*words: str, **options: object) -> subprocess.Popen[str]:
    """A command that shows itself and runs."""
    _typed(shlex.join(("tally", *words)))
    return subprocess.Popen([sys.executable, "-m", "tally", *words], text=True, **options)  # type: ignore[call-overload,no-any-return]


def _run(*words: str) -> None:
    """Run a command to its end. Raises TallyError where it fails; it has said why."""
    with _started(*words) as process:
        code = process.wait()
    _check(code)


def _check(code: int) -> None:
    if code:
        raise TallyError(
            f"the demo stops here: that command ended with exit code {code}",
            hint="What it said above names the cause. tally doctor looks at the rest of this machine.",
        )


def _killed(words: tuple[str, ...], out: str, count: int) -> bool:
    """Start the job, and kill it once a third is done. Whether it was killed: it may have been faster."""
    from tally.jobs.facade import Jobs

    jobs = Jobs()
    with _started(*words) as process:
        while process.poll() is None:
            record = jobs.at(out)
            if record is not None and 3 * record.done >= count:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.02)
    if process.returncode != -signal.SIGKILL:
        _check(process.returncode)
        say("\nIt was done before it could be killed. With more pictures it is not: --count 20000")
        return False
    if sys.stderr.isatty():
        click.echo("\x1b[?25h", err=True)  # its progress bar had hidden the cursor
    _typed(f"kill -9 {process.pid}")
    return True


def _open(out: str) -> None:
    """The server, until Ctrl-C, and a browser at the job's page."""
    from tally.jobs.facade import Jobs

    job = Jobs().get(out).id
    _run("keys", "add", "demo", "--role", "operator", "--days", "1")
    with _started("up", "--port", "0", stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                say(line.rstrip())
                if line.startswith("Tally is at "):  # and serves within the second
                    page = f"{line.split()[-1]}/jobs/{job}"
                    say(f"Log in with the key above: {page}   (Ctrl-C ends the server.)")
                    webbrowser.open(page)
        except KeyboardInterrupt:
            server.wait()
