"""Whether all that is referred to can have a value: tags in texts, names in expressions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tally.pipelines import expressions
from tally.pipelines.document import Where, texts
from tally.pipelines.expressions import ExpressionError
from tally.pipelines.support.fields import GLOBALS
from tally.pipelines.support.report import Findings
from tally.pipelines.values import TAG
from tally.pipelines.workflow import Workflow
from tally.text import did_you_mean

OF_WORKFLOW = frozenset({"workflow"})
_OF_STEPS = ("id", "status", "startedAt", "finishedAt", "hostNodeName", "exitCode", "ip", "outputs.result",
             "outputs.parameters")  # fmt: skip


class Names:
    """parameters: of the workflow."""

    def __init__(self, say: Findings, workflow: Workflow, parameters: set[str]) -> None:
        self._say, self._parameters = say, parameters
        self._documents = [workflow.main, *workflow.libraries.values()]
        self._outputs = {
            kind: {name for each in self._documents for name in _global_names(each.value, kind)}
            for kind in ("parameters", "artifacts")
        }

    def mentioned(self, name: str) -> bool:
        """Whether any text of the workflow has it in it."""
        return any(name in text for each in self._documents for _, text in texts(each.value))

    @staticmethod
    def of_template(template: Mapping[str, Any]) -> set[str]:
        """What is known inside of a template."""
        names = {"workflow", "node.name", "pod.name", "steps.name", "tasks.name", "inputs.parameters"}
        names |= {"retries", "lastRetry.status", "lastRetry.exitCode", "lastRetry.duration", "lastRetry.message"}
        for part in ("inputs", "outputs"):
            for each in (template.get(part) or {}).get("parameters", ()):
                names.add(f"{part}.parameters.{each['name']}" + (".path" if part == "outputs" else ""))
            for each in (template.get(part) or {}).get("artifacts", ()):
                names |= {f"{part}.artifacts.{each['name']}{end}" for end in ("", ".path")}
        return names

    @staticmethod
    def of_step(start: str, template: Mapping[str, Any] | None) -> set[str]:
        """What is known of a step once it is done. start: ``steps.NAME``. template: None if it is not known."""
        names = {f"{start}.{each}" for each in _OF_STEPS}
        if template is None:
            return names | {f"{start}.*"}
        for kind in ("parameters", "artifacts"):
            for each in (template.get("outputs") or {}).get(kind, ()):
                names.add(f"{start}.outputs.{kind}.{each['name']}")
        return names

    def tags(self, value: Any, where: Where, names: Iterable[str]) -> None:
        """Whether all that is referred to in texts can have a value."""
        known = set(names)
        for inner, text in texts(value):
            for match in TAG.finditer(text):
                inside = match[1]
                if inside.startswith("="):
                    self.expression(inside[1:], (*where, *inner), known)
                else:
                    self._name(inside.strip(), (*where, *inner), known)

    def _name(self, name: str, where: Where, names: set[str]) -> None:
        start, _, rest = name.partition(".")
        if start == "workflow" and "workflow" in names:
            self._global(rest, where, name)
        elif name not in names and not any(name.startswith(each[:-1]) for each in names if each.endswith(".*")):
            known = [each for each in names if not each.endswith("*")]
            self._say.no(where, f"{{{{{name}}}}} refers to nothing{did_you_mean(name, known)}")

    def _global(self, rest: str, where: Where, name: str) -> None:
        first, _, after = rest.partition(".")
        wrong = first not in GLOBALS
        suggestion = did_you_mean(first, GLOBALS)
        if first == "parameters" and after not in ("", "json") and after not in self._parameters:
            wrong, suggestion = True, did_you_mean(after, self._parameters)
        if first == "outputs":
            kind, _, what = after.partition(".")
            known = self._outputs.get(kind, set())
            wrong, suggestion = what not in known, did_you_mean(what, known)
        if wrong:
            self._say.no(where, f"{{{{{name}}}}} refers to nothing{suggestion}")

    def expression(self, text: str, where: Where, names: Iterable[str] | None = None) -> None:
        """Whether an expression can be read, and all that it names is known."""
        if "{{" in text:
            return  # what it says is known later
        try:
            tree = expressions.parse(text)
        except ExpressionError as error:
            self._say.no(where, f"the expression {text.strip()[:120]!r}: {error}")
            return
        if names is None:
            return
        known = set(names)
        roots = {each.partition(".")[0] for each in known} | {"item"}
        for way in expressions.references(tree):
            name = ".".join(way)
            if way[0] == "workflow":
                if way[1:2] == ("parameters",) and len(way) > 2 and way[2] not in (*self._parameters, "json"):
                    self._say.no(where, f"{name} refers to nothing{did_you_mean(way[2], self._parameters)}")
            elif way[0] == "inputs" and len(way) >= 3:
                if ".".join(way[:3]) not in known:
                    self._say.no(where, f"{name} refers to nothing{did_you_mean(name, known)}")
            elif way[0] in ("steps", "tasks") and len(way) >= 2:
                if not any(each.startswith(f"{way[0]}.{way[1]}.") for each in known):
                    self._say.no(where, f"{name} refers to nothing: there is no {way[0][:-1]} {way[1]!r}")
            elif way[0] not in roots:
                self._say.no(where, f"{name} refers to nothing{did_you_mean(way[0], roots)}")


def _global_names(value: Any, kind: str) -> Iterable[str]:
    """The global names that outputs anywhere in a value are given."""
    if isinstance(value, Mapping):
        for each in (value.get("outputs") or {}).get(kind, ()) if isinstance(value.get("outputs"), Mapping) else ():
            if isinstance(each, Mapping) and "globalName" in each:
                yield str(each["globalName"])
        for each in value.values():
            yield from _global_names(each, kind)
    elif isinstance(value, list):
        for each in value:
            yield from _global_names(each, kind)
