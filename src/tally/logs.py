"""The log of a process: lines without secrets, and without what a terminal would obey."""

from __future__ import annotations

import logging
import sys

from tally.masking import mask
from tally.text import visible


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(mask(super().format(record)), lines=True)


def log_to_stderr() -> None:
    """Log what happens inside to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
