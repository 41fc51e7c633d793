"""``tally``, but results of an endless source are published several times a second."""

from __future__ import annotations

import sys

from tally.cli.main import main
from tally.jobs import coordinator

coordinator.PUBLISH_SECONDS = 0.3
if __name__ == "__main__":
    sys.exit(main())
