"""Whether what this process has imported is still what is there: a process that serves several jobs may be older than
the code that it would run."""

from __future__ import annotations

import os
import sys
import time

_SLACK = 1_000_000_000
_BEGAN = time.time_ns() - _SLACK
"""Nanoseconds since the epoch: when this process began, or a little earlier. Nothing was imported before."""


def _environment() -> tuple[str, ...]:
    """Where Python's own and installed packages are, when links are followed."""
    return tuple(map(os.path.realpath, (sys.prefix, sys.base_prefix, __file__)))


_FOUND_IN = _environment()


def is_current() -> bool:
    """Whether no file that a module came from has changed since this process began, or is another one by now."""
    if _environment() != _FOUND_IN:
        return False
    for module in list(sys.modules.values()):
        file = getattr(module, "__dict__", {}).get("__file__")  # to ask a lazy module for it may import things
        if isinstance(file, str) and os.path.isabs(file):  # noqa: PTH117
            try:
                changed = os.stat(file).st_ctime_ns  # noqa: PTH116 - a Path for each would take longer than all of this
            except NotADirectoryError:  # in an archive
                continue
            except OSError:
                return False
            if changed > _BEGAN:
                return False
    return True
