"""From a vision model's outputs to rows and pictures; :mod:`tally.scorers.vision.detection` decodes boxes.

Pictures are ``uint8[height, width, 3]`` RGB. Sizes are ``(width, height)`` in pixels. A *tensor* is what the model is
given for one picture. All functions are pure and thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from tally.scorers.base import Row
from tally.scorers.vision.preprocess import Array, Prepared, Size


def probabilities(scores: Array, *, softmax: bool) -> Array:
    """One picture's class scores, any shape with at most one axis longer than 1, as ``float32[classes]``.

    softmax: applied, or the scores are kept as they are. uint8 scores are then probabilities in units of 1/256.
    One score alone is that of the second of two classes; for it, the sigmoid function takes the place of softmax.
    """
    if scores.dtype == np.uint8 and not softmax:
        return scores.reshape(-1).astype(np.float32) / 256
    values: Array = scores.reshape(-1).astype(np.float32)
    if values.size == 1:
        if not softmax:
            return np.array([1 - values[0], values[0]], np.float32)
        values = np.array([0, values[0]], np.float32)  # softmax of these is the sigmoid
    if not softmax:
        return values
    values = np.exp(values - values.max())
    values /= values.sum()
    return values


def classify_rows(
    scores: Array, name: Callable[[int], str], *, top: int | None, softmax: bool, threshold: float | None = None
) -> Row | list[Row]:
    """The best class as ``label, index, score``; where ``top`` is not 1, the best ones (None: all), with their ``rank``
    from 1. Equal scores are ranked by index.

    threshold: only classes that score more. Of one score for two classes, which are not independent, the second is it
    above, and otherwise the first.
    """
    values = probabilities(scores, softmax=softmax)
    if scores.size == 1 and threshold is not None:
        order = [int(values[1] > threshold)]
    elif top == 1:
        order = [int(values.argmax())]
    else:
        order = np.argsort(-values, kind="stable").tolist()
    if scores.size > 1 and threshold is not None:
        order = [i for i in order if values[i] > threshold]
    rows: list[Row] = [{"label": name(i), "index": i, "score": float(values[i])} for i in order[:top]]
    if top == 1:
        return rows[0] if rows else []
    return [{**row, "rank": rank} for rank, row in enumerate(rows, start=1)]


def label_map(output: Array, spatial: tuple[int, int], *, channels_last: bool, logits: bool = False) -> Array:
    """Class index of every output pixel, ``int64[h, w]``.

    output: class scores ``[h, w, classes]`` or ``[classes, h, w]`` (told apart by ``spatial``, the tensor's
        height and width, else by ``channels_last``), one foreground score, or class indices ``[h, w]``.
    logits: foreground scores are not probabilities yet.
    """
    if output.ndim == 3 and 1 not in (output.shape[0], output.shape[-1]):
        if output.shape[:2] == spatial:
            channels_last = True
        elif output.shape[1:] == spatial:
            channels_last = False
        return np.asarray(output.argmax(axis=-1 if channels_last else 0))
    flat = output
    if output.ndim == 3:
        last = output.shape[-1] == 1 and (channels_last or output.shape[0] != 1)
        flat = output.squeeze(-1 if last else 0)
    if np.issubdtype(flat.dtype, np.integer):
        return flat.astype(np.int64)
    return (flat > (0.0 if logits else 0.5)).astype(np.int64)


def segment_rows(classes: Array, prepared: Prepared, tensor_size: Size, name: Callable[[int], str]) -> list[Row]:
    """``label, index, pixels, share`` of every class in a label map of the whole tensor, letterbox borders left
    out. Shares add up to 1; pixels are those of the original, in proportion."""
    left, top, right, bottom = _region(prepared, tensor_size, (classes.shape[1], classes.shape[0]))
    shown = classes[round(top) : round(bottom), round(left) : round(right)]
    indices, counts = np.unique(shown, return_counts=True)
    shares = counts / shown.size
    pixels = np.rint(shares * (prepared.width * prepared.height))
    return [
        {"label": name(int(i)), "index": int(i), "pixels": int(n), "share": float(share)}
        for i, n, share in zip(indices, pixels, shares, strict=True)
    ]


def restore_map(classes: Array, prepared: Prepared, tensor_size: Size) -> Array:
    """A label map of the whole tensor to the original's size (nearest), letterbox borders cut off."""
    left, top, right, bottom = _region(prepared, tensor_size, (classes.shape[1], classes.shape[0]))
    columns = left + (np.arange(prepared.width) + 0.5) * ((right - left) / prepared.width)
    rows = top + (np.arange(prepared.height) + 0.5) * ((bottom - top) / prepared.height)
    restored: Array = classes[rows.astype(np.intp)][:, columns.astype(np.intp)]
    return restored


def restore_image(picture: Array, prepared: Prepared, tensor_size: Size) -> Array:
    """A picture of the whole tensor to the original's size, letterbox borders cut off."""
    height, width = picture.shape[:2]
    extra = (width - tensor_size[0], height - tensor_size[1])
    if max(extra) < 32 and min(extra) >= 0:
        # rounded up to a multiple of the model's stride: the surplus is at the right and at the bottom
        picture = picture[: tensor_size[1], : tensor_size[0]]
    left, top, right, bottom = map(round, _region(prepared, tensor_size, (picture.shape[1], picture.shape[0])))
    # cut first: a filter that is given a box still looks at the border's colour around it
    picture = np.ascontiguousarray(picture[top : max(bottom, top + 1), left : max(right, left + 1)])
    if picture.shape[:2] == (prepared.height, prepared.width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((prepared.width, prepared.height), Image.Resampling.BICUBIC))


def _region(prepared: Prepared, tensor_size: Size, output_size: Size) -> tuple[float, float, float, float]:
    x, y = output_size[0] / tensor_size[0], output_size[1] / tensor_size[1]
    left, top, right, bottom = prepared.region
    return left * x, top * y, right * x, bottom * y
