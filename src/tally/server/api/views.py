"""What the API answers with. Times are seconds since the epoch, as in the database."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from tally.jobs.chunks import Dead
from tally.jobs.spec import shown
from tally.jobs.states import State
from tally.jobs.store import JobRecord


class View(BaseModel):
    """The base of all: frozen, so that two looks can be compared."""

    model_config = ConfigDict(frozen=True)


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
    def of(cls, record: JobRecord) -> Self:
        model, usage = record.model, dict(record.usage)
        seconds = usage.pop("seconds", 0.0)
        return cls(
            id=record.id,
            state=record.state,  # type: ignore[arg-type]
            alive=record.alive,
            model=ModelName(
                name=model.get("name") or "",
                kind=model.get("kind"),
                version=model.get("version"),
                hash=model.get("hash"),
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

    @classmethod
    def of(cls, record: JobRecord) -> Self:
        spec = {name: value for name, value in shown(record.spec).items() if name != "webhook"}
        columns = record.output.get("columns")
        return cls(**JobView.of(record).model_dump(), spec=spec, columns=columns)


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
