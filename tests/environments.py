"""Clients that others publish, each in an environment of its own, as they pin old versions of what we use, too.

They are installed once, into pytest's cache. Their scripts in ``tests/clients`` print what they were answered as JSON.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.services import require

SCRIPTS = Path(__file__).parent / "clients"

CLIENTS = {
    "triton": [["tritonclient[http,grpc]==2.73.0"]],
    # Their server, and Kubernetes' client, are no part of what is tested, and large.
    "kserve": [
        ["--no-deps", "kserve==0.21.0"],
        [
            "cloudevents<2",
            "fastapi",
            "grpcio",
            "httpx",
            "numpy<3",
            "orjson",
            "pandas<3",
            "protobuf<7",
            "psutil<6",
            "pyyaml",
        ],
    ],
    "mlflow": [["mlflow==3.17.2"]],
    # Their stubs want TensorFlow, and need two of its files.
    "tensorflow_serving": [
        ["--no-deps", "tensorflow-serving-api==2.21.0", "tensorflow-protobuf==2.11.0"],
        ["grpcio", "protobuf<7"],
    ],
}
"""What pip is given for each, in turn."""


def python_of(client: str, config: pytest.Config) -> Path:
    """The Python of a client's environment. Skips the test where it cannot be installed, unless ``CI=true``."""
    steps = CLIENTS[client]
    digest = hashlib.sha256(json.dumps([sys.version, steps]).encode()).hexdigest()[:12]
    folder = config.cache.mkdir("clients") / f"{client}-{digest}" if config.cache else None
    require("pytest's cache", folder is not None)
    assert folder is not None
    python, done = folder / "bin" / "python", folder / "installed"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others may want it at the same time
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
            for step in steps:
                pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install"]
                ran = subprocess.run([*pip, "--quiet", "--no-compile", *step], capture_output=True, text=True)
                require(f"the client {client} ({ran.stderr.strip()[-300:]})", ran.returncode == 0)
            done.touch()
    return python


def asked(client: str, config: pytest.Config, *arguments: object, script: str | None = None) -> Any:
    """What a client's script was answered."""
    command = [python_of(client, config), SCRIPTS / f"{script or client}_client.py", *arguments]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
