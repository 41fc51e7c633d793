"""Values are what they look like: in files, in flags and from Python alike."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tally import plain_yaml
from tally.cli.console import literal_pairs, pairs
from tally.errors import SpecError
from tally.jobs.spec import CSV_VALUES, make, read
from tally.models.package import read_yaml
from tally.sources.tables import delimited

VALUES: dict[str, Any] = {
    "NO": "NO",
    "yes": "yes",
    "true": True,
    "False": False,
    "null": None,
    "": None,
    "12:30": "12:30",
    "2026-03-29": "2026-03-29",
    "2026-03-29 10:00:00": "2026-03-29 10:00:00",
    "1e-3": 0.001,
    "1E5": 100_000.0,
    ".5": 0.5,
    "-2": -2,
    "900000000000000001": 900_000_000_000_000_001,
    "00725": "00725",
    "+4930": "+4930",
    "1_000": "1_000",
    "0x1F": "0x1F",
    "1.2.3": "1.2.3",
    "[a, NO, 1e-3]": ["a", "NO", 0.001],
    "{a: 2026-03-29, b: .5}": {"a": "2026-03-29", "b": 0.5},
    '"true"': "true",
}


@pytest.mark.parametrize("text", VALUES)
def test_files_and_flags_hold_the_same_values(tmp_path: Path, text: str) -> None:
    expected = VALUES[text]
    (tmp_path / "job.yaml").write_text(f"source: a.csv\nmodel: m.onnx\nout: out\nsettings:\n  x: {text}\n")
    (tmp_path / "tally.yaml").write_text(f"options:\n  x: {text}\n")
    for found in (
        read(str(tmp_path / "job.yaml")).settings["x"],
        read_yaml(tmp_path / "tally.yaml")["options"]["x"],
        pairs("--set", [f"x={text}"])["x"],
        plain_yaml.load(plain_yaml.dump(expected)),
    ):
        assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    "text", ["#", "-", "- 1", "a: b", "&a", "*a", "it's", "=", "C:\\x", "|", ">", "!", "%", "@x", "?"]
)
def test_signs_of_yaml_are_text_in_a_flag(text: str) -> None:
    assert pairs("--note", [f"x={text}"]) == {"x": text}
    assert plain_yaml.load(plain_yaml.dump(text)) == text


@pytest.mark.parametrize("text", ["[1", "{a", '"x', "[&a [*a]]", "[" * 5000, "!!timestamp x"])
def test_what_is_no_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(f"source: {text}\n")
    with pytest.raises(SpecError, match=r"the job file '.*' is not valid YAML: [^\n]+"):
        read(str(tmp_path / "job.yaml"))
    if not text.startswith("!"):
        with pytest.raises(SpecError, match=r"^--set x=.*text that begins so is put in quotes"):
            pairs("--set", [f"x={text}"])


def test_values_from_python_become_those_of_json() -> None:
    at = datetime.datetime(2026, 3, 29, 10, tzinfo=datetime.UTC)
    given = {"day": at.date(), "at": at, "x": np.float32(0.5), "n": np.int64(3), "place": Path("a/b"), "t": (1, 2)}
    spec = make(source="a.csv", model="m.onnx", out="out", settings={**given, "deep": {"day": at.date()}})
    assert spec.settings == {
        "day": "2026-03-29",
        "at": "2026-03-29T10:00:00+00:00",
        "x": 0.5,
        "n": 3,
        "place": "a/b",
        "t": [1, 2],
        "deep": {"day": "2026-03-29"},
    }
    assert len(spec.fingerprint("hash")) == 64
    with pytest.raises(SpecError, match=r"settings: holds <object object at .*>, which JSON does not know"):
        make(source="a.csv", model="m.onnx", out="out", settings={"x": object()})


def test_values_of_csv_options_are_taken_literally() -> None:
    given = ["comment=#", "delim=|", "quote='", "nullstr=-", "nullstr=null", "nullstr=yes", "skip=2", "header=false"]
    found = literal_pairs("--csv", [*given, "types={id: VARCHAR}"], CSV_VALUES)
    assert found == {
        "comment": "#",
        "delim": "|",
        "quote": "'",
        "nullstr": ["-", "null", "yes"],
        "skip": 2,
        "header": False,
        "types": {"id": "VARCHAR"},
    }
    assert delimited.check_options(delimited.complete(found)) == []
    assert literal_pairs("--csv", ['quote="', "nullstr=", "delim= "], CSV_VALUES) == {
        "quote": '"',
        "nullstr": "",
        "delim": " ",
    }
    assert delimited.complete({"delim": "\\t", "nullstr": -999}) == {"delim": "\t", "nullstr": "-999"}
    with pytest.raises(SpecError, match="--csv 'delim' is not of the form KEY=VALUE"):
        literal_pairs("--csv", ["delim"])
