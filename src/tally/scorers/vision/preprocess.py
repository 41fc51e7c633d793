"""From a picture to the tensor that a vision model is given, in numpy and Pillow.

Pictures are ``uint8[height, width, 3]`` RGB. Sizes are ``(width, height)`` in pixels. A *tensor* is what the model is
given for one picture, ``[channels, height, width]`` or ``[height, width, channels]``. All functions are pure and
thread-safe.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tally.errors import ItemError
from tally.scorers.base import Item

Array: TypeAlias = "np.ndarray[Any, Any]"
Size: TypeAlias = tuple[int, int]

MAX_SIDE = 16384
"""Pixels. A larger input is a mistake, and would not fit into memory."""

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def _as_size(value: Any) -> Any:
    if isinstance(value, str):
        value = [int(part) if part.strip().isdigit() else part for part in value.lower().split("x")]
    if isinstance(value, int):
        value = [value]
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 2):
        raise ValueError("give one number of pixels, or width and height")
    if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in value):
        raise ValueError(f"width and height must be whole numbers from 1 to {MAX_SIDE}")
    return (value[0], value[-1])


def _as_numbers(value: Any) -> Any:
    """A number stands for all channels."""
    if value is None:
        return None
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise ValueError("give a number, or a list with one number for each channel") from None
    if len(numbers) not in (1, 3) or not all(math.isfinite(n) for n in numbers):
        raise ValueError("give one finite number, or three")
    return numbers


def _as_colour(value: Any) -> Any:
    numbers = _as_numbers(value)
    if numbers is None:
        return None
    if not all(0 <= n <= 255 and n == int(n) for n in numbers):
        raise ValueError("a colour is one or three whole numbers from 0 to 255")
    return tuple(int(n) for n in numbers) * (3 if len(numbers) == 1 else 1)


def _as_factor(value: Any) -> Any:
    """A number, or a fraction as people write it: ``1/255``."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*([\d.]+)\s*/\s*([\d.]+)\s*", value)):
        try:
            return float(found[1]) / float(found[2])
        except (ValueError, ZeroDivisionError):
            return value
    return value


Numbers = Annotated[tuple[float, ...] | None, BeforeValidator(_as_numbers)]


