"""What runs is the code that the model's hash covers, whatever Python remembers of earlier code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from tests.extent import FULL

from tally.errors import ModelChangedError
from tally.models.load import create, load
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.scorers.scripts.classes import local_modules
from tally.scorers.scripts.modules import PREFIX

NAMES = ("helper", "late", "pkg", "spare", "steady", "lib", "once_imported")
CLASS = """
from tally import Scorer
class Mine(Scorer):
    input = "bytes"
    columns = {"n": "int64"}
    def score(self, batch):
        return [{"n": value()} for _ in batch]
"""
SCRIPT = "def init(): ...\ndef run(data): return {'n': value()}\n"
IMPORTS = "from pkg.part import N\nfrom spare.deep import M\nimport steady\ndef value(): return N + M + steady.N\n"
OWN = "def value(): return 1\n"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in [
        name for name in set(sys.modules) - before if name.partition(".")[0] in NAMES or name.startswith(PREFIX)
    ]:
        del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def scored(ref: ModelRef) -> int:
    """By a scorer in this process."""
    scorer = load(ref, "cpu")
    (row,) = scorer.score([b"{}"])
    return row["n"]  # type: ignore[index, no-any-return, call-overload]


IN_A_PROCESS = """
import sys, tally
print(tally.score("items", sys.argv[1], sys.argv[2], workers=1, quiet=True).results()["n"].to_pylist())
"""


CHANGED, KINDS = ("m.py", "pkg/part.py", "spare/deep.py"), ("class", "script", "module")
PAIRS = list(product(CHANGED, KINDS)) if FULL else list(zip(CHANGED, KINDS, strict=True))


@pytest.mark.parametrize(("changed", "kind"), PAIRS)
def test_old_bytecode_is_not_run(tmp_path: Path, kind: str, changed: str) -> None:
    """A change that keeps size and time: Python's cache does not see it."""
    body = SCRIPT if kind == "script" else CLASS
    write(tmp_path / "m.py", (OWN if changed == "m.py" else IMPORTS) + body)
    for name in ("pkg/__init__.py", "pkg/part.py", "spare/deep.py", "steady.py"):
        write(tmp_path / name, "M = N = 0\n")
    write(tmp_path / changed, (tmp_path / changed).read_text().replace("N = 0", "N = 1"))
    write(tmp_path / "items" / "1", "{}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(code: str, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, text=True, check=True, stdout=subprocess.PIPE
        ).stdout.strip()

    for file in tmp_path.rglob("*.py"):
        os.utime(file, (1_700_000_000, 1_700_000_000))
    imports = "" if changed == "m.py" else "import pkg.part, spare.deep;"
    run(f"import sys; sys.path.insert(0, ''); {imports} import m")
    assert list(tmp_path.rglob("*.pyc"))
    model = "m:Mine" if kind == "module" else "m.py"
    assert run(IN_A_PROCESS, model, "first") == "[1]"
    path = tmp_path / changed
    before = path.stat()
    path.write_text(path.read_text().replace("return 1", "return 2").replace("N = 1", "N = 2"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert run(IN_A_PROCESS, model, "second") == "[2]"


def test_helpers_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    """Also those that are imported when the scorer is loaded."""
    text = "import helper\ndef value():\n    return helper.N + late.N\n" + CLASS
    text += "    def load(self, artifacts, device):\n        global late\n        import late\n"
    for name, n in (("a", 1), ("b", 1000)):
        write(tmp_path / name / "m.py", text)
        write(tmp_path / name / "helper.py", f"N = {n}\n")
        write(tmp_path / name / "late.py", f"N = {n}\n")
    refs = [resolve(tmp_path / name / "m.py") for name in ("a", "b")]
    assert [scored(ref) for ref in refs * 2] == [2, 2000, 2, 2000]
    scorers = [load(ref, "cpu") for ref in refs]
    assert [scorer.score([b""]) for scorer in scorers] == [[{"n": 2}], [{"n": 2000}]]


def test_packages_with_modules_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    for name, n in (("a", 1), ("b", 2)):
        write(tmp_path / name / "once_imported.py", "import helper\ndef value(): return helper.N\n" + CLASS)
        write(tmp_path / name / "helper.py", f"N = {n}\n")
        write(tmp_path / name / "tally.yaml", "entry: once_imported:Mine\n")
    assert [scored(resolve(tmp_path / name)) for name in ("a", "b", "a")] == [1, 2, 1]
    write(tmp_path / "a" / "helper.py", "N = 30\n")
    assert scored(resolve(tmp_path / "a")) == 30


@pytest.mark.parametrize("imported_by", ["tally", "the caller"])
def test_a_module_that_changed_after_its_import_is_refused(tmp_path: Path, imported_by: str) -> None:
    path = write(tmp_path / "once_imported.py", OWN + CLASS)
    sys.path.insert(0, str(tmp_path))
    if imported_by == "tally":
        assert scored(resolve("once_imported:Mine")) == 1
    else:
        __import__("once_imported")
    write(path, path.read_text().replace("return 1", "return 2"))
    with pytest.raises(ModelChangedError, match="was changed since this process imported it") as error:
        resolve("once_imported:Mine")
    assert "restart the kernel" in str(error.value.hint)


def test_a_helper_that_no_import_statement_names_is_loaded_again(tmp_path: Path) -> None:
    write(tmp_path / "m.py", "from importlib import import_module\nN = import_module('helper').N\n" + CLASS)
    write(tmp_path / "m.py", (tmp_path / "m.py").read_text() + "\ndef value(): return N\n")
    helper = write(tmp_path / "helper.py", "N = 1\n")
    assert scored(resolve(tmp_path / "m.py")) == 1
    write(helper, "N = 2\n")
    assert scored(resolve(tmp_path / "m.py")) == 2


@pytest.mark.parametrize("body", [CLASS, SCRIPT], ids=["class", "script"])
def test_folders_without_init_are_packages_too(tmp_path: Path, body: str) -> None:
    path = write(
        tmp_path / "m.py", "from lib.deep.part import N\nimport lib.x\ndef value(): return N + lib.x.N\n" + body
    )
    write(tmp_path / "lib" / "deep" / "part.py", "N = 20\n")
    write(tmp_path / "lib" / "x.py", "N = 2\n")
    write(tmp_path / "lib" / "unused.py", "")
    ref = resolve(path)
    assert ref.files == ("m.py", "lib/deep/part.py", "lib/x.py")
    if body == CLASS:
        assert scored(ref) == 22
    write(tmp_path / "lib" / "x.py", "N = 3\n")
    assert resolve(path).hash != ref.hash
    assert create(resolve(path)) is not None


def test_a_folder_may_have_the_name_of_an_installed_package(tmp_path: Path) -> None:
    path = write(tmp_path / "m.py", "import onnx, json\nfrom onnx import helper\n" + OWN + CLASS)
    write(tmp_path / "onnx" / "helper.py", "1 / 0\n")
    (tmp_path / "json").mkdir()
    assert local_modules(path) == [path]
    assert scored(resolve(path)) == 1
