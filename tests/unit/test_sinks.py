"""Sinks beyond their contract: choosing, columns, merging, pictures, claims."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tally.errors import ItemError, OutputExistsError, SpecError, StorageError
from tally.media.video.encode import Encoding
from tally.sinks import columns, merge
from tally.sinks import rows as rows_module
from tally.sinks.base import Output, OutputDescription, Sink
from tally.sinks.factory import reopen, sink_for
from tally.sinks.files import FilesSink, file_for
from tally.sinks.query import rows
from tally.sinks.rows import RowsSink
from tally.sinks.staging import StagedSink
from tally.sinks.video import VideoSink
from tally.sources.base import Chunk
from tally.storage import normalised
from tally.testing.sinks import DEAD, FACTS, Crash, CrashingStore, files_under


def attempt(sink: Sink, name: str, results: dict[str, Any]) -> Output:
    writer = sink.open(name, Chunk(0, len(results), {}))
    assert writer.add(list(results), list(results.values())) == []
    return writer.close()


def picture(value: int = 7, height: int = 4, width: int = 6) -> np.ndarray[Any, Any]:
    return np.full((height, width, 3), value, np.uint8)


# -- choosing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "options", "place", "form"),
    [
        ("out", {}, "out", "parquet"),
        ("out/", {"format": "csv"}, "out", "csv"),
        ("run.v1.2", {"format": "ndjson"}, "run.v1.2", "jsonl"),
        ("a/out.CSV", {}, "a/out.CSV", "csv"),
        ("out.ndjson", {}, "out.ndjson", "jsonl"),
        ("out.parquet", {"format": "parquet"}, "out.parquet", "parquet"),
    ],
)
def test_choose_rows(tmp_path: Path, out: str, options: dict[str, Any], place: str, form: str) -> None:
    sink = sink_for(f"{tmp_path}/{out}", output="rows", **options)
    assert type(sink) is RowsSink
    assert str(sink.layout) == f"{tmp_path}/{place}"
    assert sink.format == form
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "kind", "merged"),
    [
        ("out.csv", "rows", True),
        ("out.csv/", "rows", False),
        ("run.v1", "rows", False),
        ("out.mp4", "video", True),
        ("videos", "video", False),
        ("out.jpg", "images", False),
    ],
)
def test_outputs_of_earlier_versions_are_opened_again(tmp_path: Path, out: str, kind: str, merged: bool) -> None:
    """Their rows say what the output is, and the place as it was given."""
    kept = {"kind": kind, "format": None, "columns": None, "unit": "items", "place": f"{tmp_path}/{out}"}
    sink = reopen(OutputDescription.from_json(kept))
    assert sink.describe().merged is merged
    assert sink.place == f"{tmp_path}/{out}".rstrip("/")


def test_places_are_written_in_one_form(tmp_path: Path) -> None:
    assert normalised(f"{tmp_path}/a/../b/") == f"{tmp_path}/b"
    assert normalised(f"file://{tmp_path}/b%20c/") == f"{tmp_path}/b c"
    assert normalised("s3://bucket/a/") == "s3://bucket/a"
    assert normalised("s3://bucket/") == "s3://bucket"
    assert normalised("mything://there/") == "mything://there"


def test_choose_urls(tmp_path: Path) -> None:
    assert str(sink_for("s3://bucket/a/out.csv", output="rows").layout) == "s3://bucket/a/out.csv"
    assert str(sink_for("az://bucket", output="rows").layout) == "az://bucket"
    assert str(sink_for(f"file://{tmp_path}/out.csv", output="rows").layout) == f"{tmp_path}/out.csv"


def test_choose_pictures(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="image", format="jpeg")
    assert isinstance(sink, FilesSink)
    assert sink.pictures == "jpg"


@pytest.mark.parametrize(
    ("out", "options", "place", "kind", "codec"),
    [
        ("out", {}, "out", "mp4", "libx264"),
        ("out/", {"format": "webm"}, "out", "webm", "libvpx-vp9"),
        ("out", {"format": "mov", "codec": "prores"}, "out", "mov", "prores"),
        ("a/out.MP4", {}, "a/out.MP4", "mp4", "libx264"),
        ("out.m4v", {}, "out.m4v", "mp4", "libx264"),
        ("out.mkv", {"format": "mkv", "crf": 30.0}, "out.mkv", "mkv", "libx264"),
    ],
)
def test_choose_video(tmp_path: Path, out: str, options: dict[str, Any], place: str, kind: str, codec: str) -> None:
    sink = sink_for(f"{tmp_path}/{out}", output="video", **options)
    assert isinstance(sink, VideoSink)
    assert str(sink.layout) == f"{tmp_path}/{place}"
    assert (sink.format, sink.encoding) == (kind, Encoding(codec, options.get("crf")))
    assert bool(sink.layout.merged) == ("." in out)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("there.txt", {}, "is a file"),
        ("plain", {}, "is a file"),
        ("out.csv.gz", {}, "looks like one file"),
        ("out.csv", {"format": "parquet"}, "cannot be written as 'parquet'"),
        ("out", {"format": "png"}, "rows cannot be written as 'png'"),
        ("folder.csv", {}, "is a folder"),
        ("out.csv", {"output": "image"}, "is one file"),
        ("out.png", {"output": "image"}, "is one file"),
        ("out", {"output": "image", "format": "csv"}, "pictures cannot be written as 'csv'"),
        ("out.mp4", {"output": "image"}, "is one file"),
        ("out.mp4", {}, "looks like one file, and is none of .csv, .parquet, .jsonl"),
        ("out.avi", {"output": "video"}, "looks like one file, and is none of .mp4, .mov, .mkv, .webm"),
        ("out.csv", {"output": "video"}, "looks like one file"),
        ("there.txt", {"output": "video"}, "is a file"),
        ("out.mp4", {"output": "video", "format": "mkv"}, "cannot be written as 'mkv'"),
        ("out", {"output": "video", "format": "jpg"}, "video cannot be written as 'jpg'"),
        ("folder.mp4", {"output": "video"}, "is a folder"),
        ("out\udcff", {}, r"\\xff' is not valid UTF-8"),
        ("out", {"columns": {"key": "string", "n": "inty", "l": "list<int8>"}}, "'key' is reserved"),
        ("out", {"columns": {"n": "inty"}}, "no column type is named 'inty'"),
    ],
)
def test_choose_refuses(tmp_path: Path, out: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "there.txt").touch()
    (tmp_path / "plain").touch()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(SpecError) as caught:
        sink_for(f"{tmp_path}/{out}", **{"output": "rows", **options})
    assert message.replace("\\\\", "\\") in caught.value.message
    assert caught.value.hint


# -- columns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["string", "int8", "uint64", "float32", "float64", "bool", "binary", "timestamp[us]", "timestamp[ms, tz=UTC]",
     "list<float32>", "list<list<string>>", "struct<a: int64, b: list<struct<c: string>>>"],
)  # fmt: skip
def test_names_of_types(name: str) -> None:
    assert columns.name_of(columns.type_named(name)) == name


def build(
    results: Sequence[Any], declared: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    keys = [str(n) for n in range(len(results))]
    batch, failed = columns.build(keys, results, columns.schema_of(declared))
    assert all(error.stage == "write" for _, error in failed)
    return batch.to_pylist(), {index: error.message for index, error in failed}


def test_numpy_values_and_several_rows() -> None:
    found, failed = build(
        [
            {"a": np.float32(1.5), "b": np.int64(2), "c": np.arange(2), "d": np.zeros((1, 2)), "e": np.float16(0.5)},
            [{"a": 1}, {"a": None, "e": 2.0}],
            [],
        ]
    )
    assert failed == {}
    nothing = {"b": None, "c": None, "d": None, "e": None}
    assert found == [
        {"key": "0", "a": 1.5, "b": 2, "c": [0, 1], "d": [[0.0, 0.0]], "e": 0.5},
        {"key": "1", "a": 1.0} | nothing,
        {"key": "1", "a": None} | nothing | {"e": 2.0},
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": "x"}, "column 'a': the value 'x' (str) does not fit int64"),
        ({"a": 1.5}, "column 'a': the value 1.5 (float) does not fit int64"),
        ({"a": 2**70}, "does not fit int64"),
        ({"a": 1, "b": 3}, "column 'b': the value 3 (int) does not fit string"),
        ({"a": 1, "c": 3}, "the column 'c', which its columns do not declare"),
        ({"key": 1}, "the column name 'key' is reserved"),
        ({"a": 1, "b": "\ud800"}, "column 'b'"),
        ([{"a": 1}, {"a": "x"}], "column 'a'"),
        ("text", "the scorer returned 'text' (str), which is no row"),
        (None, "the scorer returned None (NoneType), which is no row"),
        (np.zeros((2, 3, 3), np.uint8), "the scorer returned an array (2x3x3 uint8), and this output holds rows"),
    ],
)
def test_values_that_do_not_fit_declared_columns(bad: Any, message: str) -> None:
    found, failed = build([{"a": 1, "b": "x"}, bad, {"a": None}], {"a": "int64", "b": "string"})
    assert found == [{"key": "0", "a": 1, "b": "x"}, {"key": "2", "a": None, "b": None}]
    assert list(failed) == [1]
    assert message in failed[1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": object()}, "does not fit any column type"),
        ({"a": 2**70}, "does not fit any column type"),
        ({1: "x"}, "the column name 1 (int) is no text"),
        ({"key": 1}, "the column name 'key' is reserved"),
        ({"\ud800": 1}, "is not valid Unicode"),
    ],
)
def test_values_that_fit_no_column(bad: Any, message: str) -> None:
    found, failed = build([{"a": 1}, bad, {"a": 2}])
    assert [row["a"] for row in found] == [1, 2]
    assert list(failed) == [1]
    assert message in failed[1]


def test_a_key_that_is_not_unicode() -> None:
    batch, _ = columns.build(["caf\udce9.jpg", "b\ud800"], [{"a": 1}, {"a": 2}], None)
    assert batch["key"].to_pylist() == ["caf\\xe9.jpg", "b\\ud800"]


@pytest.mark.parametrize(
    ("values", "expected", "mixed"),
    [
        ([1, 2.5, None], [1.0, 2.5, None], False),
        ([1, "x", None], ["1", "x", None], True),
        ([1, True], ["1", "true"], True),
        ([[1], [2.5], []], [[1.0], [2.5], []], False),
        ([[1.5], "x"], ["[1.5]", "x"], True),
        ([{"a": 1}, {"b": float("nan")}, {}], None, False),
        ([{}, {}], [None, None], False),
        ([{"a": [{}]}, {"a": [{}]}], ['{"a": [{}]}', '{"a": [{}]}'], False),
        ([{"a": 1}, {"a": "x"}], ['{"a": 1}', '{"a": "x"}'], True),
        ([np.uint64(2**63), 1], [str(2**63), "1"], True),
        ([datetime(2024, 5, 6, tzinfo=UTC), datetime(2300, 5, 6, tzinfo=UTC)], None, False),
    ],
)
@pytest.mark.parametrize("split", [1, 2, 4])
def test_mixed_types_do_not_depend_on_how_items_are_cut(
    tmp_path: Path, values: list[Any], expected: list[Any] | None, mixed: bool, split: int
) -> None:
    def run(name: str, size: int) -> tuple[list[Any], dict[str, Any]]:
        sink = sink_for(str(tmp_path / name), output="rows")
        sink.claim("job-1")
        outputs = [
            attempt(sink, f"a{start}", {str(i): {"a": v} for i, v in enumerate(values[start : start + size])})
            for start in range(0, len(values), size)
        ]
        manifest = sink.finalize(outputs, [], FACTS)
        return rows(sink, [])["a"].to_pylist(), manifest

    whole, _ = run("whole", len(values))
    found, manifest = run("cut", split)
    assert str(found) == str(whole)
    if expected is not None:
        assert found == expected
    assert manifest["notes"] == (["column 'a' held values of different types and was written as text"] if mixed else [])


def test_large_integers_beside_floats_lose_digits_not_the_job(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    outputs = [attempt(sink, "a", {"0": {"a": 2**60 + 1}}), attempt(sink, "b", {"1": {"a": 0.5}})]
    sink.finalize(outputs, [], FACTS)
    assert rows(sink, [])["a"].to_pylist() == [float(2**60), 0.5]


# -- writing and merging ------------------------------------------------------------------------------


def test_much_is_written_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_SPILL_BYTES", 100)
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    writer = sink.open("a", Chunk(0, 2, {}))
    for n in range(5):
        writer.add([f"{n}"], [{"text": "x" * 200}])
    output = writer.close()
    assert len(output.files) == 5
    assert output.rows == 5
    sink.finalize([output], [], FACTS)
    assert rows(sink, [])["key"].to_pylist() == list("01234")

    writer = sink.open("b", Chunk(0, 2, {}))
    writer.add(["5"], [{"text": "x" * 200}])
    writer.abort()
    assert "_tally" not in str(list(files_under(tmp_path)))


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_parts_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(merge, "PART_ROWS", 4)
    sink = sink_for(str(tmp_path / "out"), output="rows", format=form)
    sink.claim("job-1")
    outputs = [attempt(sink, f"a{s}", {f"{n:02d}": {"n": n} for n in range(s, s + 3)}) for s in range(0, 9, 3)]
    manifest = sink.finalize(outputs, [], FACTS)
    assert [(f["path"], f["rows"]) for f in manifest["files"]] == [
        (f"part-00000.{form}", 4),
        (f"part-00001.{form}", 4),
        (f"part-00002.{form}", 1),
    ]
    assert all((tmp_path / "out" / f["path"]).stat().st_size == f["bytes"] for f in manifest["files"])
    assert rows(sink, [])["n"].to_pylist() == list(range(9))
    sink.claim("job-1")
    manifest = sink.finalize([attempt(sink, "b", {"09": {"n": 9, "more": "x"}})], [], {**FACTS, "generation": 1})
    assert [f["path"] for f in manifest["files"]][3:] == [f"part-00003.{form}"]
    assert manifest["schema"] == {"key": "string", "n": "int64", "more": "string"}
    assert rows(sink, [])["n"].to_pylist() == list(range(10))


def test_parts_have_a_limit_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "PART_BYTES", 100)
    batch = pa.record_batch({"n": range(10)})
    assert [[b.num_rows for b in part] for part in merge.cut([batch] * 5)] == [[10, 10], [10, 10], [10]]
    assert list(merge.cut([batch.slice(0, 0)])) == []


def test_small_parts_become_large_row_groups(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows", columns={"n": "int32"})
    sink.claim("job-1")
    outputs = [attempt(sink, f"a{n}", {f"{n}": {"n": n}}) for n in range(20)]
    sink.finalize(outputs, [], FACTS)
    found = pq.ParquetFile(tmp_path / "out" / "part-00000.parquet")
    assert found.num_row_groups == 1
    assert found.schema_arrow.field("n").type == pa.int32()
    assert found.metadata.row_group(0).column(0).compression == "ZSTD"


def test_csv_as_people_expect_it(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out.csv"), output="rows")
    sink.claim("job-1")
    results = {
        "a/1.jpg": {"label": 'a "cat", large', "score": 0.5, "box": [1, 2], "more": {"é": None}, "raw": b"\x00\xff"},
        "2": {"label": "", "score": float("nan"), "box": None, "more": None, "raw": None},
    }
    sink.finalize([attempt(sink, "a", results)], DEAD, FACTS)
    assert (tmp_path / "out.csv").read_text() == (
        'key,label,score,box,more,raw\na/1.jpg,"a ""cat"", large",0.5,"[1, 2]","{""é"": null}",AP8=\n2,"",nan,,,\n'
    )
    assert (tmp_path / "out.dead.csv").read_text() == "key,stage,error\nbroken,read,cut off\n"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == [
        "out.csv",
        "out.csv.manifest.json",
        "out.dead.csv",
    ]
    sink.claim("job-1")
    sink.finalize([attempt(sink, "b", {"3": {"new": 1, "label": "dog"}})], [], {**FACTS, "generation": 1})
    assert (tmp_path / "out.csv").read_text() == (
        "key,label,score,box,more,raw,new\n"
        'a/1.jpg,"a ""cat"", large",0.5,"[1, 2]","{""é"": null}",AP8=,\n'
        '2,"",nan,,,,\n'
        "3,dog,,,,,1\n"
    )
    assert not (tmp_path / "out.dead.csv").exists()


def test_json_lines_are_valid_json(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out.jsonl"), output="rows")
    sink.claim("job-1")
    results = {
        "1": {"score": float("inf"), "v": [1.5, float("nan")], "m": {"a": float("nan"), "b": "é"}, "raw": b"\xff"},
        "2": {"score": 0.5, "v": [], "m": None, "raw": None},
    }
    sink.finalize([attempt(sink, "a", results)], [], FACTS)

    def refuse(token: str) -> None:
        raise AssertionError(token)

    lines = [json.loads(t, parse_constant=refuse) for t in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [
        {"key": "1", "score": None, "v": [1.5, None], "m": {"a": None, "b": "é"}, "raw": "/w=="},
        {"key": "2", "score": 0.5, "v": [], "m": None, "raw": None},
    ]


def test_columns_of_the_source_stand_before_the_scorers(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    writer = sink.open("a", Chunk(0, 2, {}))
    info = [{"frame": 0, "time": 0.0}, {"frame": 1, "time": 0.04}, {"frame": 2, "time": 0.08}]
    results: list[Any] = [{"label": "cat"}, [{"label": "dog"}, {"label": "cow"}], []]
    assert writer.add(["clip#0", "clip#1", "clip#2"], results, info) == []
    sink.finalize([writer.close()], [], FACTS)
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table.column_names == ["key", "frame", "time", "label"]
    assert table.to_pylist() == [
        {"key": "clip#0", "frame": 0, "time": 0.0, "label": "cat"},
        {"key": "clip#1", "frame": 1, "time": 0.04, "label": "dog"},
        {"key": "clip#1", "frame": 1, "time": 0.04, "label": "cow"},
    ]


def test_the_manifest(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows", columns={"z": "string", "a": "float32"})
    sink.claim("job-1")
    returned = sink.finalize(
        [attempt(sink, "a", {"1": {"z": "x", "a": 0.5}})], DEAD, {**FACTS, "model": {"hash": "abc"}, "items": 2}
    )
    text = (tmp_path / "out" / "_manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest == returned
    assert list(manifest) == sorted(manifest)
    assert list(manifest["schema"].items()) == [("key", "string"), ("z", "string"), ("a", "float32")]
    assert manifest["model"] == {"hash": "abc"}
    assert manifest["counts"] == {"rows": 1, "dead": 1, "files": 1, "bytes": manifest["files"][0]["bytes"]}
    assert manifest["dead_file"]["path"] == "_dead.parquet"
    assert pq.read_table(tmp_path / "out" / "_dead.parquet").to_pylist() == DEAD
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "_SUCCESS",
        "_dead.parquet",
        "_manifest.json",
        "part-00000.parquet",
    ]


def test_a_list_of_dead_items_may_be_long(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    dead = ({"key": f"\udcff{n}", "stage": "read", "error": "x", "first": n} for n in range(25_000))
    manifest = sink.finalize([], dead, FACTS)
    assert manifest["dead_file"]["rows"] == 25_000
    assert pq.read_table(tmp_path / "out" / "_dead.parquet")["key"][7].as_py() == "\\xff7"


def test_no_column_of_the_source_is_overwritten_by_one_of_the_model(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    writer = sink.open("a", Chunk(0, 3, {}))
    info = [{"n": number} for number in range(3)]
    refused = writer.add(["a", "b", "c"], [{"m": 1}, {"n": 2}, [{"m": 3}, {"n": 4}]], info)
    assert [at for at, _ in refused] == [1, 2]
    assert all("has a column 'n', and so has the source" in str(error) for _, error in refused)
    sink.finalize([writer.close()], [], FACTS)
    written = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert written == [{"key": "a", "n": 0, "m": 1}]


def test_columns_of_a_table_keep_their_types_beside_results_that_come_one_by_one(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    writer = sink.open("a", Chunk(0, 4, {}))
    info = pa.table(
        {
            "t": pa.array([1700000000123456789, 2, 3, 4], pa.timestamp("ns")),
            "u": pa.array([2**64 - 1, 3, 4, 5], pa.uint64()),
            "m": pa.array([None, [("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
            "f": pa.array([0.1, 0.2, 0.3, 0.4], pa.float32()),
        }
    )
    results = [{"v": 1.5}, [{"v": 2.5}, {"v": 3.5}], [], {"u": 1}]
    refused = writer.add_rows(pa.array(["a", "b", "c", "d"]), results, info)
    assert [at for at, _ in refused] == [3]
    sink.finalize([writer.close()], [], FACTS)
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table.column("key").to_pylist() == ["a", "b", "b"]
    assert table.column("v").to_pylist() == [1.5, 2.5, 3.5]
    wanted = info.take(pa.array([0, 1, 1]))
    assert all(table.column(name).combine_chunks().equals(wanted.column(name).combine_chunks()) for name in "tuf")
    assert table.column("m").to_pylist() == [None, [("k", 1)], [("k", 1)]]


def test_staged_results_that_are_gone(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    output = attempt(sink, "a", {"1": {"n": 1}})
    (tmp_path / "out/_tally/attempts/a.parquet").unlink()
    with pytest.raises(StorageError, match=r"no longer there: 1 file, e\.g\. .*a\.parquet(?s:.*)--overwrite"):
        sink.finalize([output], [], FACTS)


# -- claims -------------------------------------------------------------------------------------------


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt", "z", ".DS_Store"):
        (out / name).write_text(name)
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"out is not empty: 3 files, e\.g\. 'a\.txt'"):
            sink_for(str(out), output="rows").claim("job-1", overwrite=overwrite)
    assert len(files_under(out)) == 4
    for name in ("a.txt", "sub/b.txt", "z"):
        (out / name).unlink()
    sink_for(str(out), output="rows").claim("job-1")


def test_other_files_beside_finished_results(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job-1")
    sink.finalize([], [], FACTS)
    (tmp_path / "out/notes.md").write_text("mine")
    before = files_under(tmp_path)
    with pytest.raises(OutputExistsError, match=r"1 file, e\.g\. 'notes\.md'"):
        sink.claim("job-2", overwrite=True)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("name", ["out.csv", "out.dead.csv"])
def test_a_merged_file_of_somebody_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "unrelated.txt").touch()
    with pytest.raises(OutputExistsError, match=f"{name} exists already, and Tally did not write it"):
        sink_for(str(tmp_path / "out.csv"), output="rows").claim("job-1", overwrite=True)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("output", ["rows", "image"])
def test_overwriting_that_was_cut_short_goes_on(tmp_path: Path, output: Any) -> None:
    result: Any = {"n": 1} if output == "rows" else picture()
    for step in range(20):
        sink = sink_for(str(tmp_path / f"{step}"), output=output)
        sink.claim("job-1")
        sink.finalize([attempt(sink, "a", {"d/1": result, "d/2": result})], DEAD, FACTS)
        whole = sink.layout.store
        sink.layout.store = CrashingStore(whole.url, step)
        try:
            sink.claim("job-2", overwrite=True)
        except Crash:
            sink.layout.store = whole
            sink.claim("job-2", overwrite=True)
            assert list(files_under(tmp_path / f"{step}")) == ["_tally/job.json"]
        else:
            break
    assert step > 2
    with pytest.raises(OutputExistsError, match="job-2"):
        sink.claim("job-3", overwrite=True)


def test_a_claim_that_came_and_went_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, other = (sink_for(str(tmp_path / "out"), output="rows") for _ in range(2))
    look = sink._check_free
    looks: list[object] = []

    def check(job_id: str, overwrite: bool) -> Any:
        found = look(job_id, overwrite)
        looks.append(found)
        if len(looks) == 1:
            other.claim("job-2")
            other.finalize([], [], {**FACTS, "job": "job-2"})
        return found

    monkeypatch.setattr(sink, "_check_free", check)
    with pytest.raises(OutputExistsError, match="job-2"):
        sink.claim("job-1")
    assert sink.holder() == "job-2"
    assert not (tmp_path / "out/_tally").exists()


def test_a_retried_job_stays_finished(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows")
    assert sink.published() is None
    sink.claim("job-1")
    sink.finalize([], [], FACTS)
    assert sink.published() == 0
    before = files_under(tmp_path)
    sink.claim("job-1")
    staged = attempt(sink, "b", {"d/1": {"n": 1}})
    assert {name: what for name, what in files_under(tmp_path).items() if "_tally/" not in name} == before
    sink.release()
    assert files_under(tmp_path) == before
    assert staged.rows == 1
    assert sink.holder() == "job-1"


@pytest.mark.parametrize("output", ["rows", "image"])
def test_release_takes_back_what_was_half_published(tmp_path: Path, output: Any) -> None:
    result: Any = {"n": 1} if output == "rows" else picture()
    for step in range(30):
        sink = sink_for(str(tmp_path / f"{step}"), output=output)
        sink.claim("job-1")
        whole = sink.layout.store
        sink.finalize([attempt(sink, "a", {"d/1": result})], DEAD, FACTS)
        before = files_under(tmp_path / f"{step}")
        sink.claim("job-1")
        staged = [attempt(sink, "b", {"d/2": result})]
        sink.layout.store = CrashingStore(whole.url, step)
        try:
            sink.finalize(staged, DEAD, {**FACTS, "generation": 1})
        except Crash:
            sink.layout.store = whole
            published = sink.published()
            sink.release()
            after = files_under(tmp_path / f"{step}")
            if published == 0:
                assert after == before
            else:
                assert {*before} < {*after}
                assert "_SUCCESS" in after
        else:
            break
    assert step > 5


def test_a_damaged_claim(tmp_path: Path) -> None:
    (tmp_path / "out/_tally").mkdir(parents=True)
    (tmp_path / "out/_tally/job.json").write_text("{")
    with pytest.raises(StorageError, match=r"job\.json is damaged"):
        sink_for(str(tmp_path / "out"), output="rows").claim("job-1")


@pytest.mark.parametrize("name", ["file/out", "file/out.csv"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a part of the path is a file, not a folder"):
        sink_for(str(tmp_path / name), output="rows").claim("job-1")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system, where that is allowed."""
    folders: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"mounting is not allowed here: {error}")
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["out", "new/out.csv"])
def test_a_read_only_place(mount: Callable[..., Path], name: str) -> None:
    folder = mount("ro,size=1m")
    with pytest.raises(StorageError, match="the file system is read-only"):
        sink_for(str(folder / name), output="rows").claim("job-1")


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.csv", "out.jsonl"])
def test_a_disk_that_is_really_full(mount: Callable[..., Path], name: str) -> None:
    folder = mount("size=1m")
    sink = sink_for(str(folder / name), output="rows")
    sink.claim("job-1")
    noise, *more = (np.random.default_rng(n).bytes(300_000).hex() for n in range(5))
    with pytest.raises(StorageError, match=r"full|[Nn]o space"):
        attempt(sink, "a", {text[:9]: {"text": text} for text in more})
    outputs = [attempt(sink, "b", {"1": {"text": noise}})]
    filler = folder / "filler"
    filler.write_bytes(b"x" * 450_000)
    with pytest.raises(StorageError, match=r"full|[Nn]o space"):
        sink.finalize(outputs, [], FACTS)
    filler.unlink()
    sink.finalize(outputs, [], FACTS)
    assert rows(sink, [])["text"].to_pylist() == [noise]


