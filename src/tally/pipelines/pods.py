"""Steps that are processes: containers and scripts, and what runs beside them, from beginning to outputs."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tally.errors import SpecError
from tally.jobs.printed import tail
from tally.pipelines import daemons
from tally.pipelines.bindings import Bound, exported
from tally.pipelines.daemons import Daemon, Daemons
from tally.pipelines.document import seconds_of, texts, to_json
from tally.pipelines.options import Keys, Options
from tally.pipelines.preparing import Preparing
from tally.pipelines.progress import WHY, Progress, StopError
from tally.pipelines.steps import containers
from tally.pipelines.steps.artifacts import Artifacts, digest
from tally.pipelines.steps.commands import find_command
from tally.pipelines.steps.containers import ImageRoom
from tally.pipelines.steps.errors import ArtifactError, MissingError
from tally.pipelines.steps.processes import Command, End, Processes, kill_marked
from tally.pipelines.steps.room import Room
from tally.pipelines.store import Node, Phase
from tally.pipelines.values import Values
from tally.pipelines.workflow import Found, Workflow

MOST_RESULT = 256 << 10
"""Bytes of standard output that become a result, as on a cluster."""
MOST_PARAMETER = 256 << 10
LIMITS = ("activeDeadlineSeconds", "timeout")
"""Fields of a template that say how long it may take."""
_MOST_CODE = 64 << 20
_RESULT_OF = re.compile(r"(?:steps|tasks)(?:\.([\w-]+)|\[\s*['\"]([^'\"]+)['\"]\s*\])\.outputs\.result")


@dataclass(slots=True)
class _Pod:
    """A step that is run. folder: of its files. mark: by which its processes are known. captured: whether what it
    prints is for others to use. key: by which its outcome is found again, if it may be."""

    template: Mapping[str, Any]
    container: Mapping[str, Any]
    node: Node
    bound: Bound
    folder: Path
    mark: str
    captured: bool
    key: str | None = None
    room: Room | None = None


class Pods:
    """Runs them. folder: of the run."""

    def __init__(self, progress: Progress, folder: Path, keys: Keys, options: Options, workflow: Workflow) -> None:
        self._progress, self._folder, self._options, self._workflow = progress, folder, options, workflow
        self._artifacts = Artifacts(folder, folder.parent / "repository", keys)
        self._processes = Processes(folder / "launchers")
        self._preparing = Preparing(folder, self._artifacts, keys, options, workflow)
        limit = workflow.spec.get("parallelism")
        self._slots = asyncio.Semaphore(min(int(limit), options.at_once) if limit else options.at_once)
        self._running: set[str] = set()
        self._daemons = Daemons()
        self._sidecars: dict[str, dict[str, asyncio.Task[End]]] = {}
        self._captured = self._names_of_results()

    def _names_of_results(self) -> set[str]:
        """Steps whose standard output is asked for."""
        documents = [self._workflow.main, *self._workflow.libraries.values()]
        found = [match for each in documents for _, text in texts(each.value) for match in _RESULT_OF.findall(text)]
        return {name or quoted for name, quoted in found}

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[None]:
        """While this lasts, processes can be started."""
        async with self._processes:
            yield

    def stop_all(self, *, now: bool) -> None:
        """Ask all processes to end."""
        for each in self._running:
            self._processes.stop(each, now=now)

    async def run(self, found: Found, node: Node, bound: Bound, values: Values, *, captures: str) -> None:
        """Run a template as this node, to its end. captures: the step's name. Raises StopError, ExpressionError."""
        said = (found.kind, *LIMITS, "outputs", "sidecars", "volumes")
        template = {key: values.substituted(each) if key in said else each for key, each in found.template.items()}
        pod = _Pod(
            template, template[found.kind], node, bound, self._folder / "steps" / node.id,
            f"{self._progress.run_id}/{node.id}", captures in self._captured,
        )  # fmt: skip
        async with self._progress.working():
            await self._slots.acquire()
            try:
                if node.phase != "Running":
                    self._progress.check_goes_on()
                await self._attempt(pod)
            finally:
                self._slots.release()

    async def _attempt(self, pod: _Pod) -> None:
        node, daemon = pod.node, pod.template.get("daemon")
        begun = node.phase == "Running"
        known = all(each.keys() & {"hash", "raw"} for each in pod.bound.artifacts.values())
        if known and not daemon and not pod.container.get("volumeMounts"):
            pod.key = await asyncio.to_thread(self._key, pod)
            if not begun and self._progress.uses_cache and self._progress.cached("steps", pod.key, node):
                await self._progress.end(node, "Succeeded", "taken from the cache")
                return
        running = await self._adopted(pod) if begun and pod.folder.exists() else None
        if running is None and (running := await self._begun(pod)) is None:
            return
        if daemon and await daemons.ready(pod.container, running):
            node.outputs = {"ip": daemons.ADDRESS}
            await self._progress.save(node)
            ending = asyncio.create_task(self._ended(pod, running))
            self._daemons.add(Daemon(node.name, functools.partial(self._stop, pod.mark), ending))
            return
        await self._ended(pod, running)

    async def _adopted(self, pod: _Pod) -> asyncio.Task[End | None] | None:
        """The end of what another driver has begun; None if that was lost, and nothing is left of it."""
        running = asyncio.create_task(self._processes.adopt(pod.mark, pod.folder))
        self._running.add(pod.mark)
        if self._progress.stopping is not None:
            await asyncio.sleep(0)  # from then on, it can be asked to end
            self._stop(pod.mark)
        if pod.template.get("daemon") and self._processes.lives(pod.mark, pod.folder):
            return running
        if await running is not None:
            return running
        self._running.discard(pod.mark)
        await asyncio.to_thread(self._remove_containers, pod.mark)
        return None

    async def _begun(self, pod: _Pod) -> asyncio.Task[End | None] | None:
        """Begin a step's processes; None if that was not possible, which its node says."""
        node = pod.node
        node.phase, node.started_at = "Running", time.time()
        limit = limit_of(pod.template, node)
        try:
            if pod.template.get("daemon"):
                await daemons.check_free(pod.container)
            shutil.rmtree(pod.folder, ignore_errors=True)
            room = pod.room = self._preparing.room(pod.template, pod.container, pod.folder)
            if pod.bound.artifacts:
                await asyncio.to_thread(self._preparing.furnish, pod.template, pod.bound, room)
            command = self._preparing.command(pod.template, pod.container, room, pod.mark, limit, captured=pod.captured)
            sidecars = self._sidecar_commands(pod, limit)
        except (MissingError, ArtifactError, SpecError, OSError, daemons.PortError) as error:
            await self._progress.end(node, "Error", error.problems[0] if isinstance(error, SpecError) else str(error))
            shutil.rmtree(pod.folder / "root", ignore_errors=True)
            return None
        await self._progress.save(node)
        self._progress.check_goes_on()
        self._running.add(pod.mark)
        for each in sidecars:
            self._sidecars.setdefault(pod.mark, {})[each.mark] = asyncio.create_task(self._processes.run(each))
        return asyncio.create_task(self._processes.run(command))

    def _sidecar_commands(self, pod: _Pod, limit: float | None) -> list[Command]:
        """What runs beside a step, with its volumes, until it ends. Raises SpecError, OSError."""
        found = []
        for each in pod.template.get("sidecars") or ():
            container = each
            if each.get("mirrorVolumeMounts"):
                mounts = [*pod.container.get("volumeMounts", ()), *each.get("volumeMounts", ())]
                container = {**each, "volumeMounts": mounts}
            room = self._preparing.room(pod.template, container, pod.folder / "sidecars" / each["name"], pod=pod.folder)
            own = {key: value for key, value in pod.template.items() if key != "outputs"}
            found.append(
                self._preparing.command(own, container, room, f"{pod.mark}/{each['name']}", limit, captured=False)
            )
        return found

    async def _end_sidecars(self, pod: _Pod) -> None:
        if not pod.template.get("sidecars"):
            return
        sidecars = self._sidecars.pop(pod.mark, None)
        if sidecars is None:  # another driver has begun them
            kill_marked(f"{pod.mark}/", prefix=True)
            await asyncio.to_thread(self._remove_containers, f"{pod.mark}/", prefix=True)
        for each in sidecars or ():
            self._stop(each)
        await asyncio.gather(*(sidecars or {}).values(), return_exceptions=True)
        for room in (pod.folder / "sidecars").glob("*"):
            shutil.rmtree(room / "root", ignore_errors=True)

    def _remove_containers(self, mark: str, *, prefix: bool = False) -> None:
        if self._options.podman:
            containers.remove(mark, prefix=prefix)

    def _stop(self, mark: str) -> None:
        self._processes.stop(mark)

    async def end_daemons(self, inside: str = "") -> None:
        """End daemons that were begun inside of a node, by its name; all, if none is given."""
        await self._daemons.end(inside)

    async def _ended(self, pod: _Pod, running: asyncio.Task[End | None]) -> None:
        """Wait for a process's end, and see what it has left. Raises StopError."""
        try:
            end = await running
        finally:
            self._running.discard(pod.mark)
            if self._progress.stopping != "lost":
                await self._end_sidecars(pod)
        if self._progress.interrupted and (end is None or (end.code != 0 and not end.late)):
            for name in ("exit", "pid"):  # it did not end by itself: it is run again
                (pod.folder / name).unlink(missing_ok=True)
            raise StopError("interrupt")
        if self._progress.stopping == "lost":
            raise StopError("lost")
        room = pod.room or self._preparing.room(pod.template, pod.container, pod.folder)
        room.forget(self._preparing.keep)
        if pod.template.get("daemon") and pod.node.outputs.get("ip"):
            await self._progress.end(pod.node, "Succeeded")
        elif end is not None:
            await self._collect(pod, room, end)
        await asyncio.to_thread(room.clear)

    async def _collect(self, pod: _Pod, room: Room, end: End) -> None:
        """See what the step has left, and say how it ended."""
        node = pod.node
        node.exit_code = end.code if end.code >= 0 else 128 - end.code
        phase: Phase = "Succeeded"
        message = None
        if end.error:
            phase, message = "Error", end.error
        elif end.late:
            phase, message = "Failed", "Pod was active on the node longer than the specified deadline"
        elif self._progress.stopping in WHY and end.code != 0:
            phase, message = "Failed", f"stopped: {WHY[self._progress.stopping]}"
        elif isinstance(room, ImageRoom) and end.code == containers.FAILED:
            phase, message = "Error", f"podman: {_last_line(pod.folder / 'log') or 'it could not run the container'}"
        elif end.code != 0:
            killed = f": killed by signal {-end.code}" if end.code < 0 else ""
            phase, message = "Failed", f"Error (exit code {node.exit_code}){killed}"
        outputs = _Outputs(self._artifacts, pod, room, needed=phase == "Succeeded")
        try:
            await asyncio.to_thread(outputs.collect)
        except (ArtifactError, OSError) as error:
            if phase == "Succeeded":
                phase, message = "Error", str(error)
        node.outputs = outputs.found
        if phase == "Succeeded":
            message = outputs.remark
            if pod.key is not None:
                self._progress.remember("steps", pod.key, node)
        await self._progress.end(node, phase, message)

    def _key(self, pod: _Pod) -> str:
        """A hash of command, inputs and code: a step with the same has the same outcome."""
        template, container = pod.template, pod.container
        code: dict[str, str] = {}
        venv = self._options.venvs.get(template.get("name", ""))
        if self._options.in_image(template):
            image = containers.image(container["image"])
            code["(image)"] = image.id if image is not None else ""
        else:
            code |= _code_of(container, venv)
        artifacts = {
            name: each.get("hash") or {key: value for key, value in each.items() if key != "at"}
            for name, each in pod.bound.artifacts.items()
        }
        said = {
            key: container[key]
            for key in ("command", "args", "source", "env", "envFrom", "workingDir", "image")
            if key in container
        }
        whole = {"container": said, "parameters": dict(pod.bound.parameters), "artifacts": artifacts,
                 "subPaths": {name: each.get("subPath") for name, each in pod.bound.artifacts.items()},
                 "inputs": (template.get("inputs") or {}).get("artifacts", []),
                 "outputs": template.get("outputs") or {}, "captured": pod.captured,
                 "code": code, "venv": venv}  # fmt: skip
        return hashlib.sha256(to_json(json.loads(json.dumps(whole, default=str))).encode()).hexdigest()


