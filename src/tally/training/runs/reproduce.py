"""Doing a run again: its command, where it was given, and what is not as it was then."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tally.errors import RunError
from tally.masking import HIDDEN
from tally.processes import command as tally_command
from tally.training.runs import origin
from tally.training.runs.store import RunRecord


@dataclass(frozen=True, slots=True)
class Recipe:
    """command: the arguments, the program first. folder: where it was given. differences: sentences."""

    command: Sequence[str]
    folder: str
    differences: Sequence[str]

    @property
    def shown(self) -> str:
        """For a shell."""
        typed = origin.typed(self.command)
        return typed if self.folder == os.getcwd() else f"cd {shlex.quote(self.folder)} && {typed}"  # noqa: PTH109

    def start(self) -> int:
        """Run it here; its exit code. Raises RunError."""
        if any(HIDDEN in each for each in self.command):
            raise RunError(
                "the command held a secret, which was not kept", hint=f"Type it yourself, with the secret for {HIDDEN}."
            )
        program, *arguments = self.command
        if program == "tally":
            words = tally_command("tally", *arguments)
        elif program == "python":
            words = [sys.executable, *arguments]
        else:
            words = [program, *arguments]
        try:
            return subprocess.run(words, cwd=self.folder, check=False).returncode
        except OSError as error:
            raise RunError(f"{program} cannot be started in {self.folder}: {error.strerror}") from error


def recipe(record: RunRecord) -> Recipe:
    """How to do a run again. Raises RunError where its command is not known."""
    if not record.command:
        raise RunError(f"run {record.id} was begun in a program whose command is not known (a notebook, say)")
    folder = record.code.get("folder") or os.getcwd()  # noqa: PTH109
    return Recipe(list(record.command), folder, list(_differences(record)))


def _differences(record: RunRecord) -> Iterator[str]:
    if not Path(record.code.get("folder", ".")).is_dir():
        yield f"the folder {record.code['folder']} is not here"
    if "file" in record.code:
        yield from _of_code(record.code)
    for name, then in record.data.items():
        if "hash" not in then:
            continue
        try:
            now: dict[str, Any] = origin.data(then["place"])
        except OSError as error:
            yield f"data {name}: {then['place']} cannot be read ({error.strerror})"
            continue
        if "hash" not in now:
            yield f"data {name}: there is no {then['place']}"
        elif now["hash"] != then["hash"]:
            yield f"data {name}: {then['place']} has other content"
    before, here = record.environment, origin.environment()
    for what in ("python", "platform", "tally"):
        if what in before and before[what] != here[what]:
            yield f"{what}: {before[what]} then, {here[what]} now"
    packages = before.get("packages") or here["packages"]
    changed = sorted(
        f"{name} {packages.get(name, '-')} -> {here['packages'].get(name, '-')}"
        for name in packages.keys() | here["packages"].keys()
        if packages.get(name) != here["packages"].get(name)
    )
    if changed:
        yield f"{len(changed):,} packages: {', '.join(changed[:5])}" + (" ..." if len(changed) > 5 else "")


def _of_code(then: Any) -> Iterator[str]:
    script = Path(then["file"])
    if not script.is_file():
        yield f"the script {script} is not here"
        return
    now = origin.code(script)
    if now["hash"] == then["hash"]:
        return
    commit = f"; it was commit {then['commit'][:9]}" if "commit" in then else ""
    yield f"the code: {script}, or a module beside it that it imports, has changed{commit}"
