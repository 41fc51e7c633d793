"""``tally``, but a coordinator's lease lasts two seconds, so that a test need not wait for half a minute."""

from __future__ import annotations

import sys

from tally.cli.main import main
from tally.jobs import lease_renewer, run, submit

lease_renewer.LEASE_SECONDS = run.LEASE_SECONDS = submit.LEASE_SECONDS = 2.0
lease_renewer.RENEW_SECONDS = 0.2
if __name__ == "__main__":
    sys.exit(main())