class _Outputs:
    """What one step leaves. found: that; remark: what is to be said of it. needed: whether all has to be there."""

    def __init__(self, artifacts: Artifacts, pod: _Pod, room: Room, *, needed: bool) -> None:
        self._artifacts, self._pod, self._room, self._needed = artifacts, pod, room, needed
        self.found: dict[str, Any] = {}
        self.remark: str | None = None

    def collect(self) -> None:
        """Raises ArtifactError, OSError."""
        if isinstance(self._room, ImageRoom) and (lost := self._room.lost()) is not None:
            raise ArtifactError(f"an output cannot be copied: {lost}")
        declared = self._pod.template.get("outputs") or {}
        parameters: dict[str, str] = {}
        artifacts: dict[str, Any] = {}
        if self._pod.captured:
            self.found["result"] = self._result()
        for each in declared.get("parameters", ()):
            if (value := self._parameter(each)) is not None:
                parameters[each["name"]] = value
        for each in declared.get("artifacts", ()):
            try:
                artifacts[each["name"]] = self._artifacts.keep(each, self._room, self._pod.node.id)
            except MissingError as error:
                if self._needed and not each.get("optional"):
                    raise ArtifactError(str(error)) from None
        self.found |= {
            "parameters": parameters, "artifacts": artifacts, "globals": exported(declared, parameters, artifacts)
        }  # fmt: skip

    def _result(self) -> str:
        """The end of what it has printed, as on a cluster."""
        try:
            with (self._room.folder / "stdout").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - MOST_RESULT))
                printed = file.read()
        except FileNotFoundError:
            return ""
        if size > MOST_RESULT:
            self.remark = f"its result is the last {MOST_RESULT >> 10} KiB of {size >> 10} KiB that it has printed"
        return _checked("the result", printed.decode("utf-8", "replace").removesuffix("\n"))

    def _parameter(self, wanted: Mapping[str, Any]) -> str | None:
        what, source = f"the parameter {wanted['name']!r}", wanted.get("valueFrom") or {}
        if "path" not in source:
            return str(wanted.get("value", source.get("default", "")))
        try:
            path = self._room.found(source["path"])
        except ValueError as error:
            raise ArtifactError(str(error)) from None
        if path is None:
            if "default" in source:
                return str(source["default"])
            if self._needed:
                raise ArtifactError(f"{what}: the step left no file {source['path']}")
            return None
        if not path.is_file():
            raise ArtifactError(f"{what}: {source['path']} is no file")
        if path.stat().st_size > MOST_PARAMETER:
            raise ArtifactError(f"{what} is longer than {MOST_PARAMETER >> 10} KiB")
        try:
            return _checked(what, path.read_text("utf-8").removesuffix("\n"))
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{what} is not UTF-8 text (byte {error.start} of {source['path']})") from None


