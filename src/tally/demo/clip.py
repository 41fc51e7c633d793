"""A drawn clip with sound: a bay under a low sun, a balloon, a boat, birds, and a tune for them.

H.264 with AAC in stereo. The same seed draws the same frames; they are encoded as they are drawn, so that a clip of an
hour needs no more memory than one of a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SAMPLE_RATE = 48_000  # per second
SUPERSAMPLING = 2  # ImageDraw has no antialiasing
HORIZON = 0.62  # of the height, from above

SKY = [(38, 70, 128), (110, 150, 190), (248, 214, 160), (252, 176, 110)]  # from above to the horizon
SEA = [(236, 170, 120), (70, 128, 150), (20, 62, 96)]  # from the horizon down
RIDGES: list[tuple[float, float, float, Colour]] = [
    # height and roughness in shares of the height, pixels per second at a height of 180, colour
    (0.20, 0.08, 2, (122, 128, 160)),
    (0.12, 0.07, 5, (86, 96, 120)),
]
SHORE: Colour = (40, 74, 52)


class Scene:
    """What is to be seen at any moment of a clip of ``size`` (width, height) pixels, even numbers."""

    def __init__(self, size: tuple[int, int], seed: int) -> None:
        self.size = size
        self.width, self.height = size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING
        self.unit = self.height / 180
        rng = np.random.default_rng(seed)
        self.phases = rng.uniform(0, 2 * math.pi, (4, 5))
        self.clouds = [(rng.uniform(0, 1.4), rng.uniform(0.06, 0.34), rng.uniform(0.6, 1.3)) for _ in range(7)]
        self.puffs = rng.uniform(-1, 1, (7, 6, 2))
        self.waves = rng.uniform(0, 1, (130, 3))
        self.trees = rng.uniform(0, 1, (60, 3))
        self.birds = rng.uniform(-1, 1, (6, 2))
        self.ground = self._ground()

    def _ground(self) -> Image.Image:
        """Sky and sea without what moves: bands of colour, each running into the next."""
        horizon = round(self.height * HORIZON)
        rows = []
        for colours, count in ((SKY, horizon), (SEA, self.height - horizon)):
            at = np.linspace(0, len(colours) - 1, count)
            channels = [np.interp(at, range(len(colours)), channel) for channel in zip(*colours, strict=True)]
            rows.append(np.stack(channels, axis=1))
        column = np.concatenate(rows).round().astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(column[:, None], (self.height, self.width, 3))))

    def draw(self, time: float) -> Image.Image:
        """The frame at ``time`` seconds, RGB."""
        picture = self.ground.copy()
        pen = ImageDraw.Draw(picture)
        self._sun(pen, time)
        self._clouds(pen, time)
        for number, (high, rough, speed, fill) in enumerate(RIDGES):
            self._ridge(pen, self.phases[number], HORIZON, high, rough, speed * time, fill)
        self._waves(pen, time)
        self._boat(pen, time)
        self._balloon(pen, time)
        self._birds(pen, time)
        self._shore(pen, time)
        return picture.reduce(SUPERSAMPLING)

    def _sun(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        x = self.width * (0.72 + 0.05 * math.sin(time / 9))
        y = self.height * (0.38 + 0.06 * math.sin(time / 7))
        for share, colour in ((1.0, (252, 206, 140)), (0.8, (254, 226, 160)), (0.6, (255, 246, 214))):
            radius = 27 * self.unit * share
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def _clouds(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        for (start, level, wide), puffs in zip(self.clouds, self.puffs, strict=True):
            x = ((start + 0.025 * wide * time) % 1.5 - 0.25) * self.width
            y = level * self.height
            for shade, drop in (((196, 196, 210), 3), ((252, 244, 232), 0)):
                for across, down in puffs.tolist():
                    radius = self.unit * wide * (9 - 4 * abs(across))
                    left, top = x + across * 26 * self.unit * wide, y + (down * 4 + drop) * self.unit
                    pen.ellipse((left - 1.5 * radius, top - radius, left + 1.5 * radius, top + radius), fill=shade)

    def _ridge(
        self, pen: ImageDraw.ImageDraw, phases: Any, base: float, high: float, rough: float, moved: float, fill: Colour
    ) -> None:
        """A range of hills: a sum of sines over the place, which moves past."""
        step = max(1, round(2 * self.unit))
        across = np.arange(0, self.width + step, step)
        place = (across / self.unit + moved) / 90
        rise = sum(np.sin(place * 1.7**n + phase) / 1.6**n for n, phase in enumerate(phases))
        tops = self.height * (base - high - rough * rise / 2)
        line = list(zip(across.tolist(), tops.tolist(), strict=True))
        pen.polygon([(0, self.height * base), *line, (self.width, self.height * base)], fill=fill)

    def _waves(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        for start, depth, length in self.waves.tolist():
            near = 0.2 + depth**1.5
            y = self.height * (HORIZON + 0.01 + (1 - HORIZON) * depth**1.5) + self.unit * math.sin(2 * time + 9 * start)
            x = ((start + 0.03 * near * time) % 1.2 - 0.1) * self.width
            half = self.unit * near * (6 + 14 * length)
            sparkling = abs(x / self.width - 0.72) < 0.05 + 0.1 * depth
            colour = (255, 222, 160) if sparkling else (150, 190, 200) if length > 0.4 else (16, 50, 84)
            pen.line([(x - half, y), (x + half, y)], fill=colour, width=max(1, round(1.6 * self.unit * near)))

    def _boat(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        unit = 1.25 * self.unit
        x = ((0.18 + 0.022 * time) % 1.3 - 0.15) * self.width
        y = self.height * 0.74 + 1.5 * self.unit * math.sin(1.9 * time)
        lean = 1.5 * math.sin(1.3 * time)

        def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
            return [(x + unit * (px - lean * py / 20), y + unit * py) for px, py in points]

        pen.polygon(at((1, -3), (1, -38), (20, -6)), fill=(250, 240, 214))
        pen.polygon(at((-2, -4), (-2, -33), (-15, -6)), fill=(216, 72, 52))
        pen.line(at((0, 0), (0, -40)), fill=(60, 36, 30), width=max(1, round(1.4 * unit)))
        pen.polygon(at((-17, -1), (22, -1), (15, 7), (-12, 7)), fill=(72, 38, 36))

    def _balloon(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        unit = self.unit
        x = self.width * (0.34 + 0.16 * math.sin(time / 6))
        y = self.height * (0.27 + 0.06 * math.sin(time / 2.2))
        stripes = [(206, 54, 48), (248, 196, 72), (40, 110, 140), (248, 196, 72), (206, 54, 48)]
        for stripe, share in zip(stripes, (1.0, 0.78, 0.5, 0.24, 0.08), strict=True):
            pen.ellipse((x - 21 * unit * share, y - 25 * unit, x + 21 * unit * share, y + 25 * unit), fill=stripe)
        for side in (-1, 1):
            ends = [(x + side * 10 * unit, y + 21 * unit), (x + side * 4 * unit, y + 37 * unit)]
            pen.line(ends, fill=(60, 40, 34), width=max(1, round(unit)))
        pen.rectangle((x - 5 * unit, y + 36 * unit, x + 5 * unit, y + 43 * unit), fill=(110, 70, 44))

    def _birds(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        x = ((0.75 + 0.05 * time) % 1.4 - 0.2) * self.width
        for number, (across, down) in enumerate(self.birds.tolist()):
            left, top = x + across * 34 * self.unit, self.height * 0.2 + down * 16 * self.unit
            wing, beat = 6 * self.unit, 4 * self.unit * math.sin(7 * time + 2 * number)
            points = [(left - wing, top - beat), (left, top), (left + wing, top - beat)]
            pen.line(points, fill=(34, 34, 52), width=max(1, round(1.5 * self.unit)), joint="curve")

    def _shore(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        moved = 12 * time
        self._ridge(pen, self.phases[2], 1.0, 0.08, 0.06, moved, SHORE)
        for start, size, tone in self.trees.tolist():
            x = ((start * 460 - moved) % 460 - 60) * self.unit * self.width / self.height / 1.6
            tall = self.unit * (14 + 20 * size)
            foot = self.height * (1.01 - 0.07 * size)
            colour = (30 + round(50 * tone), 84 + round(50 * tone), 44)
            pen.line([(x, foot), (x, foot - tall)], fill=(66, 44, 34), width=max(1, round(2 * self.unit)))
            half, low, top = tall * 0.32, foot - tall * 0.2, foot - tall * 1.15
            pen.polygon([(x - half, low), (x, top), (x + half, low)], fill=colour)


def tune(start: int, count: int, seed: int) -> np.ndarray:
    """``float32[2, count]`` in -1 … 1: the samples from ``start`` on, of plucked notes over a slow bass."""
    beat, lasts = SAMPLE_RATE // 4, SAMPLE_RATE * 2
    sound = np.zeros((2, count), np.float32)
    for number in range(max(0, (start - lasts) // beat), (start + count) // beat + 1):
        rng = np.random.default_rng([seed, number])
        notes = [(0.16, int(rng.choice([0, 2, 4, 7, 9, 12, 14])), rng.uniform(0.2, 0.8))]
        if number % 8 == 0:
            notes.append((0.2, (-24, -17, -19, -12)[number // 8 % 4], 0.5))
        if number % 4 and rng.random() < 0.25:
            continue  # a rest
        begins = number * beat
        first, last = max(start, begins), min(start + count, begins + lasts)
        if first >= last:
            continue
        since = (np.arange(first, last) - begins) / SAMPLE_RATE
        for loud, semitones, right in notes:
            pitch = 2 * math.pi * 392.0 * 2 ** (semitones / 12) * since
            envelope = loud * np.exp(-3.2 * since) * np.minimum(1, since * 200)
            wave = envelope * (np.sin(pitch) + 0.4 * np.sin(2 * pitch) + 0.15 * np.sin(3 * pitch))
            sound[:, first - start : last - start] += np.stack([wave * (1 - right), wave * right])
    return sound.clip(-1, 1)


def frames(size: tuple[int, int], fps: Fraction, count: int, seed: int) -> Iterator[Image.Image]:
    """The clip's pictures, one after another."""
    scene = Scene(size, seed)
    for number in range(count):
        yield scene.draw(float(number / fps))


def draw_clip(path: Path, seconds: float, size: tuple[int, int], fps: Fraction, seed: int) -> int:
    """Write the clip; returns the number of frames."""
    count, samples = max(1, round(seconds * fps)), max(1, round(seconds * SAMPLE_RATE))
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
        audio.bit_rate = 128_000

        done = 0
        for number, picture in enumerate(frames(size, fps, count, seed)):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(video.encode(frame))
            until = min(samples, round((number + 1) / fps * SAMPLE_RATE))
            if until > done:
                sound = av.AudioFrame.from_ndarray(tune(done, until - done, seed), format="fltp", layout="stereo")
                sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE, done, Fraction(1, SAMPLE_RATE)
                container.mux(audio.encode(sound))
                done = until
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return count
