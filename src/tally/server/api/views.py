"""What the API answers with. Times are seconds since the epoch, as in the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from tally.jobs.chunks import Dead
from tally.jobs.outbox import Pushes
from tally.jobs.spec import shown
from tally.jobs.states import State
from tally.jobs.store import JobRecord, Part
from tally.masking import mask
from tally.pipelines.store import Node, Phase
from tally.pipelines.store import RunRecord as PipelineRecord
from tally.pipelines.store import RunState as PipelineState
from tally.server.auth.roles import Role
from tally.serving.deployments import Deployment, EndpointSpec
from tally.serving.settings import Limits
from tally.sources.queues.base import Message
from tally.training.runs.store import RunRecord, RunState
from tally.training.sweeps.store import SweepRecord, SweepState, TrialRecord, TrialState
from tally.triggers.cron import Interval
from tally.triggers.store import Run, Schedule
from tally.triggers.watch import Seen, Watch

if TYPE_CHECKING:
    from tally.pipelines.facade import Question


class View(BaseModel):
    """The base of all: frozen, so that two looks can be compared."""

    model_config = ConfigDict(frozen=True)


class FigureView(View):
    """What is known of all values of a metric. null: what is not finite."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    last: float | None
    step: int = Field(description="Of the last value.")
    least: float | None
    most: float | None
    count: int


class RunView(View):
    """A training. state: interrupted if its process was lost."""

    id: str
    name: str
    kind: str
    sweep: str | None = Field(description="The sweep that it is a trial of.")
    state: RunState
    alive: bool = Field(description="Whether a process trains it now.")
    error: str | None
    created_at: float
    started_at: float = Field(description="When it was begun or resumed last.")
    finished_at: float | None
    folder: str = Field(description="Where its files are, on the machine that trained it.")
    parameters: dict[str, Any]
    tags: dict[str, str]
    metrics: dict[str, FigureView]
    models: list[str] = Field(description="The versions that it registered.")
    cost: dict[str, float] = Field(description="seconds, processor_seconds, peak_bytes.")

    @classmethod
    def of(cls, record: RunRecord) -> Self:
        return cls(**cls._fields(record))

    @staticmethod
    def _fields(record: RunRecord) -> dict[str, Any]:
        metrics = {
            name: {"last": each.last, "step": each.step, "least": each.least, "most": each.most, "count": each.count}
            for name, each in record.metrics.items()
        }
        return {name: getattr(record, name) for name in RunRecord.__slots__} | {"metrics": metrics}


class RunDetail(RunView):
    """All that is known of a training."""

    command: list[str]
    code: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    has_made: bool = Field(description="Whether its folder is on the server's machine and would go with it.")

    @classmethod
    def of_one(cls, record: RunRecord, *, has_made: bool) -> Self:
        return cls(**cls._fields(record), has_made=has_made)


class RunList(View):
    """A page of runs, newest first. next: where the following page begins."""

    runs: list[RunView]
    next: str | None


class SweepView(View):
    """A sweep. state: interrupted if its process was lost."""

    id: str
    name: str
    kind: str = Field(description="What its trials train: retrain, script.")
    state: SweepState
    alive: bool = Field(description="Whether a process drives it now.")
    error: str | None
    created_at: float
    started_at: float = Field(description="When it was begun or resumed last.")
    finished_at: float | None
    folder: str = Field(description="Where its files are, on the machine that drives it.")
    spec: dict[str, Any] = Field(description="All that it was given: texts (the space), metric, lowest, sampler ...")
    best: int | None = Field(description="The number of its best trial, once it is finished.")
    best_value: float | None
    model: str | None = Field(description="The version that was registered.")
    counts: dict[str, int] = Field(description="Its trials by state.")

    @classmethod
    def of(cls, record: SweepRecord) -> Self:
        return cls(**cls._fields(record))

    @staticmethod
    def _fields(record: SweepRecord) -> dict[str, Any]:
        return record.to_dict() | {"spec": shown(record.spec)}


class TrialView(View):
    """A trial. run_id: its run. value, step: its result, or where it was pruned. attempts: how often it was begun."""

    number: int
    state: TrialState
    attempts: int
    run_id: str
    parameters: dict[str, Any]
    value: float | None
    step: int | None
    error: str | None


class SweepDetail(SweepView):
    """A sweep with its trials, by number."""

    trials: list[TrialView]
    has_made: bool = Field(description="Whether its folder is on the server's machine and would go with it.")

    @classmethod
    def of_one(cls, record: SweepRecord, trials: Sequence[TrialRecord], *, has_made: bool) -> Self:
        shown_trials = [TrialView(**each.to_dict()) for each in trials]
        return cls(**cls._fields(record), trials=shown_trials, has_made=has_made)


