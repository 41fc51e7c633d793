"""A job in each interval."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tally.alerts.evaluation import unpaired
from tally.errors import JobExistsError, JobNotFoundError, SourceNotFoundError
from tally.jobs.prestart import prestarted
from tally.jobs.signals import stop_on_signals
from tally.jobs.spec import JobSpec, made, make, settled
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord
from tally.masking import has_secret, mask
from tally.models.resolve import check_there
from tally.triggers.works.base import Ended, Taken, Work


@dataclass(frozen=True, slots=True)
class JobWork(Work):
    spec: JobSpec

    distinct = "out"

    @classmethod
    def read(cls, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        return settled(made(fields, folder))

    @classmethod
    def refusals(cls, fields: Mapping[str, Any]) -> list[str]:
        problems = []
        if has_secret(model := str(fields.get("model", ""))):
            kept = f"model: {mask(model)} carries credentials, which would be kept with the schedule"
            problems.append(f"{kept}; register the model (tally models add NAME URL), and name it: models:/NAME")
        return problems + unpaired(fields)

    @classmethod
    def make(cls, fields: Mapping[str, Any]) -> Self:
        return cls(make(**fields))

    @property
    def job(self) -> JobSpec:
        return self.spec

    def check_there(self) -> None:
        check_there(self.spec.model)

    def see_through(self, taken: Taken) -> Ended:
        """Drive the job, or follow it while another process drives it."""
        patiently, stop = taken.patiently, Stop()
        spec = patiently(lambda: self._begun(taken))
        with prestarted(spec) as engine, stop_on_signals(stop):
            record = patiently(lambda: self._record(taken, spec))
            state = taken.jobs.see_through(record.id, engine=engine, stop=stop).state
        return Ended("finished" if state == "finished" else "cancelled" if state == "cancelled" else "stopped")

    def _begun(self, taken: Taken) -> JobSpec:
        """That of the job which the run has; of a new run, what the schedule says now."""
        if taken.run.job_id is not None:
            with suppress(JobNotFoundError):
                return JobSpec(**taken.jobs.get(taken.run.job_id).spec)
        return self.spec

    @staticmethod
    def _record(taken: Taken, spec: JobSpec) -> JobRecord:
        """The job that this run started, an earlier one with the same spec, or a new one."""
        jobs, run = taken.jobs, taken.run
        if run.job_id is not None:
            with suppress(JobNotFoundError):
                return jobs.get(run.job_id)
        try:
            record = jobs.submit(spec, resume=True, overwrite=run.again)
        except JobExistsError as error:
            record = jobs.get(error.job_id)
        except SourceNotFoundError as error:
            if spec.alerts:
                taken.assign(job_id=jobs.submit_failed(spec, error).id)
            raise
        taken.assign(job_id=record.id)
        return record
