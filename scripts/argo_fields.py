"""Make ``src/tally/pipelines/argo_fields.json`` from Argo's own JSON schema: names and types of fields, nothing else.

    python scripts/argo_fields.py SCHEMA.json

A test compares the file with the schema where that is present.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "src/tally/pipelines/argo_fields.json"
ROOTS = ("Workflow", "WorkflowTemplate", "ClusterWorkflowTemplate", "CronWorkflow")
_PREFIX = "io.argoproj.workflow.v1alpha1."
_OTHER = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": "scalar",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "scalar",
    "io.argoproj.workflow.v1alpha1.Amount": "scalar",
}
"""Written as text or as a number."""
_SCALARS = {"Parameter": {"value": "scalar", "default": "scalar", "enum": "list:scalar"},
            "ValueFrom": {"default": "scalar"}}  # fmt: skip
"""Argo reads these as text whatever they are (its type AnyString), which the schema does not say."""


def name_of(definition: str) -> str:
    """A definition's short name: Argo's own, or Kubernetes'."""
    own = definition.startswith(_PREFIX)
    return ("" if own else "k8s.") + definition.rpartition(".")[2]


def kind_of(schema: dict[str, Any]) -> str:
    """A field's type: string, integer, number, boolean, scalar, any, list:TYPE, map:TYPE, or the name of an object."""
    if "$ref" in schema:
        target = schema["$ref"].removeprefix("#/definitions/")
        return _OTHER.get(target) or "@" + target
    match schema.get("type"):
        case "array":
            return "list:" + kind_of(schema.get("items", {}))
        case "object":
            values = schema.get("additionalProperties")
            return "map:" + (kind_of(values) if isinstance(values, dict) else "any")
        case None:
            return "any"
        case plain:
            return str(plain)


def condensed(schema: dict[str, Any]) -> dict[str, Any]:
    """The fields of every object that a workflow may hold."""
    definitions, found = schema["definitions"], {}
    waiting = [_PREFIX + each for each in ROOTS]
    while waiting:
        full = waiting.pop()
        short = name_of(full)
        if short in found:
            if found[short]["of"] != full:
                raise SystemExit(f"two definitions are called {short}")
            continue
        definition = definitions[full]
        fields: dict[str, str] = {}
        if "properties" not in definition:
            found[short] = {"of": full, "is": kind_of(definition) if definition.get("type") else "any"}
            kinds = [found[short]["is"]]
        else:
            for field, its in definition["properties"].items():
                if not (short in ROOTS and field == "status"):
                    fields[field] = _SCALARS.get(short, {}).get(field) or kind_of(its)
            found[short] = {"of": full, "fields": fields, "required": sorted(definition.get("required", []))}
            kinds = list(fields.values())
        waiting += [kind.rpartition("@")[2] for kind in kinds if "@" in kind]
    result: dict[str, Any] = {}
    for short, entry in sorted(found.items()):
        if "is" in entry:
            result[short] = _short(entry["is"])
        else:
            its = {field: _short(kind) for field, kind in sorted(entry["fields"].items())}
            result[short] = {"fields": its} | ({"required": entry["required"]} if entry["required"] else {})
    return result


def _short(kind: str) -> str:
    before, at, full = kind.partition("@")
    return f"{before}@{name_of(full)}" if at else kind


def text_of(table: dict[str, Any]) -> str:
    """One object a line."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items())
    return "{\n" + lines + "\n}\n"


if __name__ == "__main__":
    OUT.write_text(text_of(condensed(json.loads(Path(sys.argv[1]).read_text("utf-8")))), "utf-8")
