"""Templates that are made of others: what their steps and tasks know of each other, and what they wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tally.errors import SpecError
from tally.pipelines import conditions
from tally.pipelines.document import Where
from tally.pipelines.expressions import ExpressionError
from tally.pipelines.groups import hooks_of
from tally.pipelines.loops import WORDS
from tally.pipelines.support.names import Names
from tally.pipelines.support.passing import Passing
from tally.pipelines.support.report import Findings
from tally.pipelines.values import bare
from tally.pipelines.workflow import Found, Workflow
from tally.text import did_you_mean

Reach = Callable[[Mapping[str, Any], str, Where, set[str]], Found | None]
"""Looks at the template that a step, task or hook runs. owner, where: as in :class:`Found`. names: known there."""


class Groups:
    def __init__(self, say: Findings, names: Names, passing: Passing, workflow: Workflow, reach: Reach) -> None:
        self._say, self._names, self._passing = say, names, passing
        self._workflow, self._reach = workflow, reach

    def steps(self, template: Mapping[str, Any], owner: str, names: set[str]) -> None:
        known = set(names)
        seen: set[str] = set()
        for outer, group in enumerate(template["steps"]):
            these = group if isinstance(group, list) else [group]
            for inner, step in enumerate(these):
                where: Where = ("steps", outer, inner)
                name = step.get("name", "")
                if not name or name in seen:
                    self._say.no(where, f"a step needs a name of its own{f', not {name!r}' if name else ''}")
                self._say.named(name, where)
                seen.add(name)
                self._step(step, owner, where, known, "steps")
            for step in these:
                known |= self._names.of_step(f"steps.{step.get('name', '')}", self._quietly(step, owner))
        self._passing.outputs_of_group(template, known)

    def dag(self, template: Mapping[str, Any], owner: str, names: set[str]) -> None:
        tasks = template["dag"].get("tasks") or []
        by_name = {each.get("name", ""): each for each in tasks}
        if len(by_name) != len(tasks):
            self._say.no(("dag", "tasks"), "each task needs a name of its own")
        self._say.supported(template["dag"], {"tasks", "failFast", "target"}, ("dag",))
        target = template["dag"].get("target", "")
        for name in target.split() if "{{" not in target else ():
            if name not in by_name:
                self._say.no(("dag", "target"), f"there is no task {name!r}{did_you_mean(name, by_name)}")
        after: dict[str, set[str]] = {}
        logical = any("depends" in each for each in tasks)
        for number, task in enumerate(tasks):
            where: Where = ("dag", "tasks", number)
            name = task.get("name", "")
            self._say.named(name, where)
            if logical and "dependencies" in task:
                self._say.no(
                    where, "has dependencies where others of the DAG, or itself, have depends: Argo takes no mix"
                )
            if logical and "continueOn" in task:
                self._say.no(where, f"has continueOn where tasks have depends: say {name}.Failed in those instead")
            if (logical or "dependencies" in task) and name[:1].isdigit():
                self._say.no(where, f"the name {name!r} begins with a digit, which Argo refuses where tasks depend")
            try:
                after[name] = conditions.dependencies(task, by_name)[1]
            except ExpressionError as error:
                self._say.no(where, str(error))
                after[name] = set()
            for each in sorted(after[name] - set(by_name)):
                self._say.no(where, f"depends on a task {each!r} that there is not{did_you_mean(each, by_name)}")
            after[name] &= set(by_name)
        if circle := _circle(after):
            self._say.no(("dag", "tasks"), f"tasks wait for each other: {' -> '.join(circle)}")
            return
        left = {
            name: self._names.of_step(f"tasks.{name}", self._quietly(task, owner)) for name, task in by_name.items()
        }
        for number, task in enumerate(tasks):
            known = names.union(*(left[each] for each in _ancestors(task.get("name", ""), after)))
            self._step(task, owner, ("dag", "tasks", number), known, "tasks")
        self._passing.outputs_of_group(template, names.union(*left.values()))

    def _step(self, step: Mapping[str, Any], owner: str, where: Where, known: set[str], words: str) -> None:
        names = set(known)
        loops = [each for each in WORDS if each in step]
        if len(loops) > 1:
            self._say.no(where, f"has both {' and '.join(loops)}")
        for each in loops:
            self._names.tags(step[each], (*where, each), known)
        if "withSequence" in step and len(step["withSequence"].keys() & {"count", "end"}) != 1:
            self._say.no((*where, "withSequence"), "needs either count or end")
        if loops:
            names |= {"item", "item.*"}
        self._passing.arguments(step.get("arguments") or {}, (*where, "arguments"), names)
        self._names.tags(step.get("when", ""), (*where, "when"), names)
        if condition := step.get("when"):
            self._say.read(conditions.when, condition, (*where, "when"))
        found = self._reach(step, owner, where, names)
        its = known | {"item", "item.*", f"{words}.{step.get('name', '')}.*"} | ({"inputs.*"} if found else set())
        self.hooks(hooks_of(step), (*where, "hooks"), owner, its, step.get("arguments") or {})

    def hooks(
        self, hooks: Mapping[str, Any], where: Where, owner: str, names: set[str], arguments: Mapping[str, Any]
    ) -> None:
        """arguments: those of what the hooks are of, which an exit handler without its own is given."""
        for name, hook in hooks.items():
            place = (*where, name)
            if name == "exit" and not hook.get("arguments"):
                hook = {**hook, "arguments": self._taken(arguments, hook, owner)}
            if name != "exit" and "expression" not in hook:
                self._say.no(place, "a hook other than exit needs an expression")
            if expression := hook.get("expression"):
                self._names.expression(bare(expression), (*place, "expression"))
            self._names.tags(hook.get("arguments") or {}, (*place, "arguments"), names)
            self._reach(hook, owner, place, names)

    def _taken(self, arguments: Mapping[str, Any], hook: Mapping[str, Any], owner: str) -> dict[str, Any]:
        """Those of the arguments that a hook's template takes."""
        inputs = (self._quietly(hook, owner) or {}).get("inputs") or {}
        return {
            kind: [
                each
                for each in arguments.get(kind, ())
                if each["name"] in {one["name"] for one in inputs.get(kind, ())}
            ]
            for kind in ("parameters", "artifacts")
        }

    def _quietly(self, step: Mapping[str, Any], owner: str) -> Mapping[str, Any] | None:
        """The template of a step; None if there is none, which is said elsewhere."""
        try:
            return self._workflow.template(step, owner, (), self._workflow.main).template
        except (SpecError, KeyError):
            return None


def _circle(after: Mapping[str, set[str]]) -> list[str] | None:
    state: dict[str, int] = {}

    def visit(name: str, way: list[str]) -> list[str] | None:
        if state.get(name) == 2:
            return None
        if state.get(name) == 1:
            return [*way[way.index(name) :], name]
        state[name] = 1
        for each in sorted(after.get(name, ())):
            if found := visit(each, [*way, name]):
                return found
        state[name] = 2
        return None

    for name in after:
        if found := visit(name, []):
            return found
    return None


def _ancestors(name: str, after: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(after.get(name, ()))
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += after.get(each, ())
    return found
