"""YAML documents of Argo, read with the place of every value and checked field by field.

The fields that Argo knows are in ``argo_fields.json``, which ``scripts/argo_fields.py`` makes from Argo's own schema.
Scalars are what Kubernetes takes them for (YAML 1.1 as its Go library reads it): ``0755`` is octal, ``yes`` is true, a
date is text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import yaml

from tally.errors import SourceNotFoundError, SpecError, StorageError
from tally.text import did_you_mean, seconds

Where: TypeAlias = tuple[str | int, ...]
"""Keys and numbers that lead to a value, from the top of its document."""

KINDS = ("Workflow", "WorkflowTemplate", "ClusterWorkflowTemplate", "CronWorkflow")
BESIDE = ("ConfigMap", "Secret")
"""Kinds that may stand beside workflows in a file: where parameters and environments come from."""
_GROUP = "argoproj.io/v1alpha1"
_MOST_BYTES = 8 << 20
_MOST_VALUES = 1_000_000
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file. places: line and column of values, both from 1."""

    file: str
    kind: str
    value: Mapping[str, Any] = field(repr=False)
    places: Mapping[Where, tuple[int, int]] = field(repr=False, default_factory=dict)

    @property
    def name(self) -> str | None:
        metadata = self.value.get("metadata") or {}
        return metadata.get("name") or metadata.get("generateName")

    def at(self, where: Where) -> str:
        """``file:line:column`` of a value, or of what it would stand in."""
        for length in range(len(where), -1, -1):
            if place := self.places.get(where[:length]):
                return f"{self.file}:{place[0]}:{place[1]}"
        return self.file


def path_text(where: Where) -> str:
    """``spec.templates[0].container``."""
    text = ""
    for each in where:
        text += f"[{each}]" if isinstance(each, int) else f".{each}" if text else str(each)
    return text


@cache
def fields() -> dict[str, Any]:
    """The fields of each object of Argo and Kubernetes that a workflow may hold."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "argo_fields.json").read_text("utf-8"))
    return found


def read(path: str | Path) -> list[Document]:
    """All documents of a file. Raises SpecError with everything that is wrong in them, StorageError."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise SourceNotFoundError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    if len(content) > _MOST_BYTES:
        raise SpecError(f"{path}: more than {_MOST_BYTES >> 20} MiB: this is no workflow")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse(text, str(path))


def parse(text: str, file: str) -> list[Document]:
    """As :func:`read`, of text."""
    documents: list[Document] = []
    problems: list[str] = []
    loader: _Loader | None = None
    try:
        loader = _Loader(text)  # it looks at the characters at once
        while loader.check_node():
            node = loader.get_node()
            if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
                continue
            reader = _Reader(loader, file)
            documents.append(reader.document(node))
            problems += reader.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problems.append(f"{file}{place}: not YAML: {error.problem or error.context}")
    except (yaml.YAMLError, RecursionError) as error:
        problems.append(f"{file}: not YAML: {' '.join(str(error).split())[:300] or 'nested too deeply'}")
    finally:
        if loader is not None:
            loader.dispose()
    if not documents and not problems:
        problems.append(f"{file}: there is nothing in it")
    if problems:
        raise SpecError(problems)
    return documents


def scalar_text(value: Any) -> str:
    """A value as the text that Argo passes on: ``true``, ``3``, ``0.01``; lists and mappings as JSON."""
    if isinstance(value, str):
        return value
    return to_json(value)


class Spelled(float):
    """A number of a JSON text, which stays as it is written: ``1.50``."""

    text: str


def loaded(text: str) -> Any:
    """What a JSON text holds, as Go reads it: no NaN, and no number that is too large. Raises ValueError."""

    def number(spelled: str) -> Spelled:
        found = Spelled(spelled)
        if not math.isfinite(found):
            raise ValueError(f"the number {spelled[:40]} is too large")
        found.text = spelled
        return found

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    return json.loads(text, parse_float=number, parse_constant=no_number)


