"""Engines by name, those of installed packages too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tally.engines.base import Limits
from tally.engines.factory import make_engine, names
from tally.engines.local import LocalEngine
from tally.errors import SpecError
from tally.testing import tasks
from tally.testing.engines import DEADLINE

MODULE = """
from tally.engines.local import LocalEngine

class MadeUpEngine(LocalEngine):
    def __init__(self, **reservation):
        super().__init__(**reservation)
        self.reservation = reservation

def not_a_class(**reservation):
    return MadeUpEngine(**reservation)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a package that offers engines: names to what is behind them."""

    def install(package: str, module: str, **engines: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(MODULE)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        points = "".join(f"{name} = {module}:{attribute}\n" for name, attribute in engines.items())
        (info / "entry_points.txt").write_text(f"[tally.engines]\n{points}")
        monkeypatch.syspath_prepend(str(folder))

    return install


def test_engines_are_made_by_name() -> None:
    assert names() == ["local", "ray"]
    assert type(make_engine("local", cpus=2, memory=2**30)) is LocalEngine


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"there is no engine 'locl'; did you mean 'local'\?\n  Known: local, ray\."):
        make_engine("locl")


def test_an_installed_package_adds_an_engine(install: Callable[..., None]) -> None:
    install("made-up", "made_up_engine_one", **{"made-up": "MadeUpEngine"})
    assert names() == ["local", "made-up", "ray"]
    engine = make_engine("made-up", gpus=0.5, resources={"tpu": 1})
    assert vars(engine)["reservation"] == {"cpus": None, "gpus": 0.5, "memory": None, "resources": {"tpu": 1}}
    engine.start(tasks.setup, (), slots=1, limits=Limits())
    try:
        assert engine.submit(tasks.echo, "it runs").result(DEADLINE) == "it runs"
    finally:
        engine.stop(kill=True)


def test_what_a_package_offers_has_to_be_an_engine(install: Callable[..., None]) -> None:
    install("bad", "made_up_engine_two", function="not_a_class", missing="Nowhere")
    with pytest.raises(SpecError, match=r"the engine 'function' of an installed package is not a subclass of .*Engine"):
        make_engine("function")
    with pytest.raises(SpecError, match=r"'missing' is offered by the package bad, which cannot be used"):
        make_engine("missing")
