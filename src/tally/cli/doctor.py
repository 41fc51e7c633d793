"""``tally doctor``: names each check, and answers in seconds, whatever hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import click

from tally.cli.console import say
from tally.cli.values import Choice
from tally.errors import TallyError
from tally.health import checks, services
from tally.health.checks import Skip, Warn
from tally.storage import unexpected
from tally.text import visible

LOCAL_SECONDS = 30.0
"""How long a check of this machine may take: it imports libraries, and a busy machine is slow at that."""
REMOTE_SECONDS = 20.0
"""How long a check of something else may take, as a last resort: each of its requests has a limit of some seconds."""

_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red", "-": "bright_black"}


@dataclass(frozen=True, slots=True)
class Check:
    """remote: it mostly waits for something else, so it is begun before its turn. seconds: how long it may take."""

    name: str
    run: Callable[[], str]
    remote: bool = False
    seconds: float | None = None


def _checks(places: Sequence[str], *, write: bool, engine: str | None, address: str | None) -> list[Check]:
    return [
        Check("python", checks.python),
        Check("extras", checks.extras),
        Check("home", checks.home),
        Check("temporary files", checks.temporary),
        Check("database", services.database, remote=True),
        Check("registry", partial(services.registry, write=write), remote=True),
        *(Check(name, run, remote=True) for name, run in services.object_stores()),
        *(Check("place", partial(services.place, place, write=write), remote=True) for place in places),
        Check("ray", partial(services.ray, address, needed=engine == "ray"), remote=True),
        Check("models", checks.models),
        Check("pictures", checks.pictures),
        Check("videos", checks.videos),
        Check("tables", checks.tables),
        Check("workers", checks.workers),
    ]


class _Running(threading.Thread):
    """A check in a thread of its own, which is left behind when it hangs: it does not keep the process."""

    def __init__(self, check: Check) -> None:
        super().__init__(name=f"tally-doctor-{check.name}", daemon=True)
        self._check = check
        self._outcome: tuple[str, str] | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = "ok", self._check.run()
        except Warn as warning:
            self._outcome = "warn", str(warning)
        except Skip as skip:
            self._outcome = "-", str(skip)
        except TallyError as error:
            self._outcome = "FAIL", str(error)
        except OSError as error:
            self._outcome = "FAIL", str(unexpected(error))
        except Exception as error:
            self._outcome = "FAIL", f"{type(error).__name__}: {error}"

    def outcome(self) -> tuple[str, str]:
        """``ok``, ``warn``, ``FAIL`` or ``-``, and what is to be said of it."""
        # Checks that were begun together continue while the first of them is waited for.
        limit = self._check.seconds or (REMOTE_SECONDS if self._check.remote else LOCAL_SECONDS)
        self.join(limit)
        return self._outcome or ("FAIL", f"no answer within {limit:g} s")


def _run(checks: Sequence[Check]) -> Iterator[tuple[str, str, str]]:
    begun = {number: _Running(check) for number, check in enumerate(checks) if check.remote}
    for number, check in enumerate(checks):
        running = begun.get(number) or _Running(check)
        yield check.name, *running.outcome()


@click.command()
@click.argument("places", nargs=-1, metavar="[PLACE...]")
@click.option("--write", is_flag=True, help="Write, read back and delete a small object at each PLACE.")
@click.option(
    "--engine",
    type=Choice(["local", "ray"]),
    help="With ray: fail if Ray is missing or its cluster does not answer.",
)
@click.option(
    "--address",
    metavar="URL",
    help="Ray only: the cluster's dashboard, http://HEAD:8265; by default, the cluster that Ray itself would find.",
)
@click.option(
    "--mend",
    metavar="PLACE",
    help="Only free an output that a job claims whose database is lost.",
)
def doctor(places: tuple[str, ...], write: bool, engine: str | None, address: str | None, mend: str | None) -> int:
    """Check this installation, and what it is connected to: database, buckets, cluster.

    PLACE: a folder or bucket to look at too, such as s3://bucket/photos: whether it can be listed and read.
    The exit code is 1 if anything failed.
    """
    if mend is not None:
        from tally.jobs.facade import Jobs

        say(Jobs().mend(mend))
        return 0
    if address is not None:
        engine = "ray"
    return report(_checks(places, write=write, engine=engine, address=address))


def report(checks: Sequence[Check]) -> int:
    """Run checks, and print what each finds as soon as it has; 1 if one failed."""
    failed = False
    for name, outcome, text in _run(checks):
        failed |= outcome == "FAIL"
        mark = click.style(f"{outcome:<5}", fg=_COLOURS[outcome])
        click.echo(f"{mark} {visible(name):<16} " + visible(text, lines=True).replace("\n", "\n" + " " * 21))
    return int(failed)
