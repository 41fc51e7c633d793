"""One run of a schedule, in a process of its own: ``python -m tally.triggers.drive RUN TOKEN``.

It starts the interval's job, or finds the one that an earlier process started, sees it through, and notes its outcome.
It has the run's lease itself, so it continues if the loop that started it is killed. It waits while the database is
away.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from functools import partial

from tally.database.renewer import LeaseRenewer
from tally.database.waiting import Patience
from tally.errors import (
    JobExistsError,
    JobNotFoundError,
    ModelChangedError,
    ModelNotFoundError,
    OwnershipLostError,
    SourceNotFoundError,
    SpecError,
    TallyError,
    UntrustedModelError,
    error_line,
)
from tally.jobs.facade import Jobs
from tally.jobs.prestart import prestarted
from tally.jobs.signals import stop_on_signals
from tally.jobs.spec import JobSpec
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord
from tally.logs import log_to_stderr
from tally.triggers.store import LEASE_SECONDS, Run, ScheduleStore
from tally.triggers.template import fill

log = logging.getLogger("tally")

_FOR_GOOD = (SpecError, ModelNotFoundError, ModelChangedError, UntrustedModelError)
"""Errors that another attempt would end with, too."""


def drive(jobs: Jobs, run_id: int, token: str) -> Run:
    """See the run through in this process; returns it as it then is. Raises OwnershipLostError if another has it."""
    store, patiently = ScheduleStore(jobs.store.engine), Patience(what="the run")
    run = patiently(lambda: store.begin(run_id, token))
    renew = partial(store.renew, run_id, token)
    # If the lease is lost, the job continues here, and the process that has the run by then follows it.
    with LeaseRenewer(renew, every=LEASE_SECONDS / 6, what=f"run {run_id}", patience=patiently):
        try:
            state = _see_through(jobs, store, run, token, patiently)
        except OwnershipLostError:
            raise
        except SourceNotFoundError as error:
            why = error.message
            patiently(lambda: store.leave_empty(run_id, token, why))
        except Exception as error:
            if not isinstance(error, TallyError):
                log.exception("run %d of schedule %s", run_id, run.schedule)
            text = str(error) if isinstance(error, TallyError) else error_line(error)
            for_good = isinstance(error, _FOR_GOOD)
            patiently(lambda: store.fail(run_id, token, text, for_good=for_good))
        else:
            if state == "finished":
                patiently(lambda: store.finish(run_id, token))
            elif state == "cancelled":
                patiently(lambda: store.fail(run_id, token, "its job was cancelled", for_good=True))
            else:
                patiently(lambda: store.put_back(run_id, token, counted=False))
    return patiently(lambda: store.run(run_id))


def _see_through(jobs: Jobs, store: ScheduleStore, run: Run, token: str, patiently: Patience) -> str:
    """Drive the run's job, or follow it while another process drives it; returns the state that it ends in."""
    spec = patiently(lambda: _spec(jobs, store, run))
    stop = Stop()
    with prestarted(spec) as engine, stop_on_signals(stop):
        record = patiently(lambda: _job(jobs, store, run, spec, token))
        return jobs.see_through(record.id, engine=engine, stop=stop).state


def _spec(jobs: Jobs, store: ScheduleStore, run: Run) -> JobSpec:
    """That of the job which the run has; of a new run, what the schedule says now."""
    if run.job_id is not None:
        with suppress(JobNotFoundError):
            return JobSpec(**jobs.get(run.job_id).spec)
    schedule = store.get(run.schedule)
    return fill(schedule.template, run.interval, schedule.clock())


def _job(jobs: Jobs, store: ScheduleStore, run: Run, spec: JobSpec, token: str) -> JobRecord:
    """The job of the interval: the one that this run started, an earlier one with the same spec, or a new one."""
    if run.job_id is not None:
        with suppress(JobNotFoundError):
            return jobs.get(run.job_id)
    try:
        record = jobs.submit(spec, resume=True, overwrite=run.again)
    except JobExistsError as error:
        record = jobs.get(error.job_id)
    except SourceNotFoundError as error:
        if spec.alerts:
            store.assign(run.id, token, jobs.submit_failed(spec, error).id)
        raise
    store.assign(run.id, token, record.id)
    return record


def main() -> int:
    """The process; its exit code is 0 whenever the run was settled, also as failed."""
    log_to_stderr()
    run_id, token = int(sys.argv[1]), sys.argv[2]
    try:
        jobs = Patience(what="the run")(Jobs)
        run = drive(jobs, run_id, token)
    except OwnershipLostError:
        return 0
    log.info("schedule %s, interval from %d: %s", run.schedule, run.interval_start, run.error or run.state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
