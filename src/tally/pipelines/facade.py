"""All that can be done with pipelines: check, run, resume, cancel, delete, look at their logs."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tally.config import make_private
from tally.database.leased import Lease, folder_of
from tally.database.waiting import Patience
from tally.errors import PipelineError, PipelineStateError, SpecError
from tally.jobs.store import new_id
from tally.pipelines import workflow
from tally.pipelines.driver import Driver
from tally.pipelines.options import Keys, Options
from tally.pipelines.steps import containers
from tally.pipelines.steps.processes import kill_marked
from tally.pipelines.store import ENDED, Node, PipelineStore, RunState
from tally.pipelines.support.check import check
from tally.pipelines.workflow import Workflow
from tally.text import did_you_mean

CANCEL_SECONDS = 60.0
Say = Callable[[Node], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A value that a step waits for. choices: those that are allowed; empty if any is. needed: it has no default.
    suggested: what a form holds at first."""

    name: str
    choices: tuple[str, ...]
    needed: bool
    suggested: str
    description: str


@dataclass(frozen=True, slots=True)
class Question:
    """A step that waits for a person, and the values that it wants."""

    node: Node
    wanted: tuple[Wanted, ...]

    def problems(self, values: Mapping[str, str]) -> list[str]:
        """What is wrong with an answer."""
        known = {each.name: each for each in self.wanted}
        problems = [
            f"-p {each}: {self.node.display} takes no such value{did_you_mean(each, known)}"
            for each in values
            if each not in known
        ]
        for name, each in known.items():
            if name not in values and each.needed:
                problems.append(f"{self.node.display} needs a value: -p {name}={'|'.join(each.choices) or '...'}")
            elif name in values and each.choices and values[name] not in each.choices:
                problems.append(f"-p {name}={values[name]}: should be one of {', '.join(each.choices)}")
        return problems


