"""What ``tally doctor`` finds out about this machine.

A check returns a line about what it found. It raises :class:`Warn` or :class:`Skip` with that line, or, where
something is wrong, a TallyError.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import pwd
import shutil
import sys
import tempfile
from pathlib import Path

from tally.errors import StorageError
from tally.optional import install

ROOM = 1 << 30
"""Free bytes below which a disk is worth a warning."""

EXTRAS = {
    "postgres": ("psycopg",),
    "mariadb": ("pymysql",),
    "mongodb": ("pymongo",),
    "ray": ("ray",),
    "sklearn": ("scikit-learn", "skops"),
    "torch": ("torch", "safetensors"),
    "transformers": ("torch", "transformers", "huggingface_hub"),
    "pictures": ("imagecodecs", "pillow-heif", "pydicom", "resvg-py"),
    "keras": ("keras", "h5py"),
    "litert": ("ai-edge-litert",),
    "tensorflow": ("tensorflow",),
    "train": ("torch", "safetensors", "onnxscript", "tensorboard"),
    "retrain": ("onnx", "tensorboard"),
    "sweep": ("optuna",),
    "mlflow": ("mlflow-skinny",),
    "excel": ("openpyxl",),
    "avro": ("fastavro",),
    "xgboost": ("xgboost-cpu" if sys.platform == "linux" else "xgboost",),
    "lightgbm": ("lightgbm",),
    "catboost": ("catboost",),
    "rabbitmq": ("pika",),
    "redis": ("redis",),
    "sqs": ("boto3",),
    "kafka": ("confluent-kafka",),
    "azure-queue": ("azure-storage-queue", "azure-identity"),
    "servicebus": ("azure-servicebus", "azure-identity"),
    "server": ("fastapi", "uvicorn"),
    "grpc": ("grpcio", "protobuf"),
    "oidc": ("authlib",),
    "kubernetes": ("lightkube",),
    "notebook": ("jupyterlab", "matplotlib"),
    "otel": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
}
"""Optional dependencies by the name of the extra that brings them; a test keeps the names true. What only authors of
extensions need (``testing``) is left out."""


class Warn(Exception):  # noqa: N818 - an outcome, not an error
    """The check found something that works, but is worth knowing."""


class Skip(Exception):  # noqa: N818
    """There is nothing to check; the text says what to install or set first."""


def python() -> str:
    """Versions of Tally, Python and of the libraries that do the work."""
    names = ("onnxruntime", "pyarrow", "duckdb", "pillow", "av", "obstore", "sqlalchemy", "pebble")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}; {versions}"


def extras() -> str:
    """Which of the optional dependencies are installed."""
    there, missing = [], []
    for extra, distributions in EXTRAS.items():
        versions = [version_of(each) for each in distributions]
        if all(versions):
            there.append(f"{extra} ({', '.join(f'{a} {b}' for a, b in zip(distributions, versions, strict=True))})")
        else:
            missing.append(extra)
    text = ", ".join(there) or "none installed"
    return f"{text}; to have more: {install(','.join(missing))}" if missing else text


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def home() -> str:
    """Whether Tally's folder can be written to, and has room."""
    from tally.config import make_private, settings

    folder = settings().home
    try:
        make_private(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        readable = [
            str(each) for each in (folder, folder / "tally.db") if each.exists() and each.stat().st_mode & 0o077
        ]
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written to: {error.strerror}",
            hint="Set TALLY_HOME to a folder that can be written to.",
        ) from None
    text = _room(folder, f"{folder} can be written to")
    if (owner := folder.stat().st_uid) != os.geteuid():
        raise Warn(
            f"{text}; but it belongs to {_user(owner)}, and this is {_user(os.geteuid())}: each may be unable to use "
            "what the other makes there. Set TALLY_HOME to a folder of your own"
        )
    if readable:
        raise Warn(f"{text}; others may look into it, and it holds what you score: chmod go= {' '.join(readable)}")
    return text


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # as in containers
        return f"user {number}"


def temporary() -> str:
    """Room for temporary files."""
    return _room(Path(tempfile.gettempdir()), tempfile.gettempdir())


def _room(folder: Path, text: str) -> str:
    free = shutil.disk_usage(folder).free
    text = f"{text}, {free / 2**30:,.1f} GiB free"
    if free < ROOM:
        raise Warn(text)
    return text


def models() -> str:
    """What ONNX Runtime can run on."""
    import onnxruntime

    # The provider called Azure calls a web service, which Tally never does.
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return "ONNX Runtime runs on " + ", ".join(name for name in providers if name != "Azure")


def pictures() -> str:
    """What pictures are decoded with."""
    from PIL import Image, features

    Image.init()
    turbo = "libjpeg-turbo" if features.check("libjpeg_turbo") else "plain libjpeg, which is slow"
    return f"{len(Image.OPEN)} formats, {turbo}"


def videos() -> str:
    """Which encoders there are."""
    from tally.media.video.encode import DEFAULTS, HARDWARE
    from tally.media.video.encoders import encoders

    found = encoders("mp4")
    hardware = [codec for codec in found if codec.endswith(HARDWARE)]
    text = f"FFmpeg through PyAV {importlib.metadata.version('av')}; {len(found)} encoders, hardware: "
    text += ", ".join(hardware) or "none"
    missing = [codec for codec in dict.fromkeys(DEFAULTS.values()) if codec not in {**found, **encoders("webm")}]
    if missing:
        raise Warn(f"{text}; {', '.join(missing)} is missing: name another with --codec")
    return text


def tables() -> str:
    """What tables are read with."""
    import duckdb
    import pyarrow as pa

    duckdb.connect().close()
    return f"DuckDB {duckdb.__version__}, Arrow {pa.__version__}"


def workers() -> str:
    """Whether a worker process starts and answers."""
    from tally.engines.base import Limits
    from tally.engines.local import LocalEngine

    engine = LocalEngine()
    slots = engine.default_slots()
    memory = engine.default_memory(slots) or 0
    engine.start(dict, (), slots=1, limits=Limits())
    try:
        engine.submit(_hello).result(timeout=20)
    finally:
        engine.stop(kill=True)
    return f"a worker started and answered; default: {slots} workers of at most {memory / 2**30:,.1f} GiB"


def _hello(state: object) -> int:
    return os.getpid()
