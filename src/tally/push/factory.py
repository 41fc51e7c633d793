"""The receiver that ``push`` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tally.push.base import Receiver
from tally.push.target import Push


def open_receiver(push: Push, facts: Mapping[str, Any]) -> Receiver:
    """facts: ``job``, ``model`` and ``version``. Nothing is contacted yet. Raises SpecError."""
    if push.table is None:
        from tally.push.post import WebReceiver

        return WebReceiver(push, facts)
    from tally.push.upsert import TableReceiver

    return TableReceiver(push)
