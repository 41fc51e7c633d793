"""Play somebody who meets Tally for the first time: python scripts/newcomer.py

Builds the wheel of this tree, and types the commands of README.md and docs/quickstart.md as they stand, in order, in
one folder: in an empty environment, with an empty home, and without settings of Tally. ``pip install tally-scoring``
installs the wheel. A command that names a file, model or bucket of the reader's own is not typed, and is listed. What
the quickstart repeats of the README is typed once.

Prints what each command took. The exit code is 1 where a command fails, where it is not refused although the page says
so, or where the first result is there more than 60 s after the installation.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.pages import Block, blocks, refused, without_details  # noqa: E402

PAGES = [REPOSITORY / "README.md", REPOSITORY / "docs" / "quickstart.md"]
WITHIN = 60.0
"""Seconds from the end of the installation to the first result."""
OWN = re.compile(r"(?<!/)\bphotos/|\b\w+\.(?:onnx|pt2|safetensors)\b|clip\.mp4|readings[./]|\bmy-model\b|\w+://bucket/")
"""What a reader brings: nobody has it who has just installed Tally."""
OWN_RESULT = re.compile(r"\bquery predictions/ ")
"""What the README asks is the result of photos in a bucket; what the quickstart asks is its own, without the slash."""
SAVED_AS = re.compile(r"[Ss]ave it\s+as `(\w+\.py)`")
TAIL = 2000


class Newcomer:
    def __init__(self, folder: Path, wheel: Path, python: str) -> None:
        self.wheel = wheel
        self.work, home, environment = folder / "work", folder / "home", folder / "env"
        self.work.mkdir()
        home.mkdir()
        subprocess.run([python, "-m", "venv", environment], check=True)
        kept = {k: v for k, v in os.environ.items() if not re.match(r"TALLY_|PYTHON|XDG_|VIRTUAL_ENV|COLUMNS$", k)}
        self.env = {**kept, "HOME": str(home), "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
        self.installed: float | None = None
        self.first: float | None = None
        """Seconds from the installation to the first result."""
        self.typed: set[str] = set()
        """Blocks of the pages before."""
        self.own: list[str] = []
        self.faults: list[str] = []

    def follow(self, page: Path) -> None:
        print(f"\n{page.relative_to(REPOSITORY)}", flush=True)
        shown = [block for block in blocks(page) if block.text not in self.typed]
        self.typed |= {block.text for block in shown}
        for block, refusal in refused(shown):
            if block.language == "python" and (saved := SAVED_AS.search(block.before)):
                (self.work / saved[1]).write_text(block.text, "utf-8")
                self.type(block, f"python {saved[1]}", refusal)
            for command in block.typed("pip install", "tally"):
                self.type(block, command.partition("  #")[0].rstrip(), refusal)

    def type(self, block: Block, command: str, refusal: str | None) -> None:
        if OWN.search(command) or (block.page.name == "README.md" and OWN_RESULT.search(command)):
            self.own.append(f"{block}: {command}")
            return
        line = re.sub(r"'?\btally-scoring(\[[\w,-]+\])?'?", rf"'{self.wheel}\1'", command)
        started = time.monotonic()
        ran = subprocess.run(
            ["sh", "-c", line], cwd=self.work, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        ended = time.monotonic()
        print(f"{ended - started:7.1f} s  {command}", flush=True)
        said = ran.stdout[-TAIL:].strip()
        if (ran.returncode != 0) != (refusal is not None):
            self.faults.append(f"{block}: {command}\n  exit code {ran.returncode}\n{said}")
        elif refusal is not None and without_details(refusal) not in without_details(said[said.find("error: ") :]):
            self.faults.append(f"{block}: {command}\n  the page says {refusal.splitlines()[0]!r}\n{said}")
        elif command.startswith("pip install"):
            self.installed = self.installed or ended
        elif self.first is None and self.installed is not None and re.match(r"tally (?:demo|score)\b", command):
            self.first = ended - self.installed


def build(into: Path) -> Path:
    """The wheel of this tree, with what is not committed."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", into, REPOSITORY], check=True
    )
    [wheel] = into.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="of the empty environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder, "wheel"))
        newcomer = Newcomer(Path(folder), wheel, arguments.python)
        for page in PAGES:
            newcomer.follow(page)
        faults = newcomer.faults
        if newcomer.own:
            print("\nnot typed, as they need what is the reader's own:", *newcomer.own, sep="\n  ")
        if newcomer.first is None:
            faults.append("no command gave a result")
        else:
            print(f"\nfirst result {newcomer.first:.1f} s after the installation")
            if newcomer.first > WITHIN:
                faults.append(f"the first result came {newcomer.first:.1f} s after the installation, not {WITHIN:.0f}")
    if faults:
        raise SystemExit("\n" + "\n\n".join(f"FAIL {each}" for each in faults))


if __name__ == "__main__":
    main()
