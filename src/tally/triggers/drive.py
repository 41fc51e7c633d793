"""One run of a schedule, in a process of its own: ``python -m tally.triggers.drive RUN TOKEN``.

It starts what the interval is for, or finds what an earlier process started, sees it through, and notes its outcome.
It has the run's lease itself, so it continues if the loop that started it is killed. It waits while the database is
away. Here, and in its children, models are opened and users' code runs; never in the loop's process.
"""

from __future__ import annotations

import logging
import sys
from functools import partial

from tally import garbage
from tally.database.renewer import LeaseRenewer
from tally.database.waiting import Patience
from tally.errors import (
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
from tally.logs import log_to_stderr
from tally.triggers.store import LEASE_SECONDS, Run, ScheduleStore
from tally.triggers.template import fill
from tally.triggers.works.base import Ended, Taken

log = logging.getLogger("tally")

_FOR_GOOD = (SpecError, ModelNotFoundError, ModelChangedError, UntrustedModelError)
"""Errors that another attempt would end with, too."""


def drive(jobs: Jobs, run_id: int, token: str) -> Run:
    """See the run through in this process; returns it as it then is. Raises OwnershipLostError if another has it."""
    store, patiently = ScheduleStore(jobs.store.engine), Patience(what="the run")
    run = patiently(lambda: store.begin(run_id, token))
    renew = partial(store.renew, run_id, token)
    # If the lease is lost, the work continues here, and the process that has the run by then follows it.
    with LeaseRenewer(renew, every=LEASE_SECONDS / 6, what=f"run {run_id}", patience=patiently):
        try:
            ended = _see_through(jobs, store, run, token, patiently)
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
            if ended.state == "finished":
                patiently(lambda: store.finish(run_id, token, outcome=ended.outcome))
            elif ended.state == "failed":
                patiently(lambda: store.fail(run_id, token, str(ended.outcome), for_good=True))
            elif ended.state == "cancelled":
                patiently(lambda: store.fail(run_id, token, "its job was cancelled", for_good=True))
            else:
                patiently(lambda: store.put_back(run_id, token, counted=False))
    return patiently(lambda: store.run(run_id))


def _see_through(jobs: Jobs, store: ScheduleStore, run: Run, token: str, patiently: Patience) -> Ended:
    """Do what the schedule says for the run's interval, or what is left of it."""
    schedule = patiently(lambda: store.get(run.schedule))
    clock = schedule.clock()
    work = fill(schedule.template, run.interval, clock)
    taken = Taken(
        run=run, span=clock.span(run.interval), jobs=jobs, assign=partial(store.assign, run.id, token),
        note=partial(store.note, run.id, token),
        patiently=patiently,
    )  # fmt: skip
    return work.see_through(taken)


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
    garbage.leave(main())