class SweepList(View):
    """A page of sweeps, newest first. next: where the following page begins."""

    sweeps: list[SweepView]
    next: str | None


class PipelineView(View):
    """A run of a pipeline. state: interrupted if its process was lost; waiting if only a person keeps it waiting."""

    id: str
    name: str
    state: PipelineState
    wanted: str | None = Field(description="What its process is told to do: cancel.")
    alive: bool = Field(description="Whether a process drives it now.")
    error: str | None
    created_at: float
    started_at: float
    finished_at: float | None
    owner_host: str | None = Field(description="The machine that drives it, or drove it last.")
    folder: str = Field(description="Where its logs and artifacts are, on that machine.")
    parameters: dict[str, str]

    @classmethod
    def of(cls, record: PipelineRecord) -> Self:
        return cls(**cls._fields(record))

    @staticmethod
    def _fields(record: PipelineRecord) -> dict[str, Any]:
        return record.to_dict() | {"parameters": shown(record.parameters)}


class NodeView(View):
    """A node of a run: a step, an attempt at one, a group. parent: the id of what it is part of; empty for the first.

    kind: Pod, Steps, StepGroup, DAG, TaskGroup, Retry, Suspend, HTTP, Resource, Skipped. outputs: parameters,
    artifacts, result. supplied: what a person gave to a step that waited.
    """

    id: str
    name: str
    display: str
    kind: str
    template: str
    parent: str
    number: int = Field(description="In the order in which they were begun.")
    phase: Phase
    message: str | None
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    exit_code: int | None
    started_at: float | None
    finished_at: float | None
    supplied: dict[str, Any] | None

    @classmethod
    def of(cls, node: Node) -> Self:
        return cls(**shown(node.to_dict()))


class WantedValue(View):
    """A value that a step waits for. choices: empty if any is allowed. needed: it has no default.

    suggested: what a form holds at first.
    """

    name: str
    choices: list[str]
    needed: bool
    suggested: str
    description: str


class QuestionView(View):
    """A step that waits for a person. node: its id."""

    node: str
    display: str
    wanted: list[WantedValue]

    @classmethod
    def of(cls, question: Question) -> Self:
        wanted = [WantedValue(**asdict(each)) for each in question.wanted]
        return cls(node=question.node.id, display=question.node.display, wanted=wanted)


class PipelineDetail(PipelineView):
    """A run of a pipeline with its nodes, and what waits for a person."""

    nodes: list[NodeView]
    questions: list[QuestionView]
    has_made: bool = Field(description="Whether its logs and artifacts are on the server's machine.")

    @classmethod
    def of_one(
        cls, record: PipelineRecord, nodes: Sequence[Node], questions: Sequence[Question], *, has_made: bool
    ) -> Self:
        return cls(
            **cls._fields(record),
            nodes=[NodeView.of(each) for each in nodes],
            questions=[QuestionView.of(each) for each in questions],
            has_made=has_made,
        )


class PipelineList(View):
    """A page of runs of pipelines, newest first. next: where the following page begins."""

    runs: list[PipelineView]
    next: str | None


class StepLog(View):
    """The last lines that a step has printed, with secrets masked. node: its id."""

    node: str
    display: str
    lines: list[str]


