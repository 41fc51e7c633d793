"""What a job's page shows of pictures and videos, in a real browser."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
from PIL import Image
from tests.archives import tar
from tests.server import Server, running, until
from tests.videos import write_clip

pytest.importorskip("playwright")

from playwright.sync_api import Page, expect
from tests.browsing import check_accessibility, log_in

DETECT = """
import tally

class Detect(tally.Scorer):
    input = "image"
    columns = {"label": "string", "score": "float64", **dict.fromkeys(["xmin", "ymin", "xmax", "ymax"], "float64")}

    def score(self, batch):
        corners = {"xmin": 10.0, "ymin": 20.0, "xmax": 90.0, "ymax": 70.0}
        return [
            [{"label": label, "score": 0.5, **corners} for label in ("<car>", "dog")[: 1 + int(picture[0, 0, 0] > 9)]]
            for picture in batch
        ]
"""
MASKED = """
import numpy, tally
from tally.scorers.vision.detection.rows import runs

class Masked(tally.Scorer):
    input = "image"
    columns = {
        "label": "string", **dict.fromkeys(["xmin", "ymin", "xmax", "ymax"], "float64"),
        "corners": "list<float32>", "keypoints": "list<float32>", "mask": "list<int64>",
    }

    def score(self, batch):
        mask = runs(numpy.ones((20, 10), bool), 40, 40, 120, 100)
        box = {"label": "car", "xmin": 10.0, "ymin": 20.0, "xmax": 90.0, "ymax": 70.0}
        points = {"corners": [50, 20, 90, 45, 50, 70, 10, 45], "keypoints": [70, 45]}
        return [{**box, **points, "mask": mask} for _ in batch]
"""
INVERT = """
import tally

class Invert(tally.Scorer):
    input = "INPUT"
    output = "image"

    def score(self, batch):
        return [255 - picture for picture in batch]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "detect.py").write_text(DETECT)
    (folder / "masked.py").write_text(MASKED)
    (folder / "invert.py").write_text(INVERT.replace("INPUT", "image"))
    (folder / "film.py").write_text(INVERT.replace("INPUT", "frame"))
    (folder / "in" / "a & b").mkdir(parents=True)
    for number in range(20):
        picture = np.full((100, 120, 3), number, np.uint8)
        Image.fromarray(picture).save(folder / "in" / "a & b" / f"{number:02}.png")
    write_clip(folder / "clip.mp4", 10)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder) as server:
            yield server


def finished(server: Server, folder: Path, model: str, out: str, *, source: str = "in", **fields: Any) -> str:
    """The id of a job that has run."""
    given = {"source": [str(folder / source)], "model": str(folder / model), "out": str(folder / out), **fields}
    with server.client() as client:
        job: str = client.post("/jobs", json=given).raise_for_status().json()["id"]
        until(client, job, lambda view: view["state"] == "finished")
    return job


@pytest.fixture(scope="module")
def detected(server: Server, folder: Path) -> str:
    return finished(server, folder, "detect.py", "boxes")


def shown(page: Page, name: str) -> bool:
    """Whether the picture has been loaded, and is one."""
    return bool(page.get_by_role("img", name=name, exact=True).evaluate("each => each.decode().then(() => true)"))


def test_labels_boxes_and_pages_of_pictures(page: Page, server: Server, detected: str) -> None:
    log_in(page, server, path=f"/jobs/{detected}")
    labels = page.locator("#labels")
    expect(labels.get_by_role("row").filter(has_text="<car>")).to_contain_text(re.compile(r"20\s*20"))
    expect(labels.get_by_role("img", name="Which labels are found together: <car> and dog in 10")).to_be_visible()
    labels.get_by_text("Together, in numbers").click()
    expect(labels.get_by_role("cell", name="<car>, dog")).to_be_visible()

    pictures = page.locator("#pictures")
    expect(pictures.locator("figure")).to_have_count(12)
    assert shown(page, "a & b/00.png: <car>")
    assert shown(page, "a & b/11.png: <car>, dog")
    check_accessibility(page)
    pictures.get_by_role("link", name="More").press("Enter")
    expect(pictures.locator("figure")).to_have_count(8)
    assert "page=2" in page.url
    page.reload()  # the address leads back to it
    expect(pictures.locator("figure")).to_have_count(8)

    labels.get_by_role("link", name="dog").click()
    expect(pictures.get_by_role("heading", name="Pictures with dog")).to_be_visible()
    expect(pictures.locator("figure")).to_have_count(10)


