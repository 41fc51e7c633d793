"""Fetch the scripts of the pages from the npm registry, and write their hashes beside them.

    python scripts/vendor.py

Run it after a change of the versions below; needs npm. The wheel holds what it writes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "src" / "tally" / "server" / "pages" / "static" / "vendor"

PACKAGES = {
    "htmx.org@4.0.1": {"dist/htmx.min.js": "htmx.min.js", "dist/ext/hx-sse.min.js": "hx-sse.min.js", "LICENSE": None},
}
"""By package and version: its files, and what they are called here. Licences are called by their package."""


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    written = {}
    with tempfile.TemporaryDirectory() as scratch:
        for package, files in PACKAGES.items():
            command = ["npm", "pack", "--silent", "--pack-destination", scratch, package]
            archive = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
            with tarfile.open(Path(scratch, archive)) as content:
                for path, name in files.items():
                    name = name or f"{package.rpartition('@')[0]}.{path}"
                    member = content.extractfile(f"package/{path}")
                    assert member is not None
                    text = b"\n".join(
                        line for line in member.read().splitlines() if not line.startswith(b"//# sourceMappingURL=")
                    )
                    (FOLDER / name).write_bytes(text + b"\n")
                    written[name] = {"package": package, "sha256": hashlib.sha256(text + b"\n").hexdigest()}
    (FOLDER / "vendor.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
