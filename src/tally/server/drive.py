"""Jobs, one after another, in a process of their own: ``python -m tally.server.drive JOB TOKEN [SECONDS LINE]``.

The server starts it. Here, and in its workers, the model is opened and the user's code runs; never in the server. It
has the job's lease itself, so it continues if the server is killed.

When its job has finished, the process may rest, with its workers, for so many seconds, and is told the next job by the
line: see :mod:`tally.jobs.line`. It rests only where nothing of that job can be seen by another one. Whatever else
happens, it ends, and with it its workers.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from tally import garbage, processes
from tally.config import append_private, settings
from tally.database.waiting import Patience
from tally.engines.kept import KeptEngine
from tally.errors import OwnershipLostError, TallyError, error_line
from tally.jobs import imported
from tally.jobs.events import Event, Events, Started
from tally.jobs.facade import Jobs
from tally.jobs.line import Line
from tally.jobs.prestart import prestarted
from tally.jobs.signals import stop_on_signals
from tally.jobs.spec import JobSpec
from tally.jobs.starts import Start
from tally.jobs.stop import Stop
from tally.logs import about, log_to_stderr
from tally.models import kinds
from tally.models.reference import ModelRef

log = logging.getLogger("tally")

MOST_JOBS = 1000
"""After so many jobs a process ends: what libraries have lost is given back."""


def drive(jobs: Jobs, start: Start, engine: KeptEngine, *, may_rest: bool = False) -> bool:
    """Make the start's job run, and see it through; stopped by a signal, it saves what it has.

    may_rest: the engine's workers are kept, if another job can use them. Returns whether this process can drive another
    job as a fresh one would.
    """
    spec, stop = JobSpec(**jobs.store.get(start.job_id).spec), Stop()
    assert start.token is not None
    with prestarted(spec, engine) as prepared, stop_on_signals(stop):
        if start.action == "submit":
            try:
                jobs.submit(spec, overwrite=start.overwrite, waiting=start.job_id)
            except Exception as error:
                if not isinstance(error, TallyError):
                    log.exception("job %s", start.job_id)
                text = str(error) if isinstance(error, TallyError) else error_line(error)
                jobs.store.give_up(start.job_id, "failed", error=text)
                jobs.starts.settle(start.job_id, start.token)
                return False
        # Code of a model or a user may leave anything behind, and may have to be told that its job has ended.
        data = kinds.is_data(ModelRef.from_dict(jobs.store.get(start.job_id).model))
        engine.keeps = may_rest and prepared is engine and data
        token = start.token

        def settle(event: Event) -> None:
            if isinstance(event, Started):  # from here on the job's own lease says who has it
                jobs.starts.settle(start.job_id, token)

        events = Events(settle)
        try:
            if start.action == "retry":
                record = jobs.run(start.job_id, events=events, engine=prepared, stop=stop, retry_dead=True)
            else:
                record = jobs.see_through(start.job_id, events=events, engine=prepared, stop=stop)
        finally:
            jobs.starts.settle(start.job_id, token)
        return engine.keeps and record.state == "finished" and not stop.asked


def _surroundings() -> tuple[Any, ...]:
    """What a fresh process would be told."""
    return settings(), processes.environment()


def _drive_all(job_id: str, token: str, seconds: float, line: Line | None) -> None:
    began_in, engine = _surroundings(), KeptEngine()
    try:
        jobs = Patience(what="the job")(lambda: Jobs(served=True))
        for _ in range(MOST_JOBS):
            if not _driven(jobs, job_id, token, engine, may_rest=line is not None) or line is None:
                return
            told = line.rest(seconds)
            if told is None or _surroundings() != began_in or not imported.is_current():
                return  # the server has another process do what this one was told
            job_id, token = told
            with append_private(settings().coordinator_log_of(job_id)) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
    finally:
        engine.close()


def _driven(jobs: Jobs, job_id: str, token: str, engine: KeptEngine, *, may_rest: bool) -> bool:
    """As :func:`drive`. What the job's row says, too, is logged, and raises nothing."""
    try:
        with about(job_id):
            return drive(jobs, jobs.starts.get(job_id, token), engine, may_rest=may_rest)
    except OwnershipLostError:
        pass
    except TallyError as error:
        log.error("job %s: %s", job_id, error)
    return False


def main() -> int:
    """The process; its exit code is 0 whenever the job's row says how it went."""
    log_to_stderr()
    job_id, token, *more = sys.argv[1:]
    seconds, line = (float(more[0]), Line(int(more[1]))) if more else (0.0, None)
    try:
        _drive_all(job_id, token, seconds, line)
    except TallyError as error:
        log.error("job %s: %s", job_id, error)
    return 0


if __name__ == "__main__":
    garbage.leave(main())