def test_boxes_are_drawn_where_they_are(server: Server, detected: str, tmp_path: Path) -> None:
    with browsing(server) as client:
        page = client.get(f"/jobs/{detected}/pictures").text
        address = re.findall(r'src="([^"]+)"', page)[0].replace("&amp;", "&")
        answer = client.get(address)
    assert answer.headers["content-type"] == "image/jpeg"
    (tmp_path / "small.jpg").write_bytes(answer.content)
    pixels = np.asarray(Image.open(tmp_path / "small.jpg")).astype(int)
    assert pixels.shape == (100, 120, 3)
    bright = pixels.max(axis=2) > 100
    assert bright[45, 10]
    assert bright[45, 89]
    assert not bright[45, 30:70].any()


def test_members_of_an_archive_are_shown_by_their_thumbnails(page: Page, server: Server, folder: Path) -> None:
    files = {f"{number}.png": (folder / "in" / "a & b" / f"1{number}.png").read_bytes() for number in range(3)}
    (folder / "in.tar").write_bytes(tar(files))
    without = finished(server, folder, "detect.py", "unseen", source="in.tar")
    job = finished(server, folder, "detect.py", "seen", source="in.tar", thumbnails=60)
    log_in(page, server, path=f"/jobs/{job}")
    expect(page.locator("#pictures figure")).to_have_count(3)
    assert shown(page, "in.tar/1.png: <car>, dog")
    closely = page.get_by_role("link", name="in.tar/1.png: <car>, dog").get_attribute("href") or ""
    assert "size=1280" in closely
    with browsing(server) as client:
        assert Image.open(io.BytesIO(client.get(closely).content)).size == (320, 266)  # no larger than captions need
        address = re.findall(r'src="([^"]+)"', client.get(f"/jobs/{job}/pictures").text)[0].replace("&amp;", "&")
        pixels = np.asarray(Image.open(io.BytesIO(client.get(address).content))).astype(int)
        assert pixels.shape == (266, 320, 3)
        bright = pixels.max(axis=2) > 100
        assert bright[120, round(10 * 320 / 120)]  # the box is in pixels of the original, 120 wide
        assert bright[120, round(90 * 320 / 120) - 1]
        assert not bright[120, 40:220].any()
        address = re.findall(r'src="([^"]+)"', client.get(f"/jobs/{without}/pictures").text)[0].replace("&amp;", "&")
        assert client.get(address).headers["content-type"] == "image/svg+xml"
    with server.client() as api:
        assert "_thumbnails/part-00000.parquet" in str(api.get(f"/jobs/{job}/files").json())


@pytest.mark.parametrize("out", ["masked", "masked.csv"])
def test_masks_quadrangles_and_keypoints_are_drawn(server: Server, folder: Path, out: str) -> None:
    job = finished(server, folder, "masked.py", out)
    with browsing(server) as client:
        page = client.get(f"/jobs/{job}/pictures").text
        address = re.findall(r'src="([^"]+)"', page)[0].replace("&amp;", "&")
        content = client.get(address).content
    pixels = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    bright = pixels.max(axis=2) > 60
    assert bright[50, 45]  # within the mask
    assert bright[45, 70]  # a keypoint
    assert not bright[50, 30]
    assert not bright[60, 10]  # the quadrangle is drawn in place of the box
    assert bright[45, 10:14].any()


