from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import pytest
from tests.archives import PACKERS, tar, tar_gz, tar_zst, zipped

from tally.errors import ItemError, SourceChangedError, SourceNotFoundError, SpecError
from tally.sources.archives import members as archive_members
from tally.sources.archives.source import ArchiveSource
from tally.sources.base import Timings
from tally.sources.files import FileSource
from tally.testing.sources import Recorder, chunks_of


def read(source: ArchiveSource, items: int = 1000) -> tuple[dict[str, bytes], dict[str, str]]:
    """Content and error by key."""
    scorer = Recorder()
    scorer.input, scorer.batch_size = source.input, 2
    values: dict[str, bytes] = {}
    dead: dict[str, str] = {}
    for chunk in chunks_of(source, items):
        keys = source.keys(chunk)
        for batch in source.read(chunk, scorer, Timings()):
            values |= dict(zip(batch.keys, batch.values, strict=True))
            dead |= {keys[position]: error.message for position, error in batch.dead}
    return values, dead


def score(tmp_path: Path, name: str, content: bytes) -> tuple[dict[str, bytes], dict[str, str]]:
    (tmp_path / name).write_bytes(content)
    return read(ArchiveSource.describe([str(tmp_path / name)], "bytes"))


FILES = {f"{number}.bin": bytes([number]) * 700 for number in range(6)}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("items", [1, 4, 1000])
def test_members_have_their_content(tmp_path: Path, suffix: str, items: int) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(PACKERS[suffix](FILES | {"empty": b""}))
    values, dead = read(ArchiveSource.describe([str(tmp_path)], "bytes"), items)
    assert values == {f"a.{suffix}/{name}": content for name, content in (FILES | {"empty": b""}).items()}
    assert dead == {}


@pytest.mark.parametrize("pack", [tar, tar_gz, tar_zst, zipped])
@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_what_an_archive_is_its_content_says(tmp_path: Path, pack: Callable[..., bytes], name: str) -> None:
    values, dead = score(tmp_path, name, pack(FILES))
    assert (len(values), dead) == (6, {})


