from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

ENDS = """
import atexit, sys, threading, time
from pathlib import Path
from tally import garbage

def late():
    threading.main_thread().join()
    Path(sys.argv[1], "thread").write_text("done")

atexit.register(lambda: Path(sys.argv[1], "atexit").write_text("done"))
threading.Thread(target=late).start()
print("x" * 1_000_000, end="")
garbage.leave(3)
"""


def test_what_is_left_to_do_is_done(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS, tmp_path], capture_output=True, timeout=60)
    assert (ended.returncode, len(ended.stdout), ended.stderr) == (3, 1_000_000, b"")
    assert {each.name for each in tmp_path.iterdir()} == {"atexit", "thread"}


def test_output_that_does_not_arrive_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", "from tally import garbage; print(1); garbage.leave(0)"],
            stdout=full, stderr=subprocess.PIPE, timeout=60, env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert ended.returncode == 120  # Python's own
    assert b"No space left on device" in ended.stderr


WRITES = """
import gzip, sys
from pathlib import Path
from tally import garbage

folder = Path(sys.argv[1])
text, packed = open(folder / "text", "w"), gzip.open(folder / "packed", "wt")
garbage.keep_what_is_loaded()
binary = open(folder / "binary", "wb")
print("written", file=text)
print("written", file=packed)
binary.write(b"written")
open(folder / "closed", "w").close()
garbage.leave(0)
"""


def test_files_that_nobody_closed_are_written(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITES, tmp_path], check=True, timeout=60)
    assert (tmp_path / "text").read_text() == "written\n"
    assert gzip.decompress((tmp_path / "packed").read_bytes()) == b"written\n"
    assert (tmp_path / "binary").read_bytes() == b"written"
