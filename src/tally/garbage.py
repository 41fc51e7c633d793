"""How often Python looks for garbage that goes in circles: rarely, as imports, jobs and requests leave next to none.

This module is imported by every command, and imports nothing.
"""

from __future__ import annotations

import gc

THRESHOLDS = (50_000, 20, 20)
"""Of :func:`gc.set_threshold`. Python's own has it look after every 700 objects: a tenth of a short command's time."""


def look_rarely() -> None:
    """Look for garbage rarely from now on."""
    gc.set_threshold(*THRESHOLDS)


def keep_what_is_loaded() -> None:
    """Never look through what is there now again, and at the rest rarely: it would hold up requests."""
    gc.collect()
    gc.freeze()
    look_rarely()