class Preprocess(BaseModel):
    """How a picture becomes the model's tensor. What is left out is inferred from the model.

    size: (width, height) in pixels, or one number for a square; None: the picture as it is.
    resize: ``squash`` to the size; ``crop``: the shorter side to ``shorter`` pixels, then the centre;
        ``letterbox``: fit inside, the rest is ``fill`` (RGB), the picture at ``anchor``.
    scale, mean, std: a pixel x in 0..255 becomes ``(x * scale - mean) / std``. Mean and std are one number or
        one for each channel, in the model's channel order (blue first for ``bgr``). Scale may be a fraction: ``1/255``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[Size | None, BeforeValidator(_as_size)] = None
    resize: Literal["squash", "crop", "letterbox"] | None = None
    shorter: Annotated[int, Field(ge=1, le=MAX_SIDE)] | None = None
    fill: Annotated[tuple[int, int, int] | None, BeforeValidator(_as_colour)] = None
    anchor: Literal["top-left", "center"] | None = None
    interpolation: Literal["bilinear", "nearest", "bicubic"] | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    channels: Literal["rgb", "bgr", "gray"] | None = None
    dtype: Literal["uint8", "float16", "float32"] | None = None
    scale: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, BeforeValidator(_as_factor)] = None
    mean: Numbers = None
    std: Numbers = None

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        problems = []
        if self.std and 0.0 in self.std:
            problems.append("std: must not be 0")
        if self.resize == "crop" and self.size and self.shorter and self.shorter < max(self.size):
            problems.append(f"shorter: {self.shorter} is less than the {max(self.size)} pixels to be cut out")
        if self.channels == "gray" and 3 in (len(self.mean or ()), len(self.std or ())):
            problems.append("mean, std: three numbers given, but gray has one channel")
        mean, std = [abs(n) for n in self.mean or () if n], self.std or ()
        most = 255 * (self.scale or 1.0)
        if self.scale in (None, 1.0) and any(values and max(values) < 1 for values in (mean, std)):
            problems.append("scale: mean and std below 1 are for pixels in 0..1, so write scale: 1/255 too")
        elif (largest := max(mean, default=0.0)) > most:
            problems.append(
                f"mean: {largest:g} is more than any pixel, as scale makes them 0..{most:g} before the mean is "
                f"subtracted: write it on that scale ({largest * most / 255:g}), or leave scale out"
            )
        if self.dtype == "uint8" and not self.identity:
            problems.append("dtype: uint8 takes pixels as they are; scale, mean and std do not go with it")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def identity(self) -> bool:
        """Whether pixels keep their values 0..255."""
        return self.scale in (None, 1.0) and not any(self.mean or ()) and set(self.std or ()) <= {1.0}


MADE_UP_SIZE = (224, 224)
"""Of made-up pictures for models that take any size."""


def made_up_pictures(size: Size) -> list[Array]:
    """Pictures ``uint8[h, w, 3]``, always the same: gradients with noise as in photos, a black and a white one."""
    width, height = size
    across, down = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    planes = np.stack([across + 0 * down, down + 0 * across, 255 - (across + down) / 2], axis=2)
    noise = np.random.default_rng(0).normal(0, 25, planes.shape)
    picture: Array = np.clip(np.rint(planes + noise), 0, 255).astype(np.uint8)
    return [picture, np.zeros_like(picture), np.full_like(picture, 255)]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One picture, ready for the model, and how to get from the tensor back to the original.

    width, height: of the original, in pixels. scale: tensor pixels per original pixel, in x and y.
    offset: where the original's top-left corner lies, in tensor pixels.
    region: left, top, right, bottom of the part of the tensor that shows the picture.
    """

    key: str
    tensor: Array
    width: int
    height: int
    scale: tuple[float, float]
    offset: tuple[float, float]
    region: tuple[int, int, int, int]

    def original(self, boxes: Array) -> Array:
        """Boxes ``[n, 4]`` in tensor pixels to boxes in pixels of the original, not clipped to it."""
        return self.points(boxes.reshape(-1, 2, 2)).reshape(-1, 4)

    def points(self, points: Array) -> Array:
        """Likewise points: x and y on the last axis."""
        moved: Array = (points - np.array(self.offset, np.float32)) / np.array(self.scale, np.float32)
        return moved


