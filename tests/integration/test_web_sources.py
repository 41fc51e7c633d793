"""Files of the web as a source, as a user types them: what comes out is what comes out of folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import Ran
from tests.videos import assert_same_video, errors, numbers, write_clip
from tests.websites import Website, website

from tally.errors import ItemError, SpecError
from tally.jobs.given import is_place
from tally.media.video import container
from tally.media.video import decode as decoding
from tally.media.video.container import open_video
from tally.sources.base import Chunk, Timings
from tally.sources.locations import locate
from tally.sources.video import VideoSource
from tally.testing.sources import Recorder, chunks_of

Cli = Callable[..., Ran]

IDENTITY = """
import tally


class Identity(tally.Scorer):
    output = "image"

    def score(self, batch):
        return batch
"""


@pytest.fixture
def site() -> Iterator[Website]:
    with website() as site:
        yield site


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "identity.py"
    path.write_text(IDENTITY)
    return path


@pytest.mark.parametrize("parts", [True, False])
def test_a_video_of_the_web_becomes_a_video(cli: Cli, site: Website, model: Path, tmp_path: Path, parts: bool) -> None:
    clip = write_clip(tmp_path / "x.mp4", 40, sound=1.6)
    site.files["/clips/x.mp4"], site.parts = clip.read_bytes(), parts
    options = ("--model", model, "--crf", 0, "--workers", 1)
    ran = cli("score", clip, *options, "--out", tmp_path / "out.mp4", "-q")
    assert ran.code == 0, ran.err
    ran = cli("score", f"{site.url}/clips/x.mp4", *options, "--out", tmp_path / "web.mp4")
    assert ran.code == 0, ran.err
    assert "40 of 40 frames scored" in ran.err
    assert_same_video(tmp_path / "web.mp4", tmp_path / "out.mp4")
    kept = list((tmp_path / "tally-home" / "cache").rglob("x.mp4"))
    if parts:
        assert all(wanted for _, wanted in site.asked)
        assert not kept
    else:
        assert sum(wanted is None for _, wanted in site.asked) == len(kept) == 1
    assert ("does not give parts of it" in ran.err) is not parts


def test_a_video_that_changes_between_two_workers_is_found_out(
    site: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/x.mp4"] = write_clip(tmp_path / "x.mp4", 40, gop=10).read_bytes()
    source = VideoSource.describe([f"{site.url}/x.mp4"])
    first, *others = chunks_of(source, 10)
    assert source.keys(first)[:2] == ["x.mp4/000000", "x.mp4/000001"]

    def scored(chunk: Chunk) -> dict[str, object]:
        found: dict[str, object] = {}
        for batch in source.read(chunk, Recorder(), Timings()):
            found.update((source.keys(chunk)[position], error) for position, error in batch.dead)
            found.update((key, (value,)) for key, value in zip(batch.keys, batch.values, strict=True))
        return found

    assert numbers(scored(first)) == list(range(len(source.keys(first))))
    site.files["/x.mp4"] = site.files["/x.mp4"][:-1] + b"\0"
    monkeypatch.setattr(container, "_header_blocks", {})  # which the other does not have, nor a decoder on its way
    while decoding._kept:
        decoding._kept.pop().close()
    for chunk in others:
        told = errors(scored(chunk))
        assert list(told) == source.keys(chunk)
        assert all("has changed since the job was planned" in each for each in told.values())


def test_what_cannot_be_had_of_the_web_is_refused(
    cli: Cli, site: Website, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/x.mp4"] = b"x"

    def refused(*words: object) -> str:
        ran = cli("score", "--model", model, "--out", tmp_path / "out.mp4", *words)
        assert ran.code
        return ran.err

    assert f"there is no file {site.url}/none.mp4" in refused(f"{site.url}/none.mp4")
    for place in (site.url, f"{site.url}/", f"{site.url}/clips/", f"{site.url}/*.mp4"):
        assert "does not list its files" in refused(place)
    said = refused(f"{site.url}/x.mp4?token=hush")
    assert "carries credentials" in said
    assert "download it" in said
    assert "hush" not in said
    said = refused(f"{site.url}/x.mp4", "--out", f"{site.url}/out.mp4")
    assert "results are not written to the web" in said
    (tmp_path / "list.txt").write_text(f"{site.url}/x.mp4?token=hush\n{tmp_path}/y.mp4\n")
    monkeypatch.chdir(tmp_path)
    ran = cli("score", "--items", "list.txt", "--model", model, "--out", "pictures/", "-q")
    assert "a list names pictures, and this is a video" in cli("jobs", "dead", tmp_path / "pictures").out, ran.err


def test_the_doctor_looks_at_a_file_of_the_web(cli: Cli, site: Website) -> None:
    site.files["/x.mp4"] = b"x"
    assert f"{site.url}/x.mp4 is a file of the web, and can be read" in cli("doctor", f"{site.url}/x.mp4").out
    assert "404" in cli("doctor", f"{site.url}/y.mp4").out


def test_counted_names_of_the_web_are_taken_as_they_are(site: Website) -> None:
    [found] = locate([f"{site.url}/shards/s-{{000..002}}.tar"])
    assert (found.root, found.names) == (f"{site.url}/shards", ("s-000.tar", "s-001.tar", "s-002.tar"))
    assert not site.asked


def test_a_playlist_leads_nowhere(site: Website) -> None:
    inner = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{site.url}/secret.ts\n#EXT-X-ENDLIST\n"
    site.files |= {"/x.m3u8": inner.encode(), "/secret.ts": b"x"}
    with pytest.raises(ItemError, match=r"(?s)cannot be opened as a video.*It is a playlist"):
        open_video(site.url, "x.m3u8")
    assert {name for name, _ in site.asked} == {"/x.m3u8"}


@pytest.mark.parametrize(
    ("value", "media", "place"),
    [
        ("photos/", None, True),
        (Path("a.jpg"), None, True),
        ("s3://b/a.jpg", None, True),
        ("https://host/a.jpg", None, False),
        ("https://host/a.jpg", "image", True),
        ("https://host/a.mp4", None, True),
        ("http://host/rows.csv.gz", None, True),
        ("https://host/a.tar?x=1", None, True),
        (b"content", "image", False),
    ],
)
def test_what_a_program_gives_is_a_place_or_an_item(value: object, media: str | None, place: bool) -> None:
    assert is_place(value, media) is place


def test_a_server_looks_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    from tally import network
    from tally.server.places import check_places

    monkeypatch.setenv(network.ALLOWED, "files.internal")
    with pytest.raises(SpecError, match="is a private address"):
        check_places([("source", "https://10.0.0.1/clip.mp4")], ())
    check_places([("source", "https://1.1.1.1/clip.mp4")], ())
