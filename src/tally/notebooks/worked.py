"""The worked notebooks that come with Tally: copied to where the user works, and opened in JupyterLab."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tally.errors import SpecError
from tally.storage import failure
from tally.storage.publish import write_whole

SHIPPED = Path(__file__).parent / "worked"


def copy(folder: Path) -> list[str]:
    """Put the notebooks into a folder, which may be missing; the names of those that were not there. Those that are
    there stay as they are. Raises StorageError."""
    copied = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for notebook in sorted(SHIPPED.glob("*.ipynb")):
            if not (folder / notebook.name).exists():
                write_whole(folder / notebook.name, notebook.read_bytes())
                copied.append(notebook.name)
    except OSError as error:
        raise failure("write", str(folder), error) from error
    return copied


def check_installed() -> None:
    """Raises SpecError where JupyterLab, or what figures are drawn with, is missing."""
    missing = [name for name in ("jupyterlab", "ipykernel", "matplotlib") if find_spec(name) is None]
    if missing:
        raise SpecError(
            f"notebooks need {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint="pip install 'tally-scoring[notebook]'",
        )


def open_lab(folder: Path, arguments: Sequence[str] = ()) -> None:
    """Become JupyterLab, in this folder. Commands of this installation are found in its notebooks."""
    here = os.path.dirname(sys.executable)  # noqa: PTH120 - links stay: that of a venv says which one it is
    os.environ["PATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PATH")])])
    os.environ.setdefault("COLUMNS", "160")  # of what commands print there: a notebook has no other width
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder.resolve()}", *arguments]
    os.execv(sys.executable, command)  # noqa: S606