class CurveView(View):
    """A metric's values by step. null: what is not finite."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    steps: list[int]
    values: list[float | None]
    times: list[float]


class ModelName(View):
    """Which model a job uses."""

    name: str
    kind: str | None = None
    version: int | None = None
    hash: str | None = None


class JobView(View):
    """A job. items: planned so far, all of them where ``planned``. done, dead: committed so far."""

    id: str
    state: State
    alive: bool = Field(description="Whether a process drives it now.")
    starting: bool = Field(False, description="Whether a server is about to start, continue or replay it.")
    model: ModelName
    source: list[str]
    out: str
    unit: str = Field(description="What its items are: items, frames or rows.")
    kind: str | None = Field(description="What it writes: rows, images or video.")
    planned: bool
    items: int
    done: int
    dead: int
    rows: int
    bytes: int
    error: str | None
    assumed: list[str] = Field(description="What was taken for granted about model and data.")
    remarks: list[str]
    created_at: float
    started_at: float | None
    finished_at: float | None
    seconds: float = Field(description="For which it was driven, without pauses between two drives.")
    stages: dict[str, float] = Field(description="Seconds that workers spent, by stage.")

    @classmethod
    def of(cls, record: JobRecord, *, starting: bool = False) -> Self:
        model, usage = record.model, dict(record.usage)
        seconds = usage.pop("seconds", 0.0)
        return cls(
            id=record.id,
            state=record.state,  # type: ignore[arg-type]
            alive=record.alive,
            starting=starting,
            model=ModelName(
                name=model.get("name") or "",
                kind=model.get("kind"),
                version=model.get("version"),
                hash=model.get("hash") if model.get("files") != [] else None,
            ),
            source=list(record.spec.get("source") or ()),
            out=record.spec.get("out") or "",
            unit=record.unit,
            kind=record.output.get("kind"),
            planned=record.planned,
            items=record.items,
            done=record.done,
            dead=record.dead,
            rows=record.rows,
            bytes=record.bytes,
            error=record.error,
            assumed=list(record.assumed),
            remarks=list(record.remarks),
            created_at=record.created_at,
            started_at=record.started_at,
            finished_at=record.finished_at,
            seconds=seconds,
            stages={name: value for name, value in usage.items() if isinstance(value, (int, float))},
        )


class JobDetail(JobView):
    """A job with everything that was asked for. The webhook's address is left out: it may hold a secret."""

    spec: dict[str, Any]
    columns: dict[str, str] | None
    wanted: str = Field(description="What was asked of it last: run, pause or cancel.")
    driver: str | None = Field(description="The host whose process drives it, or drove it last.")
    manifest: dict[str, Any] | None = Field(description="What was published, without the files.")
    pushes: Pushes | None = Field(description="How far what is pushed has come, in items; null if nothing is.")
    parts: list[Part] = Field([], description="Of a job that several coordinators share out, until it is finished.")

    @classmethod
    def of(
        cls, record: JobRecord, *, starting: bool = False, pushes: Pushes | None = None, parts: Sequence[Part] = ()
    ) -> Self:
        spec = {name: value for name, value in shown(record.spec).items() if name != "webhook"}
        columns = record.output.get("columns")
        manifest = record.manifest and {name: value for name, value in record.manifest.items() if name != "files"}
        return cls(
            **JobView.of(record, starting=starting).model_dump(), spec=spec, columns=columns, wanted=record.wanted,
            driver=record.owner_host, manifest=manifest, pushes=pushes, parts=list(parts),
        )  # fmt: skip


class JobList(View):
    """A page of jobs, newest first. next: ``after`` of the next page; null where this is the last."""

    jobs: list[JobView]
    next: str | None


class DeadItem(View):
    """An item that failed for good. stage: read, decode, score or write."""

    key: str
    stage: str
    error: str

    @classmethod
    def of(cls, dead: Dead) -> Self:
        return cls(key=dead.key, stage=dead.stage, error=dead.error)


class DeadList(View):
    """Dead items in the source's order. next: ``offset`` of the next page; null where this is the last."""

    dead: list[DeadItem]
    next: int | None


class Rows(View):
    """Rows of a result or a query. truncated: there are more than were asked for."""

    columns: dict[str, str] = Field(description="Name to type, as Arrow writes it.")
    rows: list[dict[str, Any]]
    truncated: bool


class RowPage(Rows):
    """Rows of a result. next: ``after`` of the next page; null where this is the last."""

    next: str | None


class RunningJob(View):
    """A job that is being driven. rate: items per second over all its time. workers: busy at once, on average.
    cost: of its workers so far."""

    id: str
    rate: float
    workers: float
    cost: float


class Figures(View):
    """How much the server has to do, and what it costs. Prices are of one worker."""

    at: float = Field(description="The time of the database.")
    jobs: dict[str, int] = Field(description="Jobs by state.")
    waiting: int = Field(description="Jobs that are to be started.")
    minutes: list[int] = Field(description="Items done in each of the last sixty minutes, oldest first.")
    items: int = Field(description="Items done in the last hour.")
    price_per_hour: float
    currency: str
    running: list[RunningJob]


class ScheduleDetail(View):
    """A schedule, its next intervals, its last runs, and how many runs are in each state."""

    schedule: Schedule
    next: list[Interval]
    runs: list[Run]
    counts: dict[str, int]


class AddedWatch(View):
    """A watch, and how many objects are there already."""

    watch: Watch
    there: int


class WatchDetail(View):
    """A watch, how many objects it has seen, by what became of them, and the newest of them where one watch was asked
    for."""

    watch: Watch
    objects: dict[str, int]
    seen: list[Seen] = Field(description="The newest that are settling, taken or refused, newest first.")


class EndpointVersion(View):
    """A version of an endpoint. model: as it was asked for, with its options; the rest is what that was."""

    model: str
    options: dict[str, Any]
    kind: str
    name: str
    hash: str
    version: int | None = Field(description="In the registry; null for a model that does not come from it.")
    share: float = Field(description="Its weight among those that share out requests that name no version.")
    shadow: float = Field(description="The share, 0 to 1, of requests of which it gets a copy.")

    @classmethod
    def all_of(cls, spec: EndpointSpec) -> dict[str, Self]:
        """The versions of a spec, by number."""
        return {
            number: cls(
                model=mask(each.model), options=shown(each.options), kind=each.ref.kind, name=each.ref.name,
                hash=each.ref.hash, version=each.ref.version, share=spec.split.get(number, 0.0),
                shadow=spec.shadows.get(number, 0.0),
            )
            for number, each in spec.versions.items()
        }  # fmt: skip


