"""Looks at everything that a run of a workflow could reach, and says what of it is not done here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tally.errors import SpecError
from tally.pipelines import resources
from tally.pipelines.document import Where, path_text
from tally.pipelines.groups import hooks_of
from tally.pipelines.options import Keys, Options
from tally.pipelines.support.fields import LOCATIONS, SPEC, TEMPLATE
from tally.pipelines.support.groups import Groups
from tally.pipelines.support.names import OF_WORKFLOW, Names
from tally.pipelines.support.passing import Passing
from tally.pipelines.support.pods import Pods
from tally.pipelines.support.report import Findings, Report, Verdict
from tally.pipelines.values import Values, bare
from tally.pipelines.workflow import GROUPS, LEAVES, Found, Workflow, semaphore_key
from tally.text import did_you_mean

_HTTP = {"body", "headers", "insecureSkipVerify", "method", "successCondition", "timeoutSeconds", "url"}


def check(workflow: Workflow, options: Options, parameters: Mapping[str, str] | None = None) -> Report:
    """Look at everything that a run could reach. parameters: given beside those of the workflow."""
    return _Check(workflow, options, parameters or {}).run()


class _Check:
    def __init__(self, workflow: Workflow, options: Options, given: Mapping[str, str]) -> None:
        self._workflow, self._options, self._given = workflow, options, given.keys()
        self._spec = workflow.spec
        self._keys = Keys(options, workflow.others)
        self._seen: set[tuple[str, Where, str]] = set()
        arguments = self._spec.get("arguments") or {}
        own = arguments.get("parameters", ())
        self._parameters = {each["name"] for each in own} | given.keys()
        values = Values()
        for name, value in [*((each["name"], each.get("value", each.get("default"))) for each in own), *given.items()]:
            if value is not None:
                values[f"workflow.parameters.{name}"] = value
        self._say = Findings(workflow.main)
        self._names = Names(self._say, workflow, self._parameters)
        self._passing = Passing(self._say, self._names, self._keys, self._given)
        self._pods = Pods(self._say, self._names, self._passing, self._keys, options, self._spec, values)
        self._groups = Groups(self._say, self._names, self._passing, workflow, self._reach)

    # -- the workflow ------------------------------------------------------------------------------------

    def run(self) -> Report:
        spec = self._spec
        self._say.fields(spec, SPEC, ())
        entrypoint = self._options.entrypoint or spec.get("entrypoint")
        arguments = spec.get("arguments") or {}
        self._passing.arguments(arguments, ("arguments",), OF_WORKFLOW)
        own = arguments.get("parameters", ())
        for each in own:
            if each["name"] not in self._given and not {"value", "default", "valueFrom"} & each.keys():
                self._passing.source(each, ("arguments", "parameters"))
        if not entrypoint:
            self._say.no(("entrypoint",), "is missing: which template begins?")
        else:
            self._reach({"template": entrypoint}, "", ("entrypoint",), top=True)
        passed = {**arguments, "parameters": [{"name": each} for each in sorted(self._parameters)]}
        self._groups.hooks(hooks_of(spec), ("hooks",), "", {"workflow"}, passed)
        self._pods.volumes(spec.get("volumes") or (), ("volumes",))
        self._synchronization(spec.get("synchronization") or {}, ("synchronization",))
        self._retry(spec.get("retryStrategy"), ("retryStrategy",))
        if images := sorted(self._pods.unused_images):
            some = ", ".join(images[:3]) + (", ..." if len(images) > 3 else "")
            self._say.note((), f"images ({some}) are not used: commands and files are those of this machine")
        for name in sorted(self._given - {each["name"] for each in own}):
            if not self._names.mentioned(f"workflow.parameters.{name}"):
                known = self._parameters - {name}
                self._say.no(("arguments",), f"-p {name}: there is no such parameter{did_you_mean(name, known)}")
        return self._say.report

    # -- templates ---------------------------------------------------------------------------------------

    def _reach(
        self,
        holder: Mapping[str, Any],
        owner: str,
        where: Where,
        names: set[str] | frozenset[str] = OF_WORKFLOW,
        *,
        top: bool = False,
    ) -> Found | None:
        """Look at the template that is run there, once. names: known there, and so in one that is ``inline``."""
        reference = holder.get("templateRef") or {}
        named = holder.get("template", "") or reference.get("template", "")
        if "{{" in named:
            self._say.no(where, f"which template is run is not known before: {named!r}")
            return None
        if reference and "name" not in reference:
            self._say.no((*where, "templateRef"), "needs a name")
            return None
        try:
            found = self._workflow.template(holder, owner, (*self._say.start, *where), self._say.document)
        except SpecError as error:
            self._say.refuse(error)
            return None
        key = (found.document.file, found.where, str(found.document.name))
        if key not in self._seen:
            self._seen.add(key)
            name = str(found.template.get("name") or path_text(found.where))
            with self._say.about(Verdict(name, found.kind or "nothing"), found.document, found.where):
                self._template(found, names if "inline" in holder else OF_WORKFLOW)
        self._supplied(found, holder.get("arguments") or {}, where, top=top)
        return found

    def _supplied(self, found: Found, arguments: Mapping[str, Any], where: Where, *, top: bool) -> None:
        """Whether a template is given what it needs."""
        name = found.template.get("name", "inline")
        for kind in ("parameters", "artifacts"):
            given = {each["name"] for each in arguments.get(kind, ())}
            if top:
                given |= {each["name"] for each in (self._spec.get("arguments") or {}).get(kind, ())}
                given |= self._parameters if kind == "parameters" else set()
            inputs = (found.template.get("inputs") or {}).get(kind, ())
            for each in inputs:
                own = {"value", "default", "valueFrom", "optional", *LOCATIONS} & each.keys()
                if each["name"] not in given and not own:
                    self._say.no(where, f"the template {name!r} is not given its {kind[:-1]} {each['name']!r}")
            if not top:
                for extra in sorted(given - {each["name"] for each in inputs}):
                    self._say.note(where, f"the template {name!r} takes no {kind[:-1]} {extra!r}")

    def _template(self, found: Found, around: set[str] | frozenset[str]) -> None:
        template = found.template
        self._say.fields(template, TEMPLATE, ())
        kinds = [each for each in (*GROUPS, *LEAVES) if each in template]
        if len(kinds) != 1:
            what = f"it does several things: {' and '.join(kinds)}" if kinds else "it has nothing to do: no container, "
            self._say.no((), what if kinds else what + "script, steps or dag")
            return
        names = self._names.of_template(template) | around
        self._passing.arguments(template.get("inputs") or {}, ("inputs",), names)
        self._passing.outputs(template, found.kind)
        self._retry(template.get("retryStrategy"), ("retryStrategy",))
        self._synchronization(template.get("synchronization") or {}, ("synchronization",))
        if text := template.get("timeout"):
            whole = (self._spec.get("templateDefaults") or {}).get("timeout")
            if found.kind in (*GROUPS, "suspend") and text != whole:
                self._say.no(("timeout",), f"is not for templates of the kind {found.kind}")
            elif text.isdigit():
                self._say.no(("timeout",), f"{text!r} needs a unit: {text}s")
            self._say.duration(text, ("timeout",))
        match found.kind:
            case "steps":
                self._groups.steps(template, found.owner, names)
            case "dag":
                self._groups.dag(template, found.owner, names)
            case "container" | "script":
                self._pods.check(template, found.kind, names)
            case "suspend":
                if text := template["suspend"].get("duration"):
                    self._say.duration(text, ("suspend", "duration"))
            case "http":
                self._http(template["http"], names)
            case "resource":
                self._resource(template["resource"], names)
        if memoize := template.get("memoize"):
            self._names.tags(memoize, ("memoize",), names)

    def _retry(self, strategy: Mapping[str, Any] | None, where: Where) -> None:
        if not strategy:
            return
        if "affinity" in strategy:
            self._say.note((*where, "affinity"), "means nothing here and is passed over")
        policy = strategy.get("retryPolicy", "OnFailure")
        if policy not in ("Always", "OnFailure", "OnError", "OnTransientError"):
            self._say.no((*where, "retryPolicy"), f"{policy!r} is not known")
        if "backoff" in strategy and "duration" not in strategy["backoff"]:
            self._say.no((*where, "backoff"), "needs a duration")
        for key in ("duration", "maxDuration", "cap"):
            if text := (strategy.get("backoff") or {}).get(key):
                self._say.duration(text, (*where, "backoff", key))
        if expression := strategy.get("expression"):
            self._names.expression(bare(expression), (*where, "expression"))

    def _synchronization(self, value: Mapping[str, Any], where: Where) -> None:
        semaphores = [*value.get("semaphores", ()), *([value["semaphore"]] if "semaphore" in value else ())]
        for number, each in enumerate(semaphores):
            key, reference = semaphore_key(each)
            known = reference is not None and self._keys.has("ConfigMap", reference.get("name", ""), key)
            if key not in self._options.semaphores and not known:
                place = (*where, "semaphores", number)
                self._say.no(place, f"how many may hold {key!r} is not known here: --semaphore {key}=2")

    def _http(self, http: Mapping[str, Any], names: set[str]) -> None:
        self._say.supported(http, _HTTP, ("http",))
        self._names.tags({key: value for key, value in http.items() if key != "successCondition"}, ("http",), names)
        if condition := http.get("successCondition"):
            self._names.expression(bare(condition), ("http", "successCondition"))
        for number, each in enumerate(http.get("headers", ())):
            source = each.get("valueFrom") or {}
            if "secretKeyRef" in source:
                self._passing.key("Secret", source["secretKeyRef"], ("http", "headers", number))

    def _resource(self, resource: Mapping[str, Any], names: set[str]) -> None:
        say = self._say
        if self._options.context is None:
            say.no(("resource",), "it needs a Kubernetes cluster: --context names the kubeconfig's context of one")
        elif find_spec("lightkube") is None:
            say.no(("resource",), "it needs what is not installed: pip install 'tally-scoring[kubernetes]'")
        say.supported(resource, resources.FIELDS, ("resource",))
        self._names.tags(resource, ("resource",), names)
        if (action := resource.get("action")) not in resources.ACTIONS:
            say.no(("resource", "action"), f"{action!r} is not done here: {', '.join(resources.ACTIONS)} are")
        awaited = [key for key in ("successCondition", "failureCondition") if key in resource]
        for key in awaited:
            say.read(resources.conditions, resource[key], ("resource", key))
        found = say.read(resources.documents, resource.get("manifest", ""), ("resource", "manifest"))
        if awaited and found is not None and len(found) > 1:
            say.no(("resource", awaited[0]), "is for one object, and the manifest has several")
        if awaited and action == "delete":
            say.no(("resource", awaited[0]), "what is deleted meets no condition")
