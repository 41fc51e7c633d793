"""The program in the README runs, word for word. (Its links and commands are checked with those of ``docs/``.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    [program] = PROGRAM.findall(README.read_text("utf-8"))
    (tmp_path / "measure.py").write_text(program)
    pictures = tmp_path / "tally-demo" / "pictures"  # which the demo draws, see test_demo.py
    pictures.mkdir(parents=True)
    for brightness in (20, 70, 130, 180, 240):
        Image.fromarray(np.full((40, 60, 3), brightness, np.uint8)).save(pictures / f"grey-{brightness}.png")
    (pictures / "broken.png").write_bytes(b"\x89PNG cut short")

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "measure.py"],
            cwd=tmp_path,
            env={**os.environ, "TALLY_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "broken.png" not in done.stdout
    shown = [done.stdout.find(f"grey-{brightness}.png") for brightness in (240, 180, 130)]
    assert -1 not in shown
    assert shown == sorted(shown)
    assert "grey-70.png" not in done.stdout
    assert "240" in done.stdout
    out = tmp_path / "measured"
    assert {"_manifest.json", "_SUCCESS"} <= {path.name for path in out.iterdir()}
    assert list(out.glob("*.parquet"))

    done = run()  # never silently done again
    assert done.returncode == 1
    assert "already did this same job and finished" in done.stderr
    assert "overwrite=True" in done.stderr