def test_pictures_made_of_others_are_compared_by_keyboard(page: Page, server: Server, folder: Path) -> None:
    job = finished(server, folder, "invert.py", "inverted")
    log_in(page, server, path=f"/jobs/{job}")
    first = page.locator("figure.compare").first
    expect(first).to_be_visible()
    assert shown(page, "a & b/00.png, before")
    assert shown(page, "a & b/00.png, after")
    slider = first.get_by_role("slider", name="How much of a & b/00.png is shown as it was before")
    after = first.get_by_role("img", name="a & b/00.png, after")
    expect(after).to_have_css("clip-path", "inset(0px 0px 0px 50%)")
    slider.press("End")
    expect(after).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
    check_accessibility(page)
    with page.expect_response(re.compile("/files/")) as whole:
        first.get_by_role("link", name="a & b/00.png").click()
    assert (whole.value.status, whole.value.headers["content-type"]) == (200, "image/png")
    assert whole.value.body() == (folder / "inverted" / "a & b" / "00.png").read_bytes()


def test_pictures_that_a_job_has_made_are_files_of_it(server: Server, folder: Path, detected: str) -> None:
    out = folder / "made"
    job = finished(server, folder, "invert.py", "made")
    (out / "beside.png").write_bytes(b"not the job's")
    picture = (out / "a & b" / "03.png").read_bytes()
    with server.client() as client:
        there = f"/jobs/{job}/files/a%20%26%20b/03.png"
        whole = client.get(there)
        assert (whole.content, whole.headers["content-type"]) == (picture, "image/png")
        part = client.get(there, headers={"Range": "bytes=1-3"})
        assert (part.status_code, part.content) == (206, b"PNG")
        assert part.headers["content-range"] == f"bytes 1-3/{len(picture)}"
        assert client.get(there, headers={"Range": "bytes=1-3", "If-Range": '"another"'}).content == picture
        assert client.get(there, headers={"Range": f"bytes={len(picture)}-"}).status_code == 416
        for name in ("beside.png", "a & b/99.png", "a & b/../a & b/03.png", "../in/a & b/03.png", "'' or true.png"):
            assert client.get(f"/jobs/{job}/files/{quote(name, safe='')}").status_code == 404, name
        assert client.get(f"/jobs/{detected}/files/a%20%26%20b/03.png").status_code == 404  # its item, no result
        (out / "a & b" / "04.png").unlink()
        (out / "a & b" / "04.png").symlink_to("/etc/hostname")
        assert client.get(f"/jobs/{job}/files/a%20%26%20b/04.png").status_code == 404


def test_a_video_is_shown_beside_what_was_made_of_it(page: Page, server: Server, folder: Path) -> None:
    job = finished(server, folder, "film.py", "made.mp4", source="clip.mp4")
    log_in(page, server, path=f"/jobs/{job}")
    for name in ("clip.mp4, before", "clip.mp4, after"):
        expect(page.get_by_label(name)).to_have_js_property("readyState", 4)
    check_accessibility(page)
    with browsing(server) as client:
        part = client.get(f"/jobs/{job}/original?key=clip.mp4", headers={"Range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, b"ftyp")
        assert client.get(f"/jobs/{job}/original?key=film.py").status_code == 404


def test_what_cannot_be_shown_is_a_picture_that_says_why(server: Server, folder: Path, detected: str) -> None:
    inside = folder / "in"
    (inside / "bomb.png").write_bytes(_png_of(30_000, 30_000))
    (inside / "out.png").symlink_to("/etc/passwd")
    with browsing(server) as client:
        for key, why in [
            ("bomb.png", "over the limit"),
            ("out.png", "not under a folder"),
            ("../detect.png", "no name inside"),
            ("gone.png", "not there any more"),
            ("a & b/../../detect.py", "no picture"),
        ]:
            answer = client.get(f"/jobs/{detected}/picture", params={"key": key})
            assert answer.headers["content-type"] == "image/svg+xml"
            text = " ".join(re.sub(r"<[^>]+>", " ", answer.text).split())
            assert why in text, key
        assert client.get(f"/jobs/{detected}/picture?key=a%20%26%20b/00.png&size=9").status_code == 422
    for name in ("bomb.png", "out.png"):
        (inside / name).unlink()


def browsing(server: Server) -> httpx2.Client:
    """A client of the pages rather than of the API."""
    return httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}, timeout=60)


def _png_of(width: int, height: int) -> bytes:
    """A PNG whose header says how large it is, and that holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts
