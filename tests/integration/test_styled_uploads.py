"""The example of styled uploads: a clip in a watched bucket is restyled beside it, once, with its sound."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx2
import yaml
from tests.examples import EXAMPLES, serving
from tests.server import PATIENCE, running, until

import tally
from tally.demo.clip import draw_clip
from tally.storage import open_store


def streams(path: Path) -> tuple[int, list[tuple[float, bytes]]]:
    """How many pictures a clip has, and its sound as it is: the packets and their times, in seconds."""
    with av.open(str(path)) as clip:
        pictures = sum(1 for _ in clip.decode(video=0))
    with av.open(str(path)) as clip:
        packets = [each for each in clip.demux(audio=0) if each.size]
        return pictures, [(float(each.pts * each.time_base), bytes(each)) for each in packets]


def looked_twice(client: tally.Client) -> None:
    """Until the server has looked at the bucket twice from now on."""
    for _ in range(2):
        before, deadline = client.watch("clips").watch.looked_at, time.monotonic() + PATIENCE
        while client.watch("clips").watch.looked_at == before:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_each_clip_is_styled_once_beside_it_with_its_sound(s3: str, tmp_path: Path) -> None:
    clips = open_store(s3)
    job: dict[str, Any] = yaml.safe_load((EXAMPLES / "styled_uploads" / "job.yaml").read_text("utf-8"))
    job |= {"out": job["out"].replace("s3://clips", s3)}
    draw_clip(tmp_path / "early.x.mp4", 0.4, (96, 64), Fraction(25), 7)
    draw_clip(tmp_path / "clip.mp4", 1, (96, 64), Fraction(25), 7)
    clips.upload("early.x.mp4", tmp_path / "early.x.mp4")

    with running("--root", EXAMPLES) as server, tally.Client(server.url, key=server.key) as client:
        added = client.add_watch("clips", s3, job, pattern="*.mp4", exclude="*processed*")
        assert added.there == 1
        clips.upload("clip.mp4", tmp_path / "clip.mp4")
        with server.client() as api:
            [started] = until(api, "", lambda page: page["jobs"])["jobs"]
            assert until(api, started["id"], lambda view: view["state"] == "finished")["done"] == 25
        looked_twice(client)
        key = server.key
        server.kill()

    with running("--root", EXAMPLES) as server, tally.Client(server.url, key=key) as client:
        looked_twice(client)
        assert [each.id for each in client.list().jobs] == [started["id"]]
        assert client.watch("clips").objects == {"passed": 1, "taken": 1}

        # What was there before, by its name, as often as one likes.
        environment = {"CLIPS": s3, "MODEL": "tally:strokes", "TALLY_SERVER": server.url, "TALLY_KEY": key}
        with serving("styled_uploads", "process:app", **environment) as url:
            for _ in range(2):
                answer = httpx2.get(f"{url}/process", params={"video_name": "early.x.mp4"}, timeout=60)
                assert (answer.status_code, answer.text) == (200, "Processing early.x in background...")
            assert httpx2.get(f"{url}/process", params={"video_name": "../x"}, timeout=60).status_code == 422
        [asked] = client.list(text="early.x_processed").jobs
        *_, last = client.follow(asked.id)
        assert (last.state, last.done) == ("finished", 10)
        looked_twice(client)
        assert len(client.list().jobs) == 2

    videos = {each.name for each in clips.list() if each.name.endswith(".mp4")}
    assert videos == {
        "clip.mp4", "clip/clip_processed.mp4", "early.x.mp4", "early.x/early.x_processed.mp4"
    }  # fmt: skip
    for stem, count in (("clip", 25), ("early.x", 10)):
        clips.download(f"{stem}/{stem}_processed.mp4", tmp_path / "styled.mp4")
        pictures, sound = streams(tmp_path / "styled.mp4")
        assert (pictures, sound) == (count, streams(tmp_path / f"{stem}.mp4")[1])
        assert sound
