"""A job that reads from one database and writes into another is killed; each row is there once, as if nothing had been.

Two kills by default; ``TALLY_TEST_FULL=1``: twenty, over every kind of source and sink.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.databases import database, execute, in_table
from tests.extent import FULL
from tests.faults.storms import SCORERS, start, tally, workers_of
from tests.mongodb import StandIn, stand_in

from tally.jobs.facade import Jobs

ROWS = 60_000 if FULL else 20_000
KILLS = 20 if FULL else 2
WAYS = [
    ("postgresql", "duckdb", "committed"),
    ("sqlite", "postgresql", "finished"),
    *(
        [
            ("duckdb", "postgresql", "committed"),
            ("mariadb", "sqlite", "committed"),
            ("duckdb", "mariadb", "committed"),
            ("mariadb", "duckdb", "finished"),
            ("postgresql", "mariadb", "finished"),
            ("sqlite", "mongodb", "committed"),
        ]
        if FULL
        else []
    ),
]


@pytest.mark.parametrize(("origin", "target", "when"), WAYS)
def test_kills_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str, target: str, when: str
) -> None:
    monkeypatch.setenv("PACE", "0.3")
    (tmp_path / "into").mkdir()
    with ExitStack() as stack:
        source = stack.enter_context(database(origin, tmp_path))
        behind: StandIn | None = None
        if target == "mongodb":
            into, behind = stack.enter_context(stand_in())
        else:
            into = stack.enter_context(database(target, tmp_path / "into"))
        quote = "`" if origin == "mariadb" else '"'
        series = {
            "postgresql": f"generate_series(1, {ROWS}) AS s(i)",
            "duckdb": f"range(1, {ROWS + 1}) AS s(i)",
            "mariadb": f"(SELECT seq AS i FROM seq_1_to_{ROWS}) AS s",
            "sqlite": f"(WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {ROWS}) SELECT i FROM s)",  # noqa: E501
        }[origin]
        value = f"{quote}Value{quote}"
        execute(source, f"CREATE TABLE readings AS SELECT i AS id, i * 1e0 AS {value} FROM {series}")
        command = tally(
            *("score", f"{source}#readings", "--key", "id", "--model", SCORERS / "slow_rows.py", "--batch-size", 1000),
            *("--out", tmp_path / "out", "--workers", 2, "--push", f"{{url: '{into}#found', when: {when}}}"),
        )
        killed = _killed(command, tmp_path / "log", KILLS)
        subprocess.run([*command, "--resume", "-q"], check=True, timeout=300)
        assert killed == KILLS, (tmp_path / "log").read_text()
        expected = {str(i): 2.0 * i for i in range(1, ROWS + 1)}
        if behind is not None:
            found: Mapping[Any, Any] = behind.documents["cocoonaks.found"]
            assert {key: [row["double"] for row in each["rows"]] for key, each in found.items()} == {
                key: [double] for key, double in expected.items()
            }
        else:
            quote = "`" if target == "mariadb" else '"'
            rows = in_table(into, f"SELECT {quote}key{quote}, {quote}double{quote} FROM found")
            assert len(rows) == ROWS
            assert dict(rows) == expected
    [record] = Jobs().list().jobs
    assert (record.state, record.items, record.done, record.dead) == ("finished", ROWS, ROWS, 0)


def _killed(command: list[str], log: Path, kills: int) -> int:
    """Kill the job so often, at moments between its beginning and its end. Returns how often it was still running."""
    dice = random.Random(kills)
    killed = 0
    for _ in range(kills):
        process = start([*command, "--resume"], log)
        deadline = time.monotonic() + 60
        while process.poll() is None and not workers_of(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(dice.uniform(0.2, 2.0))
        if process.poll() is None:
            killed += 1
            for each in workers_of(process):
                each.kill()
            process.kill()
        process.wait()
    return killed
