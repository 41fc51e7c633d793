"""Specs: everything that is wrong is told at once, and places mean the same in every process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tally.errors import SpecError, StorageError
from tally.jobs import spec
from tally.jobs.spec import JobSpec, make


def given(**fields: Any) -> JobSpec:
    return make(**{"source": "photos", "model": "m.onnx", "out": "out", **fields})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that relative paths are relative to."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# Problems --------------------------------------------------------------------------------------------


def test_all_problems_are_told_together() -> None:
    with pytest.raises(SpecError) as refused:
        make(source=["photos", ""], model="m", task="clasify", workers=0, timeout="soon", max_dead="most%", wokers=2)
    assert {problem.split(":")[0] for problem in refused.value.problems} == {
        "source", "no output (out) is given", "task", "workers", "timeout", "max_dead", "wokers",
    }  # fmt: skip
    assert all(f"- {problem}" in str(refused.value) for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"out": None}, "no output (out) is given"),
        ({"source": []}, "source: names nothing to score (given: [])"),
        ({"out": ""}, "out: is empty"),
        ({"source": ["a", "caf\udce9"]}, r"source: is not UTF-8 text (given: 'caf\udce9')"),
        ({"batchsize": 4}, "batchsize: there is no such field; did you mean 'batch_size'?"),
        ({"xyzzy": 4}, "xyzzy: there is no such field"),
        ({"memory": "12 parsecs"}, "memory: should be a size such as 512MiB or 2GiB (given: '12 parsecs')"),
        ({"max_dead": "half%"}, "max_dead: should be a share such as 0.05 or 5% (given: 'half%')"),
        ({"max_dead": "101%"}, "max_dead: should be at most 1 (given: 1.01)"),
        ({"timeout": float("inf")}, "timeout: should be a finite number (given: inf)"),
        ({"timeout": 0}, "timeout: should be more than 0 (given: 0)"),
        ({"memory": 0}, "memory: should be more than 0 (given: 0)"),
        ({"settings": ["a"]}, "settings: should be names with values (given: ['a'])"),
    ],
)
def test_a_problem_names_field_and_value(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as refused:
        given(**fields)
    assert refused.value.problems == [problem]


# Values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5g", 3 * 2**29),
        ("64k", 64 * 2**10),
        ("1TB", 2**40),
        ("1000", 1000),
        ("1000B", 1000),
        (" 3 kb ", 3 * 2**10),
        (123, 123),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert given(memory=text).memory == size


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), (" 12.5 % ", 0.125), ("100%", 1.0), ("0.25", 0.25), (0, 0.0)]
)
def test_shares(text: Any, share: float) -> None:
    assert given(max_dead=text).max_dead == share


def test_nothing_given_means_the_default() -> None:
    assert given(timeout=None, task=None, settings=None) == given()


def test_a_spec_does_not_change() -> None:
    with pytest.raises(ValidationError):
        given().out = "elsewhere"  # type: ignore[misc]


def test_a_spec_survives_the_store() -> None:
    one = given(source=["a", "s3://b/c"], settings={"top": 3}, memory="1GiB", max_dead="5%", format="csv")
    assert JobSpec(**one.model_dump(mode="json")) == one


# Places ----------------------------------------------------------------------------------------------


def test_relative_paths_become_absolute(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    made = given(
        source=["photos/", "./a/*.jpg", "/b", "s3://bucket/c", "~/d"], out="out.csv/", labels="l.txt", artifacts="w"
    )
    assert made.source == (f"{here}/photos/", f"{here}/a/*.jpg", "/b", "s3://bucket/c", "/home/me/d")
    assert (made.out, made.labels, made.artifacts) == (f"{here}/out.csv/", f"{here}/l.txt", f"{here}/w")


def test_places_inside_of_fields_become_absolute(tmp_path: Path, here: Path) -> None:
    made = given(queue={"base": "photos", "body": "text"}, push="sqlite:///rows.db#t")
    assert made.queue == {"base": f"{here}/photos", "body": "text"}
    assert made.push is not None
    assert made.push.url == f"sqlite:///{here}/rows.db#t"
    made = given(queue={"base": "s3://b/in"}, push={"url": "sqlite:////data/rows.db#t"})
    assert (made.queue["base"], made.push and made.push.url) == ("s3://b/in", "sqlite:////data/rows.db#t")
    for line in ("out: out\npush: sqlite:///rows.db#t", "out: sqlite:///rows.db#t"):
        (tmp_path / "job.yaml").write_text(f"source: photos\nmodel: m.onnx\nqueue: {{base: deep}}\n{line}\n")
        made = spec.read("../job.yaml")
        assert (made.queue["base"], made.push and made.push.url) == (
            f"{tmp_path}/deep", f"sqlite:///{tmp_path}/rows.db#t"
        )  # fmt: skip


def test_one_source_needs_no_list(here: Path) -> None:
    assert given(source="photos").source == (f"{here}/photos",)


def test_a_name_that_only_looks_like_a_home(here: Path) -> None:
    assert given(source="~no-such-user/photos").source == (f"{here}/~no-such-user/photos",)


def test_a_file_is_relative_to_itself(tmp_path: Path, here: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(b"")
    (folder / "job.yaml").write_text(
        "source: [photos, /b, s3://bucket/c]\nmodel: m.onnx\nout: out.csv\nlabels: labels.txt\n"
        "max_dead: 5%\nmemory: 1GiB\n"
    )
    made = spec.read("../jobs/job.yaml")
    assert made.source == (f"{folder}/photos", "/b", "s3://bucket/c")
    assert (made.model, made.out, made.labels) == (f"{folder}/m.onnx", f"{folder}/out.csv", f"{folder}/labels.txt")
    assert (made.max_dead, made.memory) == (0.05, 2**30)


@pytest.mark.parametrize("model", ["models:/name@best", "https://host/m.onnx", "module:Class", "n" * 300])
def test_models_that_are_not_beside_the_file(here: Path, model: str) -> None:
    (here / "job.yaml").write_text(f"source: photos\nmodel: '{model}'\nout: out\n")
    assert spec.read("job.yaml").model == model


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"source: [a\n", "is not valid YAML"),
        (b"- a\n- b\n", "must hold fields such as source, model and out, not list"),
        (b"", "must hold fields such as source, model and out, not NoneType"),
        (b"source: caf\xe9\n", "is not UTF-8 text (invalid continuation byte at byte 11)"),
        (b"source: !!python/object:os.system ls\n", "is not valid YAML"),
        (b"source: a\nmodel: m\nout: ''\n", "out: is empty"),
        (b"source: a\nmodel: m\nout: o\n3: x\n", "3: there is no such field"),
        (b"source: a\nmodel: m\nout: o\nmodle: x\n", "modle: there is no such field; did you mean 'model'?"),
    ],
)
def test_files_that_are_no_spec(here: Path, text: bytes, problem: str) -> None:
    (here / "job.yaml").write_bytes(text)
    with pytest.raises(SpecError) as refused:
        spec.read("job.yaml")
    assert problem in str(refused.value)


@pytest.mark.parametrize("path", ["nothing.yaml", "."])
def test_files_that_cannot_be_read(path: str) -> None:
    with pytest.raises(StorageError, match="cannot read the job file"):
        spec.read(path)


# Fingerprints ----------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_result() -> None:
    base = given(settings={"a": 1, "b": [2]})
    fingerprint = base.fingerprint("hash")
    assert len(fingerprint) == hashlib.sha256().digest_size * 2
    same = [
        given(settings={"b": [2], "a": 1}),
        given(
            settings={"a": 1, "b": [2]}, workers=7, timeout=5, memory="1GiB", attempts=9, price_per_hour=3, device="cpu"
        ),
        given(settings={"a": 1, "b": [2]}, source=("photos",)),
        JobSpec(**base.model_dump(mode="json")),
    ]
    assert {each.fingerprint("hash") for each in same} == {fingerprint}
    different = [
        given(settings={"a": 1, "b": [3]}),
        given(settings={"a": 1, "b": [2]}, out="other"),
        given(settings={"a": 1, "b": [2]}, source=["photos", "more"]),
        given(settings={"a": 1, "b": [2]}, batch_size=3),
        given(settings={"a": 1, "b": [2]}, format="csv"),
        given(settings={"a": 1, "b": [2]}, task="classify"),
        given(settings={"a": 1, "b": [2]}, labels="l.txt"),
    ]
    assert len({fingerprint, base.fingerprint("other"), *(each.fingerprint("hash") for each in different)}) == 9


def test_the_fingerprint_is_the_same_in_every_version() -> None:
    one = JobSpec(source=("/photos",), model="m", out="/out", settings={"top": 5})
    assert one.fingerprint("sha256:0") == "ab396227b5abcbd34d73321b654daf62f1d0ab4dff6151e77acec0f3dbbdd9cc"


def test_a_size_is_read_as_people_write_it() -> None:
    assert given(size="640x360").size == (640, 360)
    assert given(size=[640, 360]).size == (640, 360)
    assert given(size="640x-1").size == (640, -1)
    assert given(size="640x360", fit="cover").fit == "cover"
    for wrong in ("640", "640x", "x", "640x360x3", "-2x5", "ax b", "0x10"):
        with pytest.raises(SpecError, match="size"):
            given(size=wrong)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "640x0"}, "or 640x-1 to keep the shape"),
        ({"size": "-1x-1"}, "or 640x-1 to keep the shape"),
        ({"size": "640x-2"}, "or 640x-1 to keep the shape"),
        ({"size": "640x-1", "fit": "contain"}, "fit: contain needs a whole size"),
        ({"fit": "cover"}, "fit: cover needs a whole size"),
    ],
    ids=str,
)
def test_a_size_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        given(**fields)


def test_what_changes_a_video_changes_the_fingerprint() -> None:
    options = [
        {},
        {"size": "64x64"},
        {"every": 2},
        {"codec": "libx265"},
        {"crf": 18},
        {"audio": False},
        {"overlay": True},
        {"frames": "jpg"},
    ]
    assert len({given(**each).fingerprint("sha256:0") for each in options}) == len(options)
    assert given(strict=True).fingerprint("x") == given().fingerprint("x")


# ------------------------------------------------------------------------------------------------- tables


def test_a_model_for_each_key_is_said_in_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(source="in.csv", model_per="Device, Tag=models/{Device}_{Tag}.skops", out="out")
    assert (made.by, made.model) == (("Device", "Tag"), "models/{Device}_{Tag}.skops")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text(
        "source: in.csv\nmodel_per: Device=models/{Device}.skops\nout: out\nwindow: 5m\ntime: TS\naggregate: mean,max\n"
    )
    made = spec.read(str(tmp_path / "jobs" / "job.yaml"))
    assert made.model == str(tmp_path / "jobs" / "models" / "{Device}.skops")
    assert (made.by, made.window, made.aggregate) == (("Device",), 300.0, ("mean", "max"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_per": "models/{Device}.skops"}, "model_per: should be columns and a template"),
        ({"model_per": "Device="}, "model_per: should be columns and a template"),
        ({"model_per": "A={A}.onnx", "model": "m"}, "says the model and its columns, and model is given too"),
        ({"model_per": "A={A}.onnx", "by": "B"}, "says the model and its columns, and by is given too"),
        ({"model": "m", "window": "5 parsecs"}, "window: should be a duration such as 30s, 5m, 1h or 1d"),
        ({"model": "m", "window": 0}, "window: should be more than 0"),
        (
            {"model": "m", "aggregate": "medium"},
            "aggregate: should be mean, min, max, last, count, std, median, or a quantile such as p95",
        ),
        ({"model": "m", "alerts": ["anomalys > 0"]}, "did you mean 'anomalies'?"),
    ],
)
def test_what_is_wrong_with_fields_of_tables(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        make(source="in.csv", out="out", **fields)
    assert message in str(caught.value)


def test_fields_of_tables_make_another_job_and_alerts_do_not() -> None:
    base = {"source": "in.csv", "model": "m", "out": "out"}
    same = make(**base).fingerprint("h")
    others = {"by": "a", "keep": "a", "where": "a > 1", "time": "t", "window": "1h", "aggregate": "max"}
    for name, value in {**others, "csv": {"delim": ";"}}.items():
        assert make(**base, **{name: value}).fingerprint("h") != same, name
    assert make(**base, alerts=["failed"], webhook="https://example.com/x").fingerprint("h") == same


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1.0, {"b": float("-inf")}]])
def test_settings_are_finite(value: object) -> None:
    with pytest.raises(SpecError, match=r"settings: holds -?(inf|nan), which JSON does not know: give a finite number"):
        make(source="in", model="m.py", out="out", settings={"a": value})
