"""One job, in a process of its own: ``python -m tally.server.drive JOB TOKEN``.

The server starts it. Here, and in its workers, the model is opened and the user's code runs; never in the server. It
has the job's lease itself, so it continues if the server is killed.
"""

from __future__ import annotations

import logging
import sys

from tally.database.waiting import Patience
from tally.errors import OwnershipLostError, TallyError, error_line
from tally.jobs.events import Event, Events, Started
from tally.jobs.facade import Jobs
from tally.jobs.prestart import prestarted
from tally.jobs.signals import stop_on_signals
from tally.jobs.spec import JobSpec
from tally.jobs.starts import Start
from tally.jobs.stop import Stop
from tally.logs import about, log_to_stderr

log = logging.getLogger("tally")


def drive(jobs: Jobs, start: Start) -> None:
    """Make the start's job run, and see it through; stopped by a signal, it saves what it has."""
    spec, stop = JobSpec(**jobs.store.get(start.job_id).spec), Stop()
    assert start.token is not None
    with prestarted(spec) as engine, stop_on_signals(stop):
        if start.action == "submit":
            try:
                jobs.submit(spec, overwrite=start.overwrite, waiting=start.job_id)
            except Exception as error:
                if not isinstance(error, TallyError):
                    log.exception("job %s", start.job_id)
                text = str(error) if isinstance(error, TallyError) else error_line(error)
                jobs.store.give_up(start.job_id, "failed", error=text)
                jobs.starts.settle(start.job_id, start.token)
                return
        token = start.token

        def settle(event: Event) -> None:
            if isinstance(event, Started):  # from here on the job's own lease says who has it
                jobs.starts.settle(start.job_id, token)

        try:
            if start.action == "retry":
                jobs.run(start.job_id, events=Events(settle), engine=engine, stop=stop, retry_dead=True)
            else:
                jobs.see_through(start.job_id, events=Events(settle), engine=engine, stop=stop)
        finally:
            jobs.starts.settle(start.job_id, token)


def main() -> int:
    """The process; its exit code is 0 whenever the job's row says how it went."""
    log_to_stderr()
    job_id, token = sys.argv[1], sys.argv[2]
    jobs = Patience(what="the job")(Jobs)
    try:
        with about(job_id):
            drive(jobs, jobs.starts.get(job_id, token))
    except OwnershipLostError:
        return 0
    except TallyError as error:  # it is in the job's row, too
        log.error("job %s: %s", job_id, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