# -- pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "pictures", "labels", "expected"),
    [
        ("a/b.jpg", None, False, "a/b.jpg"),
        ("a/b.JPEG", None, False, "a/b.JPEG"),
        ("a/b.webp", None, False, "a/b.webp"),
        ("a/b.tif", None, False, "a/b.tif.png"),
        ("a/b", None, False, "a/b.png"),
        ("a.jpg", None, True, "a.jpg.png"),
        ("a.jpg", "webp", True, "a.jpg.png"),
        ("a.jpg", "png", False, "a.jpg.png"),
        ("a.jpeg", "jpg", False, "a.jpeg"),
        ("a.png", "webp", False, "a.png.webp"),
        ("ü/photo [1] #2%.png", None, False, "ü/photo [1] #2%.png"),
    ],
)
def test_names_of_pictures(key: str, pictures: str | None, labels: bool, expected: str) -> None:
    assert file_for(key, pictures, labels=labels) == expected


@pytest.mark.parametrize(
    ("key", "start"),
    [
        ("../../etc/x.png", "etc/x-"),
        ("/etc/x.png", "etc/x-"),
        ("a/../x.png", "a/x-"),
        ("a//./x.png", "a/x-"),
        ("..", "_-"),
        ("", "_-"),
        ("a\\..\\x\0.png", "a_.._x_-"),
        ("_tally/x.png", "_tally_/x-"),
        ("_TALLY/job.json.png", "_TALLY_/job.json-"),
        ("part-00000.parquet/x.png", "part-00000.parquet_/x-"),
        ("a.png/x.png", "a.png_/x-"),
        (".tally-tmp-1.png", "_.tally-tmp-1-"),
        ("caf\udce9.png", "caf_xe9-"),
        ("x" * 300 + ".png", "x" * 190),
        ("ü" * 150 + ".png", "ü" * 90),
        ("/".join(["d" * 150] * 8) + "/x.png", "x-"),
        ("y" * 300 + "/x.png", "y" * 190),
    ],
)
def test_names_that_have_to_be_altered(key: str, start: str) -> None:
    name = file_for(key, None, labels=False)
    assert name.startswith(start)
    assert name.endswith(".png")
    assert ".." not in name.split("/")
    assert all(0 < len(segment.encode()) <= 220 for segment in name.split("/"))
    assert name != file_for(f"{key[:-4]}!.png", None, labels=False)