def _checked(what: str, text: str) -> str:
    if "\0" in text:
        raise ArtifactError(f"{what} has a character NUL, which no text of a workflow can hold")
    return text


def _last_line(file: Path) -> str:
    with suppress(OSError):
        if lines := tail(file, 1):
            return lines[-1]
    return ""


def limit_of(template: Mapping[str, Any], node: Node) -> float | None:
    """When a step has to be over, in seconds since the epoch."""
    limits = []
    if (seconds := template.get("activeDeadlineSeconds")) is not None:
        limits.append(float(seconds))
    if timeout := template.get("timeout"):
        limits.append(seconds_of(timeout))
    return (node.started_at or time.time()) + min(limits) if limits else None


def _code_of(container: Mapping[str, Any], venv: str | None) -> dict[str, str]:
    """The files on a command line, by their content."""
    code: dict[str, str] = {}
    for each in [*container.get("command", ()), *container.get("args", ())]:
        with suppress(OSError, ValueError):
            path = Path(each if "/" in each or not code else "")
            if path.is_absolute() and path.is_file() and path.stat().st_size <= _MOST_CODE:
                code[each] = digest(path)
    where = find_command((container.get("command") or [""])[0], venv)
    if where is not None:
        from tally.version import shown

        status = os.stat(where)  # noqa: PTH116
        code["(command)"] = f"{os.path.realpath(where)} {status.st_size} {status.st_mtime_ns} {shown()}"
    return code
