"""``tally query``: SQL over a job's results."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from tally.cli import completion, installation
from tally.cli.console import say
from tally.storage import temporary
from tally.text import visible


@click.command()
@click.argument("job", shell_complete=completion.jobs)
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
    table: Any = installation.jobs().query(job, sql)  # a pyarrow.Table
    if as_json or as_csv or not sys.stdout.isatty():
        from tally.sinks.merge import write_text

        with temporary.folder("query") as folder:
            path = Path(folder, "answer")
            write_text(path, table.to_batches(), table.schema, "jsonl" if as_json else "csv")
            with path.open("rb") as answer:
                shutil.copyfileobj(answer, sys.stdout.buffer)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    shown = Table(*(escape(visible(name)) for name in table.column_names), box=None, header_style="bold")
    for row in table.slice(0, 1000).to_pylist():
        shown.add_row(*(Text("" if value is None else visible(str(value))) for value in row.values()))
    Console().print(shown)
    if table.num_rows > 1000:
        say(f"... {table.num_rows - 1000:,} more rows (--csv or --json shows all)", err=True)
