"""Fields of manifests that Kubernetes does not know, before anything is sent: an API server may drop them in silence.

What Kubernetes's own kinds have is known from lightkube's models. Of other kinds (KubeRay's, KEDA's ...) what they need
and the templates of pods are looked at; the cluster itself refuses the rest.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Union, get_args, get_origin

import msgspec
from lightkube.core.exceptions import LoadResourceError
from lightkube.core.resource_registry import resource_registry
from lightkube.models import core_v1
from lightkube.models.meta_v1 import ObjectMeta

from tally.deploy.kubernetes import taught
from tally.text import did_you_mean

_TEXTS = {"apiVersion", "kind"}
_QUANTITIES = ("limits", "requests", "capacity", "hard", "overhead")
"""Maps whose values are amounts, which may also be numbers; those of all others are texts."""


def problems(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each field that is not known, missing, or of another type."""
    return [line for each in manifests for line in _of(each)]


def _of(found: Mapping[str, Any]) -> Iterator[str]:
    kinds = (("apiVersion", str), ("kind", str), ("metadata", Mapping))
    missing = [name for name, kind in kinds if not found.get(name) or not isinstance(found[name], kind)]
    if missing or not found["metadata"].get("name"):
        yield f"an object has no {', '.join(missing) or 'name'}: {str(dict(found))[:80]}"
        return
    what = f"{found['kind']} {found['metadata']['name']}"
    if (own := taught.FIELDS.get((str(found["apiVersion"]), str(found["kind"])))) is not None:
        yield from _struct(own, found, what, "")
        return
    try:
        model = resource_registry.load(str(found["apiVersion"]), str(found["kind"]))
    except (LoadResourceError, ImportError, ValueError):
        group = str(found["apiVersion"]).partition("/")[0]
        if "." not in group or (group.endswith(".k8s.io") and not group.startswith("gateway.")):
            yield f"{what}: Kubernetes has no {found['kind']} in {found['apiVersion']}"
        yield from _struct(ObjectMeta, found["metadata"], what, "metadata")
        yield from _templates(found.get("spec"), what, "spec")
    else:
        yield from _struct(model, found, what, "")
    yield from (f"{what}: {each}" for each in taught.missing(found))


def _templates(found: Any, what: str, where: str) -> Iterator[str]:
    """The templates of pods in an object of a kind that is not known."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            inner = value.get("spec") if key == "template" and isinstance(value, Mapping) else None
            if isinstance(inner, Mapping) and "containers" in inner:
                yield from _struct(core_v1.PodTemplateSpec, value, what, f"{where}.template")
            else:
                yield from _templates(value, what, f"{where}.{key}")
    elif isinstance(found, list):
        for number, value in enumerate(found):
            yield from _templates(value, what, f"{where}[{number}]")


def _struct(model: type, found: Mapping[str, Any], what: str, where: str) -> Iterator[str]:
    known = _fields(model)
    for name, value in found.items():
        if name not in known:
            if where or name not in _TEXTS:
                yield f"{what}: there is no {where}{'.' * bool(where)}{name}{did_you_mean(name, known)}"
        elif value is not None:
            yield from _value(known[name][0], value, what, f"{where}{'.' * bool(where)}{name}")
    yield from (
        f"{what}: {where}{'.' * bool(where)}{name} is missing"
        for name, (_, needed) in known.items()
        if needed and found.get(name) is None
    )


def _value(type_: Any, found: Any, what: str, where: str) -> Iterator[str]:
    origin, arguments = get_origin(type_), get_args(type_)
    if origin in (Union, types.UnionType):
        kinds = [each for each in arguments if each is not type(None)]
        if len(kinds) == 1:
            yield from _value(kinds[0], found, what, where)
        elif not isinstance(found, tuple(each for each in kinds if isinstance(each, type))):
            yield f"{what}: {where} may not be {found!r}"
    elif origin in (list, Sequence):
        if not isinstance(found, list):
            yield f"{what}: {where} is to be a list, not {str(found)[:60]!r}"
            return
        for number, each in enumerate(found):
            yield from _value(arguments[0], each, what, f"{where}[{number}]")
    elif type_ is dict or origin in (dict, Mapping):
        if not isinstance(found, Mapping):
            yield f"{what}: {where} is to have names and values, and is {str(found)[:60]!r}"
            return
        quantity = where.rpartition(".")[2] in _QUANTITIES
        for key, each in found.items():
            if not (quantity and type(each) in (int, float)):
                yield from _value(arguments[1] if arguments else str, each, what, f"{where}.{key}")
    elif isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        if isinstance(found, Mapping):
            yield from _struct(type_, found, what, where)
        else:
            yield f"{what}: {where} is to have fields, and is {str(found)[:60]!r}"
    elif type_ in (str, int, bool) and type(found) is not type_:
        hint = "; quotes make it a text" if type_ is str and not isinstance(found, Mapping | list) else ""
        yield f"{what}: {where} is to be {_CALLED[type_]}, not {found!r}{hint}"


_CALLED = {str: "a text", int: "a whole number", bool: "true or false"}


@cache
def _fields(model: type) -> dict[str, tuple[Any, bool]]:
    """Name in a manifest to its type, and whether it has to be given."""
    return {each.encode_name: (each.type, each.required) for each in msgspec.structs.fields(model)}
