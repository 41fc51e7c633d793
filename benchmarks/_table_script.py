"""What one would write without Tally: DuckDB streams a Parquet file, scikit-learn scores it, pyarrow writes.

    python benchmarks/_table_script.py SOURCE MODEL OUT [FIRST LAST]

FIRST, LAST: the row groups to take, as a range; all of them if left out. Prints what it has done so far.
"""

from __future__ import annotations

import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skops.io

BATCH = 65_536
FEATURES = ("a", "b", "c", "d")
SCHEMA = pa.schema([("Device", pa.int32()), ("anomaly", pa.bool_()), ("score", pa.float64())])


def main(source: str, model: str, out: str, first: str = "", last: str = "") -> None:
    estimator = skops.io.load(model)
    connection = duckdb.connect(config={"threads": 1} if first else {})
    where = ""
    if first:
        bounds = np.cumsum([0, *(group.num_rows for group in groups(source))])
        where = f"WHERE file_row_number >= {bounds[int(first)]} AND file_row_number < {bounds[int(last)]}"
    columns = ", ".join(("Device", *FEATURES))
    query = f"SELECT {columns} FROM read_parquet('{source}', file_row_number = true) {where}"
    done = 0
    with pq.ParquetWriter(out, SCHEMA, compression="zstd") as writer:
        for batch in connection.sql(query).to_arrow_reader(BATCH):
            matrix = np.column_stack([batch.column(name).to_numpy() for name in FEATURES])
            score = estimator.decision_function(matrix)
            writer.write_batch(pa.RecordBatch.from_arrays([batch.column("Device"), score < 0, score], schema=SCHEMA))
            done += len(score)
            print(f"{done:,}", flush=True)


def groups(source: str) -> list[pq.RowGroupMetaData]:
    metadata = pq.read_metadata(source)
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


if __name__ == "__main__":
    main(*sys.argv[1:])