def test_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="image")
    sink.claim("job-1")
    random = np.random.default_rng(0)
    color, labels = random.integers(0, 255, (5, 8, 3), np.uint8), random.integers(0, 20, (5, 8), np.uint8)
    smooth = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 48, 0).repeat(3, 2)
    output = attempt(sink, "a", {"a/c.png": color, "a/l.jpg": labels, "s.jpg": smooth, "t.webp": smooth[:, ::-1]})
    assert output.rows == 4
    manifest = sink.finalize([output], [], FACTS)
    out = tmp_path / "out"
    assert (np.asarray(Image.open(out / "a/c.png")) == color).all()
    assert (np.asarray(Image.open(out / "a/l.jpg.png")) == labels).all()
    for name, expected in (("s.jpg", smooth), ("t.webp", smooth[:, ::-1])):
        with Image.open(out / name) as image:
            assert image.format == {"s.jpg": "JPEG", "t.webp": "WEBP"}[name]
            assert np.abs(np.asarray(image).astype(int) - expected).max() < 6
    found = rows(sink, []).to_pylist()
    assert [row["file"] for row in found] == ["a/c.png", "a/l.jpg.png", "s.jpg", "t.webp"]
    assert [(row["width"], row["height"]) for row in found] == [(8, 5), (8, 5), (64, 48), (64, 48)]
    assert all((out / row["file"]).stat().st_size == row["bytes"] for row in found)
    assert [file["path"] for file in manifest["files"]] == ["part-00000.parquet"]
    assert manifest["output"] == "image"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": 1}, "the scorer returned dict, and this output holds pictures"),
        (np.zeros((2, 2, 3), np.float32), "an array of float32 (2x2x3); pictures are uint8"),
        (np.zeros((3, 2, 2), np.uint8), "an array of shape 3x2x2"),
        (np.zeros((0, 2, 3), np.uint8), "an array of shape 0x2x3"),
        (np.zeros((1, 70_000, 3), np.uint8), "70000x1 cannot be written as jpg"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, bad: Any, message: str) -> None:
    sink = sink_for(str(tmp_path / "out"), output="image", format="jpg")
    sink.claim("job-1")
    writer = sink.open("a", Chunk(0, 2, {}))
    ((index, error),) = writer.add(["a", "b"], [picture(), bad])
    assert index == 1
    assert isinstance(error, ItemError)
    assert error.stage == "write"
    assert message in error.message
    assert writer.close().rows == 1


