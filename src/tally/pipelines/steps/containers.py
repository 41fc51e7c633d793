"""Steps that run in their images: what podman is asked for.

A container has the files of its image, and what the template mounts; what it leaves at the paths of its outputs is
copied out of it before it is removed. It has the network of this machine, as other steps do: they reach each other.
The launcher starts the client of podman, holds it to its limits, and removes the container whatever became of it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tally.errors import PipelineError
from tally.pipelines.steps import room
from tally.pipelines.steps.launcher import MARK
from tally.pipelines.steps.room import is_below, normal

PODMAN = "podman"
FAILED = 125
"""The exit code with which podman says that it could not run the container."""
_NOT_THERE = "could not be found on container"
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Image:
    """An image of this machine. runs: whether it has a command of its own."""

    id: str
    runs: bool


def refusal() -> str | None:
    """None if there is podman here; else why not."""
    return None if shutil.which(PODMAN) else f"there is no command {PODMAN!r} on this machine"


def image(name: str) -> Image | None:
    """None if it is not on this machine. Nothing is fetched."""
    done = _asked("image", "inspect", name)
    if done.returncode:
        return None
    (found,) = json.loads(done.stdout)
    config = found.get("Config") or {}
    return Image(found["Id"], bool(config.get("Entrypoint") or config.get("Cmd")))


def how_to_fetch(name: str) -> str:
    """The command that fetches an image from where a cluster would: Docker Hub, if the name says no place."""
    first, _, rest = name.partition("/")
    if not rest:
        name = f"docker.io/library/{name}"
    elif not ("." in first or ":" in first or first == "localhost"):
        name = f"docker.io/{name}"
    return f"{PODMAN} pull {name}"


def remove(mark: str, *, prefix: bool = False) -> None:
    """Remove the container of a step, by its mark; prefix: of all whose marks begin so. Their processes end."""
    listed = _asked("ps", "--all", "--format", f'{{{{.ID}}}} {{{{index .Labels "{MARK}"}}}}')
    found = [line.partition(" ") for line in listed.stdout.splitlines()]
    ids = [each for each, _, its in found if its == mark or (prefix and its.startswith(mark))]
    if ids:
        _asked("rm", "--force", "--time=0", "--volumes", "--ignore", *ids)


def _asked(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([PODMAN, *words], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PipelineError(f"podman has not answered for {_SECONDS:g} s: {PODMAN} {' '.join(words[:2])}") from None


class ImageRoom(room.Room):
    """The files of a step in its image. What it is given is mounted; its outputs are there once it has ended."""

    def __init__(self, folder: Path, mounts: Sequence[room.Mount] = ()) -> None:
        super().__init__(folder, mounts, own=False)
        self.own = True

    @staticmethod
    def _path(inside: str) -> str:
        return normal(inside)

    def open_up(self, inside: str) -> None:
        """The image's folders are its own."""

    @property
    def binds(self) -> list[tuple[str, str, bool]]:
        return [*super().binds, *((str(self.root / each[1:]), each, False) for each in self._given)]

    def to_copy(self, outputs: Iterable[str]) -> list[str]:
        """Those of these paths that are in the container itself."""
        held = [inside for _, inside, _ in self.binds]
        return [each for each in outputs if not any(is_below(normal(each), inside) for inside in held)]

    def clear(self) -> None:
        super().clear()
        for name in ("env", "lost"):
            (self.folder / name).unlink(missing_ok=True)

    def lost(self) -> str | None:
        """Why an output that is there could not be copied, if so."""
        try:
            lines = (self.folder / "lost").read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return None
        return next((line for line in lines if line and _NOT_THERE not in line), None)


def name_of(mark: str) -> str:
    return "tally-" + mark.replace("/", "-")


def run(
    mark: str, room: ImageRoom, image: str, words: Sequence[str], *, entry: Sequence[str], workdir: str | None,
    shares: Sequence[str],
) -> list[str]:  # fmt: skip
    """The command of podman that runs a container. entry: in place of the image's. The environment is in the room's
    file ``env``, and seen by nobody else."""
    argv = [
        PODMAN, "run", f"--name={name_of(mark)}", "--replace", f"--label={MARK}={mark}", "--pull=never",
        "--network=host", "--init", "--log-driver=none", "--security-opt=label=disable",
        f"--env-file={room.folder / 'env'}",
    ]  # fmt: skip
    for place, inside, reads in [*room.binds, *((each, each, False) for each in shares)]:
        fields = ["type=bind", f"source={place}", f"destination={inside}", *(["readonly"] if reads else [])]
        argv.append("--mount=" + ",".join('"' + each.replace('"', '""') + '"' for each in fields))
    if workdir is not None and workdir != "/":
        # As on a cluster, it need not be there: a volume takes over what the image has in it.
        held = any(is_below(workdir, inside) for _, inside, _ in room.binds)
        argv += [f"--workdir={workdir}", *([] if held else [f"--volume={workdir}"])]
    if entry:
        argv.append("--entrypoint=" + json.dumps(list(entry)))
    return [*argv, image, *words]


def write_environment(room: ImageRoom, values: Mapping[str, str]) -> dict[str, str]:
    """Write a container's environment where only podman reads it. Values of several lines, which the file cannot hold,
    are returned: podman takes them from its own environment. Raises ValueError for those that would change it."""
    lines, passed = [], {}
    for name, value in values.items():
        if "\n" not in value and "\r" not in value:
            lines.append(f"{name}={value}")
        elif name in os.environ:
            raise ValueError(f"the variable {name} has several lines, and is one of this machine's own")
        else:
            lines.append(name)
            passed[name] = value
    path = room.folder / "env"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return passed


def after(mark: str, room: ImageRoom, outputs: Iterable[str]) -> list[str]:
    """The command that copies outputs out of a container that has ended, and removes it."""
    name, lost = name_of(mark), shlex.quote(str(room.folder / "lost"))
    lines = [f"rm -f {shlex.quote(str(room.folder / 'env'))}"]
    for each in room.to_copy(outputs):
        target = room.at(each)
        lines.append(
            f"mkdir -p {shlex.quote(str(target.parent))} && {PODMAN} cp {shlex.quote(f'{name}:{normal(each)}')}"
            f" {shlex.quote(str(target))} 2>>{lost} || rm -rf {shlex.quote(str(target))}"
        )
    lines.append(f"{PODMAN} rm --force --time=0 --volumes --ignore {name}")
    return ["/bin/sh", "-c", "\n".join(lines)]
