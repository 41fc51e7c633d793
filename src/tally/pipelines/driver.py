"""Drives one run of a workflow: what Argo's controller does, on this machine.

The run is a recursion over its templates. Each node has a name, which is the way to it, and a row; the recursion asks
for the row first, so that a driver that goes on after another's end passes by what is done, and waits for processes
that still run. A node's row says that it runs before its process is begun, and what came of it before anything that
depends on it is begun. So a step is done once, however often its driver is killed.

Everything happens in one thread, that of the event loop. What takes long (copying, hashing, HTTP) goes to others.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tally.database import waiting
from tally.database.leased import Lease
from tally.masking import mask
from tally.pipelines import expressions
from tally.pipelines.bindings import Bindings, Bound
from tally.pipelines.document import seconds_of
from tally.pipelines.expressions import ExpressionError
from tally.pipelines.groups import Groups, Holder, hooks_of
from tally.pipelines.leaves import Leaves
from tally.pipelines.options import Keys, Options
from tally.pipelines.progress import WHY, Progress, StopError
from tally.pipelines.store import Node, PipelineStore, RunRecord, RunState, node_id
from tally.pipelines.values import Values, bare
from tally.pipelines.workflow import Found, Template, Workflow, semaphore_key

_DEEPEST = 200


class Driver:
    """say: gets one line for each node that is done."""

    def __init__(
        self,
        store: PipelineStore,
        lease: Lease,
        record: RunRecord,
        workflow: Workflow,
        options: Options,
        *,
        say: Callable[[Node], None] = lambda node: None,
        patience: waiting.Patience | None = None,
    ) -> None:
        self._record, self._workflow, self._options = record, workflow, options
        self._keys = Keys(options, workflow.others)
        self._failures: list[Node] = []
        self._status = "Running"
        self._progress = Progress(
            store, lease, options, say=say, done=self._export, stopped=lambda now: self._leaves.stop_all(now=now),
            patience=patience or waiting.Patience(what="the run"),
        )  # fmt: skip
        self._leaves = Leaves(self._progress, Path(record.folder), self._keys, options, workflow)
        self._bindings = Bindings(
            record, workflow, options, self._keys, status=lambda: self._status, failures=lambda: self._failures
        )
        self._values = self._bindings.values
        self._groups = Groups(self._progress, self.run_template, workflow, self._bindings)

    def stop(self, *, now: bool = False) -> None:
        """Put the run down: what runs is ended, and run again when the run is resumed. From the loop's thread."""
        self._progress.stop(now=now)

    # -- the run -------------------------------------------------------------------------------------------

    async def drive(self) -> RunState:
        """Go on until the run is over, is put down, or waits for a person. Raises OwnershipLostError, PipelineError."""
        progress = self._progress
        progress.load()
        async with self._leaves.ready():
            limit = self._workflow.spec.get("activeDeadlineSeconds")
            progress.stop_before(self._record, limit)
            looking = asyncio.create_task(progress.watch(self._record, limit))
            work = asyncio.create_task(self._whole())
            try:
                await asyncio.wait([work, looking], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    looking.result()
                    if progress.stopping == "lost":
                        work.cancel()
                state, error = await work
            except (StopError, asyncio.CancelledError):
                progress.check()
                state, error = ("waiting", None) if progress.waits else ("interrupted", None)
            finally:
                for each in (looking, work):
                    each.cancel()
                await asyncio.gather(looking, work, return_exceptions=True)
        progress.check()
        told = error and mask(error)
        progress.patience(lambda: progress.store.finish(progress.lease, state, error=told))
        return state

    async def _whole(self) -> tuple[RunState, str | None]:
        spec = self._workflow.spec
        name = self._record.name
        hooks = {key: each for key, each in (spec.get("hooks") or {}).items() if key != "exit"}
        top = self._workflow.named(self._options.entrypoint or spec.get("entrypoint", ""))
        whole = Holder({"name": name, "template": top.template.get("name", "")}, top)
        running = asyncio.ensure_future(self._guarded(self._groups.workflow_hooks(hooks, name, top)))
        try:
            await self._locks(spec.get("synchronization") or {}, "", self._values)
            node = await self.run_template(whole, top, name, name, "", self._bindings.arguments(), self._values)
            phase, message = node.phase, node.message
        except StopError as error:
            await self._leaves.end_daemons()
            if error.why not in WHY:
                running.cancel()
                raise
            phase, message = "Failed", WHY[error.why]
            await self._progress.end_open(message)
        except ValueError as error:
            phase, message = "Error", str(error)
        wrong = await running
        await self._leaves.end_daemons()
        phase = "Succeeded" if phase in ("Skipped", "Omitted", "Running") else phase
        cancelled = self._progress.stopping == "cancel"
        if self._progress.stopping in WHY:
            phase, message = "Failed", WHY[self._progress.stopping]
        self._progress.begin_exit()
        self._status = phase
        wrong = await self._guarded(self._groups.workflow_hooks(hooks, name, top)) or wrong
        handler = hooks_of(spec).get("exit")
        if handler is not None:
            ended: list[Node] = []

            async def leave() -> None:
                if self._groups.holds(handler.get("expression"), self._values):
                    given = self._bindings.arguments()
                    ended.append(await self._groups.hook(handler, f"{name}.onExit", name, top, self._values, given))

            wrong = await self._guarded(leave()) or wrong
            for each in ended:
                if each.failed:
                    told = f"the exit handler: {each.message or each.phase}"
                    phase, message = (each.phase, told) if phase == "Succeeded" else (phase, f"{message}; {told}")
        if wrong is not None:
            phase, message = (phase, f"{message}; {wrong}") if message else ("Error", wrong)
        states: dict[str, RunState] = {"Succeeded": "succeeded", "Failed": "failed", "Error": "error"}
        return ("cancelled" if cancelled else states[phase]), message if phase != "Succeeded" else None

    @staticmethod
    async def _guarded(hooks: Awaitable[None]) -> str | None:
        """What went wrong with hooks; None if nothing did. Raises StopError where the run is put down."""
        try:
            await hooks
        except ValueError as error:
            return f"a hook: {error}"
        except StopError as error:
            if error.why not in WHY:
                raise
        return None

    # -- nodes ---------------------------------------------------------------------------------------------

    def _export(self, node: Node) -> None:
        """Make a done node's global outputs known to all, and its failure to the exit handler."""
        exported = node.outputs.get("globals") or {}
        for name, value in (exported.get("parameters") or {}).items():
            self._values[f"workflow.outputs.parameters.{name}"] = value
        for name, artifact in (exported.get("artifacts") or {}).items():
            self._values.artifacts[f"workflow.outputs.artifacts.{name}"] = artifact
        if node.failed and not self._progress.exiting:
            self._failures.append(node)

    async def run_template(
        self, holder: Holder, found: Found, name: str, display: str, parent: str, given: Bound, values: Values
    ) -> Node:
        """Run a template as the node by this name, and come back when it is done."""
        if name.count(".") + name.count("[") > 2 * _DEEPEST:
            raise ExpressionError(f"templates call each other more than {_DEEPEST} deep")
        template = found.template
        called = str(template.get("name") or holder.value.get("template") or "")
        strategy = template.get("retryStrategy")
        if strategy is None and found.kind != "suspend":
            strategy = self._workflow.spec.get("retryStrategy")
        kind = "Retry" if strategy is not None else _KINDS[found.kind]
        node = self._progress.begin(name, display, kind, called, parent)
        if self._options.since is not None and holder.name.partition("(")[0] == self._options.since:
            self._progress.reached = True
        if node.done:
            if template.get("synchronization"):  # its driver may have been killed before it gave them back
                self._unlock(name)
            return node
        if node.phase != "Running":  # what was begun by another driver is looked after
            self._progress.check_goes_on()
        try:
            bound, inside = self._bindings.bind(found, given, values)
            inside["node.name"] = name
            inside["pod.name"] = (
                f"{self._record.name}-{called}-{node.id}" if found.kind in ("container", "script") else node.id
            )
            node.inputs = bound.to_json()
            node.started_at = node.started_at or time.time()
            if memo := await self._memoized(template, node, inside):
                return memo
            await self._locks(template.get("synchronization") or {}, name, inside)
            try:
                # Who held it before may have made what is looked for.
                if template.get("synchronization") and (memo := await self._memoized(template, node, inside)):
                    return memo
                if strategy is None:
                    await self._once(holder, found, node, bound, inside)
                else:
                    await self._retried(holder, found, node, bound, inside, strategy)
                if node.phase == "Succeeded" and "memoize" in template:
                    cache, key, _ = self._memo_key(template["memoize"], inside)
                    self._progress.remember(cache, key, node)
                    await self._progress.save(node)
            finally:
                if template.get("synchronization"):
                    self._unlock(name)
            return node
        except ValueError as error:  # an expression without a value, a number that is none
            return await self._progress.end(node, "Error", str(error))

    async def _memoized(self, template: Template, node: Node, values: Values) -> Node | None:
        if "memoize" not in template or node.phase == "Running":
            return None
        cache, key, oldest = self._memo_key(template["memoize"], values)
        if not self._progress.cached(cache, key, node, oldest=oldest):
            return None
        return await self._progress.end(node, "Succeeded", "taken from the cache")

    @staticmethod
    def _memo_key(memoize: Mapping[str, Any], values: Values) -> tuple[str, str, float | None]:
        import hashlib

        given = values.substituted(memoize)
        cache = ((given.get("cache") or {}).get("configMap") or {}).get("name", "")
        oldest = given.get("maxAge")
        key = hashlib.sha256(given.get("key", "").encode()).hexdigest()
        return f"memoize:{cache}"[:250], key, seconds_of(oldest) if oldest else None

    async def _once(self, holder: Holder, found: Found, node: Node, bound: Bound, values: Values) -> None:
        """Run a template once, as this node."""
        match found.kind:
            case "steps" | "dag":
                try:
                    await (self._groups.steps if found.kind == "steps" else self._groups.dag)(found, node, values)
                finally:
                    if self._progress.stopping != "lost":
                        await self._leaves.end_daemons(node.name)
            case _:
                await self._leaves.run(found, node, bound, values, captures=holder.name.partition("(")[0])

    async def _retried(
        self, holder: Holder, found: Found, node: Node, bound: Bound, values: Values, strategy: Mapping[str, Any]
    ) -> None:
        strategy = {
            **strategy,
            **{key: values.substituted(strategy[key]) for key in ("limit", "backoff") if key in strategy},
        }
        limit = int(strategy["limit"]) if strategy.get("limit") not in (None, "") else None
        backoff = strategy.get("backoff") or {}
        most = seconds_of(backoff["maxDuration"]) if backoff.get("maxDuration") else None
        node.phase = "Running"
        await self._progress.save(node)
        number, last = 0, {"exitCode": "0", "status": "", "duration": "0", "message": ""}
        while True:
            inside = Values(values)
            inside["retries"] = number
            for key, value in last.items():
                inside[f"lastRetry.{key}"] = value
            name = f"{node.name}({number})"
            attempt = self._progress.begin(
                name, f"{node.display}({number})", _KINDS[found.kind], node.template, node.id
            )
            inside["node.name"] = name
            if not attempt.done:
                attempt.inputs, attempt.started_at = node.inputs, attempt.started_at or time.time()
                try:
                    limited = self._limited(found, node, most, inside) if number and most is not None else found
                    await self._once(holder, limited, attempt, bound, inside)
                except ValueError as error:
                    await self._progress.end(attempt, "Error", str(error))
            node.outputs, node.exit_code = attempt.outputs, attempt.exit_code
            if not attempt.failed:
                await self._progress.end(node, attempt.phase)
                return
            took = (attempt.finished_at or 0.0) - (attempt.started_at or 0.0)
            code = attempt.exit_code if attempt.exit_code is not None else -1
            last = {"exitCode": str(code), "status": attempt.phase,
                    "duration": str(int(took)), "message": attempt.message or ""}  # fmt: skip
            why = self._gives_up(strategy, attempt, last, number, limit, inside)
            pause = self._backoff(backoff, number)
            if why is None and most is not None and time.time() + pause - (node.started_at or 0.0) > most:
                why = "Max duration limit exceeded"
            if why is not None:
                await self._progress.end(node, attempt.phase, f"{why}: {attempt.message}" if attempt.message else why)
                return
            if pause:
                await self._progress.pause(max(0.0, pause - (time.time() - (attempt.finished_at or 0.0))))
            self._progress.check_goes_on()
            number += 1

    @staticmethod
    def _limited(found: Found, node: Node, most: float, values: Values) -> Found:
        """A template as it is tried again: no longer than its ``maxDuration`` goes on from the first attempt."""
        left = max(0.0, (node.started_at or 0.0) + most - time.time())
        if (own := found.template.get("activeDeadlineSeconds")) is not None:
            left = min(left, float(values.text(str(own))))
        return replace(found, template={**found.template, "activeDeadlineSeconds": left})

    @staticmethod
    def _gives_up(
        strategy: Mapping[str, Any],
        attempt: Node,
        last: Mapping[str, str],
        number: int,
        limit: int | None,
        values: Values,
    ) -> str | None:
        policy = strategy.get("retryPolicy", "Always" if "expression" in strategy else "OnFailure")
        wanted = {"OnFailure": ("Failed",), "OnError": ("Error",), "OnTransientError": ()}.get(
            policy, ("Failed", "Error")
        )
        if attempt.phase not in wanted:
            return f"no retry of {attempt.phase} (retryPolicy {policy})"
        if limit is not None and number >= limit:
            return "No more retries left"
        if expression := strategy.get("expression"):
            inside = Values(values)
            for key, value in last.items():
                inside[f"lastRetry.{key}"] = value
            if not expressions.truth(
                bare(inside.text(expression) if not expression.strip().startswith("{{=") else expression),
                inside.nested(),
            ):
                return "retryStrategy.expression evaluated to false"
        return None

    @staticmethod
    def _backoff(backoff: Mapping[str, Any], number: int) -> float:
        pause = seconds_of(backoff["duration"]) if backoff.get("duration") else 0.0
        if factor := backoff.get("factor"):
            pause *= float(factor) ** number
        return min(pause, seconds_of(backoff["cap"])) if backoff.get("cap") else pause

    # -- mutexes and semaphores ------------------------------------------------------------------------------

    async def _locks(self, value: Mapping[str, Any], name: str, values: Values) -> None:
        """Take what a node is to hold, or what the run is, if there is no name."""
        wanted: list[tuple[str, int]] = []
        mutexes = [*value.get("mutexes", ()), *([value["mutex"]] if "mutex" in value else ())]
        wanted += [(f"mutex:{values.text(each.get('name', ''))}"[:250], 1) for each in mutexes]
        for each in [*value.get("semaphores", ()), *([value["semaphore"]] if "semaphore" in value else ())]:
            key, reference = semaphore_key(values.substituted(each))
            places = self._options.semaphores.get(key)
            if places is None and reference is not None:
                places = int(self._keys.get("ConfigMap", reference["name"], reference["key"]))
            wanted.append((f"semaphore:{reference['name'] if reference else ''}/{key}"[:250], places or 1))
        progress = self._progress
        for lock, places in sorted(wanted):
            take = functools.partial(progress.store.lock, progress.lease, lock, places, node_id(name))
            tries = 0
            while not progress.patience(take):
                tries += 1
                await progress.pause(min(0.5, 0.05 * tries) * (0.5 + random.random()))  # noqa: S311

    def _unlock(self, name: str) -> None:
        if self._progress.stopping not in ("interrupt", "lost"):  # then it is held on, or another driver's
            self._progress.patience(lambda: self._progress.store.unlock(self._progress.lease, node_id(name)))


_KINDS = {"steps": "Steps", "dag": "DAG", "container": "Pod", "script": "Pod", "suspend": "Suspend", "http": "HTTP",
          "resource": "Resource"}  # fmt: skip