@pytest.mark.parametrize("together", [True, False])
def test_two_pictures_of_one_name(tmp_path: Path, together: bool) -> None:
    sink: StagedSink = sink_for(str(tmp_path / "out"), output="image")
    sink.claim("job-1")
    first, second = {"a/x.tif": picture(1)}, {"a/x.tif.png": picture(2)}
    if together:
        outputs = [attempt(sink, "a", first | second)]
    else:
        outputs = [attempt(sink, "a", first), attempt(sink, "b", second)]
    sink.finalize(outputs, [], FACTS)
    files = {row["key"]: row["file"] for row in rows(sink, []).to_pylist()}
    assert files["a/x.tif"] == "a/x.tif.png"
    assert files["a/x.tif.png"].startswith("a/x.tif-")
    for key, value in (("a/x.tif", 1), ("a/x.tif.png", 2)):
        content = (tmp_path / "out" / files[key]).read_bytes()
        assert np.asarray(Image.open(io.BytesIO(content)))[0, 0, 0] == value

    sink.claim("job-1")
    sink.finalize([attempt(sink, "c", {"a//x.tif": picture(3)})], [], {**FACTS, "generation": 1})
    sink.claim("job-1")
    sink.finalize([attempt(sink, "d", {"a/x.tif": picture(4)})], [], {**FACTS, "generation": 2})
    assert np.asarray(Image.open(tmp_path / "out/a/x.tif.png"))[0, 0, 0] == 1
    assert len([name for name in files_under(tmp_path / "out") if name.endswith(".png")]) == 4


