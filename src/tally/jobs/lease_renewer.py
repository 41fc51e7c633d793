"""Renewing a coordinator's lease, which also tells what the user asks of the job."""

from __future__ import annotations

import queue
from typing import Any

from tally.database.renewer import LeaseRenewer, Topic
from tally.database.waiting import Patience
from tally.jobs.store import CHANNEL, JobStore, Lease

LEASE_SECONDS = 30.0
"""How long a lease lasts that is not renewed."""
RENEW_SECONDS = 1.0
"""Seconds between two renewals, and so until a request is noticed without a notification."""


def lease_renewer(
    store: JobStore, lease: Lease, inbox: queue.SimpleQueue[tuple[Any, ...]], patience: Patience
) -> LeaseRenewer[str]:
    """A thread that renews the lease. It puts ``("wanted", request)`` into the inbox whenever the user's request
    (run, pause or cancel) has changed, and ``("lost", error)`` when another coordinator has the job."""
    request = "run"

    def renewed(latest: str) -> None:
        nonlocal request
        if latest != request:
            request = latest
            inbox.put(("wanted", latest))

    return LeaseRenewer(
        lambda: store.renew(lease, seconds=LEASE_SECONDS),
        every=RENEW_SECONDS,
        what=f"job {lease.job_id}",
        patience=patience,
        renewed=renewed,
        lost=lambda error: inbox.put(("lost", error)),
        topic=Topic(store.engine, CHANNEL, lease.job_id),
    )
