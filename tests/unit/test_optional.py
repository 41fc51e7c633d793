"""A package that is missing is named with what needs it and what installs it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from tally.errors import ModelLoadError, SpecError
from tally.models import kinds
from tally.optional import install, needed

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]


def test_a_missing_package_is_named_as_pip_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModelLoadError) as missing, needed("training needs", "sklearn", ModelLoadError):
        import sklearn.svm  # noqa: F401
    assert missing.value.message == "training needs scikit-learn, which is not installed"
    assert missing.value.hint == "Install it with: pip install 'tally-scoring[sklearn]'"


def test_a_package_that_does_not_fit_is_not_said_to_be_missing() -> None:
    with pytest.raises(SpecError) as broken, needed("the server needs", "server"):
        from json import nothing_there  # type: ignore[attr-defined]  # noqa: F401
    assert broken.value.message.startswith("the server needs json, which cannot be imported: ")
    assert "nothing_there" in broken.value.message
    assert broken.value.hint == "Install it anew: pip install 'tally-scoring[server]' --upgrade"


def test_no_extra_is_the_plain_installation() -> None:
    assert install(None) == "pip install tally-scoring"
    assert install("server,grpc") == "pip install 'tally-scoring[server,grpc]'"


@pytest.mark.parametrize("kind", [name for name, line in kinds.BUILT_IN.items() if line.traits.extra])
def test_each_kind_names_an_extra_that_there_is(kind: str) -> None:
    assert kinds.extra_of(kind) in PROJECT["optional-dependencies"]
