"""Names of a model's classes, as files hold them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from tally import plain_yaml
from tally.errors import SpecError

_FORM = "Write a text file in UTF-8 with one label on each line, in the order of the model's classes."


def read_labels(path: Path) -> list[str]:
    """The class names in a file: a text file with one on each line, up to the first empty line; or a list,
    or a mapping of index to name, in JSON or as Python prints it; or the ``names`` of a ``data.yaml``, which YOLO is
    trained from. Raises SpecError."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise SpecError(f"labels: {path} cannot be read ({error.strerror or error})", hint=_FORM) from None
    except UnicodeDecodeError:
        raise SpecError(f"labels: {path} is not text in UTF-8", hint=_FORM) from None
    if not text:
        raise SpecError(f"labels: {path} is empty", hint=_FORM)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _listed(_of_yaml(text, path), path)
    if not text.startswith(("{", "[")):
        lines = [line.strip() for line in text.splitlines()]
        return lines[: lines.index("")] if "" in lines else lines
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise SpecError(f"labels: {path} is neither JSON nor one name on each line", hint=_FORM) from None
    return _listed(value, path)


def _of_yaml(text: str, path: Path) -> Any:
    try:
        value = plain_yaml.load(text)
    except ValueError as error:
        raise SpecError(f"labels: {path} is not valid YAML: {error}", hint=_FORM) from None
    return value.get("names", value) if isinstance(value, dict) else value


def _listed(value: Any, path: Path) -> list[str]:
    if isinstance(value, dict):
        try:
            value = {int(index): str(label) for index, label in value.items()}
            return [value[i] for i in range(len(value))]
        except (KeyError, ValueError, TypeError):
            raise SpecError(f"labels: {path} must map the indices 0, 1, 2 ... to names", hint=_FORM) from None
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise SpecError(f"labels: {path} must hold a list of names", hint=_FORM)
    return value
