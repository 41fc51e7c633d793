"""How Tally starts another Python: it imports nothing from the current folder, and is not told what only the server
may know.

The current folder may be one of pictures that somebody else filled: a ``pickle.py`` in it must not run.
"""

from __future__ import annotations

import os
import re
import sys
from multiprocessing import resource_tracker

from tally.config import credentials

SAFE_PATH = "-P"
"""Python's flag that leaves the current folder out of ``sys.path``. Children that multiprocessing starts inherit it."""

_SECRETS = re.compile(
    r"TALLY_DATABASE|TALLY_\w*(SECRET|KEY|TOKEN|PASSWORD)\w*|RAY_AUTH_TOKEN"
    r"|OTEL_EXPORTER_OTLP_\w*HEADERS"
    r"|PG(PASSWORD|PASSFILE|SERVICE|SERVICEFILE|SSLKEY)"  # libpq's
)
_withheld: set[str] = set()


def withhold(variable: str) -> None:
    """Do not tell workers this environment variable from now on: a secret is in it."""
    _withheld.add(variable)


def environment() -> dict[str, str]:
    """The environment for processes that need no database and no key of the server: workers and other helpers.

    The credentials of buckets stay: workers read and write there. They are not told the folder of secrets, but what it
    has of these.
    """
    told = {name: value for name, value in os.environ.items() if name not in _withheld and not _SECRETS.fullmatch(name)}
    if told.get("PYTHONBREAKPOINT", "").startswith("ray."):
        del told["PYTHONBREAKPOINT"]  # Ray sets it in each process that it connects; its debugger works in no other
    return told | credentials()


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a Python that runs one of Tally's modules."""
    return [sys.executable, SAFE_PATH, "-m", module, *arguments]


def stay_safe() -> None:
    """Have whatever this process starts import nothing from the current folder, but workers, which are not told so.

    For a process that may lose multiprocessing's resource tracker: Ray kills what an actor has started before it ends
    the actor itself. A lock that goes in between starts another tracker, and not by :func:`track_resources`.
    """
    if "PYTHONSAFEPATH" not in os.environ:
        os.environ["PYTHONSAFEPATH"] = "1"
        withhold("PYTHONSAFEPATH")  # a model's own scripts import from their folder


def track_resources() -> None:
    """Start multiprocessing's resource tracker. It would be started in the current folder, and import from there; and
    after a kill of this process it would warn of what it then removes, in the middle of somebody's terminal."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # there is no other way to tell it
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
