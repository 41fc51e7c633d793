"""How long ``tally --help`` and ``import tally`` take in a new process, beside a Python that does nothing.

python benchmarks/startup.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _machine import introduce, show, take_turns

CAVEATS = """
Every run is a new process, but files are in the page cache and byte code is compiled: the very first run after an
installation or a restart is slower.

Wall time of the whole process, measured from outside.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    introduce("startup", CAVEATS)
    script = Path(sys.executable).with_name("tally")
    tally = [str(script)] if script.exists() else [sys.executable, "-m", "tally"]
    commands = {
        "tally --help": [*tally, "--help"],
        "import tally": [sys.executable, "-c", "import tally"],
        "tally score --help": [*tally, "score", "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    figures = take_turns({name: timed(command) for name, command in commands.items()}, given.rounds)["time"]
    bare = min(figures.pop("python -c pass"))
    show("wall time of the process", figures, first="tally --help", unit="s", digits=3)
    print(f"'python -c pass' takes {bare:.3f} s at best; the fastest of each, less that:")
    for name, seconds in figures.items():
        print(f"  {name:18}  {min(seconds) - bare:.3f} s")


def timed(command: list[str]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {"time": time.perf_counter() - began}

    return run


if __name__ == "__main__":
    main()
