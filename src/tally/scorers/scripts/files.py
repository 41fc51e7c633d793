"""Files that are kept under a model's name and version for a scoring script; they score nothing alone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tally.errors import ModelLoadError
from tally.models import kinds
from tally.models.base import Kind
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer

MARKER = "tally-files.json"
"""Makes a folder one of files; it lists them."""


class FilesKind(Kind):
    """Files for ``--artifacts models:/NAME``."""

    def create(self, ref: ModelRef) -> Scorer:
        uri = f"models:/{ref.name}" if ref.version is None else f"models:/{ref.name}/{ref.version}"
        raise ModelLoadError(
            f"{ref.name} holds files for a scoring script, and nothing that scores",
            hint=f"Give it to the script that reads them: --model score.py --artifacts {uri}",
        )


def is_no_model(place: Path) -> bool:
    """Whether it is no model that is opened without running what it carries: a pickle, weights, a folder of such."""
    if place.is_dir():
        return not (place / "tally.yaml").is_file() and kinds.marker_in(place) is None
    traits = kinds.claiming(place.name)
    return traits is None or not traits.scores or place.name.lower().endswith((*traits.pickles, *traits.weights))


@contextmanager
def as_package(place: Path) -> Iterator[Path]:
    """A folder with the file, or with the folder, that is a model of this kind; it is removed at the end.

    Its files are links, if the file system allows that.
    """
    if place.name in ("", ".."):
        place = place.resolve()
    with tempfile.TemporaryDirectory(prefix="tally-") as made:
        folder = Path(made)
        if place.is_dir():
            shutil.copytree(place, folder / place.name, copy_function=link_or_copy)
        else:
            link_or_copy(place, folder / place.name)
        names = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())
        (folder / MARKER).write_text(json.dumps(names), "utf-8")
        yield folder


def link_or_copy(source: str | Path, to: str | Path) -> None:
    """A second name for a file's content, or a copy where the file system has no such. Raises OSError."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
