"""Draw the style picture of the example: curved brush strokes in seven colours.

    python make_style_picture.py style.png [--size 512] [--seed 3]

The same seed draws the same picture. Only numpy and Pillow are needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PALETTE = np.array(
    [
        (16, 22, 54),  # ink
        (24, 58, 128),  # ultramarine
        (28, 122, 146),  # teal
        (196, 62, 44),  # vermilion
        (240, 150, 48),  # amber
        (250, 206, 112),  # straw
        (252, 240, 208),  # cream
    ],
    float,
)
"""RGB, from dark to light."""

SUPERSAMPLING = 2  # ImageDraw has no antialiasing


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """``float32[size, size]`` in 0 … 1, one random value for each of ``cells`` × ``cells``, smoothly joined."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def stroke(
    pen: ImageDraw.ImageDraw, rng: np.random.Generator, flow: np.ndarray, start: np.ndarray, colour: np.ndarray
) -> None:
    """One pull of the brush along the flow: a dark rim, then bristles of slightly different colours."""
    size, point, path = len(flow), start, [start]
    scale = size / 512
    for _ in range(int(rng.integers(10, 22))):
        x, y = np.clip(point, 0, size - 1).astype(int)
        angle = flow[y, x]
        point = point + scale * 3 * np.array([np.cos(angle), np.sin(angle)])
        path.append(point)
    line = np.array(path)
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-6)
    width = scale * rng.uniform(4.5, 8)
    taper = np.sin(np.linspace(0.25, np.pi - 0.15, len(line)))[:, None] ** 0.5

    def pull(offset: float, shade: np.ndarray, thickness: float) -> None:
        points = line + across * offset * taper
        fill = tuple(int(channel) for channel in shade.clip(0, 255))
        pen.line([(x, y) for x, y in points.tolist()], fill=fill, width=max(1, round(thickness)), joint="curve")

    for side in (-1, 1):
        pull(side * width * 0.62, colour * 0.45, scale * 2.2)
    for offset in np.linspace(-0.5, 0.5, 9):
        light = rng.normal(0, 13) + 22 * np.cos(3 * offset)
        pull(offset * width, colour + light, width / 6)


def draw_picture(size: int, seed: int) -> Image.Image:
    """The style picture, RGB, ``size`` pixels per side."""
    rng = np.random.default_rng(seed)
    wide = size * SUPERSAMPLING
    tone = 0.6 * smooth_noise(rng, wide, 6) + 0.4 * smooth_noise(rng, wide, 12)
    tone = (np.argsort(np.argsort(tone, axis=None)) / tone.size).reshape(tone.shape)  # every colour equally often
    flow = 2.2 * np.pi * smooth_noise(rng, wide, 5) + 0.8 * smooth_noise(rng, wide, 11)
    picture = Image.new("RGB", (wide, wide), tuple(PALETTE[0].astype(int)))
    pen = ImageDraw.Draw(picture)
    for _ in range(4200):
        start = rng.uniform(-0.05, 1.05, 2) * wide
        x, y = np.clip(start, 0, wide - 1).astype(int)
        place = tone[y, x] + rng.normal(0, 0.07)
        colour = PALETTE[int(np.clip(place * len(PALETTE), 0, len(PALETTE) - 1))]
        stroke(pen, rng, flow, start, colour)
    return picture.reduce(SUPERSAMPLING)


def main(argv: list[str] | None = None) -> None:
    """Draw it, and say where it is."""
    parser = argparse.ArgumentParser(description="Draw a picture of brush strokes.")
    parser.add_argument("out", type=Path, help="an image file")
    parser.add_argument("--size", type=int, default=512, help="pixels per side (default: 512)")
    parser.add_argument("--seed", type=int, default=3, help="another seed, another picture (default: 3)")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(options.size, options.seed).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