class Replica(View):
    """A process with one loaded model. requests: that it has been given and not answered."""

    pid: int | None
    state: str
    requests: int


class RecentFigures(View):
    """How a version did in the last five minutes. rates: requests per second in each stretch of ``per`` seconds, oldest
    first. failed: requests with an answer of 400 and above. seconds: of a request: p50, p95 and p99. rows: of a batch,
    on average. sizes: batches of 1, of 2, of up to 4, 8 ... rows."""

    per: float
    rates: list[float]
    rate: float
    requests: int
    failed: int
    seconds: list[float] | None
    rows: float | None
    sizes: list[int]


class ServedVersion(View):
    """A version as it is served now. wanted: replicas. waiting: requests that no replica has been given."""

    version: str
    model: str
    hash: str
    replicas: list[Replica]
    wanted: int
    ready: int
    waiting: int
    failure: str | None
    figures: RecentFigures | None = None


class Observed(View):
    """What the process that serves an endpoint says. revision: that it serves. ready: whether requests are answered.
    complete: whether each version has the replicas that it should have."""

    state: str
    revision: int | None = None
    error: str | None = None
    url: str | None = None
    grpc: str | None = None
    pid: int | None = None
    ready: bool = False
    complete: bool = False
    pools: list[ServedVersion] = []


class EarlierSpec(View):
    """What an endpoint served before. changed_at, changed_by: of the change that began it."""

    revision: int
    changed_at: float
    changed_by: str
    versions: dict[str, EndpointVersion]
    replicas: tuple[int, int]


class EndpointView(View):
    """A kept endpoint. state: ready, starting, changing, failed or down. url: where it is served, on the machine of its
    process; null where it is not. revision: counts changes. history: newest first."""

    name: str
    state: str
    alive: bool = Field(description="Whether a process serves it now.")
    url: str | None
    error: str | None
    revision: int
    created_at: float
    changed_at: float
    changed_by: str
    versions: dict[str, EndpointVersion]
    limits: Limits
    port: int
    grpc_port: int | None = Field(description="Of gRPC; null where it has none. ``observed.grpc`` says where that is.")
    max_body: int
    drain: float = Field(description="Seconds that requests have to end, once it is to.")
    failures: int = Field(description="How often in a row it could not be started.")
    observed: Observed | None
    history: list[EarlierSpec]

    @classmethod
    def of(cls, found: Deployment) -> Self:
        spec, limits = found.spec, found.spec.limits
        history = [
            EarlierSpec(
                revision=each["revision"], changed_at=each["changed_at"], changed_by=each["changed_by"],
                versions=EndpointVersion.all_of(before), replicas=before.limits.replicas,
            )
            for each in reversed(found.history)
            for before in [EndpointSpec.from_dict(each["spec"])]
        ]  # fmt: skip
        error = found.observed.get("error")
        return cls(
            name=found.name, state=found.state, alive=found.alive, url=found.url,
            error=None if error is None else mask(error), revision=found.revision, created_at=found.created_at,
            changed_at=found.changed_at, changed_by=found.changed_by, versions=EndpointVersion.all_of(spec),
            limits=replace(limits, payloads=limits.payloads and mask(limits.payloads)), port=spec.port,
            grpc_port=spec.grpc_port, max_body=spec.max_body, drain=spec.drain, failures=found.failures,
            observed=Observed(**found.observed) if found.observed else None, history=history,
        )  # fmt: skip


class Lines(View):
    """Lines of a log, oldest first, with secrets masked."""

    lines: list[str]


class MessageView(View):
    """A message. body: as text; bytes that are none are written as escapes."""

    body: str
    headers: dict[str, str]

    @classmethod
    def of(cls, message: Message) -> MessageView:
        return cls(body=message.body.decode("utf-8", "backslashreplace"), headers=dict(message.headers))


class Replayed(View):
    """How many messages are back in the queue."""

    replayed: int


class ResultFile(View):
    """A file of an output. name: relative to the output's folder."""

    name: str
    bytes: int


class Me(View):
    """Who the request came from."""

    name: str
    role: Role


class KeyView(View):
    """A key, without its text. state: valid, expired or revoked."""

    id: str
    name: str
    role: str
    state: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    used_at: float | None


class NewKey(KeyView):
    """A key that was just made. text: shown this once."""

    text: str


class AuditEntry(View):
    """Who changed what."""

    id: int
    at: float
    who: str
    key_id: str
    role: str
    action: str
    target: str
    status: int
    address: str
