"""What is written stays in its place, what a package names stays in the package, and no picture replaces another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

import tally
from tally.errors import SpecError, StorageError
from tally.models.package import read_package, sidecar
from tally.storage import open_store

Cli = Callable[..., Any]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


CHANGES: dict[str, Callable[[Any], object]] = {
    "write": lambda store: store.write("link/x", b"new"),
    "write below": lambda store: store.write("link/deep/x", b"new"),
    "move to": lambda store: store.move("mine", "link/x"),
    "move from": lambda store: store.move("link/theirs", "mine"),
    "delete": lambda store: store.delete(["link/theirs"]),
    "delete a tree": lambda store: store.delete_tree("link/folder"),
    "remove what is partial": lambda store: store.remove_partial("link"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_links_are_not_followed_to_change_anything(
    change: Callable[[Any], object], outside: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    (outside / "folder").mkdir()
    for name in ("theirs", "folder/theirs", ".tally-tmp-theirs"):
        (outside / name).write_bytes(b"theirs")
    place.mkdir()
    (place / "mine").write_bytes(b"mine")
    (place / "link").symlink_to(outside)
    before = sorted(each for each in outside.rglob("*"))
    with pytest.raises(StorageError, match="a link on its way leads out of"):
        change(open_store(place))
    assert sorted(each for each in outside.rglob("*")) == before
    assert (place / "mine").read_bytes() == b"mine"


def test_a_link_to_the_place_itself_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    open_store(tmp_path / "out").write("a/b", b"x")
    assert (tmp_path / "disk" / "a" / "b").read_bytes() == b"x"


def test_a_link_that_is_a_file_is_replaced(outside: Path, tmp_path: Path) -> None:
    (outside / "theirs").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(outside / "theirs")
    open_store(tmp_path).write("link", b"mine")
    assert (outside / "theirs").read_bytes() == b"theirs"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("link", ["sub", "_tally"])
def test_a_job_writes_nothing_where_a_link_leads(link: str, outside: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "sub" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / link).symlink_to(outside)
    (tmp_path / "same.py").write_text(MODEL)
    with pytest.raises(StorageError, match="a link on its way"):
        tally.score(tmp_path / "pictures", model=str(tmp_path / "same.py"), out=tmp_path / "out", workers=1)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("named", ["../secret.txt", "/etc/hostname", "link.txt", "deep/../../secret.txt"])
@pytest.mark.parametrize(
    "read",
    [lambda folder: read_package(folder / "tally.yaml"), lambda folder: sidecar(folder / "m.onnx")],
    ids=["package", "sidecar"],
)
def test_labels_stay_inside(read: Callable[[Path], object], named: str, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret\n")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "m.onnx").write_bytes(b"")
    (folder / "tally.yaml").write_text(f"file: m.onnx\noptions:\n  labels: {named}\n")
    (folder / "m.onnx.yaml").write_text(f"labels: {named}\n")
    with pytest.raises(SpecError, match=r"labels: '.*' lies outside the (package|model's folder)"):
        read(folder)


@pytest.mark.parametrize("fields", ["file: ../m.onnx", "file: /tmp/m.onnx", "file: m.onnx\nartifacts: .."])
def test_what_a_package_names_is_in_it(fields: str, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "m.onnx").write_bytes(b"")
    (folder / "tally.yaml").write_text(f"{fields}\n")
    with pytest.raises(SpecError, match=r"(file|artifacts): '.*' lies outside the package"):
        read_package(folder / "tally.yaml")


NAMES = ("a.jpg", "A.jpg", "a.JPG", "a.png", "a.tif", "a.tif.png", "a.tif-21e588f6.png", "A.TIF", "b/a.jpg", "B/A.JPG")
MODEL = """
import tally

class Same(tally.Scorer):
    output = "image"

    def score(self, batch):
        return list(batch)
"""


def test_no_picture_replaces_another(tmp_path: Path) -> None:
    """Also on file systems that take capitals for small letters, and however the items fall into chunks."""
    source = tmp_path / "pictures"
    for number, name in enumerate(NAMES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8 + number)).save(source / name, "PNG")
    (tmp_path / "same.py").write_text(MODEL)
    job = tally.score(source, model=str(tmp_path / "same.py"), out=tmp_path / "out", format="png", workers=2)
    rows = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert sorted(row["key"].removeprefix(f"{source}/") for row in rows) == sorted(NAMES), job
    assert len({row["file"].casefold() for row in rows}) == len(NAMES)
    for row in rows:
        number = NAMES.index(row["key"].removeprefix(f"{source}/"))
        with Image.open(tmp_path / "out" / row["file"]) as picture:
            assert picture.size == (8, 8 + number), row
