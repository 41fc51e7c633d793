"""The table of kinds of model: what it says is true of the kinds, and it is the only place that says it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.colours import model
from tests.extensions import install

import tally
from tally.errors import ModelLoadError, SpecError
from tally.models import kinds
from tally.models.base import Kind
from tally.models.load import create
from tally.models.reference import ModelRef
from tally.models.resolve import resolve

SOURCE = Path(tally.__file__).parent


@pytest.mark.parametrize("name", list(kinds.BUILT_IN))
def test_every_line_names_a_kind(name: str) -> None:
    kind = kinds.get(name)
    assert isinstance(kind, Kind)
    assert (kind.name, kind.traits) == (name, kinds.BUILT_IN[name].traits)
    assert set(kind.traits.pickles) <= set(kind.traits.claims)
    assert kind.traits.claims or kind.traits.form
    assert type(kind).create is not Kind.create


def test_every_extra_is_one() -> None:
    described = (SOURCE.parent.parent / "pyproject.toml").read_text()
    extras = {traits.extra for _, traits in kinds.table() if traits.extra is not None}
    assert {extra.partition("[")[2] for extra in extras} >= {"sklearn]", "mlflow]", "torch]", "xgboost]"}
    for extra in extras:
        assert re.search(rf"^{extra.partition('[')[2][:-1]} = \[", described, re.MULTILINE)


def test_one_file_and_one_line_are_all_that_a_framework_takes() -> None:
    """MLflow is such a framework. What doctor says of extras is about installing, and trainings are mirrored there:
    that is not about models."""
    mentioning = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if re.search(r"pyfunc|mlflow|mlmodel", path.read_text(), re.IGNORECASE)
    }
    others = {"health/checks.py", "cli/runs.py", "training/runs/mlflow_mirror.py", "training/runs/tracking.py"}
    assert mentioning - others == {"models/kinds.py", "scorers/tabular/pyfunc.py"}


def test_models_import_no_scorers() -> None:
    names = [f"tally.models.{path.stem}" for path in (SOURCE / "models").glob("*.py") if path.stem != "__init__"]
    assert "tally.models.kinds" in names
    code = f"import sys, {', '.join(names)}; print([name for name in sys.modules if name.startswith('tally.scorers')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_file_is_of_the_kind_that_recognises_it(tmp_path: Path) -> None:
    pictures = model(tmp_path / "m.onnx")
    for wanted in (None, "onnx", "onnx_table", "sklearn"):
        assert (kinds.of_file(pictures, wanted) or Kind("none")).name == "onnx"
    script, scorer = tmp_path / "script.py", tmp_path / "scorer.py"
    script.write_text("def init(): ...\ndef run(data): ...")
    scorer.write_text("class Mine: ...")
    assert [(kinds.of_file(each) or Kind("none")).name for each in (script, scorer)] == ["script", "python"]
    assert kinds.of_file(tmp_path / "m.xyz") is None


@pytest.mark.parametrize(
    ("name", "claimed"),
    [
        ("m.onnx", True),
        ("M.ONNX", True),
        ("deep/m.skops", True),
        ("MLmodel", True),
        ("deep/MLmodel", True),
        ("otherMLmodel", False),
        ("mlmodel", False),
        ("onnx", False),
        ("m.onnx.yaml", False),
    ],
)
def test_names_that_are_claimed(name: str, claimed: bool) -> None:
    assert (kinds.claiming(name) is not None) == claimed


def test_a_flag_that_a_kind_does_not_take_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(model(tmp_path / "m.onnx"), artifacts=tmp_path)
    assert caught.value.message == "--artifacts cannot be used with the model m.onnx"
    assert caught.value.hint == "--artifacts is for models of kind script, python, object."


def test_the_file_that_makes_a_folder_a_model_stands_for_the_folder(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {spark: {}}")
    for given in (tmp_path, tmp_path / "MLmodel"):
        with pytest.raises(ModelLoadError, match="no flavor python_function"):
            resolve(given, trust=True)


def test_kinds_in_a_package_are_checked(tmp_path: Path) -> None:
    model(tmp_path / "m.onnx")
    for wrong in ("onix", "keyed"):
        (tmp_path / "tally.yaml").write_text(f"file: m.onnx\nkind: {wrong}")
        with pytest.raises(SpecError, match=rf"kind: there is no kind '{wrong}'.*\(there are onnx, onnx_table, skl"):
            resolve(tmp_path)
    (tmp_path / "tally.yaml").write_text("file: m.onnx\nkind: onnx_table")
    with pytest.raises(SpecError, match="kind: is onnx_table, but what it names is of kind onnx"):
        resolve(tmp_path)


# kinds of installed packages


ADAPTER = """
from tally.models.base import Kind, Traits

