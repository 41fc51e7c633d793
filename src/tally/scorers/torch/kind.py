"""Networks of PyTorch as a kind of model: how they are recognised, and what a package says of them.

PyTorch itself is imported where one is opened, in :mod:`tally.scorers.torch.network`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from tally.errors import SpecError, UntrustedModelError
from tally.models.base import Candidate, ModelRequest, covering, merged
from tally.models.inspected import inspected_before
from tally.models.package import sidecar
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.torch.options import OWN, PROGRAMS, TorchSettings, form_of
from tally.scorers.vision.kind import VisionKind
from tally.text import did_you_mean


class TorchKind(VisionKind):
    """Exported programs (``.pt2``), TorchScript, and weights with ``module: file.py:Class``, the network's class."""

    comments: ClassVar[Mapping[str, str]] = {
        **VisionKind.comments,
        "module": "file.py:Class, the network that the weights are of",
        "arguments": "what the class is called with",
    }

    def companions(self, path: Path) -> list[str]:
        module = sidecar(path).get("module")
        return [module.rpartition(":")[0]] if isinstance(module, str) else []

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        module = merged(found.declared, request.settings).get("module")
        if isinstance(module, str) and found.folder is not None:
            file = found.path.parent / module.rpartition(":")[0]
            if file.is_file():  # inspecting it says what is wrong otherwise
                found = replace(found, files=covering(found.files or (found.entry,), found.folder, file))
        return super().resolve(found, request)

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if name in OWN}
        problems = TorchSettings.problems_in(given)
        module, form = options.get("module"), form_of(path)
        if form in PROGRAMS:
            if module is not None:
                problems.append(f"module: {path.name} is a whole network, and needs no class: leave module out")
            if not trusted:
                raise UntrustedModelError(
                    f"{path} is a program of PyTorch: opening it may run whatever code it carries",
                    hint="If you know who made it, give --trust. Better: its weights (safetensors), and --set "
                    "module=file.py:Class.",
                )
        elif module is not None:
            problems += _no_class(path.parent, module)
        if problems:
            raise SpecError(problems)

        def look() -> dict[str, Any]:
            from tally.scorers.torch.scorer import inspect

            return inspect(path, options, trusted=trusted)

        # PyTorch takes seconds to import.
        code = () if module is None else sorted(each.name for each in path.parent.glob("*.py"))
        return inspected_before(
            path, options, trusted=trusted, distributions=("torch",), files=(path.name, *code), inspect=look
        )

    def create(self, ref: ModelRef) -> Scorer:
        from tally.scorers.torch.scorer import create

        return create(ref.options)


def _no_class(folder: Path, module: object) -> list[str]:
    """What is wrong with ``file.py:Class``, found without running it."""
    file, _, name = str(module).rpartition(":")
    if not isinstance(module, str) or not file.endswith(".py") or not name.isidentifier():
        return [f"module: file.py:Class, not {module!r}"]
    path = folder / file
    if Path(file).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        return [f"module: {file!r} lies outside the model's folder"]
    if not path.is_file():
        return [f"module: there is no {file!r} beside the weights, in {folder}"]
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        return [f"module: {path}, line {error.lineno}: {error.msg}"]
    known = [each.name for each in tree.body if isinstance(each, (ast.ClassDef, ast.FunctionDef))]
    imported = [
        each.asname or each.name for node in tree.body if isinstance(node, ast.ImportFrom) for each in node.names
    ]
    if name not in (*known, *imported):
        return [f"module: {path} defines no {name!r}{did_you_mean(name, known)}"]
    return []
