"""Makes ``schema_0003.json``: the rows that Tally wrote before jobs said what their output is.

    PYTHONPATH=BEFORE/src:. python tests/before/make.py

``BEFORE`` is a checkout of commit 2b7c3eb, and shared/data is beside this repository. Each job is named by its output.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path("/tmp/tally-before")
REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"

SCORERS = {
    "rows.py": 'input = "bytes"\n    columns = {"size": "int64"}',
    "untyped.py": 'input = "bytes"',
    "pictures.py": 'input = "image"\n    output = "image"',
    "frames.py": 'input = "frame"\n    output = "image"\n    batch_size = 4',
    "table.py": 'input = "table"',
}
SCORES = {
    "rows.py": 'if b"bad" in each: raise ValueError("bad")\n            found.append({"size": len(each)})',
    "untyped.py": 'found.append({"anomaly": len(each) > 3})',
    "pictures.py": "found.append(255 - each)",
    "frames.py": (
        "self.count = getattr(self, 'count', 0) + 1\n"
        "            if self.count > 30: raise ValueError('no more')\n            found.append(255 - each)"
    ),
    "table.py": "pass",
}


def inputs() -> None:
    """Small sources and scorers."""
    sys.path.insert(0, str(REPOSITORY))
    from PIL import Image
    from tests.videos import write_clip

    for name, declared in SCORERS.items():
        Path(name).write_text(
            f"import tally\n\n\nclass S(tally.Scorer):\n    {declared}\n\n"
            f"    def score(self, batch):\n        found = []\n        for each in batch:\n"
            f"            {SCORES[name]}\n        return found\n"
        )
    for folder in ("texts", "photos", "clips"):
        Path(folder).mkdir()
    for number in range(3):
        Path("texts", f"{number}.txt").write_text("x" * (number + 2))
        Image.new("RGB", (4, 4), (number, 0, 0)).save(f"photos/{number}.png")
    Path("texts", "bad.txt").write_text("bad")
    Path(os.fsdecode(b"texts/caf\xe9.txt")).write_text("strange")
    Path("sensors.csv").write_text("a,b\n1,2\n3,4\n")
    write_clip(Path("clips/a.mp4"), 60)


def jobs() -> None:
    """One of each kind."""
    import tally
    from tally.errors import JobError
    from tally.jobs import launch
    from tally.jobs.spec import make

    store = launch.open_store()

    def submitted(source: str, model: str | Path, out: str, **more: Any) -> str:
        return launch.submit(store, make(source=source, model=str(model), out=out, **more)).id

    def scored(source: str, model: str | Path, out: str, **more: Any) -> str:
        job = submitted(source, model, out, workers=1, **more)
        try:
            launch.drive(store, job)
        except JobError:
            pass
        return job

    scored("texts", "rows.py:S", "rows")
    scored("texts/0.txt", "rows.py:S", "merged.CSV")
    scored("texts", "rows.py:S", "strict", strict=True, batch_size=1, format="jsonl")
    scored("texts", "untyped.py:S", "watched/", alerts=("anomalies > 0", "failed"), webhook="http://127.0.0.1:9/x")
    scored("photos", "pictures.py:S", "pictures")
    scored("clips", "frames.py:S", "stopped-videos", strict=True, batch_size=4)
    scored("clips", "pictures.py:S", "video.mkv")
    scored("clips", "pictures.py:S", "stills", frames="jpg", every=20)
    submitted("photos", "pictures.py:S", "new-pictures", format="png")
    submitted("photos", "pictures.py:S", "unknown")
    submitted("photos", DATA / "models/style/mosaic_720.onnx", "styled")
    submitted("clips", DATA / "models/style/mosaic_720.onnx", "styled-videos")
    submitted("clips", DATA / "models/style/mosaic_720.onnx", "styled.mp4/")
    submitted("photos", DATA / "models/segment/deeplab_v3_257.onnx", "masks", settings={"output": "image"})
    submitted("photos", DATA / "models/segment/deeplab_v3_257.onnx", "areas")
    submitted("photos", DATA / "models/detect/yolox_nano.onnx", "boxes", overlay=True)
    submitted("sensors.csv", "table.py:S", "table.parquet")
    cancelled = submitted("photos", "untyped.py:S", "twice")
    lease = store.acquire(cancelled, seconds=30)
    assert lease is not None
    store.release(lease, "cancelled")
    launch.release(store.get(cancelled))
    lost = submitted("photos", "untyped.py:S", "lost")
    assert store.acquire(lost, seconds=30) is not None
    assert tally.__version__


def schedules() -> None:
    """A schedule with a run that is at work."""
    from tally.jobs.database import connect

    from tally.config import settings
    from tally.triggers.cron import Cron, Interval
    from tally.triggers.store import ScheduleStore

    store = ScheduleStore(connect(settings().database))
    store.add("hourly", template={"out": "x"}, file="job.yaml", cron=Cron("0 * * * *", "UTC"), overlap="queue",
              catch_up="all", since=0)  # fmt: skip
    store.plan(store.get("hourly"), until=7200, due=[Interval(0, 3600), Interval(3600, 7200)], late=[], missed=[])
    assert store.claim("hourly") is not None


def dump() -> dict[str, list[dict[str, Any]]]:
    """Every row of every table."""
    import sqlite3

    database = sqlite3.connect(ROOT / "home" / "tally.db")
    database.row_factory = sqlite3.Row
    found = {}
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        if table.startswith("sqlite_") or table == "alembic_version":
            continue
        rows = [dict(row) for row in database.execute(f"SELECT * FROM {table}")]
        for row in rows:
            for name, value in row.items():
                if isinstance(value, bytes):
                    row[name] = {"base64": base64.b64encode(value).decode()}
        if rows:
            found[table] = rows
    return found


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    os.chdir(ROOT)
    os.environ["TALLY_HOME"] = str(ROOT / "home")
    os.environ["TALLY_WEBHOOK_SECRET"] = "whsec_" + base64.b64encode(b"0" * 32).decode()
    inputs()
    jobs()
    schedules()
    tables = (
        f'"{name}": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"
        for name, rows in dump().items()
    )
    text = "{\n" + ",\n".join(tables) + "\n}"
    for path, shown in ((ROOT, "/old"), (DATA, "/data")):
        text = text.replace(str(path), shown)
    (Path(__file__).parent / "schema_0003.json").write_text(text + "\n")
    shutil.rmtree(ROOT)


if __name__ == "__main__":
    main()
