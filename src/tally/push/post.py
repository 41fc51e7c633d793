"""Posts rows to a web address, item by item or several in one request.

Each request carries an id, which stays the same when it is sent again, and a signature if there is a secret to sign
with: see :mod:`tally.alerts.webhook`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

from tally.alerts import webhook
from tally.errors import SpecError, StorageAwayError, StorageError
from tally.push.base import Parcel, Receiver, Refusal
from tally.push.bodies import Rows, by_key, filled
from tally.push.target import Push
from tally.sinks.columns import json_text

CONNECTIONS = 8
"""Requests that are under way at once."""

_ITEM_STATUSES = (400, 409, 413, 422)
"""What is wrong with the item, and not with the sender, the address or the moment."""
_LATER = (408, 425, 429)
_LONGEST_PAUSE = 60.0
_TEXT_SHOWN = 300


class WebReceiver(Receiver):
    """facts: ``job``, ``model`` and ``version``, for bodies."""

    def __init__(self, push: Push, facts: Mapping[str, Any]) -> None:
        self._push, self._facts = push, facts
        self._address, self._headers = push.address(), push.header_values()
        try:
            webhook.checked(self._address)
        except ValueError as error:
            raise SpecError(f"push: {error}") from None
        self._key = webhook.secret() if webhook.has_secret() else None
        self._body = push.body
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="tally-push")

    def deliver(self, parcel: Parcel, *, confirm: Callable[[], None] = lambda: None) -> list[Refusal]:
        """See :meth:`Receiver.deliver`."""
        groups = list(self._groups(parcel))
        names = [f"{parcel.name}-{n}" for n in range(len(groups))]
        confirm()
        found = self._threads.map(self._send, names, groups, repeat(parcel.info))
        return [refusal for each in found for refusal in each]

    def close(self) -> None:
        """See :meth:`Receiver.close`."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _groups(self, parcel: Parcel) -> Iterator[Mapping[str, Rows]]:
        """The rows by key, as many items at a time as go into one request."""
        rows = by_key(parcel)
        keys, size = list(rows), self._push.items
        for begin in range(0, len(keys), size):
            yield {key: rows[key] for key in keys[begin : begin + size]}

    def _send(self, name: str, group: Mapping[str, Rows], info: Mapping[str, Mapping[str, Any]]) -> list[Refusal]:
        refusals, bodies = [], {}
        for key, rows in group.items():
            try:
                bodies[key] = filled(self._body, self._facts, key, rows, info.get(key, {}))
            except SpecError as error:
                refusals.append(Refusal(key, error.message))
        if not bodies:
            return refusals
        body = list(bodies.values()) if self._push.items > 1 else next(iter(bodies.values()))
        reason = self._post(name, json_text(body).encode())
        if reason is None:
            return refusals
        if len(bodies) == 1:
            return [*refusals, Refusal(next(iter(bodies)), reason)]
        # One of them is to blame: each alone tells.
        for n, key in enumerate(bodies):
            refusals += self._send(f"{name}-{n}", {key: group[key]}, info)
        return refusals

    def _post(self, name: str, body: bytes) -> str | None:
        """None if it was accepted; else why the item was refused."""
        try:
            answer = webhook.send(self._address, body, name, key=self._key, headers=self._headers)
        except webhook.UndeliveredError as error:
            raise StorageAwayError(f"{webhook.shown(self._address)}: {error}") from None
        if 200 <= answer.status < 300:
            return None
        said = f"answered {answer.status}" + (f": {answer.text[:_TEXT_SHOWN]}" if answer.text else "")
        if answer.status in _ITEM_STATUSES:
            return said
        if answer.status >= 500 or answer.status in _LATER:
            if answer.retry_after:
                time.sleep(min(answer.retry_after, _LONGEST_PAUSE))
            raise StorageAwayError(f"{webhook.shown(self._address)} {said}")
        why = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
        raise StorageError(
            f"{webhook.shown(self._address)} takes no rows: it {said}{why}",
            hint="Check the address and the headers of 'push', then resume the job.",
        )