class Pipelines:
    """The pipelines of this installation. Raises TallyError."""

    def __init__(self, store: PipelineStore) -> None:
        self.store = store

    def start(
        self, path: str | Path, parameters: Mapping[str, str], options: Options, *, name: str | None = None
    ) -> tuple[Lease, list[str]]:
        """Make a run of a workflow's file, which this process drives from now on, and say what is passed over.

        name: of one of several workflows in the file. Raises SpecError with everything that cannot be run here.
        """
        return self.begin(workflow.load(path, name), parameters, options)

    def begin(
        self,
        found: Workflow,
        parameters: Mapping[str, str],
        options: Options,
        *,
        name: str | None = None,
        run_id: str | None = None,
    ) -> tuple[Lease, list[str]]:
        """As :meth:`start`, of what was read. name, run_id: of the run."""
        report = check(found, options, parameters)
        reasons = report.reasons + _unknown(found, options)
        if reasons:
            hint = f"tally pipeline check {found.main.file} tells what runs here"
            raise SpecError(list(dict.fromkeys(reasons)), hint=hint)
        given = all_parameters(found, options, parameters)
        run_id = run_id or new_id()
        folder = folder_of(PipelineStore.word, run_id)
        make_private(folder)
        spec = {"workflow": found.to_json(), "options": options.to_json()}
        lease = self.store.create(
            run_id=run_id, name=name or _named(found), folder=str(folder), spec=spec, parameters=given
        )
        return lease, list(dict.fromkeys(report.notes))

    def drive(self, lease: Lease, say: Say = lambda node: None) -> RunState:
        """Drive a run until it is over, waits for a person, or is interrupted by Ctrl-C or SIGTERM."""
        while True:
            wanted = self.store.get(lease.id).wanted
            state = self._drive(lease, say)
            # Just before the run was put down, it may have been told to go on, by who saw that it was driven.
            told = self.is_answered(lease.id) or self.store.get(lease.id).wanted != wanted
            if state != "waiting" or not told:
                return state
            lease = self.store.resume(lease.id)

    def is_answered(self, run_id: str) -> bool:
        """Whether a step that waited for a person was told to go on, and has not gone on yet."""
        return any(each.supplied is not None and not each.done for each in self.store.nodes(run_id))

    def _drive(self, lease: Lease, say: Say) -> RunState:
        record = self.store.get(lease.id)
        found = workflow.from_json(record.spec["workflow"])
        options = Options.from_json(record.spec["options"])

        async def driving() -> RunState:
            driver = Driver(self.store, lease, record, found, options, say=say, patience=Patience(what="the run"))
            loop, count = asyncio.get_running_loop(), 0

            def interrupted() -> None:
                nonlocal count
                count += 1
                driver.stop(now=count > 1)

            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupted)
            return await driver.drive()

        return asyncio.run(driving())

    def waiting(self, run_id: str) -> list[Node]:
        """The steps of a run that wait for a person."""
        return [each.node for each in self.questions(run_id)]

    def questions(self, run_id: str) -> list[Question]:
        """What the steps of a run that wait for a person ask for, while it goes on: those that have no answer yet."""
        record = self.store.get(run_id)
        nodes = [
            each
            for each in self.store.nodes(record.id)
            if each.kind == "Suspend" and each.phase == "Running" and each.supplied is None
        ]
        if record.state in ENDED or not nodes:
            return []
        found = workflow.from_json(record.spec["workflow"])
        return [Question(each, _wanted(found, each)) for each in nodes if not _timed(found, each)]

    def supply(self, run_id: str, values: Mapping[str, str], step: str | None = None) -> list[Node]:
        """Let steps that wait for a person go on; those that do. values: outputs, by name. Raises SpecError."""
        record = self.store.get(run_id)
        questions = self.questions(record.id)
        if step is not None:
            chosen = [each for each in questions if step in (each.node.display, each.node.name, each.node.id)]
            if not chosen:
                displays = [each.node.display for each in questions]
                raise SpecError(f"no step {step!r} waits{did_you_mean(step, displays)}")
            questions = chosen
        for each in questions:
            if problems := each.problems(values):
                raise SpecError(problems)
        for each in questions:
            self.store.supply(record.id, each.node.id, values)
        return [each.node for each in questions]

    def answer(self, run_id: str, values: Mapping[str, str], step: str | None = None) -> list[Node]:
        """As :meth:`supply`; but a run that was only interrupted goes on without its steps being told to."""
        record = self.store.get(run_id)
        if record.state in ENDED:
            raise PipelineStateError(f"pipeline {record.id} is {record.state} already")
        if record.state == "interrupted" and step is None and not values:
            return []
        return self.supply(record.id, values, step)

    def resume(self, run_id: str) -> Lease | None:
        """Drive a run that waits or was interrupted; None where another process does. Raises PipelineStateError."""
        record = self.store.get(run_id)
        if record.alive:
            return None
        try:
            return self.store.resume(record.id)
        except PipelineStateError:
            if self.store.get(record.id).alive:  # by now: whoever waited for it was faster
                return None
            raise

    def cancel(self, run_id: str) -> Lease | None:
        """Stop a run: its steps are ended, then its exit handler is run.

        By the process that drives it or, if there is none, by this one: then with a lease. Raises PipelineStateError.
        """
        record = self.store.get(run_id)
        return None if self.tell_to_stop(record.id) else self.resume(record.id)

    def tell_to_stop(self, run_id: str) -> bool:
        """As :meth:`cancel`, but drive nothing; whether a process is told. Otherwise, one that resumes the run is."""
        record = self.store.get(run_id)
        if record.state in ENDED:
            raise PipelineStateError(f"pipeline {record.id} is {record.state} already")
        self.store.want(record.id, "cancel")
        return record.alive

    def delete(self, run_id: str) -> None:
        """Forget a run that is not driven, with its logs and artifacts. Raises PipelineStateError, PipelineError."""
        record = self.store.get(run_id)
        if not record.alive:
            kill_marked(f"{record.id}/", prefix=True)
            if Options.from_json(record.spec["options"]).podman:
                containers.remove(f"{record.id}/", prefix=True)
        self.store.delete(record.id)
        try:
            if self.store.has_made(record):
                shutil.rmtree(record.folder)
        except OSError as error:
            raise PipelineError(f"the files of {record.id} cannot be removed: {error}") from None

    def logs(self, run_id: str, step: str | None = None) -> Iterator[tuple[Node, list[Path]]]:
        """The files that steps have printed into, in the order in which they were begun. Raises SpecError."""
        record = self.store.get(run_id)
        pods = [each for each in self.store.nodes(record.id) if each.kind == "Pod"]
        if step is not None:
            chosen = [
                each
                for each in pods
                if step in (each.display, each.name, each.id, each.template) or each.display.startswith(f"{step}(")
            ]
            if not chosen:
                raise SpecError(f"no step {step!r} has run{did_you_mean(step, {each.display for each in pods})}")
            pods = chosen
        for node in pods:
            folder = Path(record.folder) / "steps" / node.id
            yield node, [each for each in (folder / "log", folder / "stdout") if each.exists()]

    def printed(self, run_id: str, step: str | None = None) -> Iterator[tuple[Node, Iterable[str]]]:
        """The lines that steps have printed, as :meth:`logs`."""
        for node, files in self.logs(run_id, step):
            yield node, (line for file in files for line in _lines(file))


