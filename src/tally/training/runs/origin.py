"""Where a run comes from: its command, code, environment and data, so that it can be told, and done again, later."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tally.errors import TallyError
from tally.masking import mask
from tally.models.hashing import combined, content_files, content_hash, known_hash
from tally.scorers.scripts.classes import local_modules
from tally.training.runs.store import is_secret
from tally.version import shown

_TALLY = Path(__file__).absolute().parents[2]
GIT_SECONDS = 5.0
"""How long git may take to say which commit this is."""


def command() -> list[str]:
    """The command line of this process as one would type it: ``tally ...`` or ``python script.py ...``."""
    if not sys.argv or not sys.argv[0]:
        return []
    program, *arguments = sys.argv
    name = Path(program).name
    arguments = [mask(each) if is_secret(each) else each for each in arguments]
    if name in ("tally", "__main__.py") and (name == "tally" or Path(program).parent.name == "tally"):
        return ["tally", *arguments]
    return ["python", program, *arguments] if program.endswith(".py") else [program, *arguments]


def typed(words: Sequence[str]) -> str:
    """A command line as one types it into a shell."""
    return shlex.join(words)


def code(script: Path | None = None) -> dict[str, Any]:
    """The code that trains: ``hash`` of the script and the modules beside it that it imports, ``commit`` and whether
    there are changes since (``dirty``), the ``repository``'s folder; and the current ``folder``.

    script: None for the program that this process runs.
    """
    found: dict[str, Any] = {"folder": os.getcwd()}  # noqa: PTH109
    if script is None:
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        if main and str(main).endswith(".py") and not Path(main).absolute().is_relative_to(_TALLY):
            script = Path(main)
    if script is None or not script.is_file():
        return found | {"tally": shown()}
    script = script.absolute()
    files = {path.relative_to(script.parent).as_posix(): path for path in _modules(script)}
    digest = combined((name, known_hash(path)) for name, path in files.items())
    found |= {"file": str(script), "files": len(files), "hash": digest}
    return found | _git(str(script.parent))


def _modules(script: Path) -> list[Path]:
    """The script, and the modules beside it that it imports; itself alone where that cannot be told."""
    try:
        return [each for each in local_modules(script) if each.is_relative_to(script.parent)]
    except Exception:  # it is no Python, say; whoever runs it is told
        return [script]


def _git(folder: str) -> dict[str, Any]:
    """The commit of the repository around a folder; nothing where there is none, or no git."""
    try:
        # A repository may name a program as its file monitor, which git would start.
        told = subprocess.run(
            ["git", "-C", folder, "-c", "core.fsmonitor=false", "rev-parse", "HEAD", "--show-toplevel"],
            capture_output=True, text=True, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if told.returncode != 0:
            return {}
        commit, top = told.stdout.splitlines()[:2]
        changed = subprocess.run(
            ["git", "-C", folder, "-c", "core.fsmonitor=false", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    return {"commit": commit, "repository": top, "dirty": bool(changed.stdout.strip()) or changed.returncode != 0}


@cache
def environment() -> Mapping[str, Any]:
    """What the training runs in: ``python``, ``platform``, ``packages`` (name to version) with their hash, ``tally``,
    ``processors``."""
    # Ray, once imported, puts what it carries for itself on the path.
    own = (each for each in distributions() if "thirdparty_files" not in str(each.locate_file("")))
    packages = {each.name.lower(): each.version for each in own if each.name}
    listed = "\n".join(f"{name}=={version}" for name, version in sorted(packages.items()))
    return {
        "python": platform.python_version(), "platform": platform.platform(), "host": platform.node(),
        "processors": os.cpu_count(), "tally": shown(), "packages": dict(sorted(packages.items())),
        "packages_hash": f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}",
    }  # fmt: skip


def data(place: str | Path) -> dict[str, Any]:
    """What a run was trained from: a file's or a folder's ``place``, ``hash`` of names and content, ``bytes``.

    A model of the registry is what its name stands for now. A place that is not here (a bucket's URL) has no hash.
    Raises OSError where a file cannot be read.
    """
    if str(place).startswith("models:/") and (registered := _registered(str(place))) is not None:
        return {**data(registered), "place": str(place)}
    path = Path(place)
    if not path.exists():
        return {"place": mask(str(place))}
    files = list(content_files(path, (".",)) if path.is_dir() else [(path.name, path)])
    digest = content_hash(path) if path.is_dir() else combined([(path.name, known_hash(path))])
    return {
        "place": str(path.absolute()), "hash": digest, "files": len(files),
        "bytes": sum(each.stat().st_size for _, each in files),
    }  # fmt: skip


def _registered(reference: str) -> str | None:
    """The folder of a version of the registry; None where it is not here."""
    from tally.models.registry import open_registry

    try:
        location = open_registry().get(reference).location
    except TallyError:
        return None
    return location if Path(location).exists() else None
