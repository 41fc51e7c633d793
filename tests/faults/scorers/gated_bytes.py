from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import tally


class Gated(tally.Scorer):
    """Each worker scores two batches at once, and the rest once the file at ``$GATE`` is there."""

    input = "bytes"
    batch_size = 4
    columns = {"bytes": "int64", "sha256": "string"}  # noqa: RUF012

    def load(self, artifacts, device):
        self.gate, self.batches = Path(os.environ["GATE"]), 0

    def score(self, batch):
        self.batches += 1
        while self.batches > 2 and not self.gate.exists():
            time.sleep(0.02)
        return [{"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for data in batch]
