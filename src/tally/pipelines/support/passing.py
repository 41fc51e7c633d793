"""What templates are given, and what they put out: parameters, artifacts, and where they come from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tally.errors import SpecError
from tally.pipelines import resources
from tally.pipelines.document import Where
from tally.pipelines.options import Keys
from tally.pipelines.support.fields import LOCATIONS, S3, STORES
from tally.pipelines.support.names import Names
from tally.pipelines.support.report import Findings


class Passing:
    """given: names of the workflow's parameters that have a value from outside."""

    def __init__(self, say: Findings, names: Names, keys: Keys, given: Collection[str]) -> None:
        self._say, self._names, self._keys, self._given = say, names, keys, given

    def key(self, kind: str, reference: Mapping[str, Any], where: Where, *, optional: bool = False) -> None:
        """Whether a key of a Secret or ConfigMap is known."""
        if "{{" in reference.get("name", "") + reference.get("key", "") or optional or reference.get("optional"):
            return
        try:
            self._keys.get(kind, reference.get("name", ""), reference.get("key", ""))
        except SpecError as error:
            self._say.no_key(where, error)

    def arguments(self, arguments: Mapping[str, Any], where: Where, names: Iterable[str]) -> None:
        """Arguments or inputs: whether what they say can have a value."""
        for number, each in enumerate(arguments.get("parameters", ())):
            place = (*where, "parameters", number)
            self._names.tags({key: each[key] for key in ("value", "default") if key in each}, place, names)
            if "valueFrom" in each and "value" not in each and each["name"] not in self._given:
                self.source(each, place)
            if "enum" in each and "value" in each and "{{" not in each["value"] and each["value"] not in each["enum"]:
                self._say.no(place, f"{each['value']!r} is none of {', '.join(each['enum'])}")
        for number, each in enumerate(arguments.get("artifacts", ())):
            place = (*where, "artifacts", number)
            self._say.named(each["name"], place)
            self._location(each, place)
            self._names.tags({key: value for key, value in each.items() if key not in ("name", "path")}, place, names)
            if "fromExpression" in each:
                self._names.expression(each["fromExpression"], (*place, "fromExpression"), names)
            if "zip" in (each.get("archive") or {}):
                self._say.no((*place, "archive", "zip"), "is not done on this machine")
            if "artifactGC" in each or "archiveLogs" in each:
                self._say.note(place, "how long it is kept means nothing here")

    def source(self, parameter: Mapping[str, Any], where: Where) -> None:
        """Where a parameter's value comes from, if it has none."""
        source = parameter.get("valueFrom") or {}
        if "configMapKeyRef" in source:
            self.key("ConfigMap", source["configMapKeyRef"], (*where, "valueFrom"), optional="default" in source)
        elif "default" not in source and "expression" not in source and "supplied" not in source:
            name = parameter["name"]
            self._say.no(
                where, f"the parameter {name!r} has no value" + ("" if where[:1] == ("inputs",) else f": -p {name}=...")
            )

    def _location(self, artifact: Mapping[str, Any], where: Where) -> None:
        for kind in LOCATIONS:
            if kind not in artifact:
                continue
            if kind in STORES:
                self._say.no((*where, kind), f"the artifact {artifact['name']!r} needs {STORES[kind]}")
            elif kind == "s3":
                for secret in ("accessKeySecret", "secretKeySecret", "sessionTokenSecret"):
                    if secret in artifact["s3"]:
                        self.key("Secret", artifact["s3"][secret], (*where, "s3", secret))
                self._say.supported(artifact["s3"], S3, (*where, "s3"))
            elif kind == "http":
                self._say.supported(artifact["http"], {"url", "headers"}, (*where, "http"))

    def outputs(self, template: Mapping[str, Any], kind: str) -> None:
        outputs = template.get("outputs") or {}
        leaf = kind in ("container", "script")
        for number, each in enumerate(outputs.get("parameters", ())):
            where: Where = ("outputs", "parameters", number)
            source = each.get("valueFrom") or {}
            known = {"jsonPath", "jqFilter"} if kind == "resource" else {"path", "parameter", "expression", "supplied"}
            self._say.supported(source, {*known, "default"}, (*where, "valueFrom"))
            for key in known & source.keys() & {"jsonPath", "jqFilter"}:
                self._say.read(resources.check_path, source[key], (*where, "valueFrom", key))
            if leaf and "path" not in source and "value" not in each:
                self._say.no(where, f"the parameter {each['name']!r} needs valueFrom.path")
            if kind == "suspend" and "supplied" not in source and "value" not in each:
                self._say.no(where, f"the parameter {each['name']!r} needs valueFrom.supplied")
        for number, each in enumerate(outputs.get("artifacts", ())):
            where = ("outputs", "artifacts", number)
            self._say.named(each["name"], where)
            self._location(each, where)
            if leaf and "path" not in each:
                self._say.no(where, f"the artifact {each['name']!r} has no path")
            if "http" in each or "raw" in each:
                self._say.no(where, f"the artifact {each['name']!r} cannot be sent there")
            if "zip" in (each.get("archive") or {}):
                self._say.no((*where, "archive", "zip"), "is not done on this machine")

    def outputs_of_group(self, template: Mapping[str, Any], known: set[str]) -> None:
        outputs = template.get("outputs") or {}
        for number, each in enumerate(outputs.get("parameters", ())):
            where: Where = ("outputs", "parameters", number, "valueFrom")
            source = each.get("valueFrom") or {}
            self._names.tags(source.get("parameter", ""), (*where, "parameter"), known)
            if "expression" in source:
                self._names.expression(source["expression"], (*where, "expression"), known)
        for number, each in enumerate(outputs.get("artifacts", ())):
            where = ("outputs", "artifacts", number)
            self._names.tags(each.get("from", ""), (*where, "from"), known)
            if "fromExpression" in each:
                self._names.expression(each["fromExpression"], (*where, "fromExpression"), known)