def to_json(value: Any) -> str:
    """JSON as Go writes it: no spaces, keys in order, whole numbers without a fraction."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Spelled):
        return value.text
    if isinstance(value, float):
        return _go_number(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{to_json(str(key))}:{to_json(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(to_json, value)) + "]"
    raise ValueError(f"{type(value).__name__} is no value of JSON")


def _go_number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    if value == int(value) and abs(value) < 1e21:
        return str(int(value))
    text = repr(value)
    if "e" in text and 1e-6 <= abs(value) < 1e21:
        text = f"{value:.17f}".rstrip("0")
        while float(text[:-1] or 0) == value:
            text = text[:-1]
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{exponent[0]}{exponent[1:].lstrip('0')}" if e and exponent[0] in "+-" else text


def argument_text(value: Any) -> str:
    """A scalar of a file where text is wanted, as ``argo submit`` reads it: a number without an exponent."""
    if not isinstance(value, float):
        return scalar_text(value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds_of(text: str) -> float:
    """Argo's durations: ``10``, ``30s``, ``1m30s``, ``1d``. Raises ValueError."""
    parts = re.findall(r"\d+(?:\.\d+)?(?:ms|[smhd])", text)
    if parts and "".join(parts) == text.strip():
        return sum(seconds(each) for each in parts)
    return seconds(text)


