"""What a beginner meets first says what to do next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tally
from tally.errors import TallyError
from tally.jobs import spec
from tally.models.labels import read_labels
from tally.models.package import read_yaml
from tally.models.readable import check_whole
from tally.sources.locations import locate


def written(folder: Path, text: str | bytes, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lengths(batch: Any) -> list[dict[str, int]]:
    return [{"length": len(each)} for each in batch]


CASES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no-job-file": (lambda f: spec.load(str(f / "job.yaml")), "cannot read the job file", "It is looked for in "),
    "yaml": (lambda f: spec.load(str(written(f, "source: a: b"))), "is not valid YAML", "put quotes around a text"),
    "no-fields": (lambda f: spec.load(str(written(f, "photos/"))), "must hold fields", "one field on each line"),
    "latin": (lambda f: spec.load(str(written(f, b"out: \xe9"))), "is not UTF-8 text", "Save it as UTF-8"),
    "package": (lambda f: read_yaml(written(f, "- a")), "must hold fields", "tally new package NAME"),
    "labels": (lambda f: read_labels(written(f, "")), "is empty", "one label on each line"),
    "binary": (lambda f: read_labels(written(f, b"\xff\xfe")), "not text in UTF-8", "one label on each line"),
    "cut-off": (lambda f: check_whole(written(f, b"\x08\x07\x3a\xff", "m.onnx")), "cut off", "downloaded completely?"),
    "no-name": (lambda f: locate([""]), "names no file or folder", "Is a variable of your shell or script empty?"),
    "no-items": (lambda f: tally.score(iter(()), lengths, f / "out"), "there are no items", "make it anew"),
    "a-number": (lambda f: tally.score(7, lengths, f / "out"), "names no items", "Give a path or URL"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_next_step_is_said(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "home"))
    cause, what, next_step = CASES[case]
    with pytest.raises(TallyError) as raised:
        cause(tmp_path)
    assert what in raised.value.message
    assert next_step in (raised.value.hint or "")
