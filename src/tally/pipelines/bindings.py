"""What templates are given, and what they see: the values of a workflow, the inputs of its templates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tally.errors import SpecError
from tally.pipelines import expressions
from tally.pipelines.document import scalar_text, to_json
from tally.pipelines.expressions import ExpressionError
from tally.pipelines.options import Keys, Options
from tally.pipelines.store import Node, RunRecord
from tally.pipelines.values import Values, bare
from tally.pipelines.workflow import Found, Workflow

_LETTERS = "aAbBcCdDeFgGhHIjklLmMnNpPQrRStTuUvVwWxXyYzZ"
"""Of formats of times."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a template is given."""

    parameters: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": dict(self.parameters),
            "artifacts": {key: dict(each) for key, each in self.artifacts.items()},
        }


class Bindings:
    """values: those that every template of the run sees. status, failures: of the run as it is now."""

    def __init__(
        self,
        record: RunRecord,
        workflow: Workflow,
        options: Options,
        keys: Keys,
        *,
        status: Callable[[], str],
        failures: Callable[[], Sequence[Node]],
    ) -> None:
        self._record, self._workflow, self._options, self._keys = record, workflow, options, keys
        self.values = self._workflow_values(status, failures)

    def _workflow_values(self, status: Callable[[], str], failures: Callable[[], Sequence[Node]]) -> Values:
        record, spec, metadata = self._record, self._workflow.spec, self._workflow.metadata
        values = Values()
        made = datetime.fromtimestamp(record.created_at, UTC)
        for key, value in {
            "name": record.name, "namespace": metadata.get("namespace", "default"), "uid": record.id,
            "mainEntrypoint": self._options.entrypoint or spec.get("entrypoint", ""),
            "serviceAccountName": spec.get("serviceAccountName", "default"), "priority": spec.get("priority", 0),
            "parameters": named(record.parameters), "parameters.json": named(record.parameters),
            "creationTimestamp": rfc3339(record.created_at), "creationTimestamp.RFC3339": rfc3339(record.created_at),
            "creationTimestamp.s": int(record.created_at),
            "scheduledTime": (metadata.get("annotations") or {}).get(
                "workflows.argoproj.io/scheduled-time", rfc3339(record.created_at)
            ),
        }.items():  # fmt: skip
            values[f"workflow.{key}"] = value
        for letter in _LETTERS:
            values[f"workflow.creationTimestamp.{letter}"] = made.strftime(f"%{letter}")
        for name, value in record.parameters.items():
            values[f"workflow.parameters.{name}"] = value
        labels = {**(metadata.get("labels") or {}), **((spec.get("workflowMetadata") or {}).get("labels") or {})}
        annotations = {
            **(metadata.get("annotations") or {}),
            **((spec.get("workflowMetadata") or {}).get("annotations") or {}),
        }
        for word, found in (("labels", labels), ("annotations", annotations)):
            values[f"workflow.{word}"] = values[f"workflow.{word}.json"] = to_json(found)
            for name, value in found.items():
                values[f"workflow.{word}.{name}"] = value
        values.live("workflow.duration", lambda: f"{time.time() - record.created_at:f}")
        values.live("workflow.status", status)
        values.live("workflow.failures", lambda: _failures_text(failures()))
        for name, source in ((spec.get("workflowMetadata") or {}).get("labelsFrom") or {}).items():
            values[f"workflow.labels.{name}"] = expressions.evaluate(source["expression"], values.nested())
        return values

    def arguments(self) -> Bound:
        arguments = self._workflow.spec.get("arguments") or {}
        artifacts = {each["name"]: self.values.substituted(each) for each in arguments.get("artifacts", ())}
        return Bound(dict(self._record.parameters), artifacts)

    def given(self, arguments: Mapping[str, Any], values: Values) -> Bound:
        """What a step passes on. Raises ExpressionError."""
        parameters: dict[str, str] = {}
        for each in arguments.get("parameters", ()):
            source = each.get("valueFrom") or {}
            if "value" in each:
                parameters[each["name"]] = values.text(each["value"])
            elif "expression" in source:
                parameters[each["name"]] = scalar_text(expressions.evaluate(source["expression"], values.nested()))
            elif "configMapKeyRef" in source:
                parameters[each["name"]] = self._key_of(source, values)
            elif "default" in each:
                parameters[each["name"]] = values.text(each["default"])
        artifacts: dict[str, Any] = {}
        for each in arguments.get("artifacts", ()):
            found = self.artifact(each, values)
            if found is not None:
                artifacts[each["name"]] = found
        return Bound(parameters, artifacts)

    def _key_of(self, source: Mapping[str, Any], values: Values) -> str:
        reference = values.substituted(source["configMapKeyRef"])
        try:
            return self._keys.get("ConfigMap", reference["name"], reference["key"])
        except SpecError as error:
            if "default" in source:
                return values.text(source["default"])
            raise ExpressionError(error.problems[0]) from None

    def artifact(self, given: Mapping[str, Any], values: Values) -> dict[str, Any] | None:
        """Where an artifact that is passed on is; None for an optional one that there is not."""
        extra = {key: values.substituted(given[key]) for key in ("subPath", "mode", "recurseMode") if key in given}
        if "from" in given:
            name = given["from"].strip().removeprefix("{{").removesuffix("}}").strip()
            if name.startswith("="):
                found = expressions.evaluate(name[1:], values.nested())
            else:
                found = values.artifacts.get(name)
        elif "fromExpression" in given:
            found = expressions.evaluate(bare(values.text(given["fromExpression"])), values.nested())
        else:
            return {key: each for key, each in values.substituted(given).items() if key not in ("name", "path")}
        if isinstance(found, Mapping):
            return {**found, **extra}
        if given.get("optional"):
            return None
        raise ExpressionError(f"there is no artifact {given.get('from') or given.get('fromExpression')}")

    def bind(self, found: Found, given: Bound, values: Values) -> tuple[Bound, Values]:
        """A template's inputs, and the values that it sees. Raises ExpressionError."""
        inside = Values(self.values)
        for name in ("steps.name", "tasks.name"):
            if name in values:
                inside[name] = values[name]
        parameters: dict[str, str] = {}
        inputs = found.template.get("inputs") or {}
        for each in inputs.get("parameters", ()):
            name, source = each["name"], each.get("valueFrom") or {}
            if name in given.parameters:
                value = given.parameters[name]
            elif "value" in each or "default" in each:
                value = inside.text(each.get("value", each.get("default", "")))
            elif "configMapKeyRef" in source:
                value = self._key_of(source, inside)
            elif "default" in source:
                value = inside.text(source["default"])
            else:
                raise ExpressionError(
                    f"the template {found.template.get('name')!r} is not given its parameter {name!r}"
                )
            if "enum" in each and value not in each["enum"]:
                raise ExpressionError(f"the parameter {name!r} is {value!r}, none of {', '.join(each['enum'])}")
            parameters[name] = value
            inside[f"inputs.parameters.{name}"] = value
        inside["inputs.parameters"] = named(parameters)
        artifacts: dict[str, Any] = {}
        for each in inputs.get("artifacts", ()):
            name = each["name"]
            own = {
                key: inside.substituted(value) for key, value in each.items() if key not in ("name", "path", "optional")
            }
            if name in given.artifacts:
                artifacts[name] = {
                    **{key: own[key] for key in ("mode", "recurseMode") if key in own},
                    **given.artifacts[name],
                }
            elif set(own) & {"raw", "http", "s3"}:
                artifacts[name] = own
            elif not each.get("optional"):
                raise ExpressionError(f"the template {found.template.get('name')!r} is not given its artifact {name!r}")
            if name in artifacts:
                inside.artifacts[f"inputs.artifacts.{name}"] = artifacts[name]
            if "path" in each:
                inside[f"inputs.artifacts.{name}.path"] = inside.text(each["path"])
        outputs = found.template.get("outputs") or {}
        for each in outputs.get("artifacts", ()):
            if "path" in each:
                inside[f"outputs.artifacts.{each['name']}.path"] = inside.text(each["path"])
        for each in outputs.get("parameters", ()):
            if path := (each.get("valueFrom") or {}).get("path"):
                inside[f"outputs.parameters.{each['name']}.path"] = inside.text(path)
        return Bound(parameters, artifacts), inside


def _failures_text(failures: Sequence[Node]) -> str:
    """As Argo gives it: a JSON text in quotes, so that it can stand in a shell's words."""
    found = [
        {"displayName": each.display, "message": each.message or "", "templateName": each.template,
         "phase": each.phase,
         "podName": each.id, "finishedAt": rfc3339(each.finished_at)}
        for each in failures
    ]  # fmt: skip
    return json.dumps(json.dumps(found, ensure_ascii=False, separators=(",", ":")), ensure_ascii=False)


def exported(outputs: Mapping[str, Any], parameters: Mapping[str, str], artifacts: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs that have a global name, by it."""
    return {
        "parameters": {each["globalName"]: parameters[each["name"]] for each in outputs.get("parameters", ())
                       if "globalName" in each and each["name"] in parameters},
        "artifacts": {each["globalName"]: artifacts[each["name"]] for each in outputs.get("artifacts", ())
                      if "globalName" in each and each["name"] in artifacts},
    }  # fmt: skip


def named(parameters: Mapping[str, str]) -> str:
    return to_json([{"name": name, "value": value} for name, value in parameters.items()])


def rfc3339(at: float | None) -> str:
    return datetime.fromtimestamp(at or 0.0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
