"""Jobs: :mod:`tally.jobs.facade` has everything that can be done with them.

The package can be called: ``tally.jobs(state="failed", limit=10)`` lists jobs, as :func:`tally.api.jobs` describes. It
takes ``state``, ``model``, ``place``, ``text``, ``since``, ``until``, ``after`` and ``limit``.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, **wanted: Any) -> Any:
        from tally.api import jobs

        return jobs(**wanted)

    @property
    def __signature__(self) -> inspect.Signature:
        from tally.api import jobs

        return inspect.signature(jobs)


sys.modules[__name__].__class__ = _CallablePackage
