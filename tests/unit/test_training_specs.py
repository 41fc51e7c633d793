"""Trainings that a file describes: their fields are the flags of commands, and all that is wrong is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from tests import retraining

from tally.cli.main import cli
from tally.errors import ModelNotFoundError, SpecError
from tally.models.registry import open_registry
from tally.models.resolve import resolve
from tally.training.promotion import TAG, Condition, Promotion
from tally.training.runs.store import RunStore
from tally.training.runs.tracking import run
from tally.training.specs.base import Attempt
from tally.training.specs.kinds import kind_of, placed, training_of

ELSEWHERE = {
    "anomaly": {"out"},
    "style": {"out"},
    "retrain": {"out", "output_graph", "output_labels", "summaries_dir", "resume", "print_misclassified_test_images"},
    "script": {"resume"},
}
"""Flags that say where the command writes, prints or begins; a scheduled run has a folder of its own."""
NAMES = {"assignments": "set", "csv_options": "csv", "values": "value", "texts": "param", "parameters": "param"}
NAMES |= {"train_sets": "train_set", "test_sets": "test_set"}
REFUSED = {"architecture", "model_dir"}


def flags(*path: str) -> set[str]:
    """The parameters of a command, as fields."""
    command: Any = cli
    for each in path:
        command = command.get_command(click.Context(command), each)
    return {NAMES.get(each.name, each.name) for each in command.params} - REFUSED


@pytest.mark.parametrize(
    ("word", "kind"),
    [("train", "anomaly"), ("train", "style"), ("train", "retrain"), ("train", "script"), ("sweep", "retrain"),
     ("sweep", "script")],
)  # fmt: skip
def test_the_fields_are_the_flags_of_the_command(word: str, kind: str) -> None:
    fields = {each.alias or name for name, each in kind_of({word: kind}).model_fields.items()}
    # Of both: the name of a run, which anomaly and style take from the model's; a sweep of trials tests the best, and
    # says itself why it does not fine-tune.
    own = (
        {"name"}
        | ({"checkpoints"} if kind == "script" else set())
        | ({"final_test", "fine_tune"} if word == "sweep" else set())
    )
    assert fields - own == flags(word, kind) - own - ELSEWHERE[kind]


def test_all_that_is_wrong_is_told_together() -> None:
    fields = {"train": "anomaly", "source": "a.csv", "nu": 3, "seed": "one", "gates": "x", "gate": ["kyes > 1", "keys"]}
    with pytest.raises(SpecError) as error:
        training_of(fields)
    told = "\n".join(error.value.problems)
    for problem in (
        "no by is given", "no value is given", "seed: should be a whole number", "gates: there is no such field",
        "register: is needed", "gate: 'kyes' is not measured; did you mean 'keys'?", "gate: 'keys' is no condition",
        "nu: more than 0, at most 0.5, not 3",
    ):  # fmt: skip
        assert problem in told
    with pytest.raises(SpecError, match=r"train: 'anomly' is not one of .*; did you mean 'anomaly'"):
        training_of({"train": "anomly"})


def test_places_are_meant_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "features.onnx").touch()
    given = {
        "train": "retrain",
        "image_dir": "photos/{interval_start:%Y}",
        "backbone": "features.onnx",
        "register": "x",
    }
    found = placed(given, tmp_path)
    assert found["image_dir"] == f"{tmp_path}/photos/{{interval_start:%Y}}"
    assert found["backbone"] == f"{tmp_path}/features.onnx"
    assert placed({**given, "backbone": "models:/x"}, tmp_path)["backbone"] == "models:/x"
    sets = placed({"train": "script", "script": "a.py", "train_set": [["l.csv", "i"]], "data": {"b": "c"}}, tmp_path)
    assert sets["train_set"] == [[f"{tmp_path}/l.csv", f"{tmp_path}/i"]]
    assert sets["data"] == {"b": f"{tmp_path}/c"}


def test_its_command_trains_the_same() -> None:
    given = {
        "train": "anomaly", "source": ["a.csv", "b.csv"], "by": "d,t", "value": ["v"], "kind": "isolation-forest",
        "window": "5m", "time": "at", "csv": {"delim": ";"}, "timezone": "Europe/Berlin",
        "time_unit": "ms", "path_columns": "{d}_{t}.csv", "register": "pumps", "gate": "keys >= 2",
    }  # fmt: skip
    words = training_of(given).command()  # type: ignore[attr-defined]
    assert words[:3] == ["tally", "train", "anomaly"]
    command = cli.get_command(click.Context(cli), "train").get_command(None, "anomaly")  # type: ignore[union-attr]
    parsed = command.make_context("anomaly", words[3:]).params
    assert parsed["by"] == ("d", "t")
    assert (parsed["source"], parsed["kind"], parsed["window"]) == (("a.csv", "b.csv"), "isolation-forest", 300)
    told = parsed["timezone"], parsed["time_unit"], parsed["path_columns"]
    assert told == ("Europe/Berlin", "ms", "{d}_{t}.csv")
    assert (parsed["register"], parsed["alias"], parsed["gate"]) == ("pumps", "champion", ("keys >= 2",))


# -- gates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("accuracy >= 0.97", ("accuracy", ">=", 0.97, None)),
        ("mAP@0.5:0.95>-1e-3", ("mAP@0.5:0.95", ">", -0.001, None)),
        ("loss <= champion", ("loss", "<=", 0, "champion")),
        ("test_accuracy >= in-use - 0.01", ("test_accuracy", ">=", -0.01, "in-use")),
        ("test_accuracy>=champion-0.01", ("test_accuracy", ">=", -0.01, "champion")),
        ("loss<=champion+1e-3", ("loss", "<=", 0.001, "champion")),
        ("loss <= in-use-2 + 0", ("loss", "<=", 0, "in-use-2")),
    ],
)
def test_a_condition_is_read(text: str, found: tuple[Any, ...]) -> None:
    condition = Condition.of(text)
    assert (condition.metric, condition.sign, condition.limit, condition.alias) == found


@pytest.mark.parametrize(
    "text",
    ["accuracy", "accuracy = 1", "> 1", "a > b c", "a >= 1 <= 2", "accuracy >= 97 %", "a >= nan", "a <= inf",
     "a > -inf", "a < infinity", "a < 1e999", "a >= nan - 1", "a >= champion - 1e999"],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is no condition") as error:
        Condition.of(text)
    assert "METRIC >= champion" in str(error.value.hint)


def test_a_gate_decides_the_alias_and_says_why(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'tally-scoring[retrain]'")
    registry = open_registry()

    def trained(accuracy: float | None, *gate: str, alias: str | None = None) -> str:
        """What the gate says of a new model that has this accuracy."""
        package = retraining.backbone(tmp_path / f"{len(registry.list())}.onnx")
        model = onnx.load(package)
        model.producer_version = package.name  # another hash
        onnx.save(model, str(package))
        promotion = Promotion.of("pets", alias, gate)
        assert promotion is not None
        with run("x") as begun:
            if accuracy is not None:
                begun.log("accuracy", accuracy)
            facts = {"metrics": begun.last_values(), "run": begun.id}
            first = promotion.conclude(begun, lambda name: registry.add(name, resolve(package), metadata=facts))
            again = promotion.conclude(begun, lambda name: pytest.fail("it is registered already"))
            assert again.version.version == first.version.version
            assert first.verdict is not None
            assert begun.tags[TAG]
        return first.verdict.why

    not_worse = "accuracy >= champion"
    assert trained(0.9, "accuracy >= 0.95") == (
        "models:/pets/1 does not become champion: accuracy is 0.9, and not >= 0.95"
    )
    with pytest.raises(ModelNotFoundError):
        registry.get("models:/pets@champion")
    assert trained(0.91, not_worse) == ("models:/pets/2 is champion: accuracy is 0.91, and there is no champion yet")
    assert trained(0.9, not_worse, "accuracy >= 0.5") == (
        "models:/pets/3 does not become champion: accuracy is 0.9, and not >= 0.91, from 0.91 of models:/pets/2"
    )
    assert trained(0.9, "accuracy >= champion - 0.02").startswith("models:/pets/4 is champion: ")
    assert trained(float("nan"), not_worse).startswith("models:/pets/5 does not become champion: accuracy is nan")
    assert "accuracy was not measured (it measured nothing)" in trained(None, not_worse)
    assert trained(None, alias="in-use") == "models:/pets/7 is in-use"
    registry.alias("pets", "champion", 7)
    assert "of models:/pets/7, the champion, no accuracy is known to compare with" in trained(0.99, not_worse)
    assert [each.version for each in registry.show("pets").history] == [2, 4, 7, 7]


def test_no_gate_compares_with_what_there_is_not(tmp_path: Path) -> None:
    registry = open_registry()

    def checked(*gate: str, alias: str | None = None, metrics: list[str] | None = None) -> Promotion:
        promotion = Promotion.of("pets", alias, gate)
        assert promotion is not None
        promotion.check(metrics)
        return promotion

    checked("accuracy >= champion", "accuracy > 0.5", metrics=["accuracy"])
    checked("accuracy >= in-use", alias="in-use")
    with pytest.raises(SpecError, match="model 'pets' has no alias 'champoin'; did you mean 'champion'"):
        checked("accuracy >= champoin")
    with pytest.raises(SpecError, match="model 'pets' has no alias 'champion'"):
        checked("accuracy >= champion", alias="in-use")
    with pytest.raises(SpecError, match="'test_accuracy' is not measured"):
        checked("test_accuracy > 0.5", metrics=["accuracy"])
    # A schedule's file says so when it is read, and its run before it trains.
    spec = training_of({"train": "style", "style": "a.jpg", "register": "pets", "gate": "loss/style <= champoin"})
    with pytest.raises(SpecError, match="has no alias 'champoin'"):
        spec.check_gate()
    with pytest.raises(SpecError, match="has no alias 'champoin'"):
        spec.see_through(Attempt(before=None, assign=lambda run: None))
    assert RunStore.open().list().runs == []
    told = {"train": "retrain", "image_dir": "a", "backbone": "b", "register": "x", "gate": "test_accuracy > 0.5"}
    assert training_of(told)
    with pytest.raises(SpecError, match="'test_accuracy' is not measured"):
        training_of({**told, "final_test": False})

    first, better = (tmp_path / each for each in ("first.txt", "better.txt"))
    first.write_text("1"), better.write_text("2")
    with run("x") as begun:
        begun.register(first, "pets", as_files=True, metrics={"accuracy": 0.9}, alias="in-use")
    with run("y") as begun:
        begun.log("accuracy", float("inf"))
        version = registry.get(begun.register(better, "pets", as_files=True))
        for gate in ("accuracy >= in-use", "accuracy >= 0.9", "accuracy >= champion"):
            verdict = checked(gate).decide(begun, version, registry)
            assert verdict is not None
            assert (
                verdict.why
                == "models:/pets/2 does not become champion: accuracy is inf, which is compared with nothing"
            )
        begun.log("accuracy", 0.95)
        registry.unalias("pets", "in-use")  # while it was trained
        gone = Promotion.of("pets", None, ["accuracy >= in-use"])
        assert gone is not None
        verdict = gone.decide(begun, version, registry)
        assert verdict is not None
        assert not verdict.passed
        assert verdict.why.endswith("accuracy is 0.95, and there is no in-use")


def test_what_is_to_become_of_a_model_is_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    assert Promotion.of_kept(tmp_path, None, None, (), say=said.append) is None
    before = Promotion.of("Pets", None, ["accuracy >= champion"])
    assert before is not None
    before.keep(tmp_path)
    assert Promotion.of_kept(tmp_path, None, None, (), say=said.append) == before
    assert Promotion.of_kept(tmp_path, "pets", "champion", (), say=said.append) == before
    assert said == []
    now = Promotion.of_kept(tmp_path, None, None, ["accuracy > 0.5"], say=said.append)
    assert now == Promotion.of("pets", "champion", ["accuracy > 0.5"])
    assert len(said) == 1
    assert said[0] == (
        "from now on --register pets --alias champion --gate 'accuracy > 0.5'; it began with --register pets "
        "--alias champion --gate 'accuracy >= champion'"
    )


@pytest.mark.parametrize("digits", [400, 5000])  # Python prints no number of 5,000
def test_numbers_that_are_too_large_are_refused(digits: int) -> None:
    value = -(10**digits)
    with run("x") as begun:
        with pytest.raises(SpecError, match=r"the value of 'v' is too large: a metric is 1\.8e\+308 at most"):
            begun.log("v", value)
        with pytest.raises(SpecError, match="the step of 'v' is too large"):
            begun.log("v", 1, step=abs(value))
        with pytest.raises(SpecError, match="the step of 'v' should be a whole number, not inf"):
            begun.log("v", 1, step=float("inf"))  # type: ignore[arg-type]
