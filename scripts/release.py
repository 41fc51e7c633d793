"""Build a release into dist/: ``make release``. CONTRIBUTING.md says when.

    python scripts/release.py [--trial] [--python python3.12 ...]

A release is the last commit, with a clean tree, a dated heading of its version in CHANGELOG.md, the licences of all
packages, and the address of the repository in pyproject.toml ([project.urls] Repository): the index of packages shows
the README, and its links have to lead somewhere from there. ``--trial`` does all the rest without these.

Wheel and sdist are built twice, and have to be equal byte by byte. Both are installed into empty environments and
score. What the wheel brings is written down as a CycloneDX SBOM. Needs the group ``release`` of pyproject.toml.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
DIST = REPOSITORY / "dist"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
VERSION = PROJECT["version"]


def run(*command: str | Path, **options: object) -> str:
    ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    if ran.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed\n{ran.stdout}")
    return str(ran.stdout).strip()


def address() -> str | None:
    return PROJECT.get("urls", {}).get("Repository")


def problems() -> list[str]:
    """Why this is no release."""
    changes = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    page = (REPOSITORY / "docs" / "reference" / "licences.md").read_text("utf-8")
    listed = set(re.findall(r"^\| ([a-z0-9-]+) \|", page, re.MULTILINE))
    lines = [*PROJECT["dependencies"], *(line for each in PROJECT["optional-dependencies"].values() for line in each)]
    missing = {canonicalize_name(Requirement(line).name) for line in lines} - listed
    dated = re.search(rf"^## {re.escape(VERSION)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.MULTILINE)
    checks = {
        "the tree has changes that are not committed": not run("git", "status", "--porcelain", cwd=REPOSITORY),
        f"CHANGELOG.md has no heading '## {VERSION} (YEAR-MONTH-DAY)'": dated,
        f"docs/reference/licences.md lacks {', '.join(sorted(missing))}: run scripts/licences.py": not missing,
        'pyproject.toml does not say where the repository is: [project.urls] Repository = "https://..."': address(),
    }
    return [problem for problem, passed in checks.items() if not passed]


def absolute(text: str, repository: str) -> str:
    """The README with links that lead into the repository from anywhere: to the version's tag."""

    def replace(found: re.Match[str]) -> str:
        kind = "raw" if Path(found[2]).suffix in (".png", ".gif", ".jpg", ".svg") else "blob"
        return f"{found[1]}{repository.rstrip('/')}/{kind}/v{VERSION}/{found[2]}"

    return re.sub(r"""(\]\(|(?:src|href|srcset)=")(?!#|[a-z]+:)([^\s")]+)""", replace, text)


def build(into: Path) -> dict[str, str]:
    """Wheel and sdist of the last commit, in a folder of its own; their hashes."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        tree.mkdir()
        run("sh", "-c", f"git archive HEAD | tar -x -C '{tree}'", cwd=REPOSITORY)
        if repository := address():
            readme = tree / "README.md"
            readme.write_text(absolute(readme.read_text("utf-8"), repository), "utf-8")
        stamp = run("git", "log", "-1", "--format=%ct", cwd=REPOSITORY)
        run(
            sys.executable, "-m", "build", "--no-isolation", "--outdir", into, tree,
            env={**os.environ, "SOURCE_DATE_EPOCH": stamp}, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(into.iterdir())}


def try_out(package: Path, python: str, scratch: Path) -> Path:
    """Install the file into an empty environment, and score with it; the environment's Python."""
    place = Path(tempfile.mkdtemp(dir=scratch))
    run(python, "-m", "venv", "--without-pip", place / "env")
    inside = place / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", inside, "install", "--quiet", package, stderr=subprocess.STDOUT)
    tally = [inside, "-m", "tally"]
    work = {"cwd": place, "env": {**os.environ, "TALLY_HOME": str(place / "home")}, "stderr": subprocess.STDOUT}
    run(*tally, "simulate", "pictures", "--out", "pictures", "--count", "40", **work)
    run(*tally, "score", "pictures", "--model", "tally:shapes", "--out", "predictions", **work)
    counted = run(*tally, "query", "predictions", "select count(*) from results", **work)
    if counted.split()[-1] != "40":
        raise SystemExit(f"{package.name} with {python}: 40 pictures became\n{counted}")
    print(f"{package.name}: installed and scored with {run(inside, '--version')}", flush=True)
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trial", action="store_true", help="build although this is no release")
    parser.add_argument("--python", action="append", help="try it with this Python, too; may be repeated")
    arguments = parser.parse_args()
    if (found := problems()) and not arguments.trial:
        raise SystemExit("no release:\n- " + "\n- ".join(found))

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        first, second = build(scratch / "first"), build(scratch / "second")
        if first != second:
            raise SystemExit(f"two builds differ: {first} {second}")
        shutil.rmtree(DIST, ignore_errors=True)
        shutil.copytree(scratch / "first", DIST)
        for file, digest in first.items():
            print(f"{digest}  {file} ({(DIST / file).stat().st_size / 1e6:.1f} MB), the same twice", flush=True)
        run(sys.executable, "-m", "twine", "check", "--strict", *(DIST / file for file in first))
        [wheel], [sdist] = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
        inside = try_out(wheel, sys.executable, scratch)
        sbom = DIST / f"tally-scoring-{VERSION}.cdx.json"
        run(
            sys.executable, "-m", "cyclonedx_py", "environment", inside, "--pyproject", REPOSITORY / "pyproject.toml",
            "--output-reproducible", "-o", sbom, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print(f"{sbom.name}: what the wheel brings", flush=True)
        for package, python in [(sdist, sys.executable), *((wheel, python) for python in arguments.python or ())]:
            try_out(package, python, scratch)


if __name__ == "__main__":
    main()
