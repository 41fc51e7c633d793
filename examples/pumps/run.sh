#!/bin/sh
# Two hundred sensors for two days: detectors are trained on the first day, and the second is scored, at once and then
# hour by hour. Everything is written to a new folder: sh examples/pumps/run.sh [FOLDER]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir "${1:-pumps}"
cd "${1:-pumps}"
export TALLY_HOME="$PWD/home"

tally simulate readings --devices 40 --sensors 5 --hours 48 --anomalies 0.2% --labels truth.parquet --out readings

# A model for each Device and Tag, all of them in one file.
tally train anomaly readings --where "TS < '2026-01-02'" --by Device,Tag --value Value --nu 0.001 --out models/pumps

# The second day, and the sensors that were most anomalous.
tally score readings --where "TS >= '2026-01-02'" --model models/pumps --keep TS,Value --out day --quiet
tally query day "SELECT Device, Tag, count(*) AS readings, count(*) FILTER (anomaly) AS anomalies FROM results
    GROUP BY ALL ORDER BY anomalies DESC, Device, Tag LIMIT 5"

# How many readings of each kind were called anomalous. Values that are stuck are ordinary values, one by one.
python - <<'EOF'
import duckdb

print(duckdb.sql("""
    SELECT coalesce(Kind, '(none)') AS kind, count(*) AS readings, count(*) FILTER (anomaly) AS anomalous
    FROM 'day/*.parquet' LEFT JOIN 'truth.parquet' USING (TS, Device, Tag) GROUP BY ALL ORDER BY ALL
"""))
EOF

# The same by the clock. 'tally schedule run --forever' would go on with the hours to come.
cp "$here/job.yaml" .
tally schedule add pumps job.yaml --cron '0 * * * *' --timezone UTC
tally schedule backfill pumps --from 2026-01-02T00:00 --to 2026-01-02T03:00
tally schedule show pumps
