"""An overlay of kustomize: where it is, what it renders to, and that this is in order."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tally.errors import DeployError, SpecError
from tally.text import did_you_mean, expanded

FOLDER = Path("deploy", "kubernetes", "overlays")
"""Where overlays are found by their name: below the current folder."""
KUSTOMIZATION = ("kustomization.yaml", "kustomization.yml", "Kustomization")
SECONDS = 60.0
_ORDER = (
    "Namespace", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "PersistentVolume", "PersistentVolumeClaim",
    "ExternalSecret", "Certificate", "NetworkPolicy", "Service", "StatefulSet", "Job", "Deployment",
)  # fmt: skip
"""Kinds that others build upon, in the order in which they are applied; others come after them."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # ten times as fast, where it was built
    """Reads what kustomize writes, which quotes what YAML 1.1 would take for something else, but for ``=``."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: str(loader.construct_scalar(node)))


@dataclass(frozen=True)
class Overlay:
    """A folder with a kustomization. Raises SpecError where there is none."""

    folder: Path

    @classmethod
    def find(cls, given: str) -> Overlay:
        """The overlay at a path, or of that name."""
        for folder in (expanded(given), FOLDER / given):
            if any((folder / name).is_file() for name in KUSTOMIZATION):
                return cls(folder)
        names = [each.name for each in FOLDER.iterdir() if each.is_dir()] if FOLDER.is_dir() else []
        raise SpecError(
            f"there is no overlay {given!r}: no folder with a kustomization.yaml{did_you_mean(given, names)}",
            hint=f"In {FOLDER} are {', '.join(sorted(names))}."
            if names
            else f"Names are looked for in {FOLDER}, below the folder that you are in: Tally's repository has some.",
        )

    @cached_property
    def text(self) -> str:
        """What kustomize renders. Raises DeployError with what it says."""
        try:
            done = subprocess.run(
                [kubectl(), "kustomize", str(self.folder)],
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise DeployError(f"kubectl kustomize {self.folder} has not ended for {SECONDS:g} s") from None
        if done.returncode:
            raise DeployError(f"{self.folder} cannot be rendered: {' '.join(done.stderr.split())[-1000:]}")
        return done.stdout

    @cached_property
    def manifests(self) -> Sequence[dict[str, Any]]:
        """All objects, in the order in which they are applied. Raises DeployError with all that is wrong with them."""
        from tally.deploy.kubernetes import fields
        from tally.deploy.kubernetes.lint import rules

        found = [_told(each) for each in yaml.load_all(self.text, _Loader) if each is not None]
        if not found:
            raise DeployError(f"{self.folder} renders to nothing", hint="Its kustomization.yaml names no resources.")
        if wrong := fields.problems(found) or rules.problems(found):
            raise DeployError(
                wrong[0] if len(wrong) == 1 else "\n".join(f"- {each}" for each in wrong),
                hint=f"Nothing was applied. What {self.folder} renders to is not in order.",
            )
        return sorted(found, key=lambda each: _ORDER.index(each["kind"]) if each["kind"] in _ORDER else len(_ORDER))

    @property
    def namespace(self) -> str:
        """That of its objects."""
        spaces = {each["metadata"]["namespace"] for each in self.manifests if "namespace" in each["metadata"]}
        return spaces.pop() if spaces else "default"


def _told(found: Any) -> Any:
    """What is said of an object: a field without a value is none."""
    if isinstance(found, dict):
        return {key: _told(value) for key, value in found.items() if value is not None}
    return [_told(each) for each in found] if isinstance(found, list) else found


def kubectl() -> str:
    """The program: that of this machine, or of the wheel. Raises SpecError where there is none."""
    beside = Path(sys.executable).with_name("kubectl")
    found = shutil.which("kubectl") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise SpecError(
            "there is no kubectl on the PATH, which renders overlays",
            hint="pip install 'tally-scoring[kubernetes]' brings one.",
        )
    return found
