"""One part of a split job, in a process of its own: ``python -m tally.jobs.part PART PATH [dead]``.

The job's own coordinator starts it. The part has a lease itself, so it continues if that one is killed. PATH: where
imports are looked for, too, as JSON. dead: its dead items are replayed.
"""

from __future__ import annotations

import json
import logging
import sys

from tally import garbage
from tally.database.waiting import Patience
from tally.errors import TallyError
from tally.jobs.facade import Jobs
from tally.jobs.prestart import prestarted
from tally.jobs.signals import stop_on_signals
from tally.jobs.spec import JobSpec
from tally.jobs.stop import Stop
from tally.logs import about, log_to_stderr

log = logging.getLogger("tally")


def main() -> int:
    """The process; its exit code is 0 whenever the part's row says how it went."""
    log_to_stderr()
    part, path, *more = sys.argv[1:]
    sys.path += [each for each in json.loads(path) if each not in sys.path]
    jobs, stop = Patience(what="the job")(Jobs), Stop()
    try:
        record = jobs.store.get(part)
        with about(record.parent or part), prestarted(JobSpec(**record.spec)) as engine, stop_on_signals(stop):
            jobs.run(part, engine=engine, stop=stop, retry_dead=bool(more))
    except TallyError as error:  # it is in the part's row, too; or another process has it
        log.error("part %s: %s", part, error)
    return 0


if __name__ == "__main__":
    garbage.leave(main())