@pytest.mark.parametrize("pack", [tar, tar_gz, tar_zst, zipped])
def test_an_archive_that_is_cut_off_is_never_short(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    """Wherever it is cut: what is scored has its content, and the archive is dead by its name."""
    whole = pack(FILES)
    for cut in sorted({*range(0, len(whole), max(1, len(whole) // 12)), 1024, 4 * 1536, len(whole) - 10_240}):
        if not 0 <= cut < len(whole) - (1024 if pack is tar else 0):
            continue
        values, dead = score(tmp_path, "a.tar", whole[:cut])
        assert "a.tar" in dead or len(dead) + len(values) >= 6, cut
        assert dead, cut
        assert values.items() <= {f"a.tar/{name}": content for name, content in FILES.items()}.items()


def test_a_tar_without_its_end_is_cut_off(tmp_path: Path) -> None:
    values, dead = score(tmp_path, "a.tar", tar(FILES)[: 6 * 1536])
    assert len(values) == 6
    assert list(dead) == ["a.tar"]
    assert "it ends at byte 9,216 without a tar's end: it is cut off" in dead["a.tar"]


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    content = bytearray(tar(FILES))
    content[3 * 1536 + 10] ^= 255
    values, dead = score(tmp_path, "a.tar", bytes(content))
    assert len(values) == 3
    assert "at byte 4,608 there is no header of a tar: it is damaged" in dead["a.tar"]


def test_two_tars_in_one_file_are_not_taken_for_one(tmp_path: Path) -> None:
    values, dead = score(tmp_path, "a.tar", tar({"a": b"1"}) + tar({"b": b"2"}))
    assert list(values) == ["a.tar/a"]
    assert "it goes on behind its end" in dead["a.tar"]


@pytest.mark.parametrize("content", [b"", b"no archive at all" * 100])
def test_what_is_no_archive_is_one_dead_item(tmp_path: Path, content: bytes) -> None:
    values, dead = score(tmp_path, "a.tar", content)
    assert values == {}
    assert list(dead) == ["a.tar"]


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\b", "C:/b"])
def test_names_that_lead_out_are_dead(tmp_path: Path, pack: Callable[..., bytes], name: str) -> None:
    values, dead = score(tmp_path, "a.tar", pack({name: b"x", "good": b"y"}))
    assert values == {"a.tar/good": b"y"}
    assert list(dead.values()) == ["its name leads out of the archive"]


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_name_that_is_there_twice_the_second_is_dead(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    values, dead = score(tmp_path, "a.tar", pack([("a", b"1"), ("b", b"2"), ("./a", b"3")]))
    assert values == {"a.tar/a": b"1", "a.tar/b": b"2"}
    assert dead == {
        "a.tar/a#2": "the archive has 'a' more than once: the first is scored, and this is number 2",
    }


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "it is a link to '/etc/passwd', and links in archives are not followed"),
        (tarfile.LNKTYPE, "it is a link to '/etc/passwd', and links in archives are not followed"),
        (tarfile.CHRTYPE, "it is a device or a pipe"),
        (tarfile.FIFOTYPE, "it is a device or a pipe"),
    ],
)
def test_links_and_devices_are_dead(tmp_path: Path, kind: bytes, said: str) -> None:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("odd.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert score(tmp_path, "a.tar", file.getvalue()) == ({}, {"a.tar/odd.png": said})


def test_links_in_zips_are_dead(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("odd.png")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    values, dead = score(tmp_path, "a.zip", file.getvalue())
    assert (values, list(dead)) == ({}, ["a.zip/odd.png"])


def _flags(content: bytes, bit: int) -> bytes:
    """With a flag set in each header of a ZIP."""
    changed = bytearray(content)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := changed.find(mark, start + 1)) >= 0:
            changed[start + at] |= bit
    return bytes(changed)


def test_encrypted_members_are_dead(tmp_path: Path) -> None:
    assert score(tmp_path, "a.zip", _flags(zipped({"a": b"1"}), 1)) == ({}, {"a.zip/a": "it is encrypted"})


def test_other_ways_of_compressing_are_named(tmp_path: Path) -> None:
    values, dead = score(tmp_path, "a.zip", zipped({"a": b"1"}, method=zipfile.ZIP_LZMA))
    assert values == {}
    assert "method 14" in dead["a.zip/a"]


def test_a_zip_whose_content_is_another_is_found_out(tmp_path: Path) -> None:
    content = zipped(FILES, method=zipfile.ZIP_STORED)
    values, dead = score(tmp_path, "a.zip", content.replace(FILES["3.bin"], b"?" * 700, 1))
    assert len(values) == 5
    assert "it is damaged" in dead["a.zip/3.bin"]


@pytest.mark.parametrize("pack", [tar_gz, tar_zst, zipped])
def test_bombs_are_refused(tmp_path: Path, pack: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "_RATIO_FROM", 2**20)
    values, dead = score(tmp_path, "a.tar", pack({"bomb": bytes(2**23)}))
    assert values == {}
    assert any("as bombs do" in said for said in dead.values())


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    content = bytearray(zipped({"a": b"1" * 50, "b": b"2" * 50}))
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    content[second + 42 : second + 46] = bytes(4)  # where the first one is
    values, dead = score(tmp_path, "a.zip", bytes(content))
    assert values == {}
    assert "its members overlap" in dead["a.zip"]


def test_members_that_are_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "MAX_MEMBER", 100)
    values, dead = score(tmp_path, "a.tar", tar({"large": bytes(101), "small": b"1"}))
    assert list(values) == ["a.tar/small"]
    assert dead == {"a.tar/large": "it has 101 bytes, and 100 are the most"}


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_an_archive_that_has_changed_is_never_read_by_its_old_places(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(PACKERS[suffix](FILES))
    source = ArchiveSource.describe([str(path)], "bytes")
    [first, *_] = chunks_of(source, 2)
    path.write_bytes(PACKERS[suffix]({"other": b"x"} | FILES))
    scorer = Recorder()
    scorer.input = "bytes"
    [batch] = source.read(source.unmarked(first), scorer, Timings())
    assert len(batch.dead) == 2
    assert all(isinstance(error, ItemError) and "has changed" in error.message for _, error in batch.dead)
    with pytest.raises(SourceChangedError):
        list(chunks_of(source, 2, after=first.cursor, first=2))


SHARD = {
    "b/1.cls": b"0",
    "b/1.left.png": b"l",
    "b/1.right.png": b"r",
    "b/1.json": '{"wo": "Köln"}'.encode(),
    "b/2.left.png": b"l",
}


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_what_shares_a_stem_is_kept(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"s.{suffix}").write_bytes(PACKERS[suffix](SHARD | {"b/2.json": b"\xff"}))
    source = ArchiveSource.describe([str(tmp_path)], "bytes", keep=["*"])
    assert source.columns == {"cls": "string", "json": "string"}
    scorer = Recorder()
    scorer.input, scorer.batch_size = "bytes", 1
    [chunk] = chunks_of(source, 10)
    one, two, three = source.read(chunk, scorer, Timings())
    expected = {"cls": "0", "json": '{"wo": "Köln"}'}
    assert (one.keys, one.info) == ([f"s.{suffix}/b/1.left.png"], [expected])
    assert (two.keys, two.info) == ([f"s.{suffix}/b/1.right.png"], [expected])
    assert "no text in UTF-8" in three.dead[0][1].message


def test_nothing_is_kept_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar(SHARD))
    with pytest.raises(SpecError, match=r"no member of .*s\.tar is called ….jsn; did you mean 'json'") as raised:
        ArchiveSource.describe([str(tmp_path)], "image", keep=["jsn"])
    assert "beside pictures there are cls, json" in str(raised.value)


def test_an_archive_without_pictures_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar({"a.txt": b"", "b": b""}))
    source = ArchiveSource.describe([str(tmp_path / "s.tar")], "image")
    with pytest.raises(SourceNotFoundError, match=r"s\.tar hold no pictures, but .*\.txt 1"):
        chunks_of(source, 10)


@pytest.mark.parametrize(
    ("given", "names"),
    [("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]), ("s-{9..9}.tar", ["s-9.tar"])],
)
def test_numbers_in_braces_count(tmp_path: Path, given: str, names: Sequence[str]) -> None:
    for name in ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar", "s-9.tar", "s-12.tar"]:
        (tmp_path / name).write_bytes(tar({"a": b"1"}))
    source = ArchiveSource.describe([f"{tmp_path}/{given}"], "bytes")
    assert [key for chunk in chunks_of(source, 10) for key in source.keys(chunk)] == [f"{name}/a" for name in names]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s-{000..002}.tar", r"there is no .*/s-001\.tar, nor 1 more of the 3 files of s-\{000\.\.002\}\.tar"),
        ("s-{2..1}.tar", "counts down"),
        ("s-{0..9}{0..9}.tar", "twice"),
        ("{0..9}/s.tar", "in the name of a folder"),
        ("s-{0..9}*.tar", "beside a wildcard"),
    ],
)
def test_numbers_in_braces_that_cannot_be(tmp_path: Path, given: str, said: str) -> None:
    (tmp_path / "s-000.tar").write_bytes(tar({"a": b"1"}))
    with pytest.raises((SpecError, SourceNotFoundError), match=said):
        ArchiveSource.describe([f"{tmp_path}/{given}"], "bytes")


def test_a_file_that_is_called_like_numbers_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a{1..2}.png").write_bytes(b"x")
    source = FileSource.describe([f"{tmp_path}/a{{1..2}}.png"], "bytes")
    assert source.keys(chunks_of(source, 10)[0]) == ["a{1..2}.png"]
