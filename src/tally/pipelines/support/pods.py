"""Templates that are processes: their commands or images, paths, volumes and environments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tally.errors import SpecError
from tally.pipelines.daemons import PROBES, port_of
from tally.pipelines.document import Where, to_json
from tally.pipelines.options import Keys, Options
from tally.pipelines.steps import containers, room
from tally.pipelines.steps.commands import missing
from tally.pipelines.steps.room import is_below, normal
from tally.pipelines.support.fields import CONTAINER
from tally.pipelines.support.names import Names
from tally.pipelines.support.passing import Passing
from tally.pipelines.support.report import Findings
from tally.pipelines.values import Values
from tally.text import did_you_mean

_PROBE = {*PROBES, "initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"}
_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")


class Pods:
    """spec: of the workflow. values: those that are known before it runs."""

    def __init__(
        self,
        say: Findings,
        names: Names,
        passing: Passing,
        keys: Keys,
        options: Options,
        spec: Mapping[str, Any],
        values: Values,
    ) -> None:
        self._say, self._names, self._passing, self._keys = say, names, passing, keys
        self._options, self._spec, self._values = options, spec, values
        self._no_own_files = room.refusal()
        self._images: dict[str, containers.Image | None] = {}
        self.unused_images: set[str] = set()
        """Images in whose place there is this machine."""

    def check(self, template: Mapping[str, Any], kind: str, names: set[str]) -> None:
        container = template[kind]
        self.volumes(template.get("volumes") or (), ("volumes",))
        if template.get("daemon"):
            self._daemon(template, container, kind)
            container = {key: each for key, each in container.items() if key != "readinessProbe"}
        self._container(template, container, (kind,), names)
        for number, each in enumerate(template.get("sidecars") or ()):
            its = {key: value for key, value in each.items() if key != "mirrorVolumeMounts"}
            self._say.named(each["name"], ("sidecars", number))
            self._container(template, its, ("sidecars", number), names)
            if template.get("daemon"):
                self._say.no(("sidecars", number), "a daemon with it is not run here")
        self._paths(template, container)

    def _container(
        self, template: Mapping[str, Any], container: Mapping[str, Any], where: Where, names: set[str]
    ) -> None:
        self._say.fields(container, CONTAINER, where)
        self._names.tags({key: value for key, value in container.items() if key in CONTAINER.done}, where, names)
        in_image = self._options.in_image(template)
        (self._image if in_image else self._command)(template, container, where)
        for number, each in enumerate(container.get("env", ())):
            self._variable(each, (*where, "env", number))
        for number, each in enumerate(container.get("envFrom", ())):
            for key, of in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in each and not each[key].get("optional"):
                    self._keys_of(of, each[key].get("name", ""), (*where, "envFrom", number))
        own_files = None if in_image else self._no_own_files
        known = {each["name"] for each in [*(self._spec.get("volumes") or ()), *(template.get("volumes") or ())]}
        known |= {(each.get("metadata") or {}).get("name", "") for each in self._spec.get("volumeClaimTemplates") or ()}
        for number, each in enumerate(container.get("volumeMounts", ())):
            place: Where = (*where, "volumeMounts", number)
            if each.get("name") not in known:
                self._say.no(
                    place, f"there is no volume {each.get('name')!r}{did_you_mean(each.get('name', ''), known)}"
                )
            self._say.supported(each, {"name", "mountPath", "subPath", "readOnly"}, place)
            if own_files is not None:
                self._say.no(place, f"{each.get('mountPath')} needs a file system of the step's own: {own_files}")
            elif normal(each.get("mountPath", "/")) == "/":
                self._say.no(place, "a volume cannot take the place of /")
        if "workingDir" in container and own_files is not None:
            self._say.no((*where, "workingDir"), f"needs a file system of the step's own: {own_files}")

    def _command(self, template: Mapping[str, Any], container: Mapping[str, Any], where: Where) -> None:
        command = container.get("command") or []
        image = self._values.text(container.get("image", ""), only_known=True)
        self.unused_images.add(image)
        if not command:
            what = f"is not given: what the image {image!r} runs by itself is known on a cluster, and with --podman"
            self._say.no((*where, "command"), what)
        elif "{{" not in command[0]:
            source = ["-c", container["source"]] if "source" in container else []
            venv = self._options.venvs.get(template.get("name", ""))
            if (name := missing([*command, *container.get("args", ()), *source], venv)) is not None:
                what = f"there is no command {name!r} on this machine (the image is {image!r})"
                self._say.no((*where, "command"), what)

    def _image(self, template: Mapping[str, Any], container: Mapping[str, Any], where: Where) -> None:
        name = self._values.text(container.get("image", ""), only_known=True)
        if (why := containers.refusal()) is not None:
            self._say.no((*where, "image"), f"--podman: {why}")
            return
        if not name or "{{" in name:
            self._say.no((*where, "image"), f"which one is not known before: {name}" if name else "is missing")
            return
        if name not in self._images:
            self._images[name] = containers.image(name)
        image = self._images[name]
        if image is None:
            self._say.no(
                (*where, "image"), f"{name!r} is not on this machine; fetch it: {containers.how_to_fetch(name)}"
            )
        elif "source" in container and not container.get("command"):
            self._say.no((*where, "command"), "is missing: what is to run the script?")
        elif not container.get("command") and not image.runs:
            self._say.no((*where, "command"), f"is not given, and the image {name!r} has none")

    def _variable(self, each: Mapping[str, Any], where: Where) -> None:
        if not _VARIABLE.fullmatch(each.get("name", "")):
            self._say.no(where, f"{each.get('name')!r} is no name of an environment variable")
        source = each.get("valueFrom") or {}
        self._say.supported(source, {"secretKeyRef", "configMapKeyRef"}, (*where, "valueFrom"))
        for key, of in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if key in source:
                self._passing.key(of, source[key], (*where, "valueFrom", key))

    def _keys_of(self, kind: str, name: str, where: Where) -> None:
        try:
            self._keys.all(kind, name)
        except SpecError as error:
            self._say.no_key(where, error)

    def _daemon(self, template: Mapping[str, Any], container: Mapping[str, Any], kind: str) -> None:
        probe = container.get("readinessProbe") or {}
        self._say.supported(probe, _PROBE, (kind, "readinessProbe"))
        if probe and port_of(container) is None and "{{" not in to_json(probe):
            self._say.no((kind, "readinessProbe"), "needs a port by its number")
        for what in ("retryStrategy", "outputs"):
            if template.get(what) or (what == "retryStrategy" and what in template):
                self._say.no((what,), "a daemon with it is not run here")

    # -- paths -------------------------------------------------------------------------------------------------

    def _paths(self, template: Mapping[str, Any], container: Mapping[str, Any]) -> None:
        mounts = [(normal(each.get("mountPath", "/")), bool(each.get("readOnly")))
                  for each in container.get("volumeMounts", ())]  # fmt: skip
        in_image = self._options.in_image(template)
        given: list[str] = []
        for number, each in enumerate((template.get("inputs") or {}).get("artifacts", ())):
            where: Where = ("inputs", "artifacts", number)
            if "path" not in each:
                self._say.no(where, f"the artifact {each['name']!r} has no path")
                continue
            given.append(normal(each["path"]))
            self._path(each["path"], (*where, "path"), in_image=in_image)
            mount = max((each for each in mounts if is_below(given[-1], each[0])), default=("", False))
            if mount[1]:
                self._say.no((*where, "path"), f"{each['path']} is in a volume that is only read")
        for out, where in _output_paths(template):
            path = normal(out)
            held = [each for each in (*given, *(mount for mount, _ in mounts)) if is_below(each, path) and each != path]
            if in_image and held:
                self._say.no(
                    where, f"{out} holds {held[0]}, which the step is given; that cannot be put out with --podman"
                )
            mounted = any(is_below(path, mount) for mount, _ in mounts)
            self._path(out, where, in_image=in_image, taken=not mounted and not is_below(path, room.PRIVATE))

    def _path(self, path: str, where: Where, *, in_image: bool, taken: bool = False) -> None:
        """taken: whether it must not be there on this machine already."""
        if "{{" in path:
            return
        if not path.startswith("/"):
            self._say.no(where, f"{path!r} should be an absolute path")
        elif in_image:
            if normal(path) == "/" or normal(path).startswith(("/proc/", "/sys/", "/dev/")):
                self._say.no(where, f"{path} is the system's")
        elif self._no_own_files is not None:
            self._say.no(where, f"{path} needs a file system of the step's own: {self._no_own_files}")
        else:
            if taken and Path(path).exists():
                self._say.no(where, f"{path} is there on this machine already, and not the step's")
            if room.resolved(normal(path)).startswith(("/proc/", "/sys/", "/dev/")):
                self._say.no(where, f"{path} is the system's")

    # -- volumes -----------------------------------------------------------------------------------------------

    def volumes(self, volumes: Iterable[Mapping[str, Any]], where: Where) -> None:
        for number, each in enumerate(volumes):
            name, place = each.get("name", ""), (*where, number)
            self._say.named(name, place)
            sources = set(each) - {"name"}
            claim = (each.get("persistentVolumeClaim") or {}).get("claimName", "")
            if name in self._options.volumes or claim in self._options.volumes or sources <= {"emptyDir"}:
                continue
            if "secret" in sources or "configMap" in sources:
                of = "Secret" if "secret" in sources else "ConfigMap"
                source = each.get("secret") or each.get("configMap") or {}
                self._say.supported(source, {"secretName", "name", "optional"}, place)
                self._keys_of(of, source.get("secretName") or source.get("name", ""), place)
                continue
            kind = ", ".join(sorted(sources))
            self._say.no(place, f"the volume {name!r} ({kind}) needs a folder of this machine: --volume {name}=FOLDER")


def _output_paths(template: Mapping[str, Any]) -> Iterator[tuple[str, Where]]:
    outputs = template.get("outputs") or {}
    for number, each in enumerate(outputs.get("parameters", ())):
        if path := (each.get("valueFrom") or {}).get("path"):
            yield path, ("outputs", "parameters", number, "valueFrom", "path")
    for number, each in enumerate(outputs.get("artifacts", ())):
        if path := each.get("path"):
            yield path, ("outputs", "artifacts", number, "path")
