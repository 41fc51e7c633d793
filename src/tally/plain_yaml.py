"""YAML in which a value is what it looks like: the one rule for job files, ``tally.yaml`` and ``KEY=VALUE`` flags.

``true`` and ``false``, ``null`` and nothing, and numbers as JSON writes them (also ``.5``, ``5.`` and ``1e-3``) are
that; lists and mappings hold such values. Everything else is text: ``NO``, ``12:30``, ``2026-03-29``, ``00725``,
``1_000``. YAML 1.1, which PyYAML follows by itself, makes a truth value, 750, a date, 469 and 1000 of these.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

HINT = "Write 'name: value', indent with spaces, and put quotes around a text that has ': ' or ' #' in it."
"""What most often is wrong with YAML."""

_DEEPEST = 100
"""The most levels of lists and mappings."""
_MOST = 1_000_000
"""The most values; what an alias stands for counts each time."""

_SCALARS = (
    ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("tag:yaml.org,2002:null", re.compile(r"null|Null|NULL|~|"), ["n", "N", "~", ""]),
    ("tag:yaml.org,2002:int", re.compile(r"-?(?:0|[1-9][0-9]*)"), "-0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"<<"), "<"),
)


class _Loader(yaml.SafeLoader):
    """What is text for this module is text. Tags make nothing that JSON does not know."""

    yaml_constructors: ClassVar[Any] = {
        tag: made
        for tag, made in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "str", "seq", "map")
    }
    yaml_implicit_resolvers: Any = {}  # noqa: RUF012  # as in its base


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for something else."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012  # as in its base


def _float(loader: Any, node: Any) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _text(loader: Any, node: Any) -> str:
    return str(loader.construct_scalar(node))


for _tag, _pattern, _first in _SCALARS:
    _whole = re.compile(rf"(?:{_pattern.pattern})$")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _whole, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:merge", _text)  # where it is no key


def value(text: str) -> Any:
    """The value of a flag: as it would stand in a file, on one line.

    What begins with a bracket, a brace or a quote is YAML; raises ValueError if it is not. All other signs, such as
    ``#``, ``-``, ``&`` and ``: ``, are signs of text.
    """
    if text.strip()[:1] in ("[", "{", '"', "'"):
        return load(text)
    plain = text.strip()
    return load(plain) if any(pattern.fullmatch(plain) for _, pattern, _ in _SCALARS[:-1]) else text


def load(text: str) -> Any:
    """The value that the text holds. Raises ValueError, in one line, for what is not YAML, and for what has no end."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("lists and mappings are nested too deeply") from None
    except ValueError as error:  # !!int x, say
        raise ValueError(" ".join(str(error).split())) from None
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Raises ValueError for what is nested too deeply, and for what a few aliases make huge."""
    left, waiting = _MOST, [(value, _DEEPEST)]
    while waiting:
        found, deeper = waiting.pop()
        if not isinstance(found, (list, dict)):
            continue
        left -= len(found)
        if deeper < 0 or left < 0:
            raise ValueError("lists and mappings are nested too deeply" if deeper < 0 else "it holds too many values")
        waiting += [(each, deeper - 1) for each in (found.values() if isinstance(found, dict) else found)]


def dump(value: Any) -> str:
    """The value as text that :func:`load` reads."""
    text: str = yaml.dump(value, Dumper=_Dumper, allow_unicode=True)
    return text
