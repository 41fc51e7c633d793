from __future__ import annotations

import os
import time

import tally


class Slow(tally.Scorer):
    """Inverts each picture, in as many seconds as PACE says."""

    output = "image"
    batch_size = 4

    def score(self, batch):
        time.sleep(float(os.environ.get("PACE", "0")) * len(batch))
        return [255 - picture for picture in batch]
