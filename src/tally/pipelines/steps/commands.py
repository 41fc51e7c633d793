"""Commands of steps: where they are on this machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

OURS = "tally"
"""The command that is this Tally, also where another is on the path."""
_SHELLS = ("sh", "bash", "dash", "ash", "zsh", "ksh")
_NO_COMMANDS = """
    . : [ [[ alias break case cd command continue declare do done echo elif else esac eval exec exit export false fi for
    function getopts hash if in let local printf pwd read return select set shift source test then time times trap true
    type typeset ulimit umask unset until wait while
"""
_OF_SHELLS = frozenset(_NO_COMMANDS.split())
"""Words that are no commands of the machine, or need not be."""


def find_command(name: str, venv: str | None) -> str | None:
    """Where a command is; None if it is not on this machine. ``tally`` is this one, wherever it is."""
    if "/" in name:
        return name if os.access(name, os.X_OK) and not Path(name).is_dir() else None
    return shutil.which(name, path=search_path(venv)) or (sys.executable if name == OURS else None)


def search_path(venv: str | None, first: Path | None = None) -> str:
    """Where commands are looked for: a virtual environment, the user's own path, and where Tally's Python is."""
    before = [str(Path(venv).absolute() / "bin")] if venv else []
    before += [str(first)] if first is not None else []
    return os.pathsep.join([*before, os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def missing(words: Sequence[str], venv: str | None) -> str | None:
    """The first of these words' commands that is not on this machine: itself, and that of a shell's script."""
    commands = (words[0], _first_of_script(words))
    return next((each for each in commands if each is not None and find_command(each, venv) is None), None)


def _first_of_script(words: Sequence[str]) -> str | None:
    """The first command of a shell's script, if it is written out: that of most others is not known before."""
    if Path(words[0]).name not in _SHELLS:
        return None
    flags = [number for number, each in enumerate(words[1:-1], 1) if re.fullmatch(r"-[a-zA-Z]*c", each)]
    if not flags:
        return None
    match = re.match(r"(?:\s|#[^\n]*\n)*([A-Za-z0-9_./+-]+)(?=[\s;&|]|$)", words[flags[0] + 1])
    return match[1] if match and match[1] not in _OF_SHELLS else None