class Preprocessor:
    """Applies one :class:`Preprocess`; what that leaves out is plain: RGB, 0..255, NCHW, squash."""

    def __init__(self, spec: Preprocess) -> None:
        self.size = spec.size
        self.resize = spec.resize or "squash"
        self.shorter = spec.shorter or (round(max(spec.size) * 256 / 224) if spec.size else 0)
        self.fill = spec.fill or (114, 114, 114)
        self.anchor = spec.anchor or "top-left"
        self.filter = _FILTERS[spec.interpolation or "bilinear"]
        self.nchw = spec.layout != "nhwc"
        self.channels = spec.channels or "rgb"
        self.dtype = np.dtype(spec.dtype or "float32")
        self.identity = spec.identity
        mean, std = np.array(spec.mean or (0.0,)), np.array(spec.std or (1.0,))
        count = 1 if self.channels == "gray" else 3
        # (x * scale - mean) / std as x * gain + shift, in one pass
        self.gain = np.broadcast_to(((spec.scale or 1.0) / std).astype(np.float32), count)
        self.shift = np.broadcast_to((-mean / std).astype(np.float32), count)

    def __call__(self, item: Item) -> Prepared:
        """Resize and normalise one picture ``uint8[h, w, 3]``. Raises ItemError for anything else."""
        value = item.value
        if not (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3):
            raise ItemError(f"{item.key}: not a decoded picture (uint8[height, width, 3])", stage="prepare")
        width = int(item.info.get("width", value.shape[1]))
        height = int(item.info.get("height", value.shape[0]))
        if self.channels != "gray" and self._fits(value):
            scale = value.shape[1] / width, value.shape[0] / height
            region = 0, 0, value.shape[1], value.shape[0]
            return Prepared(item.key, self.tensor(value), width, height, scale, (0.0, 0.0), region)
        image = Image.fromarray(value)
        if self.channels == "gray":
            image = image.convert("L")
        image, scale, offset, region = self._fit(image, width, height)
        return Prepared(item.key, self.tensor(image), width, height, scale, offset, region)

    def _fits(self, picture: Array) -> bool:
        """Whether a picture is taken as it is."""
        return self.size is None or (self.resize == "squash" and picture.shape[1::-1] == self.size)

    def _fit(
        self, image: Image.Image, width: int, height: int
    ) -> tuple[Image.Image, tuple[float, float], tuple[float, float], tuple[int, int, int, int]]:
        # Proportions come from the original's size: the picture may have been decoded at a reduced scale.
        target_width, target_height = self.size or (width, height)
        whole = (0, 0, target_width, target_height)
        if self.resize == "crop" and self.size:
            factor = self.shorter / min(width, height)
            wide, high = round(width * factor), round(height * factor)
            left, top = (wide - target_width) // 2, (high - target_height) // 2
            cut = (left, top, left + target_width, top + target_height)
            if max(wide, high) <= 8 * self.shorter:
                # Resizing only what is cut out (below) would save half the time, but rounds differently from
                # what models are trained and checked with: probabilities move by 0.01.
                image = image.resize((wide, high), self.filter).crop(cut)
            else:  # a ribbon: as a whole it might not fit into memory
                x, y = image.width / wide, image.height / high
                box = (cut[0] * x, cut[1] * y, cut[2] * x, cut[3] * y)
                image = image.resize(self.size, self.filter, box=box)
            return image, (wide / width, high / height), (-left, -top), whole
        if self.resize == "letterbox" and self.size:
            factor = min(target_width / width, target_height / height)
            wide, high = max(1, int(width * factor)), max(1, int(height * factor))
            centred = self.anchor == "center"
            left = (target_width - wide) // 2 if centred else 0
            top = (target_height - high) // 2 if centred else 0
            canvas = Image.new(image.mode, self.size, self.fill if image.mode == "RGB" else self.fill[0])
            canvas.paste(image.resize((wide, high), self.filter), (left, top))
            return canvas, (factor, factor), (left, top), (left, top, left + wide, top + high)
        if self.size and image.size != self.size:
            image = image.resize(self.size, self.filter)
        return image, (image.width / width, image.height / height), (0.0, 0.0), (0, 0, *image.size)

    def tensor(self, image: Image.Image | Array) -> Array:
        """The normalised tensor of an image that has its final size; no memory of it is shared."""
        pixels: Array = np.asarray(image)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if self.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        if self.nchw:
            pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))  # while they are bytes: that is faster
        if self.dtype == np.uint8 or self.identity:
            return np.array(pixels, self.dtype, order="C")
        out: Array = np.empty(pixels.shape, np.float32)
        out[...] = pixels
        if self.nchw:
            out *= self.gain[:, None, None]
            out += self.shift[:, None, None]
        else:
            # whole rows at once: numpy is six times slower on an innermost axis of three
            rows = out.reshape(out.shape[0], -1)
            rows *= np.tile(self.gain, out.shape[1])
            rows += np.tile(self.shift, out.shape[1])
        return out.astype(self.dtype, copy=False)

    def pixels(self, tensor: Array) -> Array:
        """The inverse of :meth:`tensor` for a model's output in the same value range and channel order:
        ``uint8[h, w, 3]`` RGB, clipped."""
        values = tensor.astype(np.float32, copy=False)
        if values.shape[0] in (1, 3) and (self.nchw or values.shape[-1] not in (1, 3)):
            values = values.transpose(1, 2, 0)
        if values.shape[2:] != (3,):
            values = np.broadcast_to(values, (*values.shape[:2], 3))
        picture: Array = np.empty(values.shape, np.uint8)
        # A channel at a time, which stays in the processor's cache; a pixel at a time takes four times as long.
        for at in range(3):
            channel = 2 - at if self.channels == "bgr" else at
            plane = values[:, :, channel]
            if not self.identity:
                plane = plane - self.shift[channel % len(self.shift)]
                plane /= self.gain[channel % len(self.gain)]
            plane = np.rint(plane)
            picture[:, :, at] = np.clip(plane, 0, 255, out=plane).astype(np.uint8)
        return picture
