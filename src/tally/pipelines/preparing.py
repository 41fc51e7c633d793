"""What a step is begun with: its volumes, artifacts and environment, and the command that the launcher is asked for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tally import processes
from tally.errors import SpecError
from tally.pipelines.bindings import Bound
from tally.pipelines.options import Keys, Options
from tally.pipelines.steps import containers
from tally.pipelines.steps import room as rooms
from tally.pipelines.steps.artifacts import Artifacts
from tally.pipelines.steps.commands import OURS, find_command, search_path
from tally.pipelines.steps.containers import ImageRoom
from tally.pipelines.steps.errors import ArtifactError, MissingError
from tally.pipelines.steps.processes import Command
from tally.pipelines.steps.room import Mount, Room
from tally.pipelines.workflow import Workflow

_REFERENCE = re.compile(r"\$(?:\$|\(([^)]*)\))")


class Preparing:
    """Prepares the steps of one run. folder: of the run."""

    def __init__(self, folder: Path, artifacts: Artifacts, keys: Keys, options: Options, workflow: Workflow) -> None:
        self._folder, self._artifacts, self._keys = folder, artifacts, keys
        self._options, self._workflow = options, workflow
        self._own_files = rooms.refusal() is None
        # An environment may lie anywhere: also that of Tally, whose commands steps may name.
        seen = (*options.shares, *options.venvs.values(), sys.prefix, str(folder.parent.parent))
        self.keep = [path for path in map(os.path.realpath, seen) if rooms.is_below(path, rooms.PRIVATE)]
        """Folders below /tmp that processes of this machine see."""

    def room(
        self, template: Mapping[str, Any], container: Mapping[str, Any], folder: Path, *, pod: Path | None = None
    ) -> Room:
        """The step's files. pod: the folder of the step beside which it is. Raises SpecError, OSError."""
        own = {each["name"]: each for each in template.get("volumes") or ()}
        whole = {each["name"]: each for each in self._workflow.spec.get("volumes") or ()}
        mounts: list[Mount] = []
        for each in container.get("volumeMounts", ()):
            volume = own.get(each["name"]) or whole.get(each["name"]) or {}
            place = self._place(each["name"], volume, pod or folder)
            of_keys = self._fill(volume, place)
            if sub := each.get("subPath"):
                inner = Path(os.path.realpath(place / rooms.normal("/" + sub)[1:]))
                if not inner.is_relative_to(os.path.realpath(place)):
                    raise SpecError(f"the subPath {sub!r} of the volume {each['name']!r} leads out of it, to {inner}")
                place = inner
                if not place.exists():
                    place.mkdir(parents=True)
            mounts.append(Mount(place, each["mountPath"], bool(each.get("readOnly")) or of_keys))
        if self._options.in_image(template):
            return ImageRoom(folder, mounts)
        return Room(folder, mounts, own=self._own_files)

    def _place(self, name: str, volume: Mapping[str, Any], pod: Path) -> Path:
        """The folder of a volume."""
        claim = (volume.get("persistentVolumeClaim") or {}).get("claimName", "")
        given = self._options.volumes.get(name) or self._options.volumes.get(claim)
        if given is not None:
            return Path(given).absolute()
        templates = self._workflow.spec.get("volumeClaimTemplates") or ()
        of_run = not volume and any((each.get("metadata") or {}).get("name") == name for each in templates)
        place = (self._folder if of_run else pod) / "volumes" / name
        if not place.exists():
            place.mkdir(parents=True)
            place.chmod(0o777)
        return place

    def _fill(self, volume: Mapping[str, Any], place: Path) -> bool:
        """Write the keys of a Secret or ConfigMap, if the volume is one."""
        for kind, of in (("secret", "Secret"), ("configMap", "ConfigMap")):
            if kind in volume:
                name = volume[kind].get("secretName") or volume[kind].get("name", "")
                place.chmod(0o755)
                for key, value in self._keys.all(of, name).items():
                    (place / key).write_text(value, "utf-8")
                return True
        return False

    def furnish(self, template: Mapping[str, Any], bound: Bound, room: Room) -> None:
        """Give a step its artifacts. Raises ArtifactError, OSError."""
        for number, each in enumerate((template.get("inputs") or {}).get("artifacts", ())):
            if each["name"] not in bound.artifacts:
                continue
            scratch = room.folder / f"scratch{number}"
            try:
                self._artifacts.give(bound.artifacts[each["name"]], each["path"], room, scratch)
            except MissingError as error:
                if not each.get("optional"):
                    raise ArtifactError(f"the artifact {each['name']!r}: {error}") from None
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def command(
        self,
        template: Mapping[str, Any],
        container: Mapping[str, Any],
        room: Room,
        mark: str,
        limit: float | None,
        *,
        captured: bool,
    ) -> Command:
        """What the launcher is asked for. captured: whether what it prints is for others to use. Raises SpecError."""
        said = self._environment(container)
        entry, words = ([_expanded(each, said) for each in container.get(key, ())] for key in ("command", "args"))
        if container.get("source"):
            words = [*words, room.put_script(container["source"])]
        stdout = room.folder / "stdout" if captured else None
        workdir = rooms.normal(container["workingDir"]) if container.get("workingDir") else None
        if isinstance(room, ImageRoom):
            try:
                passed = containers.write_environment(room, said)
            except ValueError as error:
                raise SpecError(str(error)) from None
            argv = containers.run(
                mark, room, container["image"], words, entry=entry, workdir=workdir, shares=self._options.shares
            )
            after = containers.after(mark, room, output_paths(template))
            return Command(mark, room.folder, argv, os.environ | passed, "/", root=False, limit=limit, stdout=stdout,
                           after=after)  # fmt: skip
        venv = self._options.venvs.get(template.get("name", ""))
        env = dict(os.environ)  # its user's: a step may be another command of this Tally
        env["PATH"] = search_path(venv, self._own_commands)
        if venv:
            env["VIRTUAL_ENV"] = str(Path(venv).absolute())
        env |= said
        if find_command(entry[0], venv) is None and not room.at(entry[0]).exists():
            raise SpecError(f"there is no command {entry[0]!r} on this machine")
        cwd = workdir or "/"
        if cwd != "/" and room.own:
            room.open_up(cwd + "/.")
            if not Path(cwd).is_dir():
                room.at(cwd).mkdir(parents=True, exist_ok=True)
        return Command(
            mark, room.folder, [*entry, *words], env, cwd if room.own else str(room.root), room.own, room.binds,
            self.keep, room.opaque, limit, stdout,
        )  # fmt: skip

    @cached_property
    def _own_commands(self) -> Path:
        """A folder in which ``tally`` is this one."""
        folder = self._folder / "bin"
        command = folder / OURS
        if not command.exists():
            folder.mkdir(exist_ok=True)
            words = shlex.join([sys.executable, processes.SAFE_PATH, "-m", "tally"])
            command.write_text(f'#!/bin/sh\nexec {words} "$@"\n', "utf-8")
            command.chmod(0o755)
        return folder

    def _environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        """What the template says of it. Raises SpecError."""
        env: dict[str, str] = {}
        for each in container.get("envFrom", ()):
            for key, of in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in each:
                    try:
                        found = self._keys.all(of, each[key].get("name", ""))
                    except SpecError:
                        if not each[key].get("optional"):
                            raise
                        continue
                    env |= {each.get("prefix", "") + name: value for name, value in found.items()}
        named: dict[str, str] = {}
        for each in container.get("env", ()):
            source = each.get("valueFrom") or {}
            reference = source.get("secretKeyRef") or source.get("configMapKeyRef")
            if reference is None:
                named[each["name"]] = _expanded(each.get("value", ""), named)
                continue
            try:
                named[each["name"]] = self._keys.get(
                    "Secret" if "secretKeyRef" in source else "ConfigMap", reference["name"], reference["key"]
                )
            except SpecError:
                if not reference.get("optional"):
                    raise
        return env | named


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """As Kubernetes reads commands, arguments and variables: ``$(NAME)`` is a variable that was said before, if there
    is one, and ``$$`` is ``$``."""
    return _REFERENCE.sub(lambda match: "$" if match[1] is None else variables.get(match[1], match[0]), text)


def output_paths(template: Mapping[str, Any]) -> list[str]:
    """Where a step is to leave what it puts out."""
    outputs = template.get("outputs") or {}
    found = [(each.get("valueFrom") or {}).get("path") for each in outputs.get("parameters", ())]
    found += [each.get("path") for each in outputs.get("artifacts", ())]
    return list(dict.fromkeys(each for each in found if each))