def test_replacing_pictures_removes_only_them(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="image")
    sink.claim("job-1")
    sink.finalize([attempt(sink, "a", {f"d/{n}": picture() for n in range(3)})], [], FACTS)
    sink_for(str(tmp_path / "out"), output="image").claim("job-2", overwrite=True)
    assert list(files_under(tmp_path / "out")) == ["_tally/job.json"]


def test_an_aborted_picture_attempt(tmp_path: Path) -> None:
    sink = sink_for(str(tmp_path / "out"), output="image")
    sink.claim("job-1")
    writer = sink.open("a", Chunk(0, 2, {}))
    writer.add(["x"], [picture()])
    writer.abort()
    assert list(files_under(tmp_path / "out")) == ["_tally/job.json"]


def test_an_output_whose_kind_was_guessed_is_opened_as_what_was_published(tmp_path: Path) -> None:
    """Of a job from before outputs were described: pictures, whose publishing was cut short."""
    sink = sink_for(f"{tmp_path}/out/", output="image")
    sink.claim("job")
    writer = sink.open("000000000000-a", Chunk(0, 1, {}))
    assert writer.add(["a.png"], [np.zeros((4, 4, 3), np.uint8)]) == []
    output = writer.close()

    class CutError(Exception):
        pass

    def cut() -> None:
        if (tmp_path / "out/a.png").exists():
            raise CutError

    with pytest.raises(CutError):
        sink.finalize([output], [], {"job": "job", "generation": 0}, confirm=cut)
    guessed = replace(sink.describe(), kind="rows", format="parquet", columns=None, options={"guessed": True})
    reopen(guessed).release()
    assert not (tmp_path / "out/a.png").exists()
    assert not (tmp_path / "out/_tally").exists()


@pytest.mark.parametrize("here", [True, False])
def test_rows_without_a_place_in_the_order_come_last(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    given = pa.schema({"held": pa.string(), "order": pa.int64()})
    batches = [
        pa.RecordBatch.from_pydict({"held": ["c", "last"], "order": [3, None]}, given),
        pa.RecordBatch.from_pydict({"held": ["a", "b"], "order": [-1, 2]}, given),
    ]
    if not here:
        monkeypatch.setattr(merge, "_SORT_HERE", 0)
    found = [row["held"] for batch in merge.ordered(batches, given, "order") for row in batch.to_pylist()]
    assert found == ["a", "b", "c", "last"]
