"""Python's garbage: looked for rarely, as imports, jobs and requests leave next to none, and not swept in the end.

This module is imported by every command, and imports next to nothing.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

THRESHOLDS = (50_000, 20, 20)
"""Of :func:`gc.set_threshold`. Python's own has it look after every 700 objects: a tenth of a short command's time."""
_FILE: Any = io.IOBase.__base__  # the plain class: io.IOBase itself takes ten times as long to ask
_BUFFERED = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


def look_rarely() -> None:
    """Look for garbage rarely from now on."""
    gc.set_threshold(*THRESHOLDS)


def keep_what_is_loaded() -> None:
    """Never look through what is there now again, and at the rest rarely: it would hold up requests."""
    gc.collect()
    gc.freeze()
    look_rarely()


def leave(code: int) -> NoReturn:
    """End this process as Python does, but leave its memory to the system.

    To take apart all that a job has loaded, object by object, Python needs a fifth of a second. Files that nobody has
    closed get what was written to them. Under a profiler, say, the process ends as any other.
    """
    if _is_run_by(sys._getframe(1)):
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined] # both as Python itself begins to end
    atexit._run_exitfuncs()
    write_out()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError, AttributeError):
        sys.exit(code)  # a reader that has gone, or a full disk, which Python tells
    os._exit(code)


def write_out() -> None:
    """Write what open files still have in memory only: code of a user's may keep a log of its own."""
    gc.unfreeze()
    files = [each for each in gc.get_objects() if issubclass(type(each), _FILE)]  # isinstance() would ask proxies
    for each in files:
        if isinstance(each, _BUFFERED):
            with suppress(Exception):
                each.flush()
    for each in files:
        if type(each).__module__ != "_io":  # gzip's, say: it has an end to write
            with suppress(Exception):
                each.close()


def _is_run_by(frame: FrameType) -> bool:
    """Whether something runs the script or the module that called this, and may have work left when that ends: a
    profiler, a debugger, a tool that measures coverage. Python itself has none."""
    module: FrameType | None = frame
    while module is not None and module.f_code.co_name != "<module>":
        module = module.f_back
    outer = None if module is None else module.f_back
    while outer is not None and outer.f_globals.get("__name__") == "runpy":
        outer = outer.f_back
    return module is None or outer is not None
