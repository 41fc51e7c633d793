"""The contenders of shards.py, as somebody would write them without Tally: one command each.

    python _shard_contenders.py (webdataset|ray-tar|ray-parquet) FOLDER MODEL.json COUNT OUT.parquet

All decode and preprocess in the same way, with one ONNX Runtime thread in each process that scores, in batches of the
same size. They keep the results in memory and write one Parquet file at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _contenders import Model, Progress, Rows, cores, ray_answer, save, scored_by_ray
from tally.media.images import decode
from tally.scorers.base import Item
from tally.scorers.vision.preprocess import Preprocess, Preprocessor


class Prepare:
    """A picture's file to what the model is given."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.size = tuple(described["size"])
        self.preprocess = Preprocessor(Preprocess(**described["preprocess"]))

    def __call__(self, content: bytes) -> np.ndarray[Any, Any]:
        pixels, info = decode(content, self.size)
        return self.preprocess(Item("a picture", pixels, info)).tensor


def best(model: Model, names: Sequence[str], tensors: np.ndarray[Any, Any]) -> Rows:
    (scores,) = model.session.run(None, {model.input: tensors})
    found = scores.argmax(1)
    return [(name, int(index), float(each[index])) for name, index, each in zip(names, found, scores, strict=True)]


# -- WebDataset and a DataLoader -------------------------------------------------------------------


def webdataset(folder: Path, described: dict[str, Any], progress: Progress) -> Rows:
    """Worker processes of the DataLoader decode shards, each its own; the model is in the main one."""
    import torch
    import webdataset as wds

    prepare, model = Prepare(described), Model(described)

    def prepared(pair: tuple[str, bytes]) -> tuple[str, np.ndarray[Any, Any]]:
        return f"{pair[0]}.jpg", prepare(pair[1])

    dataset = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
    dataset = dataset.to_tuple("__key__", "jpg").map(prepared)
    loader = torch.utils.data.DataLoader(dataset, batch_size=described["batch_size"], num_workers=cores())
    rows: Rows = []
    for names, tensors in loader:
        rows += best(model, names, tensors.numpy())
        progress(len(names))
    return rows


# -- Ray Data --------------------------------------------------------------------------------------


class _Actor:
    def __init__(self, described: dict[str, Any]) -> None:
        self.prepare, self.model = Prepare(described), Model(described)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "image" in batch:
            names, contents = zip(*((each["path"], each["bytes"]) for each in batch["image"]), strict=True)
        else:
            names, contents = [f"{key}.jpg" for key in batch["__key__"]], batch["jpg"]
        return ray_answer(best(self.model, names, np.stack([self.prepare(content) for content in contents])))


def ray(folder: Path, described: dict[str, Any], progress: Progress) -> Rows:
    """What Ray's own reader of the form gives."""
    import ray as r

    # Its readers want a CPU, too: where the actors have them all, Ray stands still.
    r.init(num_cpus=2 * cores(), include_dashboard=False, log_to_driver=False, logging_level="error")
    r.data.DataContext.get_current().enable_progress_bars = False
    tars = sorted(map(str, folder.glob("*.tar")))
    dataset = r.data.read_webdataset(tars, decoder=None) if tars else r.data.read_parquet(str(folder))
    return scored_by_ray(dataset, _Actor, described, progress)


CONTENDERS: dict[str, Callable[[Path, dict[str, Any], Progress], Rows]] = {
    "webdataset": webdataset,
    "ray-tar": ray,
    "ray-parquet": ray,
}


if __name__ == "__main__":
    name, given, model, count, out = sys.argv[1:]
    save(CONTENDERS[name](Path(given), json.loads(Path(model).read_text()), Progress(int(count))), out)
    print("saved", flush=True)