def open_pipelines() -> Pipelines:
    """Those of this installation, as the environment's settings say."""
    return Pipelines(PipelineStore.open())


def all_parameters(found: Workflow, options: Options, given: Mapping[str, str]) -> dict[str, str]:
    """The workflow's parameters: given, or its own. Raises SpecError."""
    keys = Keys(options, found.others)
    result: dict[str, str] = {}
    problems: list[str] = []
    for each in (found.spec.get("arguments") or {}).get("parameters", ()):
        name, source = each["name"], each.get("valueFrom") or {}
        if name in given:
            result[name] = given[name]
        elif "value" in each or "default" in each:
            result[name] = each.get("value", each.get("default", ""))
        elif "configMapKeyRef" in source:
            reference = source["configMapKeyRef"]
            if "default" in source and not keys.has("ConfigMap", reference["name"], reference["key"]):
                result[name] = source["default"]
            else:
                result[name] = keys.get("ConfigMap", reference["name"], reference["key"])
        elif "default" in source:
            result[name] = source["default"]
        if name in result and "enum" in each and result[name] not in each["enum"]:
            problems.append(f"-p {name}={result[name]}: should be one of {', '.join(each['enum'])}")
    if problems:
        raise SpecError(problems)
    return result | {name: value for name, value in given.items() if name not in result}


def _unknown(found: Workflow, options: Options) -> list[str]:
    """Options that name what there is not in the workflow."""
    problems: list[str] = []
    documents = [found.main, *found.libraries.values()]
    if options.since is not None:
        names = {name for each in documents for name in _step_names(each.value)}
        if options.since not in names:
            problems.append(f"--from {options.since}: there is no such step{did_you_mean(options.since, names)}")
    templates = {str(each.get("name")) for document in documents for each in _templates(document.value)}
    problems += [
        f"--venv {each}: there is no such template{did_you_mean(each, templates)}"
        for each in options.venvs
        if each not in templates
    ]
    for flag, places in (("--volume", options.volumes), ("--venv", options.venvs)):
        problems += [
            f"{flag} {name}={place}: there is no such folder"
            for name, place in places.items()
            if not Path(place).is_dir()
        ]
    problems += [f"--share {each}: there is no such folder" for each in options.shares if not Path(each).exists()]
    return problems


def _templates(value: Any) -> Iterator[Mapping[str, Any]]:
    spec = value.get("spec") or {}
    for each in (spec, spec.get("workflowSpec") or {}):
        yield from each.get("templates") or ()


def _step_names(value: Any) -> Iterator[str]:
    for template in _templates(value):
        for group in template.get("steps") or ():
            for each in group if isinstance(group, list) else [group]:
                yield str(each.get("name"))
        for each in (template.get("dag") or {}).get("tasks") or ():
            yield str(each.get("name"))


def _template_of(found: Workflow, node: Node) -> Mapping[str, Any]:
    for document in (found.main, *found.libraries.values()):
        for each in _templates(document.value):
            if each.get("name") == node.template:
                return each
    return {}


def _wanted(found: Workflow, node: Node) -> tuple[Wanted, ...]:
    """The values that a waiting step asks for: what its outputs, and inputs of the same name, say of them."""
    template = _template_of(found, node)
    inputs = {each["name"]: each for each in (template.get("inputs") or {}).get("parameters", ())}
    outputs = (template.get("outputs") or {}).get("parameters", ())
    given = node.inputs.get("parameters") or {}
    return tuple(
        Wanted(
            each["name"],
            tuple(map(str, each.get("enum") or inputs.get(each["name"], {}).get("enum") or ())),
            "default" not in (each.get("valueFrom") or {}),
            str(given.get(each["name"], (each.get("valueFrom") or {}).get("default", ""))),
            str(each.get("description") or inputs.get(each["name"], {}).get("description") or ""),
        )
        for each in outputs
    )


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as opened:
        for line in opened:
            yield line.decode("utf-8", "replace").rstrip("\r\n")


def _timed(found: Workflow, node: Node) -> bool:
    return bool((_template_of(found, node).get("suspend") or {}).get("duration"))


def _named(found: Workflow) -> str:
    """The name of a run, as a cluster would give it."""
    metadata = found.metadata
    if metadata.get("name") and found.main.kind == "Workflow":
        return str(metadata["name"])
    start = metadata.get("generateName") or f"{metadata.get('name') or 'workflow'}-"
    return start + "".join(random.choices(string.ascii_lowercase + string.digits, k=5))  # noqa: S311
