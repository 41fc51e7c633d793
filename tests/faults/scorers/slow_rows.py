"""Gives every row twice its value, at the pace that PACE says."""

import os
import time

import pyarrow.compute as pc

import tally


class SlowRows(tally.Scorer):
    input = "table"

    def __init__(self, feature="Value"):
        self.features = (feature,)
        self.columns = {"double": "float64"}

    def score(self, batch):
        time.sleep(float(os.environ.get("PACE", "0")))
        [feature] = self.features
        return batch.select([feature]).set_column(0, "double", pc.multiply(batch[feature], 2.0))
