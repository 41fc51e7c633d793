"""Numbers, times and states as the pages write them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from tally.jobs.states import ENDED
from tally.server.api.views import JobView
from tally.text import iso_time, local_time

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def count(number: float) -> str:
    """``1,234``."""
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes: ``12.3 MiB``."""
    for unit in _UNITS:
        if number < 1024 or unit == _UNITS[-1]:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def latency(seconds: float) -> str:
    """``7.1 ms``, ``1.25 s``."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def percent(job: JobView) -> int | None:
    """How much of a job is done, in percent; None while that is not known."""
    if not job.planned:
        return None
    return 100 if not job.items else min(100, 100 * job.done // job.items)


def rate(job: JobView) -> str:
    """Items per second over all the time that it was driven."""
    return f"{job.done / job.seconds:,.1f} {job.unit}/s" if job.seconds else "-"


def left(job: JobView) -> str:
    """How long it takes yet, if it goes on as it did; nothing where that cannot be said."""
    if job.state != "running" or not job.planned or not job.done or not job.seconds:
        return ""
    return duration((job.items - job.done) * job.seconds / job.done)


def cost(job: JobView, price_per_hour: float) -> float:
    """What its workers have cost."""
    return price_per_hour * job.stages.get("worker_seconds", 0.0) / 3600


def actions(job: JobView) -> list[tuple[str, str]]:
    """What can be asked of a job in its state, and what the button says."""
    possible = []
    if job.state == "running":
        possible.append(("pause", "Pause"))
    if job.state in ("paused", "interrupted", "failed"):
        possible.append(("resume", "Resume"))
    if job.dead and not job.alive and job.state != "cancelled":
        possible.append(("retry", "Replay dead items"))
    if job.state not in ENDED:
        possible.append(("cancel", "Cancel"))
    return possible


def clock_time(seconds: float) -> str:
    """The time of the day, ``14:05:09``, on this machine's clock."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def moment(at: float | None) -> str:
    """A time for a page: on this machine's clock, and whose clock that is; ``-`` for None."""
    shown = local_time(at)
    if at is None:
        return shown
    zone = time.strftime("%Z", time.localtime(at))
    return Markup('<time datetime="{}" title="{} {}">{}</time>').format(iso_time(at), shown, zone, shown)


def cell(value: Any) -> str:
    """A value of a result."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


FILTERS: dict[str, Callable[..., Any]] = {
    "actions": actions,
    "count": count,
    "size": size,
    "duration": duration,
    "latency": latency,
    "percent": percent,
    "rate": rate,
    "left": left,
    "cost": cost,
    "cell": cell,
    "clock_time": clock_time,
    "local_time": moment,
    "iso_time": iso_time,
}