class Loud(Kind):
    traits = Traits(claims=(".onnx", ".loud"), extra="loud", flags=("task",))
    def create(self, ref):
        from tally import Scorer
        scorer = Scorer()
        scorer.columns = {ref.options.get("task", "none"): "string"}
        return scorer
"""


def test_what_the_table_claims_comes_before_what_packages_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", monkeypatch, "tally.scorers", {"loud": "loud_for_kinds:Loud"}, loud_for_kinds=ADAPTER)
    assert resolve(model(tmp_path / "m.onnx")).kind == "onnx"
    (tmp_path / "m.loud").write_text("!")
    ref = resolve(tmp_path / "m.loud", task="shout")
    assert (ref.kind, ref.options) == ("loud", {"task": "shout"})
    assert create(ref).columns == {"shout": "string"}
    assert "loud" in kinds.taking("task")
    (tmp_path / "tally.yaml").write_text("file: m.onnx\nkind: loud")
    assert resolve(tmp_path).kind == "loud"  # asked for by name, it takes the file


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("loud_broken:Loud", r"'loud' is offered by the package loud, which cannot be used: ZeroDivisionError"),
        ("loud_wrong:number", "the entry point 'loud' in tally.scorers is 3, not a subclass of"),
    ],
)
def test_a_package_that_cannot_be_used_harms_no_other_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    install(
        tmp_path / "site", monkeypatch, "tally.scorers", {"loud": value}, loud_broken="1 / 0", loud_wrong="number = 3"
    )
    assert resolve(model(tmp_path / "m.onnx")).kind == "onnx"
    (tmp_path / "m.xyz").write_text("!")
    with pytest.raises(SpecError, match=message):
        resolve(tmp_path / "m.xyz")
    with pytest.raises(SpecError, match="Supported paths are"):
        resolve(3)  # type: ignore[arg-type]


def test_a_kind_may_take_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTER.replace('"task",', '"artifacts",')
    install(tmp_path / "site", monkeypatch, "tally.scorers", {"loud": "loud_taking:Loud"}, loud_taking=adapter)
    (tmp_path / "m.loud").write_text("!")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "w.bin").write_bytes(b"1")
    ref = resolve(tmp_path / "m.loud", artifacts=weights)
    assert (ref.artifacts, ref.files) == (str(weights), ("m.loud", "weights"))
    assert resolve(tmp_path / "m.loud").artifacts == "."
    with pytest.raises(SpecError, match=r"--task cannot be used with the model m\.loud"):
        resolve(tmp_path / "m.loud", task="shout")


def test_a_reference_of_a_kind_that_is_not_installed(tmp_path: Path) -> None:
    ref = ModelRef("quiet", "m", tmp_path, "m.quiet", "sha256:0")
    with pytest.raises(ModelLoadError, match=r"kind 'quiet' cannot be scored.*\n  Kinds are onnx, .*brings 'quiet'"):
        create(ref)


def test_a_server_takes_for_code_whatever_may_run_some() -> None:
    from tally.server.places import is_code

    assert is_code("net.pt2")
    for name, traits in kinds.table():
        assert all(is_code(f"model{each}") for each in {*traits.pickles, *traits.weights} - {".safetensors"}), name
    assert not is_code("net.safetensors")
