"""The receiver that ``push`` names. A new kind of database is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tally.database import foreign
from tally.errors import SpecError
from tally.push.base import Receiver
from tally.push.target import Push

RECEIVERS = {
    **dict.fromkeys(foreign.DRIVERS, "tally.push.upsert"),
    "duckdb": "tally.push.duckdb",
    **dict.fromkeys(foreign.DOCUMENTS, "tally.push.mongodb"),
}
"""By the scheme of URLs, the file that has ``open_receiver(push, facts)``."""


def open_receiver(push: Push, facts: Mapping[str, Any]) -> Receiver:
    """facts: ``job``, ``model`` and ``version``. Nothing is contacted yet. Raises SpecError."""
    if push.table is None:
        from tally.push.post import WebReceiver

        return WebReceiver(push, facts)
    scheme = foreign.scheme_of(push.address())
    if scheme is None:
        raise SpecError("push: the database's URL cannot be understood")
    if (problem := push.misfit(scheme)) is not None:
        raise SpecError(f"push: {problem}")
    made: Receiver = import_module(RECEIVERS[scheme]).open_receiver(push, facts)
    return made