class _Loader(yaml.SafeLoader):
    """Scalars as Go's YAML library takes them."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012  # as in its base
    yaml_constructors: ClassVar[Any] = {
        tag: made
        for tag, made in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map", "binary")
    }


_SCALARS = (
    ("bool", r"y|Y|yes|Yes|YES|n|N|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?(?:0b[01_]+|0o?[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    (
        "float",
        (
            r"[-+]?(?:[0-9][0-9_]*)?\.?[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+\."
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)  # fmt: skip
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})$"), list(_first))


def _number(tag: str, text: str) -> Any:
    plain = text.replace("_", "").lower()
    if tag == "float":
        return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
    sign = -1 if plain.startswith("-") else 1
    digits = plain.lstrip("+-")
    for prefix, base in (("0b", 2), ("0x", 16), ("0o", 8)):
        if digits.startswith(prefix):
            return sign * int(digits[2:], base)
    return sign * int(digits, 8 if len(digits) > 1 and digits[0] == "0" else 10)


class _Reader:
    """Makes values of one document's nodes, and notes where they stand and what is wrong with them."""

    def __init__(self, loader: _Loader, file: str) -> None:
        self._loader, self._file = loader, file
        self.places: dict[Where, tuple[int, int]] = {}
        self.problems: list[str] = []
        self._left = _MOST_VALUES

    def document(self, node: yaml.Node) -> Document:
        kind = self._kind(node)
        if kind in KINDS:
            value = self._read(node, f"@{kind}", ())
        else:
            value = self._read(node, "map:any", ())
            if kind not in BESIDE and not self.problems:
                self._wrong(node, (), f"kind {kind!r} is no workflow" + did_you_mean(kind, (*KINDS, *BESIDE)))
        if kind in KINDS and isinstance(value, dict) and value.get("apiVersion", _GROUP) != _GROUP:
            self._wrong(node, ("apiVersion",), f"is {value['apiVersion']!r}; known is {_GROUP}")
        return Document(self._file, kind, value if isinstance(value, dict) else {}, self.places)

    def _kind(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == "kind" and isinstance(value, yaml.ScalarNode):
                    return str(value.value)
        return "(none)"

    def _wrong(self, node: yaml.Node, where: Where, what: str) -> None:
        line, column = self.places.get(where) or (node.start_mark.line + 1, node.start_mark.column + 1)
        at = path_text(where)
        self.problems.append(f"{self._file}:{line}:{column}: {at + ': ' if at else ''}{what}")

    def _read(self, node: yaml.Node, kind: str, where: Where) -> Any:
        self._left -= 1
        if self._left < 0 or len(where) > _DEEPEST:
            raise yaml.YAMLError("it holds too many values, or they are nested too deeply")
        self.places.setdefault(where, (node.start_mark.line + 1, node.start_mark.column + 1))
        table = fields()
        if kind.startswith("@") and isinstance(table[kind[1:]], str):
            kind = table[kind[1:]]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kind, where)
        if isinstance(node, yaml.SequenceNode):
            if kind != "any" and not kind.startswith("list:"):
                self._wrong(node, where, f"is a list; it should be {_described(kind)}")
                return None
            inner = kind.removeprefix("list:") if kind != "any" else "any"
            found = [self._read(each, inner, (*where, number)) for number, each in enumerate(node.value)]
            if inner not in ("any", "@Item"):
                for number, each in enumerate(node.value):
                    if found[number] is None and isinstance(each, yaml.ScalarNode) and each.tag.endswith(":null"):
                        self._wrong(each, (*where, number), f"is nothing; it should be {_described(inner)}")
            return found
        assert isinstance(node, yaml.MappingNode)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                self._wrong(key, (*where, str(key.value)), "stands here twice")
            seen.add(str(key.value))
        self._loader.flatten_mapping(node)  # what is said here comes after what is merged
        if kind != "any" and not kind.startswith(("@", "map:")) and kind != "object":
            self._wrong(node, where, f"is a mapping; it should be {_described(kind)}")
            return None
        entry = table[kind[1:]] if kind.startswith("@") else None
        return self._mapping(node, kind, entry, where)

    def _mapping(self, node: yaml.MappingNode, kind: str, entry: Any, where: Where) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key_node, its in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._wrong(key_node, where, "a key has to be text")
                continue
            key = str(key_node.value)
            place = (*where, key)
            self.places[place] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if entry is None:
                inner = kind.removeprefix("map:") if kind.startswith("map:") else "any"
            elif key in entry["fields"]:
                inner = entry["fields"][key]
            else:
                known = did_you_mean(key, entry["fields"])
                self._wrong(key_node, place, f"{kind[1:].removeprefix('k8s.')} has no such field{known}")
                continue
            value[key] = self._read(its, inner, place)
        for name in entry.get("required", ()) if entry else ():
            if value.get(name) is None and name != "metadata":
                self._wrong(node, where, f"{name} is missing")
        # Nothing is the same as no value.
        return {key: each for key, each in value.items() if each is not None} if entry or kind != "map:any" else value

    def _scalar(self, node: yaml.ScalarNode, kind: str, where: Where) -> Any:
        tag = node.tag.rpartition(":")[2]
        value: Any
        if tag == "null":
            value = None
        elif tag == "bool":
            value = str(node.value).lower() in ("y", "yes", "true", "on")
        elif tag in ("int", "float"):
            try:
                value = _number(tag, str(node.value))
            except ValueError:
                value = str(node.value)
        elif tag in ("str", "merge", "binary"):
            value = str(node.value)
        else:
            self._wrong(node, where, f"the tag {node.tag} is not known")
            return None
        if value is None or kind == "any":
            return value
        if kind in ("scalar", "string") and isinstance(value, float):  # as 'argo submit' reads it
            try:
                return argument_text(value)
            except ValueError as error:
                self._wrong(node, where, f"is {node.value!r}: {error}; put it in quotes")
                return None
        if kind == "scalar":
            return scalar_text(value)
        if kind == "string" and not isinstance(value, str):  # as 'argo submit' reads it
            if isinstance(value, bool) and str(node.value).lower() not in ("true", "false"):
                what = f"is {node.value!r}, which YAML takes for {scalar_text(value)}; put it in quotes"
                self._wrong(node, where, what)
                return None
            return scalar_text(value)
        fits = {"string": isinstance(value, str), "boolean": isinstance(value, bool)}
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits |= {"integer": whole, "number": whole or isinstance(value, float)}
        if not fits.get(kind, False):
            hint = "; put it in quotes" if kind == "string" else ""
            self._wrong(node, where, f"is {node.value!r}; it should be {_described(kind)}{hint}")
            return None
        return value


def _described(kind: str) -> str:
    if kind.startswith("list:"):
        return "a list"
    if kind.startswith(("map:", "@")) or kind == "object":
        return "a mapping" + (f" ({kind[1:].removeprefix('k8s.')})" if kind.startswith("@") else "")
    return {"string": "text", "scalar": "text", "integer": "a whole number", "boolean": "true or false"}.get(kind, kind)


def texts(value: Any, where: Where = ()) -> Iterator[tuple[Where, str]]:
    """Every text in a value, with the way to it."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from texts(each, (*where, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from texts(each, (*where, number))
