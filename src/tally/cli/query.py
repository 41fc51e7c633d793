"""``tally query``: SQL over a job's results."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import pyarrow as pa


@click.command()
@click.argument("job")
@click.argument("sql")
@click.option("--csv", "as_csv", is_flag=True, help="CSV, also on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row.")
def query(job: str, sql: str, as_csv: bool, as_json: bool) -> None:
    """Ask JOB's results with SQL (DuckDB's).

    JOB is a job's id, the beginning of it, or the place that the job writes to. The views are 'results'
    (with the column 'key') and 'dead' (key, stage, error). A job may still be running: then it is asked
    for what is committed.

    \b
    tally query JOB "select label, count(*) from results group by 1 order by 2 desc"
    """
    from tally.api import Job

    table = Job(job).query(sql)
    if as_json:
        for row in table.to_pylist():
            click.echo(json.dumps(row, default=str))
    elif as_csv or not sys.stdout.isatty():
        import pyarrow.csv

        pyarrow.csv.write_csv(_flat(table), sys.stdout.buffer)
    else:
        from rich.console import Console
        from rich.table import Table

        shown = Table(*table.column_names, box=None, header_style="bold")
        for row in table.slice(0, 1000).to_pylist():
            shown.add_row(*("" if value is None else str(value) for value in row.values()))
        Console().print(shown)
        if table.num_rows > 1000:
            click.echo(f"... {table.num_rows - 1000:,} more rows (--csv or --json shows all)", err=True)


def _flat(table: pa.Table) -> pa.Table:
    """The table with nested columns as JSON text, which CSV can hold."""
    import pyarrow as pa

    for index, each in enumerate(table.schema):
        if pa.types.is_nested(each.type):
            texts = [None if value is None else json.dumps(value, default=str) for value in table[index].to_pylist()]
            table = table.set_column(index, each.name, pa.array(texts, pa.string()))
    return table
