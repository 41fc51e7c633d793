"""What tests of the examples share."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def script(path: str) -> ModuleType:
    """A script of an example, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(folder: str, app: str, **environment: str) -> Iterator[str]:
    """An example's web application, as users start it; gives its address."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", EXAMPLES / folder, app, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    told = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            told += line
            if found := re.search(r"running on (http://\S+)", line):
                yield found[1]
                return
        raise AssertionError(f"the application ended with {process.wait()}:\n{told}")
    finally:
        process.terminate()
        process.wait(60)
        assert process.stderr is not None
        process.stderr.close()
