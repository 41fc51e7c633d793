"""Jobs: :mod:`tally.jobs.facade` has everything that can be done with them.

The package can be called, as ``tally.jobs(state="failed")``: see :func:`tally.api.jobs`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, **wanted: Any) -> Any:
        from tally.api import jobs

        return jobs(**wanted)


sys.modules[__name__].__class__ = _CallablePackage
