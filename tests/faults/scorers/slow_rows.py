"""Gives every row twice its value, at the pace that PACE says."""

import os
import time

import pyarrow.compute as pc

import tally


class SlowRows(tally.Scorer):
    input = "table"
    features = ("Value",)

    def __init__(self):
        self.columns = {"double": "float64"}

    def score(self, batch):
        time.sleep(float(os.environ.get("PACE", "0")))
        return batch.select(["Value"]).set_column(0, "double", pc.multiply(batch["Value"], 2.0))
