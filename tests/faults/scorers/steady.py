from __future__ import annotations

import hashlib
import time

import tally


class Steady(tally.Scorer):
    """Slow enough to be killed often, and a row that depends on nothing but the item."""

    input = "bytes"
    batch_size = 4
    columns = {"bytes": "int64", "sha256": "string"}  # noqa: RUF012

    def score(self, batch):
        time.sleep(0.035 * len(batch))
        return [{"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for data in batch]
