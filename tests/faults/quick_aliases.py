"""``tally``, but what an alias means is asked for each message, and results are published several times a second."""

from __future__ import annotations

import sys

from tally.cli.main import main
from tally.jobs import coordinator
from tally.sources.queues import routing

routing.FRESH_SECONDS = -1.0
coordinator.PUBLISH_SECONDS = 0.3
if __name__ == "__main__":
    sys.exit(main())
