"""``tally new``: its templates work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.colours import model

from tally.cli.new import new
from tally.errors import (
    OutputExistsError,
    SpecError,
)
from tally.models.load import load
from tally.models.resolve import resolve

pytestmark = pytest.mark.usefixtures("restored", "empty_folder")


@pytest.fixture
def tally_new() -> Callable[..., str]:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(new, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_new_scorer_works(tally_new: Callable[..., str]) -> None:
    assert "tally score photos/ --model my_scorer.py --out out/" in tally_new("scorer", "my-scorer")
    ref = resolve("my_scorer.py", settings={"threshold": 0.3})
    assert ref.entry == "my_scorer.py:MyScorer"
    scorer = load(ref, "cpu")
    dark, bright = scorer.score([np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)])
    assert (dark, bright) == ({"brightness": 0.0, "label": "dark"}, {"brightness": 1.0, "label": "bright"})
    assert set(scorer.columns or ()) == {"brightness", "label"}
    with pytest.raises(OutputExistsError, match=r"my_scorer\.py is there already"):
        tally_new("scorer", "my_scorer.py")
    with pytest.raises(SpecError, match="cannot be a scorer's name"):
        tally_new("scorer", "7up")


def test_new_script_works(tally_new: Callable[..., str], tmp_path: Path) -> None:
    tally_new("scorer", "score", "--script")
    ref = resolve("score.py")
    assert ref.options["form"] == "mini_batch"
    assert load(ref, "cpu").score([str(tmp_path / "score.py")])[0]["weights"] >= 1  # type: ignore[call-overload,index]


def test_new_package_works(tally_new: Callable[..., str], tmp_path: Path) -> None:
    tally_new("package", "brightness")
    ref = resolve("brightness")
    assert (ref.name, ref.kind, ref.options) == ("brightness", "python", {"threshold": 0.5, "batch_size": 16})
    assert load(ref, "cpu").batch_size == 16
    with pytest.raises(OutputExistsError, match="brightness is there already"):
        tally_new("package", "brightness")


def test_new_package_from_a_model(tally_new: Callable[..., str], tmp_path: Path) -> None:
    model(tmp_path / "colours.onnx", external="colours.weights")
    output = tally_new("package", "mine", "--from", "colours.onnx")
    assert "note: labels were not given" in output
    text = (tmp_path / "mine" / "tally.yaml").read_text()
    assert "# squash, crop" in text
    assert (tmp_path / "mine" / "labels.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    ref, direct = resolve("mine"), resolve("colours.onnx")
    assert ref.assumed == ()
    assert ref.options == {**direct.options, "labels": "labels.txt"}
    assert "iou_threshold" not in text  # means nothing for classify
    load(ref, "cpu")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    tally_new("package", "named", "--from", "colours.onnx", "--labels", "names.txt")
    assert (tmp_path / "named" / "labels.txt").read_text() == "red\ngreen\nblue\n"


def test_new_package_from_a_model_of_another_kind(tally_new: Callable[..., str], tmp_path: Path) -> None:
    skops = pytest.importorskip("skops.io")
    linear = pytest.importorskip("sklearn.linear_model")
    skops.dump(linear.LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]), tmp_path / "line.skops")
    tally_new("package", "line", "--from", "line.skops")
    described = (tmp_path / "line" / "tally.yaml").read_text()
    assert "name: line\nfile: line.skops\n" in described
    assert "options:" not in described
    assert resolve("line").options == resolve("line.skops").options
    with pytest.raises(SpecError, match="--from takes a model file, not 'line'"):
        tally_new("package", "other", "--from", "line")
    tally_new("scorer", "mine")
    with pytest.raises(SpecError, match=r"--from takes a model file, not 'mine\.py'\n  For code, leave --from out"):
        tally_new("package", "other", "--from", "mine.py")
