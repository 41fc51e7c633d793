"""A part of the items: the first, a sample, a shard; and paths that are not there among others that are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import Ran

import tally
from tally.errors import SpecError
from tally.scorers.base import Scorer


class Length(Scorer):
    input = "bytes"

    def score(self, batch: list[bytes]) -> list[dict[str, int]]:
        return [{"length": len(each)} for each in batch]


class Doubled(Scorer):
    input = "table"
    features = ("n",)

    def score(self, batch: pa.Table) -> list[dict[str, int]]:
        return [{"twice": 2 * n} for n in batch["n"].to_pylist()]


def keys_of(job: tally.Job) -> list[str]:
    found: list[str] = job.results().to_pydict()["key"]
    return found


def test_parts_of_files(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    for n in range(60):
        (tmp_path / "in" / f"{n:02}").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{n:02}").write_bytes(bytes(n))

    def score(name: str, **part: object) -> list[str]:
        job = tally.score(tmp_path / "in", Length, tmp_path / name, quiet=True, workers=1, **part)  # type: ignore[arg-type]
        assert {name: job.manifest["spec"][name] for name in part} == {
            name: str(each) if name != "limit" else each for name, each in part.items()
        }
        return keys_of(job)

    whole = [f"{n:02}" for n in range(60)]
    assert score("limit", limit=7) == whole[:7]
    shards = [score(f"shard{n}", shard=f"{n}/3") for n in (1, 2, 3)]
    assert all(shards)
    assert sorted(key for shard in shards for key in shard) == whole
    tenth, sample = score("share", sample="20%"), score("sample", sample="9")
    assert 3 <= len(tenth) <= 25
    assert len(sample) == 9
    assert set(tenth) <= set(sample) or set(sample) <= set(tenth)
    shown = cli("jobs", "show", tmp_path / "shard1").out
    assert "shard 1/3" in shown
    for wrong in ({"shard": "4/3"}, {"sample": "0%"}, {"sample": "0"}, {"limit": 0}):
        with pytest.raises(SpecError):
            score("wrong", **wrong)


def test_parts_of_tables(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(5000)}), tmp_path / "in.parquet")
    shards = [
        tally.score(
            tmp_path / "in.parquet", Doubled, tmp_path / f"{n}", quiet=True, workers=1, shard=(n, 2), sample=0.5
        )
        for n in (1, 2)
    ]
    rows = [row for job in shards for row in job.results().to_pylist()]
    assert 2000 < len(rows) < 3000
    whole = (
        tally.score(tmp_path / "in.parquet", Doubled, tmp_path / "whole", quiet=True, workers=1).results().to_pylist()
    )
    keys = {row["key"] for row in rows}
    assert [row for row in whole if row["key"] in keys] == sorted(rows, key=lambda row: row["twice"])
    assert len({row["key"] for row in rows}) == len(rows)


def test_a_missing_path_among_others_is_one_dead_item(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    job = tally.score([tmp_path / "a", tmp_path / "b", tmp_path / "no" / "c"], Length, tmp_path / "out", quiet=True)
    assert job.results().to_pylist() == [{"key": "a", "length": 3}]
    assert job.dead().to_pydict()["key"] == ["b", "no/c"]
