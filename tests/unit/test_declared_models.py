"""A file that declares several models to serve: each with what is its own, and every mistake told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY
from tests.endpoints import echo

from tally.errors import SpecError
from tally.serving import declared
from tally.serving.settings import Limits

OPTIONS = {"task": None, "labels": None, "artifacts": None, "settings": {}, "trust": False}


def read(folder: Path, text: str, limits: Limits | None = None) -> list[declared.ModelSettings]:
    (folder / "served.yaml").write_text(text)
    return declared.read(str(folder / "served.yaml"), OPTIONS, limits or Limits())


def test_each_model_has_its_own_and_the_rest_is_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    echo(tmp_path / "words.py")
    page = (REPOSITORY / "docs" / "how-to" / "serve.md").read_text("utf-8")
    sample = re.search(r"```yaml\n(models:.*?)```", page, re.DOTALL)
    assert sample is not None
    text = sample[1].replace("- model: models:/detector@champion", "- model: words.py:Echo")
    (tmp_path / "score.py").write_text("def init():\n    pass\n\ndef run(data):\n    pass\n")
    monkeypatch.chdir("/")
    first, faces, words = read(tmp_path, text, Limits(timeout=5.0, threads=2))
    assert first.name == "words"
    assert first.model == f"{tmp_path}/words.py:Echo"
    assert first.limits == Limits(replicas=(1, 4), max_batch=16, timeout=10.0, threads=2)
    assert (faces.name, faces.options) == ("faces", OPTIONS)
    assert faces.limits.payloads == "s3://bucket/asked"
    assert (faces.limits.payload_share, faces.limits.device, faces.limits.timeout) == (0.01, "cuda:1", 5.0)
    assert words.options == {**OPTIONS, "artifacts": f"{tmp_path}/weights", "settings": {"top": 5}}
    assert words.model == f"{tmp_path}/score.py"


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        read(
            tmp_path,
            "port: 1\nmodles: []\nreplicas: 3\nmodels:\n- {name: one, model: a, replicas: x, max_bach: 3}\n"
            "- {name: two, replicas: 3}\n- text\n- {model: b, max_queue: 0, threads: 2}\n- {model: c, threads: true}\n",
        )
    said = [each.partition("served.yaml: ")[2] for each in raised.value.problems]
    assert [each.rpartition(" (given")[0] or each for each in said] == [
        "port: is the server's, and an option of the command: --port",
        "modles: there is no such field; did you mean 'models'?",
        "replicas: is a model's: put it into the model's entry under models",
        "one: replicas: should be a number such as 2, or a range such as 0..4",
        "one: max_bach: there is no such field; did you mean 'max_batch'?",
        "two: no model is given",
        "models.2: should have fields such as model and replicas",
        "b: max_queue: 1 to 1,000,000 requests, not 0",
        "c: threads: should be a whole number",
    ]
    with pytest.raises(SpecError, match="should be a list of models"):
        read(tmp_path, "models: {}\n")


@pytest.mark.parametrize(
    ("text", "declares"),
    [("served.yaml", True), ("a/b.YML", True), ("tally.yaml", False), ("m.onnx", False), ("s3://b/m.yaml", False)],
)
def test_what_is_a_file_and_what_a_model(text: str, declares: bool) -> None:
    assert declared.is_file(text) is declares
