"""Comparing runs: what differs between them, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tally.errors import SpecError
from tally.text import did_you_mean
from tally.training.runs.store import RunRecord


def differing(records: Sequence[RunRecord]) -> tuple[list[str], list[str]]:
    """The names of the parameters that are not the same in all runs (all of them, if there is one run), and of all
    metrics, in the order in which they appear."""
    parameters = list(dict.fromkeys(name for each in records for name in each.parameters))
    metrics = list(dict.fromkeys(name for each in records for name in each.metrics))
    if len(records) > 1:
        first, *others = records
        missing = object()
        parameters = [
            name
            for name in parameters
            if any(each.parameters.get(name, missing) != first.parameters.get(name, missing) for each in others)
        ]
    return parameters, metrics


def best_first(records: Sequence[RunRecord], metric: str, *, lowest: bool = False) -> list[RunRecord]:
    """The runs by the last value of a metric, the older first where that is the same. Those that have failed come after
    the others, and those without a finite number last. Raises SpecError if no run has it."""
    known = {name for each in records for name in each.metrics}
    if metric not in known:
        raise SpecError(
            f"no run has the metric {metric!r}{did_you_mean(metric, known)}",
            hint=f"They have {', '.join(sorted(known)) or 'none'}.",
        )

    def rank(record: RunRecord) -> tuple[bool, bool, float, float]:
        value = record.metrics[metric].last if metric in record.metrics else math.nan
        if not math.isfinite(value):
            return True, record.state == "failed", 0.0, record.created_at
        return False, record.state == "failed", value if lowest else -value, record.created_at

    return sorted(records, key=rank)


def has_result(record: RunRecord, metric: str) -> bool:
    """Whether a run may be called the best: it has not failed, and measured a finite number."""
    return record.state != "failed" and metric in record.metrics and math.isfinite(record.metrics[metric].last)
