from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.compute as pc

import tally


class Readings(tally.Scorer):
    """Says which readings are high, slowly."""

    input = "table"
    features = ("value",)
    batch_size = 16
    columns = {"high": "bool"}  # noqa: RUF012

    def score(self, table):
        time.sleep(0.01 * table.num_rows)
        return pa.table({"high": pc.greater(table["value"], 0.9)})
