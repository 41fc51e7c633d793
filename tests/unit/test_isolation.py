"""Several scripts in one process: what one finds around itself, no other does."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tally.scorers.base import Item, Scorer
from tally.scorers.scripts.classes import scorer_class
from tally.scorers.scripts.script import ScriptScorer

SCRIPT = """
import os, sys
import utils

def init():
    global folder
    folder = os.environ["AZUREML_MODEL_DIR"]
    sys.path.append(os.path.join(os.path.dirname(__file__), "lib"))

def run(mini_batch):
    import late, inner.part
    from utils import NAME
    assert utils is sys.modules["utils"]
    late.calls += 1
    return [
        {
            "argv": sys.argv[1:], "folder": folder, "now": os.environ["AZUREML_MODEL_DIR"], "calls": late.calls,
            "lib": __import__("extra").NAME, "utils": NAME, "late": late.NAME, "inner": inner.part.NAME,
        }
    ] * len(mini_batch)

def shutdown():
    open(os.path.join(os.environ["AZUREML_MODEL_DIR"], sys.argv[1] + "-" + __import__("utils").NAME), "w").close()
"""


def write(folder: Path, name: str, script: str = SCRIPT) -> Path:
    """A script in a folder of its own, with modules beside it whose names every other such folder has too."""
    for module in ("utils.py", "late.py", "inner/__init__.py", "inner/part.py", "lib/extra.py"):
        (folder / name / module).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / module).write_text(f"NAME = {name!r}\ncalls = 0\n")
    (folder / name / "weights").mkdir()
    (folder / name / "score.py").write_text(script)
    return folder / name / "score.py"


def scorer(script: Path, weights: Path | None = None, *arguments: str) -> ScriptScorer:
    found = ScriptScorer(script, arguments=arguments or [script.parent.name])
    found.load(weights or script.parent / "weights", "cpu")
    return found


def answer(found: ScriptScorer) -> Any:
    (row,) = found.score([found.prepare(Item("a", "a"))])
    return row


def expected(script: Path, calls: int, weights: Path | None = None, argument: str | None = None) -> dict[str, Any]:
    name, folder = script.parent.name, str(weights or script.parent / "weights")
    return {
        "argv": [argument or name],
        "folder": folder,
        "now": folder,
        **dict.fromkeys(("lib", "utils", "late", "inner"), name),
        "calls": calls,
    }


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The process is after each test as it was before."""
    monkeypatch.delenv("AZUREML_MODEL_DIR", raising=False)
    argv, path, modules = [*sys.argv], [*sys.path], set(sys.modules)
    yield
    assert (sys.argv, sys.path) == (argv, path)
    assert "AZUREML_MODEL_DIR" not in os.environ
    names = ("utils", "late", "inner", "inner.part", "extra", "score")
    new = set(sys.modules) - modules
    assert [name for name in names if name in new] == []


def test_scripts_in_one_process_do_not_see_each_other(tmp_path: Path) -> None:
    first, second = write(tmp_path, "first"), write(tmp_path, "second")
    scorers = scorer(first), scorer(second)
    for calls in (1, 2, 3):
        assert answer(scorers[0]) == expected(first, calls)
        assert answer(scorers[1]) == expected(second, calls)
    for found in scorers:
        found.close()
    for script in (first, second):
        assert [path.name for path in (script.parent / "weights").iterdir()] == [
            f"{script.parent.name}-{script.parent.name}"
        ]


def test_one_script_twice_is_two_scripts(tmp_path: Path) -> None:
    script = write(tmp_path, "only")
    weights = [tmp_path / "a", tmp_path / "b"]
    for folder in weights:
        folder.mkdir()
    scorers = [scorer(script, folder, folder.name) for folder in weights]
    for calls in (1, 2):
        for found, folder in zip(scorers, weights, strict=True):
            assert answer(found) == expected(script, calls, folder, folder.name)


def test_a_script_keeps_what_it_changes_and_nobody_else_has_it(tmp_path: Path) -> None:
    text = """
import os, sys
def init():
    sys.argv = ["changed"]
    sys.path = ["/nowhere", *sys.path]
    os.environ["AZUREML_MODEL_DIR"] = "/elsewhere"
def run(mini_batch):
    found = [sys.argv, "/nowhere" in sys.path, os.environ.pop("AZUREML_MODEL_DIR", None)]
    sys.modules.pop("late", None)
    return [found] * len(mini_batch)
"""
    changing, other = scorer(write(tmp_path, "changing", text)), scorer(write(tmp_path, "other"))
    assert answer(changing) == {"prediction": [["changed"], True, "/elsewhere"]}
    assert answer(other) == expected(other.script, 1)
    assert answer(changing) == {"prediction": [["changed"], True, None]}


