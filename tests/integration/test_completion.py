"""What shells complete: in this process as they ask for it, and in bash itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tally
from tally.models.registry import open_registry
from tally.models.resolve import resolve

Cli = Callable[..., Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a table, in it the current one, and a registered model."""
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pumps.csv").write_text("pump,flow,at\n1,2.0,3\n")
    (tmp_path / "model.py").write_text(
        "import tally\n\n\nclass Size(tally.Scorer):\n    input = 'bytes'\n\n"
        "    def score(self, batch):\n        return [{'size': len(each)} for each in batch]\n"
    )
    open_registry().add("flows", resolve("model.py"), alias="prod")
    return tmp_path


@pytest.fixture
def complete(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    def completed(line: str) -> list[str]:
        monkeypatch.setenv("_TALLY_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_WORDBREAKS", " \t\n\"'@><=;|&(:")
        ran = cli()
        assert (ran.code, ran.err) == (0, "")
        return str(ran.out).splitlines()

    return completed


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tally jobs sh", ["show"]),
        ("tally score pumps.csv --esc", ["--escape-formulas"]),
        ("tally score photos --task c", ["classify"]),
        ("tally score photos --task=c", ["classify"]),
        ("tally jobs list --state f", ["failed", "finished"]),
        # Bash has "models:" already, and puts what comes behind it.
        ("tally score x --model models:/f", ["/flows", "/flows@prod"]),
        ("tally score x --model models:/flows@p", ["prod"]),
        ("tally score x --model=models:/flows@p", ["prod"]),
        ("tally models show f", ["flows"]),
        ("tally score pumps.csv --by ", ["pump", "flow", "at"]),
        ("tally score pumps.csv --by pump,f", ["pump,flow"]),
        ("tally score pumps.csv --window 5m --aggregate mean,m", ["mean,mean", "mean,min", "mean,max", "mean,median"]),
        # The shell's own files:
        ("tally score ", [""]),
        ("tally score x --model mod", [""]),
        ("tally score x --out ", [""]),
        ("tally score nowhere.csv --by ", [""]),
    ],
)
def test_what_is_completed(here: Path, complete: Callable[[str], list[str]], line: str, found: list[str]) -> None:
    assert complete(line) == found


def test_jobs_are_completed_by_their_ids(here: Path, complete: Callable[[str], list[str]]) -> None:
    job = tally.score("pumps.csv", "models:/flows", "out", quiet=True)
    for command in ("jobs show", "jobs resume", "query"):
        assert complete(f"tally {command} {job.id[:3]}") == [job.id]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_words_and_leaves_files_to_itself(here: Path) -> None:
    script = f"""
        tally() {{ {sys.executable} -m tally "$@"; }}
        export -f tally
        eval "$(_TALLY_COMPLETE=bash_source tally)"
        complete -p tally
        _tally_completion_asked() {{
            COMP_LINE="$1" COMP_POINT=${{#1}} COMP_WORDBREAKS=$' \\t\\n"'"'"'@><=;|&(:'
            {{ $(complete -p tally | sed 's/.* -F \\([^ ]*\\) .*/\\1/') {here}/tally; }}
            echo "${{COMPREPLY[*]}}"
        }}
        _tally_completion_asked "tally score x --task seg and more"
        _tally_completion_asked "tally score x --task seg"
        _tally_completion_asked "tally score x --model models:/fl"
        _tally_completion_asked "tally score pum"
    """
    (here / "tally").write_text(f'#!/bin/sh\nexec {sys.executable} -m tally "$@"\n')
    (here / "tally").chmod(0o700)
    ran = subprocess.run(
        ["bash", "--norc", "-c", script], env={**os.environ}, capture_output=True, text=True, timeout=120, check=True
    )
    declared, *asked = ran.stdout.splitlines()
    assert "-o default" in declared, "files are completed where nothing else is"
    assert asked == ["", "segment", "/flows /flows@prod", ""]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts_that_they_understand(cli: Cli, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setenv("_TALLY_COMPLETE", f"{shell}_source")
    script = str(cli().out)
    assert f"_TALLY_COMPLETE={shell}_complete" in script
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"there is no {shell} here")
    ran = subprocess.run([found, "-n"], input=script, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
