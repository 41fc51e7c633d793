"""Templates that do something themselves: a process, a request, an object of a cluster, a pause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tally.errors import SpecError, TallyError
from tally.pipelines import expressions, resources
from tally.pipelines.bindings import Bound
from tally.pipelines.document import seconds_of
from tally.pipelines.expressions import ExpressionError
from tally.pipelines.options import Keys, Options
from tally.pipelines.pods import LIMITS, MOST_RESULT, Pods, limit_of
from tally.pipelines.progress import Progress
from tally.pipelines.store import Node, Phase
from tally.pipelines.values import Values, bare
from tally.pipelines.workflow import Found, Workflow

_HTTP_SECONDS = 30.0


class Leaves:
    """Runs them. folder: of the run."""

    def __init__(self, progress: Progress, folder: Path, keys: Keys, options: Options, workflow: Workflow) -> None:
        self._progress, self._keys, self._options = progress, keys, options
        self._pods = Pods(progress, folder, keys, options, workflow)

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[None]:
        """While this lasts, templates can be run."""
        async with self._pods.ready():
            yield

    def stop_all(self, *, now: bool) -> None:
        """Ask all processes to end."""
        self._pods.stop_all(now=now)

    async def end_daemons(self, inside: str = "") -> None:
        """End daemons that were begun inside of a node, by its name; all, if none is given."""
        await self._pods.end_daemons(inside)

    async def run(self, found: Found, node: Node, bound: Bound, values: Values, *, captures: str) -> None:
        """Run a template as this node, to its end. captures: the step's name. Raises StopError, ExpressionError."""
        if found.kind in ("http", "resource"):  # what another driver has begun of them would be done again
            self._progress.check_goes_on()
        match found.kind:
            case "container" | "script":
                await self._pods.run(found, node, bound, values, captures=captures)
            case "suspend":
                await self._suspend(found, node, bound, values)
            case "http":
                await self._http(found, node, values)
            case "resource":
                await self._resource(found, node, values)
            case other:
                raise ExpressionError(f"templates of the kind {other!r} are not run here")

    async def _suspend(self, found: Found, node: Node, bound: Bound, values: Values) -> None:
        duration = found.template["suspend"].get("duration")
        node.phase = "Running"
        await self._progress.save(node)
        left = None
        if duration:
            left = max(0.0, (node.started_at or time.time()) + seconds_of(values.text(duration)) - time.time())
        given = await self._progress.supplied(node, left)
        outputs = found.template.get("outputs") or {}
        parameters: dict[str, str] = {}
        for each in outputs.get("parameters", ()):
            source = each.get("valueFrom") or {}
            if given and each["name"] in given:
                parameters[each["name"]] = given[each["name"]]
            elif "default" in source:
                parameters[each["name"]] = values.text(source["default"])
            else:
                raise ExpressionError(f"the output {each['name']!r} was not supplied")
        node.outputs = {"parameters": parameters, "artifacts": {}}
        await self._progress.end(node, "Succeeded")

    async def _resource(self, found: Found, node: Node, values: Values) -> None:
        """Act on a cluster, and wait for what is to come of it."""
        resource = values.substituted(found.template["resource"])
        assert self._options.context is not None
        cluster = resources.Resources(self._options.context, self._options.namespace)
        limit = limit_of({key: values.substituted(found.template.get(key)) for key in LIMITS}, node)
        node.phase = "Running"
        await self._progress.save(node)  # what is made again, or found made already, is the same
        phase: Phase = "Succeeded"
        message = None
        async with self._progress.working():
            try:
                manifests = resources.documents(resource.get("manifest", ""))
                live = await asyncio.to_thread(cluster.act, resource["action"], manifests, node.id)
                wanted = {
                    "Failed": resources.conditions(resource.get("failureCondition", "")),
                    "Succeeded": resources.conditions(resource.get("successCondition", "")),
                }
                while live is not None and any(wanted.values()):
                    met = [key for key, all_ in wanted.items() if all_ and all(each.holds(live) for each in all_)]
                    if met[:1] == ["Failed"]:
                        phase, message = "Failed", f"failureCondition '{resource['failureCondition']}' evaluated true"
                    if met or not wanted["Succeeded"]:
                        break
                    if limit is not None and time.time() >= limit:
                        phase, message = "Failed", "Pod was active on the node longer than the specified deadline"
                        break
                    await self._progress.pause(resources.LOOK_SECONDS)
                    live = await asyncio.to_thread(cluster.look, live)
                if phase == "Succeeded":
                    node.outputs = {"parameters": self._of_object(found.template, live), "artifacts": {}}
            except (TallyError, resources.ResourceError) as error:
                phase, message = "Error", error.message if isinstance(error, TallyError) else str(error)
            finally:
                cluster.close()
        await self._progress.end(node, phase, message)

    @staticmethod
    def _of_object(template: Mapping[str, Any], live: Mapping[str, Any] | None) -> dict[str, str]:
        """Outputs that are taken from the object. Raises ResourceError."""
        parameters: dict[str, str] = {}
        for each in (template.get("outputs") or {}).get("parameters", ()):
            source = each.get("valueFrom") or {}
            try:
                parameters[each["name"]] = (
                    resources.value_at(live, source.get("jsonPath") or source["jqFilter"])
                    if {"jsonPath", "jqFilter"} & source.keys()
                    else each["value"]
                )
            except resources.ResourceError:
                if "default" not in source:
                    raise
                parameters[each["name"]] = source["default"]
        return parameters

    async def _http(self, found: Found, node: Node, values: Values) -> None:
        http = values.substituted(
            {key: each for key, each in found.template["http"].items() if key != "successCondition"}
        )
        condition = found.template["http"].get("successCondition")
        node.phase = "Running"
        await self._progress.save(node)
        async with self._progress.working():
            seconds = float(http.get("timeoutSeconds", _HTTP_SECONDS))
            if timeout := values.text(found.template.get("timeout", "")):
                seconds = min(seconds, seconds_of(timeout))
            phase, message, body = await asyncio.to_thread(self._request, http, condition, values, seconds)
        node.outputs = {"parameters": {}, "artifacts": {}, "result": body}
        await self._progress.end(node, phase, message)

    def _request(
        self, http: Mapping[str, Any], condition: str | None, values: Values, seconds: float
    ) -> tuple[Phase, str | None, str]:
        import httpx2

        headers = {}
        for each in http.get("headers", ()):
            reference = (each.get("valueFrom") or {}).get("secretKeyRef")
            try:
                headers[each["name"]] = (
                    each["value"]
                    if reference is None
                    else self._keys.get("Secret", reference["name"], reference["key"])
                )
            except SpecError as error:
                return "Error", error.problems[0], ""
        method = http.get("method", "GET")
        try:
            answer = httpx2.request(
                method, http["url"], headers=headers, content=http.get("body"), follow_redirects=True,
                timeout=seconds,
                verify=not http.get("insecureSkipVerify", False),
            )  # fmt: skip
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            return "Failed", f"{http['url']}: {error or type(error).__name__}", ""
        body = answer.text[:MOST_RESULT]
        if condition is None:
            if answer.is_success:
                return "Succeeded", None, body
            return "Failed", f"received non-2xx response code: {answer.status_code}", body
        scope = values.nested() | {
            "request": {"method": method, "url": http["url"], "body": http.get("body", ""), "headers": headers},
            "response": {"statusCode": answer.status_code, "body": body,
                         "headers": {name.title(): answer.headers.get_list(name) for name in answer.headers}},
        }  # fmt: skip
        try:
            met = expressions.truth(bare(condition), scope)
        except ExpressionError as error:
            return "Error", f"successCondition: {error}", body
        return ("Succeeded", None, body) if met else ("Failed", f"successCondition '{condition}' evaluated false", body)
