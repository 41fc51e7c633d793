"""Draw scenes: pictures of four shapes, two beside two, as the detector of this example knows them.

    python make_scenes.py OUT --count 60 --seed 7

The same seed draws the same scenes. Only Tally is needed.
"""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path

from PIL import Image, ImageOps

from tally.demo.pictures import SHAPES, draw_picture

SIDE = 128
"""Width and height of one shape's tile, in pixels."""


def shapes_of(number: int, seed: int) -> list[str]:
    """The shapes of a scene, row by row."""
    return random.Random(f"{seed}/{number}").choices(sorted(SHAPES), k=4)


def draw_scene(number: int, seed: int) -> Image.Image:
    """One scene, 256 pixels square."""
    scene = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for place, shape in enumerate(shapes_of(number, seed)):
        tile = ImageOps.exif_transpose(Image.open(io.BytesIO(draw_picture(shape, 4 * number + place, seed))))
        scene.paste(tile.resize((SIDE, SIDE)), (place % 2 * SIDE, place // 2 * SIDE))
    return scene


def main(argv: list[str] | None = None) -> None:
    """Write scenes, and say where they are."""
    parser = argparse.ArgumentParser(description="Draw scenes of four shapes.")
    parser.add_argument("out", type=Path, help="folder for the scenes; made if it is missing")
    parser.add_argument("--count", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--seed", type=int, default=7, help="another seed, other scenes (default: 7)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for number in range(options.count):
        draw_scene(number, options.seed).save(options.out / f"scene-{number:04d}.jpg", quality=90)
    print(f"{options.count} scenes in {options.out}")


if __name__ == "__main__":
    main()
