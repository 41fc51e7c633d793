"""Every hostile file, decoded in a process of its own whose address space and processor time are bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from tally.errors import ItemError
from tally.media.images import decode
outcomes = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    for size in (None, (64, 64)):
        try:
            pixels, info = decode(file.read_bytes(), size)
            outcome = [*pixels.shape, info["width"], info["height"]]
        except ItemError as error:
            assert error.stage == "decode"
            outcome = error.message
        outcomes.setdefault(file.name, []).append(outcome)
# Not ru_maxrss: that begins with what the process that started this one held.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) // 1024
print(json.dumps({"outcomes": outcomes, "peak": peak}))
"""


@pytest.fixture(scope="module")
def result(data: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", CHILD, str(data / "hostile" / "images")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def outcomes(result: dict[str, dict[str, list[object]]]) -> dict[str, list[object]]:
    return result["outcomes"]


def test_no_file_crashes_or_hangs_the_process(data: Path, outcomes: dict[str, list[object]]) -> None:
    assert set(outcomes) == {file.name for file in (data / "hostile" / "images").iterdir()}


def test_memory_stays_bounded(result: dict[str, int]) -> None:
    # In MiB. The largest that is not refused by its header announces 84 million pixels: 640 MiB.
    assert result["peak"] < 1024


def test_errors_are_short_and_readable(outcomes: dict[str, list[object]]) -> None:
    messages = [each for both in outcomes.values() for each in both if isinstance(each, str)]
    assert len(messages) > 200
    for message in messages:
        assert 10 < len(message) < 250
        assert message.isprintable()
        assert "Traceback" not in message
        assert "object at 0x" not in message


def test_both_sizes_agree_on_what_is_a_picture(outcomes: dict[str, list[object]]) -> None:
    for name, (full, reduced) in outcomes.items():
        assert isinstance(full, str) == isinstance(reduced, str), name
        if isinstance(full, list) and isinstance(reduced, list):
            assert full[3:] == reduced[3:], name


TOO_LARGE = "is over the limit of 128 million (max_pixels raises it)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("derived_bomb_13000x13000_rgb.png", f"13000x13000 = 169.0 million pixels {TOO_LARGE}"),
        ("derived_zero_bytes.jpg", "the file is empty (0 bytes)"),
        ("derived_html_named.jpg", "not an image, but a web page (starts with b'<!DOCTYPE ht')"),
        ("derived_dog_truncated_50pct.jpg", "truncated: the JPEG image ends early (the file has 81,879 bytes)"),
        ("pillow_bmp_b_reallybig.bmp", f"6000000.0 million pixels {TOO_LARGE}"),
        ("libpng_bad_iCCP.png", "damaged PNG image: its header cannot be read (the file has 321 bytes)"),
    ],
)
def test_reasons(outcomes: dict[str, list[object]], name: str, message: str) -> None:
    assert outcomes[name] == [message, message]


@pytest.mark.parametrize("name", ["png_named.jpg", "pillow_invalid-exif.jpg", "imagers_resize-with-alpha-original.png"])
def test_what_is_only_unusual_is_read(outcomes: dict[str, list[object]], name: str) -> None:
    assert all(isinstance(each, list) for each in outcomes[name])
