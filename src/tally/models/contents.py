"""What a file is by its content, whatever its name says, and what to do with it: for messages."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

_PICKLED = "Pickles run code when they are opened. Export the model to ONNX, or save weights alone."
_MAGIC = (
    (
        b"\x89HDF",
        "hdf5",
        "an HDF5 file, as Keras writes",
        "Name it with .h5: that is how models of Keras are known.",
    ),
    (b"GGUF", "gguf", "a language model in GGUF", "Tally does not score these; a script of your own can."),
    (b"\x1f\x8b", "packed", "a gzip archive", "Unpack it first."),
    (b"BZh", "packed", "a bzip2 archive", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "packed", "a zstd archive", "Unpack it first."),
    (b"PAR1", "parquet", "a Parquet file", "That is a table; models are scored over it."),
    (b"<", "markup", "a web page or XML", "The download probably failed: fetch the model's file itself."),
)
_TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
"""What the index of a TensorFlow checkpoint ends in."""
_CHECKPOINT = "Save the model itself: model.save('model.keras'), or export it to ONNX with tf2onnx."


class Content(NamedTuple):
    """form: by which code knows it. name: what it is, with its article. hint: what to do."""

    form: str
    name: str
    hint: str


def content_of(path: Path) -> Content | None:
    """What a file is by its first and last bytes, or None where they do not tell. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(264)
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        end = file.read()
    if head[4:8] == b"TFL3":
        return Content("tflite", "a TensorFlow Lite model", "Name it with .tflite: that is how such models are known.")
    if head.startswith(b"PK\x03\x04"):
        return _archived(path)
    for magic, form, name, hint in _MAGIC:
        if head.startswith(magic):
            return Content(form, name, hint)
    if head.startswith((b'{"learner"', b"{L\0\0\0\0\0\0\0\x07learner")):
        return Content("xgboost", "a model of XGBoost", "Name it with .json or .ubj.")
    if head.startswith(b"tree\nversion="):
        return Content("lightgbm", "a model of LightGBM", "Name it with .txt or .lgb.")
    if head.startswith(b"CBM1"):
        return Content("catboost", "a model of CatBoost", "Name it with .cbm.")
    if head[257:262] == b"ustar":
        return Content("packed", "a tar archive", "Unpack it first.")
    if end == _TABLE_END:
        return Content("checkpoint", "the index of a TensorFlow checkpoint, which holds weights alone", _CHECKPOINT)
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < size:
        return Content(
            "safetensors",
            "a file of safetensors, weights alone",
            "Name it with .safetensors, and say whose weights it has.",
        )
    # Pickles begin with the byte 0x80 and the number of their protocol.
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Content("pickle", "a Python pickle", _PICKLED)
    return None


def _archived(path: Path) -> Content:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "metadata.json" in names and "model.weights.h5" in names:
                version = json.loads(archive.read("metadata.json")).get("keras_version", "")
                return Content("keras", f"a model of Keras {version}".rstrip(), "Name it with .keras.")
    except (zipfile.BadZipFile, OSError, ValueError, EOFError):
        return Content("damaged", "a ZIP archive that is damaged or cut off", "Was it copied or downloaded completely?")
    inner = {name.partition("/")[2] for name in names} | set(names)
    if "constants.pkl" in inner and "data.pkl" in inner:
        return Content("torchscript", "a TorchScript program", "Name it with .pt.")
    if "archive_format" in inner and any(each.startswith("models/") for each in inner):
        return Content("exported", "a program that torch.export saved", "Name it with .pt2.")
    if "serialized_exported_program.json" in inner:
        return Content("exported", "a program that torch.export saved", "Name it with .pt2.")
    if "data.pkl" in inner:
        return Content("torch", "a file of torch.save", "Name it with .pt or .pth.")
    if "schema.json" in inner:
        return Content("skops", "a model of skops", "Name it with .skops.")
    some = ", ".join(sorted(names)[:3])
    return Content("zip", f"a ZIP archive ({some}{', ...' if len(names) > 3 else ''})", "Unpack it first.")
