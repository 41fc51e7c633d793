"""Azure's own command line."""

from __future__ import annotations

import shutil
import subprocess

from tally.errors import DeployError, SpecError

_SECONDS = 600


def az(*words: str) -> str:
    """What a command of it answers, as JSON. Raises SpecError where there is none, DeployError."""
    program = shutil.which("az")
    if program is None:
        raise SpecError(
            "there is no 'az' on the PATH",
            hint="Install the Azure CLI and log in (az login), or write the file: --out FOLDER",
        )
    what = " ".join(("az", *words[:2]))
    try:
        done = subprocess.run(
            [program, *words, "--output", "json", "--only-show-errors"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DeployError(f"{what} has not answered for {_SECONDS} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-1000:] or f"exit code {done.returncode}"
        hint = "Log in again: az login" if "az login" in said else None
        raise DeployError(f"{what} failed: {said}", hint=hint)
    return done.stdout
