from __future__ import annotations

import tally


class Identity(tally.Scorer):
    """Gives each picture back."""

    output = "image"

    def score(self, batch):
        return batch
