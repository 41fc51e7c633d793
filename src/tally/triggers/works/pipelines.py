"""A workflow in each interval: one run of a pipeline, as ``tally pipeline run`` runs it."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tally.database.leased import Lease
from tally.errors import PipelineNotFoundError, PipelineStateError, SpecError
from tally.jobs.signals import stop_on_signals
from tally.jobs.spec import absolute, problem_of
from tally.jobs.stop import Stop
from tally.jobs.store import new_id
from tally.pipelines import document, workflow
from tally.pipelines.facade import Pipelines
from tally.pipelines.options import ENVIRONMENT, Options
from tally.pipelines.store import ENDED, Node, PipelineStore
from tally.pipelines.support.check import check
from tally.pipelines.workflow import Workflow
from tally.triggers.cron import GRACE_SECONDS
from tally.triggers.works.base import Ended, Taken, Work

log = logging.getLogger("tally")

LOOK_SECONDS = 1.0
SCHEDULED_TIME = "workflows.argoproj.io/scheduled-time"
"""The annotation with the time that ``{{workflow.scheduledTime}}`` is."""
_OVERLAPS = {"Allow": "parallel", "Forbid": "skip", "": "parallel"}
_FOLDERS = ("volume", "secret", "config_map", "venv")

Texts = Annotated[dict[str, str], BeforeValidator(lambda given: _texts(given))]


def _texts(given: Any) -> Any:
    """Values as texts; numbers and truth values as a workflow takes them."""
    if not isinstance(given, Mapping):
        return given
    return {str(key): document.argument_text(each) if isinstance(each, (bool, int, float)) else each
            for key, each in given.items()}  # fmt: skip


class Given(BaseModel):
    """What a schedule runs. The fields are the argument and the flags of ``tally pipeline run``.

    pipeline: the file. workflow: which one, of several in it. documents: what was read from it, and from files beside
    it, as :meth:`Workflow.to_json` gives it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    pipeline: str = Field(min_length=1)
    workflow: str | None = None
    parameter: Texts = Field(default_factory=dict)
    volume: dict[str, str] = Field(default_factory=dict)
    secret: dict[str, str] = Field(default_factory=dict)
    config_map: dict[str, str] = Field(default_factory=dict)
    venv: dict[str, str] = Field(default_factory=dict)
    podman: bool = False
    share: tuple[str, ...] = ()
    semaphore: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    parallel: int | None = Field(None, ge=1, le=10_000)
    entrypoint: str | None = None
    context: str | None = None
    namespace: str | None = None
    cached: bool = False
    documents: dict[str, Any] = Field(repr=False)

    @property
    def options(self) -> Options:
        return Options(
            volumes=self.volume, secrets=self.secret, config_maps=self.config_map, venvs=self.venv, shares=self.share,
            podman=self.podman, semaphores=self.semaphore, parallel=self.parallel, entrypoint=self.entrypoint,
            context=self.context, namespace=self.namespace, cached=self.cached,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PipelineWork(Work):
    given: Given

    verbatim: ClassVar[tuple[str, ...]] = ("documents",)
    only_admins: ClassVar[str | None] = "a pipeline runs programs on the server's machine"

    @classmethod
    def read(cls, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        if "documents" in fields:  # it was read where it was sent from
            return fields
        if "apiVersion" in fields:
            (only,) = document.parse(json.dumps(fields), "the workflow")
            if _refers(only.value):
                raise SpecError(
                    "the workflow refers to WorkflowTemplates, which are in other files",
                    hint="Add it where they are: tally schedule add NAME FILE",
                )
            return {"pipeline": str(only.name or "workflow"), "documents": Workflow(only, {}).to_json()}
        path = fields["pipeline"]
        if not isinstance(path, str):
            raise SpecError(f"pipeline: should be the file of a workflow, not {path!r}")
        path = absolute(path, folder)
        name = fields.get("workflow")
        found = workflow.load(path, name if isinstance(name, str) else None)
        given = [name for name in _FOLDERS if isinstance(fields.get(name), Mapping)]
        placed: dict[str, Any] = {name: _placed(fields[name], folder) for name in given}
        if isinstance(fields.get("share"), (str, list)):
            share = fields["share"]
            placed["share"] = [absolute(str(each), folder) for each in ([share] if isinstance(share, str) else share)]
        return {**fields, **placed, "pipeline": path, "documents": found.to_json()}

    @classmethod
    def timing(cls, fields: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        """What a CronWorkflow says. Raises SpecError for what schedules here do not do."""
        main = workflow.from_json(fields["documents"]).main
        if main.kind != "CronWorkflow":
            return {}
        spec = main.value.get("spec") or {}
        found: dict[str, Any] = {"paused": spec["suspend"]} if "suspend" in spec else {}
        problems: list[str] = []
        if "cron" not in given:
            crons = spec.get("schedules") or []
            if len(crons) == 1:
                found["cron"] = crons[0]
            else:
                problems.append(
                    f"spec.schedules: there are {len(crons)}, and a schedule of Tally has one; add it once for each, "
                    "with --cron"
                )
        if "timezone" not in given and spec.get("timezone"):
            found["timezone"] = spec["timezone"]
        if "overlap" not in given:
            policy = spec.get("concurrencyPolicy") or ""
            if policy in _OVERLAPS:
                found["overlap"] = _OVERLAPS[policy]
            else:
                problems.append(
                    f"spec.concurrencyPolicy: {policy}: no run is stopped here for the one after it; it is Allow or "
                    "Forbid, or give --overlap"
                )
        if "catch_up" not in given:
            deadline = spec.get("startingDeadlineSeconds") or 0
            if deadline <= GRACE_SECONDS:
                found["catch_up"] = "none"
            else:
                problems.append(
                    f"spec.startingDeadlineSeconds: {deadline}: a run that is later than {GRACE_SECONDS:g} s was "
                    "missed here; say what becomes of those with --catch-up"
                )
        problems += [
            f"spec.{name}: a schedule of Tally goes on until it is paused or removed"
            for name in ("stopStrategy", "when")
            if spec.get(name)
        ]
        if problems:
            raise SpecError(problems)
        return found

    @classmethod
    def make(cls, fields: Mapping[str, Any]) -> Self:
        try:
            given = Given.model_validate(fields)
        except ValidationError as error:
            raise SpecError([problem_of(each, Given) for each in error.errors()]) from None
        report = check(workflow.from_json(given.documents), given.options, given.parameter)
        if report.reasons:
            hint = f"tally pipeline check {given.pipeline} tells what runs here"
            raise SpecError(list(dict.fromkeys(report.reasons)), hint=hint)
        return cls(given)

    def check_there(self) -> None:
        """It was, when it was made: what it names has to be on this machine."""

    def see_through(self, taken: Taken) -> Ended:
        """Drive the run, or follow it while another process does, or while it waits for a person."""
        pipelines, stop = Pipelines(PipelineStore(taken.jobs.store.engine)), Stop()
        patiently, run_id, noted = taken.patiently, taken.run.pipeline_id, taken.run.outcome
        if run_id is None:
            # Before it begins: a process that is killed between the two leaves an id that no run has.
            run_id = new_id()
            patiently(partial(taken.assign, pipeline_id=run_id))
        while not stop.asked:
            with stop_on_signals(stop):
                lease = patiently(partial(self._lease, pipelines, run_id, taken))
                record = patiently(partial(pipelines.store.get, run_id))
                if record.state in ENDED:
                    what = f"pipeline {record.name} is {record.state}" + (f": {record.error}" if record.error else "")
                    return Ended("finished" if record.state == "succeeded" else "failed", what)
                waiting = [] if record.alive else patiently(partial(pipelines.waiting, run_id))
                names = ", ".join(each.display for each in waiting)
                note = f"waits for a person: {names}" if names else None
                if note != noted:
                    patiently(partial(taken.note, note))
                    noted = note
                    log.info("%s", note or f"pipeline {record.name} goes on")
                if lease is None:
                    stop.wait(LOOK_SECONDS)
            if lease is not None and pipelines.drive(lease, _say) == "interrupted":
                break
        return Ended("stopped")

    def _lease(self, pipelines: Pipelines, run_id: str, taken: Taken) -> Lease | None:
        """The lease of the interval's run, a new one where there is none; None where nothing is to be driven now."""
        try:
            record = pipelines.store.get(run_id)
        except PipelineNotFoundError:
            name = f"{taken.run.schedule}-{taken.run.interval_end}"
            lease, notes = pipelines.begin(
                self._workflow(taken), self.given.parameter, self.given.options, name=name, run_id=run_id
            )
            for each in notes:
                log.info("%s", each)
            return lease
        told = record.state == "waiting" and (record.wanted is not None or pipelines.is_answered(record.id))
        if record.alive or (record.state != "interrupted" and not told):
            return None
        with suppress(PipelineStateError):  # another process was faster
            return pipelines.store.resume(record.id)
        return None

    def _workflow(self, taken: Taken) -> Workflow:
        """As a cluster would submit it at the end of the interval."""
        found = workflow.from_json(self.given.documents)
        main = found.main
        metadata = dict(main.value.get("metadata") or {})
        if main.kind == "CronWorkflow":
            own = (main.value.get("spec") or {}).get("workflowMetadata") or {}
            metadata = {key: each for key, each in metadata.items() if key not in ("labels", "annotations")} | own
        due = datetime.fromtimestamp(taken.run.interval_end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata["annotations"] = {**(metadata.get("annotations") or {}), SCHEDULED_TIME: due}
        value = {**main.value, "metadata": metadata}
        return Workflow(document.Document(main.file, main.kind, value), found.libraries, found.others)


def _refers(value: Any) -> bool:
    """Whether a document refers to a WorkflowTemplate."""
    if isinstance(value, Mapping):
        return any(key in ("templateRef", "workflowTemplateRef") or _refers(each) for key, each in value.items())
    return isinstance(value, list) and any(map(_refers, value))


def _placed(folders: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Folders of this machine, wherever a run is started; the environment is one, too."""
    return {
        str(name): each if each == ENVIRONMENT or not isinstance(each, str) else absolute(each, folder)
        for name, each in folders.items()
    }


def _say(node: Node) -> None:
    if node.kind != "StepGroup":
        log.info("%s %s%s", node.phase, node.name, f": {node.message}" if node.message else "")
