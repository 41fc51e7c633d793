"""The files of one step: a file system of its own, laid over that of this machine, with volumes and artifacts in it.

What a path inside means is the launcher's doing (:mod:`tally.pipelines.steps.launcher`); this is the same seen from
outside: where on this machine a path of a step is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tally.pipelines.steps import launcher

PRIVATE = "/tmp"  # noqa: S108  # a step's own, not the machine's
SCRIPT = "/argo/staging/script"
"""Where a script is put, as on a cluster."""


@cache
def refusal() -> str | None:
    """None if steps can have a file system of their own here; else why not."""
    command = [sys.executable, "-I", "-S", str(Path(launcher.__file__)), "--allowed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip() or (done.stderr.strip()[-300:] if done.returncode else None)


def normal(path: str, folder: str = "/") -> str:
    """A path inside, without dots; a relative one is one of the working folder."""
    return os.path.normpath(os.path.join(folder, path))  # noqa: PTH118


def is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def resolved(path: str) -> str:
    """The path where links of this machine that lead to it are followed: ``/bin/x`` is ``/usr/bin/x``."""
    if is_below(path, PRIVATE) or path == "/":
        return path
    parent, name = os.path.split(path)
    return os.path.join(os.path.realpath(parent), name)  # noqa: PTH118


class Mount(NamedTuple):
    """A folder of this machine, where the step finds it, and whether it only reads it."""

    place: Path
    inside: str
    reads: bool = False


class Room:
    """The folder of a step, whose file system is laid over that of this machine. own: whether it has one of its own."""

    def __init__(self, folder: Path, mounts: Sequence[Mount] = (), *, own: bool = True) -> None:
        self.folder, self.own = folder, own
        self.root = folder / "root"
        self._mounts = sorted(
            (each._replace(inside=self._path(each.inside)) for each in mounts), key=lambda each: each[1]
        )
        self._given: list[str] = []
        self.root.mkdir(parents=True, exist_ok=True)
        if own:
            (self.root / "tmp").mkdir(exist_ok=True)
            for each in self._mounts:
                self.open_up(each.inside)
                (self.root / each.inside[1:]).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def _path(inside: str) -> str:
        return resolved(normal(inside))

    @property
    def binds(self) -> list[tuple[str, str, bool]]:
        return [(str(each.place), each.inside, each.reads) for each in self._mounts]

    @property
    def opaque(self) -> list[str]:
        """Folders that it was given: nothing of the machine's is seen there."""
        return [each for each in self._given if (self.root / each[1:]).is_dir()]

    def open_up(self, inside: str) -> None:
        """Let the folder in which a path is be the step's own, as far as this machine has it; what is in it stays."""
        own = self.root
        for part in Path(self._path(inside)).parts[1:-1]:
            own /= part
            if not (Path("/") / own.relative_to(self.root)).is_dir():
                return
            own.mkdir(exist_ok=True)

    def at(self, inside: str) -> Path:
        """Where a path of the step is on this machine."""
        path = self._path(inside)
        for each in reversed(self._mounts):
            if is_below(path, each.inside):
                return each.place / path[len(each.inside) :].lstrip("/")
        return self.root / path[1:]

    def _make_way(self, inside: str) -> Path:
        """The place of what the step is given there."""
        self.open_up(inside)
        path = self._path(inside)
        if not any(is_below(path, each.inside) for each in self._mounts):
            self._given.append(path)
        target = self.at(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def put(self, source: Path, inside: str) -> None:
        """Copy a file or folder to a path of the step: it may change it."""
        target = self._make_way(inside)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)

    def put_script(self, text: str) -> str:
        """A script that the step runs; its path."""
        target = self._make_way(SCRIPT)
        target.write_text(text, "utf-8")
        target.chmod(0o755)
        return SCRIPT if self.own else str(target)

    def found(self, inside: str) -> Path | None:
        """What the step left at a path; None if there is nothing. Raises ValueError for a link to somewhere else."""
        path = self.at(inside)
        for _ in range(20):
            if not path.is_symlink():
                break
            leads = str(path.readlink())
            path = self.at(normal(leads, os.path.dirname(normal(inside))))  # noqa: PTH120
        real = Path(os.path.realpath(path))
        places = [self.root, *(each.place for each in self._mounts)]
        if path.exists() and not any(is_below(str(real), os.path.realpath(each)) for each in places):
            raise ValueError(f"{inside} is a link to {real}, which is not the step's")
        return real if path.exists() else None

    def forget(self, keep: Sequence[str]) -> None:
        """Remove the empty folders in which the step saw these folders of this machine."""
        for each in keep:
            path = self.root / each[1:]
            while path != self.root / PRIVATE[1:] and path.is_relative_to(self.root):
                try:
                    path.rmdir()
                except OSError:
                    break
                path = path.parent

    def clear(self) -> None:
        """Remove what only the step needed."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(self.folder / "volumes", ignore_errors=True)
