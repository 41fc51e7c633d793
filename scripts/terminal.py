"""Record what a command shows on a terminal as an animated picture: python scripts/terminal.py OUT.gif COMMAND...

Needs pyte (a terminal emulator) and a monospace TrueType font. Nothing is staged: the command runs, here and now.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import time
from dataclasses import dataclass
from fcntl import ioctl
from itertools import pairwise
from pathlib import Path
from struct import pack
from termios import TIOCSWINSZ

import pyte
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf"
SIZE = 15
BACKGROUND, TEXT = (24, 27, 33), (208, 212, 220)
COLOURS = {
    "black": (80, 86, 98), "red": (224, 108, 117), "green": (152, 195, 121), "brown": (229, 192, 123),
    "blue": (97, 175, 239), "magenta": (198, 120, 221), "cyan": (86, 182, 194), "white": TEXT,
    "brightblack": (110, 118, 132), "brightred": (240, 128, 137), "brightgreen": (172, 215, 141),
    "brightmagenta": (218, 140, 241), "brightblue": (127, 195, 249), "brightcyan": (106, 202, 214),
}  # fmt: skip
LONGEST = 1.5
"""Seconds that a picture stays when nothing happens; a wait shows nothing."""
LAST = 6.0


@dataclass
class Frame:
    at: float
    cells: tuple[tuple[tuple[str, str, bool], ...], ...]


def record(command: list[str], columns: int, lines: int) -> list[Frame]:
    """Each state of the screen, at most ten a second."""
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(columns), LINES=str(lines))
        os.execvp(command[0], command)  # noqa: S606 - the caller's command
    ioctl(terminal, TIOCSWINSZ, pack("HHHH", lines, columns, 0, 0))
    frames: list[Frame] = []
    begun, ended = time.monotonic(), False
    while not ended:
        until = time.monotonic() + 0.1
        while (left := until - time.monotonic()) > 0 and not ended:
            if select.select([terminal], [], [], left)[0]:
                try:
                    stream.feed(os.read(terminal, 1 << 16))
                except OSError:  # its other end is closed
                    ended = True
        cells = tuple(
            tuple((screen.buffer[y][x].data, screen.buffer[y][x].fg, screen.buffer[y][x].bold) for x in range(columns))
            for y in range(lines)
        )
        if not frames or frames[-1].cells != cells:
            frames.append(Frame(time.monotonic() - begun, cells))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise SystemExit(f"{command} ended with exit code {code}")
    return frames


def draw(frame: Frame, regular: ImageFont.FreeTypeFont, bold: ImageFont.FreeTypeFont) -> Image.Image:
    width, height = round(regular.getlength("M")), SIZE + 5
    picture = Image.new("RGB", (width * len(frame.cells[0]) + 24, height * len(frame.cells) + 24), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for y, line in enumerate(frame.cells):
        for x, (character, colour, strong) in enumerate(line):
            text = "•" if "\u2800" <= character <= "\u28ff" else character  # a spinner, which few monospace fonts have
            if text.strip():
                ink = COLOURS.get(colour) or (TEXT if colour == "default" else tuple(bytes.fromhex(colour)))
                pen.text((12 + x * width, 12 + y * height), text, ink, bold if strong else regular)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parser.add_argument("--columns", type=int, default=112)
    parser.add_argument("--lines", type=int, default=35)
    parser.add_argument("--font", default=FONT, help="its bold face is NAME-Bold.ttf beside it")
    given = parser.parse_args()
    frames = record(given.command, given.columns, given.lines)
    faces = [ImageFont.truetype(each, SIZE) for each in (given.font, given.font.replace(".ttf", "-Bold.ttf"))]
    pictures = [draw(each, *faces).quantize(48, dither=Image.Dither.NONE) for each in frames]
    shown = [min(after.at - each.at, LONGEST) for each, after in pairwise(frames)] + [LAST]
    pictures[0].save(
        given.out, save_all=True, append_images=pictures[1:], duration=[round(1000 * each) for each in shown], loop=0,
        optimize=True,
    )  # fmt: skip
    print(f"{given.out}: {len(frames)} frames, {sum(shown):.1f} s, {given.out.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