@pytest.mark.parametrize("found_by", ["process", "scripts"])
def test_installed_modules_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found_by: str) -> None:
    """Those that are written in C cannot be loaded twice."""
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "installed_once.py").write_text("loaded = object()")
    path = f"import sys\nsys.path.append({str(installed)!r})\n"
    if found_by == "process":
        monkeypatch.syspath_prepend(str(installed))
        path = ""
    text = f"{path}import installed_once\ndef init(): ...\ndef run(mini_batch): return [id(installed_once.loaded)]"
    scorers = [scorer(write(tmp_path, name, text)) for name in ("first", "second")]
    assert answer(scorers[0]) == answer(scorers[1])
    assert sys.modules.pop("installed_once").loaded is not None
    if found_by == "process":
        sys.path.remove(str(installed))


def test_what_the_process_has_imported_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "host")
    monkeypatch.syspath_prepend(str(tmp_path / "host"))
    hosts = [importlib.import_module(name) for name in ("utils", "late", "inner.part")]
    script = write(tmp_path, "script")
    found = scorer(script)
    assert answer(found) == expected(script, 1)
    assert answer(found) == expected(script, 2)
    assert [sys.modules.pop(module.__name__) for module in hosts] == hosts
    sys.modules.pop("inner")
    sys.path.remove(str(tmp_path / "host"))


def test_scorer_classes_hide_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from tally import Scorer
import utils
class Mine(Scorer):
    def score(self, batch):
        import late
        return [{"utils": utils.NAME, "late": late.NAME}] * len(batch)
"""
    mine: Scorer = scorer_class(write(tmp_path, "class", text), "")()
    script = write(tmp_path, "script")
    found = scorer(script)
    for calls in (1, 2):
        assert answer(found) == expected(script, calls)
        assert mine.score([1]) == [{"utils": "class", "late": "class"}]
    for name in [name for name in sys.modules if name in ("utils", "late")]:
        del sys.modules[name]
    sys.path.remove(str(tmp_path / "class"))


def test_a_script_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    for name, text in {
        "importing": "import utils, late\n1 / 0\ndef init(): ...\ndef run(mini_batch): ...",
        "starting": "import utils\ndef init():\n    import late\n    1 / 0\ndef run(mini_batch): ...",
    }.items():
        script = write(tmp_path, name, text)
        with pytest.raises(Exception, match="ZeroDivisionError"):
            scorer(script)  # nothing_leaks looks at what is left
    script = write(tmp_path, "running", "def init(): ...\ndef run(mini_batch):\n    import utils\n    1 / 0")
    with pytest.raises(ZeroDivisionError):
        answer(scorer(script))


def test_a_script_may_run_another(tmp_path: Path) -> None:
    inner = write(tmp_path, "inside")
    text = SCRIPT.replace(
        "import late, inner.part", "import late, inner.part; import nested; nested.result = nested.run()"
    )
    outer = write(tmp_path, "outside", text)
    (outer.parent / "nested.py").write_text(
        "from pathlib import Path\nfrom tally.scorers.scripts.script import ScriptScorer\n"
        f"found = ScriptScorer({str(inner)!r}, arguments=['inside'])\n"
        f"found.load(Path({str(inner.parent / 'weights')!r}), 'cpu')\n"
        "def run(): return list(found.score(['a']))\n"
    )
    found = scorer(outer)
    assert answer(found) == expected(outer, 1)
    with found._surroundings.entered():  # type: ignore[union-attr]
        assert sys.modules["nested"].result == [expected(inner, 1)]
        with found._surroundings.entered():  # type: ignore[union-attr]
            assert sys.modules["utils"].NAME == "outside"
        assert sys.modules["utils"].NAME == "outside"


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads give way to each other as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_threads_take_turns(tmp_path: Path) -> None:
    text = """
import os, sys, threading
import utils
inside = []
def init(): ...
def run(mini_batch):
    for _ in range(50):
        here = (utils.NAME, sys.argv[1], os.path.basename(os.path.dirname(os.environ["AZUREML_MODEL_DIR"])))
        assert here == (NAME,) * 3, here
        assert __import__("utils").NAME == NAME
    return [NAME] * len(mini_batch)
"""
    scorers = {name: scorer(write(tmp_path, name, f"NAME = {name!r}\n{text}")) for name in ("first", "second", "third")}
    failures: list[BaseException] = []
    start = threading.Barrier(len(scorers))

    def work(name: str) -> None:
        try:
            start.wait()
            for _ in range(40):
                assert answer(scorers[name]) == {"prediction": name}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in scorers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
