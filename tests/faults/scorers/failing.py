from __future__ import annotations

import tally


class Failing(tally.Scorer):
    """Fails on everything."""

    input = "path"

    def score(self, batch):
        raise RuntimeError("the model server is away")
