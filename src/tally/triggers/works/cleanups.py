"""A clean-up in each interval: what ended long ago is forgotten, jobs with their results where that is said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tally.errors import (
    JobNotFoundError,
    JobStateError,
    PipelineError,
    PipelineNotFoundError,
    PipelineStateError,
    RunNotFoundError,
    RunStateError,
    SpecError,
    StorageError,
)
from tally.jobs import tidy
from tally.jobs.facade import Jobs
from tally.jobs.spec import absolute, problem_of
from tally.jobs.store import JobRecord
from tally.pipelines.facade import Pipelines
from tally.pipelines.store import PipelineStore
from tally.pipelines.store import RunRecord as PipelineRecord
from tally.storage import is_url
from tally.training.runs.store import RunRecord, RunStore
from tally.training.specs.base import Duration, Text, listed
from tally.training.sweeps.store import SweepRecord, SweepStore
from tally.triggers.works.base import Ended, Taken, Work

log = logging.getLogger("tally")

PAGE = 200
ENDED = ("finished", "failed", "cancelled", "killed", "succeeded", "error")
"""States of what is forgotten. What is at work, waits, is paused or was interrupted is not."""
_STAYS = (JobStateError, RunStateError, PipelineStateError, PipelineError, StorageError, SpecError)
"""What is told of what cannot be forgotten."""
_SWEEPER = "clean-up"
"""Who claims a place whose results it removes."""


class CleanUp(BaseModel):
    """What is forgotten, of what has ended.

    clean: ``jobs``, ``runs`` (those that are no trials of a sweep), ``sweeps``, ``pipelines``. older_than: seconds from
    their end to that of the interval. out: of jobs, only those that write to this place, or below it. name: of the
    others, only those whose name begins so. keep: so many of the newest stay, of each. results: remove what finished
    jobs have written, too. dry_run: only tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    clean: Annotated[
        tuple[Literal["jobs", "runs", "sweeps", "pipelines"], ...], BeforeValidator(listed), Field(min_length=1)
    ]
    older_than: Duration
    out: Text | None = None
    name: Text | None = None
    keep: int = Field(default=0, ge=0)
    results: bool = False
    dry_run: bool = False

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Raises SpecError with every problem."""
        try:
            found = cls.model_validate(fields)
        except ValidationError as error:
            raise SpecError([problem_of(each, cls) for each in error.errors()]) from None
        problems = [
            f"{field}: is about {' and '.join(about)}, and clean is {', '.join(found.clean)}"
            for field, about in (("out", ("jobs",)), ("results", ("jobs",)), ("name", ("runs", "sweeps", "pipelines")))
            if getattr(found, field) and not {*about} & {*found.clean}
        ]
        if problems:
            raise SpecError(problems)
        return found


class Record(Protocol):
    """A job, a run, a sweep, or a run of a pipeline."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def created_at(self) -> float: ...
    @property
    def finished_at(self) -> float | None: ...


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class CleanUpWork(Work):
    wanted: CleanUp

    only_admins = "a clean-up forgets jobs, runs and pipelines"

    @classmethod
    def read(cls, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        out = fields.get("out")
        return {**fields, "out": absolute(out, folder)} if isinstance(out, str) else fields

    @classmethod
    def make(cls, fields: Mapping[str, Any]) -> Self:
        return cls(CleanUp.of(fields))

    def named(self) -> Iterable[tuple[str, str]]:
        if self.wanted.out is not None:
            yield "out", self.wanted.out

    def check_there(self) -> None:
        """There is nothing that it needs."""

    def see_through(self, taken: Taken) -> Ended:
        wanted, jobs = self.wanted, taken.jobs
        runs, sweeps = RunStore(jobs.store.engine), SweepStore(jobs.store.engine)
        pipelines = Pipelines(PipelineStore(jobs.store.engine))
        at = taken.run.interval_end
        counts: dict[str, int] = {}
        for what in wanted.clean:
            if what == "jobs":
                all_jobs: Iterator[JobRecord] = _each(jobs.list, lambda page: page.jobs)
                written = (each for each in all_jobs if _is_below(str(each.spec["out"]), wanted.out))
                counts[what] = self._forget("job", self._old(written, at), lambda record: self._job(jobs, record))
            elif what == "runs":
                all_runs: Iterator[RunRecord] = _each(runs.list, lambda page: page.runs)
                alone = (each for each in all_runs if each.sweep is None and self._is_meant(each.name))
                counts[what] = self._forget("run", self._old(alone, at), runs.remove)
            elif what == "sweeps":
                all_sweeps: Iterator[SweepRecord] = _each(sweeps.list, lambda page: page.sweeps)
                called = (each for each in all_sweeps if self._is_meant(each.name))
                counts[what] = self._forget("sweep", self._old(called, at), sweeps.remove)
            else:
                all_pipelines: Iterator[PipelineRecord] = _each(pipelines.store.list, lambda page: page.runs)
                meant = (each for each in all_pipelines if self._is_meant(each.name))
                counts[what] = self._forget("pipeline", self._old(meant, at), lambda each: pipelines.delete(each.id))
        shown = ", ".join(f"{count:,} {what if count != 1 else what[:-1]}" for what, count in counts.items())
        return Ended("finished", f"would forget {shown}" if wanted.dry_run else f"forgot {shown}")

    def _is_meant(self, name: str) -> bool:
        return self.wanted.name is None or name.startswith(self.wanted.name)

    def _old(self, records: Iterable[R], at: float) -> Sequence[R]:
        """Those that ended long enough before this time, but for the newest that are to be kept; newest first."""
        ended = [each for each in records if each.state in ENDED and not each.alive]
        until = at - self.wanted.older_than
        return [each for each in ended[self.wanted.keep :] if (each.finished_at or each.created_at) < until]

    def _forget(self, word: str, records: Sequence[R], forget: Callable[[R], object]) -> int:
        """How many were forgotten. What cannot be is told in the log, and stays."""
        count = 0
        for each in records:
            if not self.wanted.dry_run:
                try:
                    forget(each)
                except (JobNotFoundError, RunNotFoundError, PipelineNotFoundError):  # somebody else was faster
                    continue
                except _STAYS as error:
                    log.warning("%s %s stays: %s", word, each.id, error)
                    continue
            log.info("%s %s %s", "would forget" if self.wanted.dry_run else "forgot", word, each.id)
            count += 1
        return count

    def _job(self, jobs: Jobs, record: JobRecord) -> None:
        if self.wanted.results and record.state == "finished":
            _remove_results(record)
        jobs.delete(record.id)


def _each(list_: Callable[..., Any], of: Callable[[Any], Iterable[R]]) -> Iterator[R]:
    """All that a list has, page by page. of: what a page holds."""
    page = list_(limit=PAGE)
    yield from of(page)
    while page.next is not None:
        page = list_(after=page.next, limit=PAGE)
        yield from of(page)


def _is_below(place: str, above: str | None) -> bool:
    """Whether a place is another, or within it."""
    if above is None:
        return True
    place, above = place.rstrip("/"), above.rstrip("/")
    return place == above or place.startswith(f"{above}/")


def _remove_results(record: JobRecord) -> None:
    """Remove the files that a finished job's manifest lists, unless they are another job's by now."""
    sink = tidy.sink_of(record)
    if sink.holder() != record.id:
        return
    sink.claim(_SWEEPER, overwrite=True)
    sink.release()
    if not is_url(sink.place):
        with suppress(OSError):  # other files are there, or it was a file
            Path(sink.place).rmdir()
