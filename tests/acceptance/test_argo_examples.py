"""Argo's 127 published examples: each runs with the right outcome, or is refused by the name of what it needs.

What is right is in ``argo_examples.yaml``. ``docs/reference/pipelines-conformance.md`` is made from it:
``python -m tests.acceptance.test_argo_examples > docs/reference/pipelines-conformance.md``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.examples_of_argo import Outcome, run_all
from tests.objectstores import moto_s3

from tally.pipelines.steps import room

TABLE = Path(__file__).with_name("argo_examples.yaml")
PAGE = Path(__file__).parent.parent.parent / "docs/reference/pipelines-conformance.md"
EXPECTED: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text("utf-8"))
KEYS = ("accessKey", "secretKey", "accesskey", "secretkey")
"""Of the Secrets that examples name."""
COMMANDS = ("node", "curl", "bash", "kubectl")
"""What some examples need beside Python and the usual commands."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    import os

    root = Path(__file__).resolve().parent.parent.parent
    folder = Path(os.environ.get("TALLY_TEST_DATA", root.parent / "shared" / "data")) / "argo"
    if not folder.is_dir():
        pytest.skip(f"no examples at {folder}")
    if (why := room.refusal()) is not None:
        pytest.skip(f"steps cannot have a file system of their own here: {why}")
    if missing := [each for each in COMMANDS if shutil.which(each) is None]:
        pytest.skip(f"some examples run {', '.join(missing)}")
    place = tmp_path_factory.mktemp("argo")
    (place / "keys").mkdir()
    for name, value in (("msg", "hello"), *((key, "testing") for key in KEYS)):
        (place / "keys" / name).write_text(value)
    with pytest.MonkeyPatch.context() as patch, moto_s3() as service:
        patch.setenv("TALLY_HOME", str(place / "home"))
        patch.delenv("TALLY_DATABASE", raising=False)
        files = {path: _placed(EXPECTED.get(path.name, {}), place / "keys") for path in sorted(folder.glob("*.yaml"))}
        yield run_all(files, place / "run", service.url)


def _placed(settings: Mapping[str, Any], keys: Path) -> dict[str, Any]:
    options = settings.get("options", {})
    for kind in ("config_maps", "secrets"):
        if kind in options:
            options = {**options, kind: dict.fromkeys(options[kind], str(keys))}
    return {**settings, "options": options}


def test_every_example_is_in_the_table(outcomes: dict[str, Outcome]) -> None:
    assert set(outcomes) == set(EXPECTED)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_example(outcomes: dict[str, Outcome], name: str) -> None:
    expected, found = EXPECTED[name], outcomes[name]
    if (there := re.search(r"there is no command '([\w.-]+)'", expected.get("refused", ""))) and shutil.which(there[1]):
        pytest.skip(f"{there[1]} is on this machine")
    if "refused" in expected:
        assert found.state == "refused"
        assert expected["refused"] in found.refusal
        return
    assert found.state == expected["state"], (found.error, found.refusal, found.phases)
    assert {key: each for key, each in found.phases.items() if each != "Succeeded"} == expected.get("phases", {})
    assert _is(expected.get("error"), found.error)
    printed = {
        key: texts[0] if len(texts) == 1 else sorted(texts) for key, texts in found.printed.items() if any(texts)
    }
    assert printed.keys() == expected.get("printed", {}).keys()
    for step, text in expected.get("printed", {}).items():
        assert _is(text, printed[step]), (step, printed[step])
    assert found.outputs == expected.get("outputs", {})


def _is(expected: Any, found: Any) -> bool:
    if isinstance(expected, str) and expected.startswith("~"):
        return re.search(expected[1:], str(found)) is not None
    return bool(expected == found)


def page() -> str:
    """The page of the documentation."""
    runs = {name: each for name, each in EXPECTED.items() if "refused" not in each}
    states = {name: each["state"] for name, each in runs.items()}
    lines = [
        "# Argo's examples, and what comes of them here",
        "",
        f"Of {len(EXPECTED)} workflow files that Argo publishes as examples, {len(runs)} run",
        "[on this machine](../how-to/pipelines.md) as on a cluster;",
        f"{len(EXPECTED) - len(runs)} are refused before anything starts, by the name of what they need.",
        "A test runs all of them, and compares phases, outputs and what steps print. This page is made from its table.",
        "",
        "A run that should fail does: the example is about that, or leaves it to chance, which the test decides.",
        "Where steps print what is in their image (`/etc/os-release`), it is this machine's.",
        "",
        "| example | outcome |",
        "|---|---|",
    ]
    for name, each in EXPECTED.items():
        if name in runs:
            how = f", with `{_flags(each['options'])}`" if "options" in each else ""
            lines.append(f"| {name} | {states[name]}{how} |")
        else:
            lines.append(f"| {name} | refused: {each['refused'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _flags(options: Mapping[str, Any]) -> str:
    flags = {"semaphores": "--semaphore", "config_maps": "--config-map", "volumes": "--volume", "secrets": "--secret"}
    return " ".join(
        f"{flags[kind]} {name}={'FOLDER' if kind != 'semaphores' else value}"
        for kind, values in options.items()
        for name, value in values.items()
    )


def test_the_page_is_made_from_the_table() -> None:
    assert PAGE.read_text("utf-8") == page()


if __name__ == "__main__":
    print(page(), end="")
