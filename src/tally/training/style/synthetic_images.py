"""Synthetic pictures, so that training a style needs no other picture than the style.

They show nothing in particular, but have edges, gradients and detail of every size and contrast, as photographs do.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

_STEEPNESS = (0.6, 1.6)
"""Exponents of 1/f^x noise, from rough to smooth; natural pictures have about 1."""


def draw(rng: np.random.Generator, size: int) -> Pixels:
    """A random scene ``uint8[size, size, 3]``: textured shapes on a coloured, cloudy background."""
    scene = _clouds(rng, size)
    for _ in range(int(rng.integers(3, 12))):
        scene.paste(_clouds(rng, size), mask=_shape(rng, size))
    return np.asarray(scene)


def _clouds(rng: np.random.Generator, size: int) -> Image.Image:
    """Noise of all sizes between two colours, over a gradient."""
    first, second = rng.uniform(0, 255, (2, 3))
    angle, weight = rng.uniform(0, 2 * math.pi), rng.uniform(0, 1)
    ramp = np.linspace(-1, 1, size)
    gradient = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]) + 1 / size
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / frequency ** rng.uniform(*_STEEPNESS)
    noise = np.fft.irfft2(spectrum, (size, size))
    tone = weight * gradient + (1 - weight) * noise / (noise.std() + 1e-6)
    share = (0.5 + rng.choice([0, 0.1, 0.4]) * tone).clip(0, 1)[:, :, None]
    return Image.fromarray((first + (second - first) * share).astype(np.uint8))


def _shape(rng: np.random.Generator, size: int) -> Image.Image:
    """A mask (mode ``L``) of a polygon, an ellipse or a few lines."""
    mask = Image.new("L", (2 * size, 2 * size))  # twice the size, because ImageDraw has no antialiasing
    pen = ImageDraw.Draw(mask)
    centre, radius = rng.uniform(0, 2 * size, 2), size * rng.uniform(0.08, 0.9)
    kind = rng.integers(3)
    if kind == 0:
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 8))))
        corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        pen.polygon([(x, y) for x, y in corners.tolist()], fill=255)
    elif kind == 1:
        half = radius * rng.uniform(0.3, 1, 2)
        (left, top), (right, bottom) = (centre - half).tolist(), (centre + half).tolist()
        pen.ellipse((left, top, right, bottom), fill=255)
    else:
        for _ in range(int(rng.integers(1, 9))):
            (x, y), (u, v) = rng.uniform(0, 2 * size, (2, 2)).tolist()
            pen.line([(x, y), (u, v)], fill=255, width=int(rng.integers(2, 14)))
    return mask.reduce(2)
