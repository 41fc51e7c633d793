"""A job looks at each of its Parquet files once, in the process that submits and drives it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tally

SCORER = """
import pyarrow as pa
from tally.scorers.base import Scorer

class Double(Scorer):
    input = "table"
    features = ["value"]
    columns = {"double": "float64"}

    def score(self, table):
        return pa.table({"double": [2 * value for value in table["value"].to_pylist()]})
"""


@pytest.mark.parametrize("options", [{}, {"by": ["device"]}, {"where": "value > 1"}])
def test_five_files_are_opened_five_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (tmp_path / "double.py").write_text(SCORER)
    (tmp_path / "in").mkdir()
    for number in range(5):
        pq.write_table(pa.table({"device": [1, 2, 2], "value": [1.0, 2.0, 3.0]}), tmp_path / f"in/{number}.parquet")
    opened: Counter[str] = Counter()

    def counting(real: Any) -> Any:
        def count(where: Any, *args: Any, **given: Any) -> Any:
            if isinstance(where, (str, Path)) and Path(where).parent == tmp_path / "in":
                opened[Path(where).name] += 1
            return real(where, *args, **given)

        return count

    monkeypatch.setattr(pq, "ParquetFile", counting(pq.ParquetFile))
    monkeypatch.setattr(pq, "read_metadata", counting(pq.read_metadata))
    job = tally.score(
        str(tmp_path / "in"), model=f"{tmp_path}/double.py:Double", out=str(tmp_path / "out"),
        workers=1, quiet=True, **options,
    )  # fmt: skip
    assert job.manifest["counts"]["rows"] == (10 if "where" in options else 15)
    assert opened == {f"{number}.parquet": 1 for number in range(5)}
