"""``tally doctor``: names each check, and answers in seconds."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from tally.errors import StorageError, TallyError

ROOM = 1 << 30
"""Free bytes below which a disk is worth a warning."""


class Warn(Exception):  # noqa: N818 - an outcome, not an error
    """The check found something that works, but is worth knowing."""


def _python() -> str:
    import importlib.metadata

    names = ("onnxruntime", "pyarrow", "duckdb", "pillow", "av", "obstore", "sqlalchemy", "pebble")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}; {versions}"


def _home() -> str:
    from tally.config import settings

    home = settings().home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise StorageError(
            f"{home} cannot be written to: {error.strerror}",
            hint="Set TALLY_HOME to a folder that can be written to.",
        ) from None
    free = shutil.disk_usage(home).free
    text = f"{home} can be written to, {free / 2**30:,.1f} GiB free"
    if free < ROOM:
        raise Warn(text)
    return text


def _database() -> str:
    import sqlalchemy as sa

    from tally.config import settings
    from tally.jobs.launch import open_store

    store = open_store()
    jobs = len(store.newest(limit=1000))
    return f"{sa.make_url(settings().database).render_as_string(hide_password=True)}, {jobs} jobs"


def _models() -> str:
    import onnxruntime

    # The provider called Azure calls a web service, which Tally never does.
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return "ONNX Runtime runs on " + ", ".join(name for name in providers if name != "Azure")


def _workers() -> str:
    from tally.engines.base import Limits
    from tally.engines.local import LocalEngine

    engine = LocalEngine()
    slots = engine.default_slots()
    memory = engine.default_memory(slots) or 0
    engine.start(dict, (), slots=1, limits=Limits())
    try:
        engine.submit(_hello).result(timeout=20)
    finally:
        engine.stop(kill=True)
    return f"a worker started and answered; default: {slots} workers of at most {memory / 2**30:,.1f} GiB"


def _hello(state: object) -> int:
    return os.getpid()


def _pictures() -> str:
    from PIL import Image, features

    Image.init()
    turbo = "libjpeg-turbo" if features.check("libjpeg_turbo") else "plain libjpeg, which is slow"
    return f"{len(Image.OPEN)} formats, {turbo}"


def _videos() -> str:
    import importlib.metadata

    from tally.video.encode import DEFAULTS, HARDWARE, encoders

    found = encoders("mp4")
    hardware = [codec for codec in found if codec.endswith(HARDWARE)]
    text = f"FFmpeg through PyAV {importlib.metadata.version('av')}; {len(found)} encoders, hardware: "
    text += ", ".join(hardware) or "none"
    missing = [codec for codec in dict.fromkeys(DEFAULTS.values()) if codec not in {**found, **encoders("webm")}]
    if missing:
        raise Warn(f"{text}; {', '.join(missing)} is missing: name another with --codec")
    return text


def _tables() -> str:
    from importlib.metadata import PackageNotFoundError, version

    text = f"DuckDB {version('duckdb')}, Arrow {version('pyarrow')}"
    try:
        return f"{text}, scikit-learn {version('scikit-learn')} with skops {version('skops')}"
    except PackageNotFoundError:
        return f"{text}; for models of scikit-learn: pip install 'tally-scoring[sklearn]'"


def _temporary() -> str:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / 2**30:,.1f} GiB free"
    if free < ROOM:
        raise Warn(text)
    return text


CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "home": _home,
    "database": _database,
    "temporary files": _temporary,
    "models": _models,
    "pictures": _pictures,
    "videos": _videos,
    "tables": _tables,
    "workers": _workers,
}


def _run() -> Iterator[tuple[str, str, str]]:
    for name, check in CHECKS.items():
        try:
            yield "ok", name, check()
        except Warn as warning:
            yield "warn", name, str(warning)
        except TallyError as error:
            yield "FAIL", name, str(error).replace("\n", "\n" + " " * 21)
        except Exception as error:
            yield "FAIL", name, f"{type(error).__name__}: {error}"


@click.command()
def doctor() -> int:
    """Check this installation, and say what is missing. The exit code is 1 if anything failed."""
    failed = False
    for outcome, name, text in _run():
        failed |= outcome == "FAIL"
        colour = {"ok": "green", "warn": "yellow", "FAIL": "red"}[outcome]
        click.echo(f"{click.style(f'{outcome:<5}', fg=colour)} {name:<16} {text}")
    return int(failed)
