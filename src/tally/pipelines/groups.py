"""Templates that are made of others: steps and DAGs, with their loops, conditions and hooks."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tally.pipelines import conditions, expressions, loops
from tally.pipelines.bindings import Bindings, Bound, exported, rfc3339
from tally.pipelines.document import scalar_text, to_json
from tally.pipelines.expressions import ExpressionError
from tally.pipelines.progress import Progress, StopError
from tally.pipelines.store import Node, Phase, node_id
from tally.pipelines.values import Values, bare
from tally.pipelines.workflow import Found, Workflow

MOST_BEGUN = 256
"""Items of one loop that are begun and not done, at most."""
RESULTS = {"Succeeded": "Succeeded", "Failed": "Failed", "Error": "Errored", "Skipped": "Skipped", "Omitted": "Omitted",
           "Running": "Daemoned", "Pending": "Daemoned"}  # fmt: skip
"""What ``depends`` calls phases."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A step, a task or a hook, and where it stands: what it runs is looked up from there."""

    value: Mapping[str, Any]
    inside: Found

    @property
    def name(self) -> str:
        return str(self.value.get("name", ""))


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a step or task. node: that stands for all."""

    nodes: Sequence[Node]
    node: Node
    loop: bool

    @property
    def names(self) -> list[str]:
        """As ``depends`` calls them."""
        found = [RESULTS[self.node.phase]]
        if self.loop:
            phases = [each.phase for each in self.nodes]
            found += ["AnySucceeded"] if "Succeeded" in phases else []
            found += ["AllFailed"] if phases and all(each == "Failed" for each in phases) else []
        return found


class _Places:
    """How many children of a template run at once. failed: one has, and no more are begun if it fails fast."""

    def __init__(self, parallelism: int | None, *, fail_fast: bool) -> None:
        self._places = asyncio.Semaphore(parallelism) if parallelism else None
        self._fail_fast = fail_fast
        self.failed = False

    async def __aenter__(self) -> bool:
        if self._places is not None:
            await self._places.acquire()
        return self._fail_fast and self.failed

    async def __aexit__(self, *error: object) -> None:
        if self._places is not None:
            self._places.release()


class RunTemplate(Protocol):
    """Runs a template as the node by this name, and comes back when it is done."""

    async def __call__(
        self, holder: Holder, found: Found, name: str, display: str, parent: str, given: Bound, values: Values
    ) -> Node: ...


class Groups:
    """run: that runs a template, a group or not."""

    def __init__(self, progress: Progress, run: RunTemplate, workflow: Workflow, bindings: Bindings) -> None:
        self._progress, self._run, self._workflow, self._bindings = progress, run, workflow, bindings
        self._hooks_done: set[str] = set()

    # -- hooks ------------------------------------------------------------------------------------------------

    async def workflow_hooks(self, hooks: Mapping[str, Any], name: str, top: Found) -> None:
        for key, hook in hooks.items():
            if key not in self._hooks_done and self.holds(hook.get("expression"), self._bindings.values):
                self._hooks_done.add(key)
                await self.hook(hook, f"{name}.hooks.{key}", name, top, self._bindings.values)

    def holds(self, expression: str | None, values: Values) -> bool:
        return expression is None or expressions.truth(bare(values.text(expression)), values.nested())

    async def hook(
        self,
        hook: Mapping[str, Any],
        name: str,
        parent: str,
        inside: Found,
        values: Values,
        otherwise: Bound | None = None,
    ) -> Node:
        """Run a hook. otherwise: what it is given where it says nothing of arguments."""
        display = name if "onExit" in name or "hooks" in name else hook.get("template", "")
        holder = Holder({**hook, "name": display}, inside)
        given = self._bindings.given(hook.get("arguments") or {}, values)
        if otherwise is not None and not hook.get("arguments"):
            given = otherwise
        return await self._run(holder, self._resolve(holder), name, display, node_id(parent), given, values)

    def _resolve(self, holder: Holder) -> Found:
        inside = holder.inside
        return self._workflow.template(holder.value, inside.owner, inside.where, inside.document)

    # -- steps -----------------------------------------------------------------------------------------------

    async def steps(self, found: Found, node: Node, values: Values) -> None:
        template = found.template
        node.phase = "Running"
        await self._progress.save(node)
        scope = Values(values)
        at_once = _Places(template.get("parallelism"), fail_fast=bool(template.get("failFast")))
        for number, group in enumerate(template["steps"]):
            name = f"{node.name}[{number}]"
            these = [Holder(each, found) for each in (group if isinstance(group, list) else [group])]
            part = self._progress.begin(name, f"[{number}]", "StepGroup", node.template, node.id)
            if not part.done:
                part.phase, part.started_at = "Running", part.started_at or time.time()
                await self._progress.save(part)
            runs = [self._looped(each, f"{name}.{each.name}", part.id, scope, at_once, "steps") for each in these]
            results = await _together(runs)
            failed = next((child for holder, result in zip(these, results, strict=True) for child in result.nodes
                           if child.failed and not _goes_on(holder, child)), None)  # fmt: skip
            for holder, result in zip(these, results, strict=True):
                self._add_outputs(scope, f"steps.{holder.name}", result)
            if not part.done:
                await self._progress.end(
                    part, "Failed" if failed else "Succeeded", f"child {failed.display!r} failed" if failed else None
                )
            if failed is not None:
                await self._progress.end(node, "Failed", f"child {failed.display!r} failed")
                return
        await self._finish(found, node, scope)

    async def _finish(self, found: Found, node: Node, scope: Values) -> None:
        """Take over outputs from steps or tasks, and be done."""
        outputs = found.template.get("outputs") or {}
        parameters: dict[str, str] = {}
        for each in outputs.get("parameters", ()):
            source = each.get("valueFrom") or {}
            try:
                if "expression" in source:
                    parameters[each["name"]] = scalar_text(expressions.evaluate(source["expression"], scope.nested()))
                else:
                    parameters[each["name"]] = scope.text(source.get("parameter", each.get("value", "")))
            except ExpressionError as error:
                if "default" not in source:
                    raise ExpressionError(f"the output {each['name']!r}: {error}") from None
                parameters[each["name"]] = scope.text(source["default"])
        artifacts: dict[str, Any] = {}
        for each in outputs.get("artifacts", ()):
            artifact = self._bindings.artifact(each, scope)
            if artifact is not None:
                artifacts[each["name"]] = artifact
        node.outputs = {
            "parameters": parameters,
            "artifacts": artifacts,
            "globals": exported(outputs, parameters, artifacts),
        }
        await self._progress.end(node, "Succeeded")

    # -- dag -------------------------------------------------------------------------------------------------

    async def dag(self, found: Found, node: Node, values: Values) -> None:
        dag = found.template["dag"]
        tasks = {each["name"]: Holder(each, found) for each in dag.get("tasks", ())}
        after = {name: conditions.dependencies(each.value, {key: holder.value for key, holder in tasks.items()})
                 for name, each in tasks.items()}  # fmt: skip
        targets = values.text(dag.get("target", "")).split()
        needed = set(tasks)
        if targets:
            needed, waiting = set(), list(targets)
            while waiting:
                if (name := waiting.pop()) not in needed:
                    needed.add(name)
                    waiting += after[name][1]
        else:
            targets = [name for name in tasks if not any(name in after[each][1] for each in tasks)]
        node.phase = "Running"
        await self._progress.save(node)
        scope = Values(values)
        at_once = _Places(found.template.get("parallelism"), fail_fast=bool(found.template.get("failFast")))
        results: dict[str, Result] = {}
        done = {name: asyncio.Event() for name in needed}

        async def run(name: str) -> None:
            tree, before = after[name]
            try:
                for each in before:
                    await done[each].wait()
                if not before <= results.keys():
                    raise StopError(self._progress.stopping or "interrupt")  # what it waits for was stopped
                met = tree is None or conditions.is_met(tree, {each: results[each].names for each in before})
                if met:
                    path = f"{node.name}.{name}"
                    results[name] = await self._looped(tasks[name], path, node.id, scope, at_once, "tasks")
                else:
                    called = tasks[name].value.get("template", "")
                    omitted = await self._progress.passed(
                        f"{node.name}.{name}", name, called, node.id, "Omitted", "omitted: depends condition not met"
                    )
                    results[name] = Result([omitted], omitted, loop=False)
                self._add_outputs(scope, f"tasks.{name}", results[name])
            finally:
                done[name].set()

        await _together([run(name) for name in tasks if name in needed])
        branches: dict[str, Node] = {}

        def branch(name: str) -> Node:
            """A task or, if it was not run, what it waited for: one that has failed, if any."""
            if name not in branches:
                own = results[name].node
                passed = own.phase in ("Skipped", "Omitted")
                before = [branch(each) for each in sorted(after[name][1])] if passed else []
                branches[name] = next((each for each in before if each.failed), own)
            return branches[name]

        for name in targets:
            failed = branch(name)
            if failed.failed and not _goes_on(tasks[name], failed):
                await self._progress.end(node, failed.phase, f"child {failed.display!r} failed")
                return
        await self._finish(found, node, scope)

    # -- loops -----------------------------------------------------------------------------------------------

    async def _looped(
        self, holder: Holder, name: str, parent: str, scope: Values, at_once: _Places, words: str
    ) -> Result:
        """Run a step or task: once, or for each of its items."""
        step = holder.value
        if not any(each in step for each in loops.WORDS):
            child = await self._step(holder, name, holder.name, parent, scope, at_once, words)
            return Result([child], child, loop=False)
        passed = functools.partial(self._progress.passed, name, holder.name, step.get("template", ""), parent)
        group: Node | None = None
        if words == "tasks":
            group = self._progress.begin(name, holder.name, "TaskGroup", step.get("template", ""), parent)
            if not group.done:
                group.phase, group.started_at = "Running", group.started_at or time.time()
                await self._progress.save(group)
            parent = group.id
        try:
            items = loops.items(step, scope)
        except ExpressionError as error:
            # What is not run needs no items.
            skipped = self._is_skipped(step, scope)
            phase: Phase = "Skipped" if skipped else "Error"
            if group is None:
                broken = await passed(phase, skipped or str(error))
            else:
                broken = group if group.done else await self._progress.end(group, phase, skipped or str(error))
            return Result([broken], broken, loop=False)
        if not items and group is None:
            empty = await passed("Skipped", "there are no items")
            return Result([empty], empty, loop=True)
        nodes: list[Node | None] = [None] * len(items)
        begun = asyncio.Semaphore(MOST_BEGUN)

        async def one(number: int, item: Any) -> None:
            try:
                inside = Values(scope)
                inside["item"] = item
                for key, value in item.items() if isinstance(item, Mapping) else ():
                    inside[f"item.{key}"] = value
                label = f"({number}:{loops.item_label(item)})"
                child = await self._step(
                    Holder({**step, "name": holder.name + label}, holder.inside), name + label, holder.name + label,
                    parent, inside, at_once, words,
                )  # fmt: skip
                nodes[number] = child
            finally:
                begun.release()

        running: set[asyncio.Task[None]] = set()
        try:
            for number, item in enumerate(items):
                await begun.acquire()
                over = {each for each in running if each.done()}
                if any(each.exception() for each in over):
                    break  # it is raised once the others are over, too
                running -= over
                running.add(asyncio.create_task(one(number, item)))
            await _together(running)
        finally:
            for each in running:
                each.cancel()
        found = [each for each in nodes if each is not None]
        worst = next((each for phase in ("Error", "Failed") for each in found if each.phase == phase), None)
        if group is None:
            return Result(found, worst or _succeeded(found), loop=True)
        if not group.done:
            await self._progress.end(
                group, worst.phase if worst else "Succeeded", f"child {worst.display!r} failed" if worst else None
            )
        return Result(found, group, loop=True)

    @staticmethod
    def _is_skipped(step: Mapping[str, Any], scope: Values) -> str | None:
        try:
            condition = scope.text(step.get("when", ""))
            return None if conditions.when(condition) else f"when {condition!r} evaluated false"
        except ExpressionError:
            return None

    async def _step(
        self, holder: Holder, name: str, display: str, parent: str, scope: Values, at_once: _Places, words: str
    ) -> Node:
        """Run one step or task, or one item of it."""
        step = holder.value
        values = Values(scope)
        values[f"{words}.name"] = display
        passed = functools.partial(self._progress.passed, name, display, step.get("template", ""), parent)
        try:
            condition = values.text(step.get("when", ""))
            if not conditions.when(condition):
                return await passed("Skipped", f"when {condition!r} evaluated false")
            if "inline" in step:  # what is its own is known once it is run
                step = {**step, "inline": values.substituted(step["inline"], only_known=True)}
            found = self._resolve(Holder(step, holder.inside))
            given = self._bindings.given(step.get("arguments") or {}, values)
        except ExpressionError as error:
            return await passed("Error", str(error))
        async with at_once as fails:
            if fails:
                return await passed("Omitted", "another has failed, and failFast is set")
            hooks = hooks_of(step)
            early = (
                asyncio.ensure_future(self._step_hooks(hooks, holder, name, values, words, None, given))
                if hooks
                else None
            )
            try:
                node = await self._run(holder, found, name, display, parent, given, values)
            except BaseException:
                if early is not None:
                    early.cancel()
                raise
            if early is not None:
                await early
                await self._step_hooks(hooks, holder, name, values, words, node, given)
            if node.failed and not _goes_on(holder, node):
                at_once.failed = True
        return node

    async def _step_hooks(
        self,
        hooks: Mapping[str, Any],
        holder: Holder,
        name: str,
        values: Values,
        words: str,
        node: Node | None,
        given: Bound,
    ) -> None:
        """Run the hooks of a step that are due: those of a running one, if it is not done. given: to the step."""
        inside = Values(values)
        start = f"{words}.{str(holder.value.get('name', '')).partition('(')[0]}"
        if node is None:
            inside[f"{start}.status"] = "Running"
        else:
            self._add_outputs(inside, start, Result([node], node, loop=False))
        for key, hook in sorted(hooks.items(), key=lambda each: each[0] == "exit"):  # that comes last
            if key == "exit":
                if (
                    node is not None
                    and node.phase not in ("Skipped", "Omitted")
                    and self.holds(hook.get("expression"), inside)
                ):
                    await self.hook(hook, f"{name}.onExit", name, holder.inside, inside, given)
            elif f"{name} {key}" not in self._hooks_done and self.holds(hook.get("expression"), inside):
                self._hooks_done.add(f"{name} {key}")
                await self.hook(hook, f"{name}.hooks.{key}", name, holder.inside, inside)

    def _add_outputs(self, scope: Values, start: str, result: Result) -> None:
        """Let others know what came of a step: of a loop, as lists."""
        node = result.node
        scope[f"{start}.id"], scope[f"{start}.status"] = node.id, node.phase
        scope[f"{start}.startedAt"], scope[f"{start}.finishedAt"] = (
            rfc3339(node.started_at),
            rfc3339(node.finished_at),
        )
        scope[f"{start}.hostNodeName"] = os.uname().nodename
        if not result.loop:
            if node.phase in ("Skipped", "Omitted"):
                return
            if "ip" in node.outputs:
                scope[f"{start}.ip"] = node.outputs["ip"]
            if node.exit_code is not None:
                scope[f"{start}.exitCode"] = node.exit_code
            if "result" in node.outputs:
                scope[f"{start}.outputs.result"] = node.outputs["result"]
            for name, value in (node.outputs.get("parameters") or {}).items():
                scope[f"{start}.outputs.parameters.{name}"] = value
            for name, artifact in (node.outputs.get("artifacts") or {}).items():
                scope.artifacts[f"{start}.outputs.artifacts.{name}"] = artifact
            return
        ran = [each for each in result.nodes if each.phase == "Succeeded"]
        results = [loops.item_of(each.outputs["result"]) for each in ran if "result" in each.outputs]
        scope[f"{start}.outputs.result"] = to_json(results)
        parameters = [each.outputs["parameters"] for each in ran if each.outputs.get("parameters")]
        scope[f"{start}.outputs.parameters"] = to_json(parameters)
        for name in {name for each in parameters for name in each}:
            found = loops.items_of([each[name] for each in parameters if name in each])
            scope[f"{start}.outputs.parameters.{name}"] = to_json(found)


def hooks_of(holder: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a step, a task or a workflow, by name; its ``onExit`` is the one called ``exit``."""
    hooks = dict(holder.get("hooks") or {})
    return hooks | {"exit": {"template": holder["onExit"]}} if holder.get("onExit") else hooks


def _goes_on(holder: Holder, node: Node) -> bool:
    goes_on = holder.value.get("continueOn") or {}
    return bool(goes_on.get("failed") if node.phase == "Failed" else goes_on.get("error"))


def _succeeded(nodes: Sequence[Node]) -> Node:
    """The node that stands for items none of which has failed."""
    return next((each for each in nodes if each.phase == "Succeeded"), nodes[0])


async def _together(coroutines: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for all; if one raises, for the others too, and raise that then."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    stops = [each for each in results if isinstance(each, BaseException)]
    if stops:
        raise next((each for each in stops if not isinstance(each, StopError)), stops[0])
    return results
