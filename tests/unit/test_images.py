from __future__ import annotations

import struct
import threading
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from tally.errors import ItemError
from tally.media import rare
from tally.media.images import decode, each_page, pages, suffixes


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 320, height: int = 200) -> Image.Image:
    """Red grows to the right, green downwards: every corner differs from the others."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "tga"])
def test_what_comes_out_is_rgb_contiguous_and_writable(kind: str) -> None:
    pixels, info = decode(encoded(gradient(), kind))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.array_equal(pixels, np.asarray(gradient()))
    assert info == {"width": 320, "height": 200}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, (40, 20)])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_every_orientation_comes_out_upright(orientation: int, size: tuple[int, int] | None, kind: str) -> None:
    upright = gradient(320, 160)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, info = decode(encoded(stored, kind, exif=exif), size)
    assert info == {"width": 320, "height": 160}
    assert pixels.shape[1] == 2 * pixels.shape[0]
    assert difference(np.asarray(Image.fromarray(pixels).resize((320, 160))), np.asarray(upright)) < 4


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_orientations_that_there_are_not_change_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(gradient(), "jpeg", exif=exif))[0].shape == (200, 320, 3)


def test_broken_exif_does_not_cost_the_picture() -> None:
    pixels, _ = decode(encoded(gradient(), "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"))
    assert pixels.shape == (200, 320, 3)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (None, (800, 1600, 3)),
        ((1600, 800), (800, 1600, 3)),
        ((500, 300), (800, 1600, 3)),
        ((400, 200), (400, 800, 3)),
        ((100, 200), (400, 800, 3)),
        ((200, 100), (200, 400, 3)),
        ((10, 10), (100, 200, 3)),
    ],
)
def test_a_reduced_jpeg_is_still_twice_as_large_as_wanted(size: tuple[int, int] | None, shape: tuple[int, ...]) -> None:
    pixels, info = decode(encoded(gradient(1600, 800), "jpeg"), size)
    assert pixels.shape == shape
    assert info == {"width": 1600, "height": 800}


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for kind in ("gif", "png", "webp", "tiff"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        pixels, _ = decode(data)
        assert difference(pixels, np.full((8, 8, 3), (255, 0, 0))) < 3, kind


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = {"CMYK": "tiff", "YCbCr": "tiff"}.get(mode, "png")
    image = gradient(32, 32).convert(mode)
    pixels, _ = decode(encoded(image, kind))
    assert difference(pixels, np.asarray(image.convert("RGB"))) < 1


def test_transparency_is_dropped_and_not_blended() -> None:
    image = gradient(32, 32).convert("RGBA")
    image.putalpha(0)
    assert np.array_equal(decode(encoded(image, "png"))[0], np.asarray(gradient(32, 32)))


def test_palettes_with_transparent_entries() -> None:
    image = gradient(32, 32).quantize(8)
    data = encoded(image, "png", transparency=bytes([0, 128, 255]))
    assert np.array_equal(decode(data)[0], np.asarray(image.convert("RGB")))


def grey(values: list[float], kind: str) -> list[int]:
    """One row of samples, as what they come out."""
    pixels, _ = decode(encoded(Image.fromarray(np.array([values], dtype=kind)), "tiff"))
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 1])
    return pixels[0, :, 0].tolist()


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = [0, 128, 129, 257, 32768, 65535]
    assert grey(values, "<u2") == [0, 0, 1, 1, 128, 255]
    assert grey(values, "<i4") == [0, 0, 1, 1, 128, 255]
    pgm = b"P5 6 1 65535\n" + np.array(values, ">u2").tobytes()
    assert decode(pgm)[0][0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    png = encoded(Image.fromarray(np.array([values], "<u2")), "png")
    assert decode(png)[0][0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_big_endian_sixteen_bits() -> None:
    image = Image.frombytes("I;16B", (3, 1), np.array([0, 257, 65535], ">u2").tobytes())
    data = encoded(image, "tiff")
    assert data.startswith(b"MM")
    assert decode(data)[0][0, :, 0].tolist() == [0, 1, 255]


def test_other_ranges() -> None:
    assert grey([0.0, 0.5, 1.0], "<f4") == [0, 128, 255]
    assert grey([0.0, 100.0, 255.0], "<f4") == [0, 100, 255]
    assert grey([-10.0, 0.0, 10.0], "<f4") == [0, 128, 255]
    assert grey([float("nan"), 0.0, 2000.0], "<f4") == [0, 0, 255]
    assert grey([5.0, float("inf"), float("-inf")], "<f4") == [5, 255, 0]
    assert grey([0, 1 << 20, 1 << 21], "<i4") == [0, 128, 255]


def test_lab_goes_through_its_profile() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(gradient(64, 64), to_lab)
    assert lab is not None
    assert difference(decode(encoded(lab, "tiff"))[0], np.asarray(gradient(64, 64))) < 3


def test_large_pictures_are_copied_in_strips() -> None:
    image = gradient(3001, 1201)
    assert np.array_equal(decode(encoded(image, "bmp"))[0], np.asarray(image))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_large_pictures_are_refused_by_their_header() -> None:
    data = encoded(gradient(200, 100), "png")
    assert decode(data, max_pixels=20_000)[0].shape == (100, 200, 3)
    with pytest.raises(ItemError, match=r"^200x100 = 0.0 million pixels is over .* 0.019999 million \(max_pixels"):
        decode(data, max_pixels=19_999)
    bomb = png_header(13_000, 13_000) + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ItemError, match=r"^13000x13000 = 169.0 million pixels is over .* 128 million \(max_pixels"):
        decode(bomb)
    bomb = png_header(60_000, 60_000) + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ItemError, match=r"^3600.0 million pixels is over the limit of 128 million \(max_pixels"):
        decode(bomb)


def test_compressed_fits_is_refused() -> None:
    cards = ["XTENSION= 'BINTABLE'", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 8"]
    cards += ["ZIMAGE  = T", "ZCMPTYPE= 'GZIP_1  '", "ZBITPIX = 8", "ZNAXIS  = 2", "ZNAXIS1 = 8", "ZNAXIS2 = 8"]
    first = "".join(card.ljust(80) for card in ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 0", "END"]).ljust(2880)
    second = "".join(card.ljust(80) for card in [*cards, "END"]).ljust(2880)
    with pytest.raises(ItemError, match="FITS"):
        decode((first + second).encode() + bytes(2880))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^the file is empty \(0 bytes\)$"),
        (b"<!DOCTYPE html>", r"^not an image, but a web page \(starts with b'<!DOCTYPE ht'\)$"),
        (b"\xff\xd8\xff nonsense", r"^damaged JPEG image: its header cannot be read \(the file has 12 bytes\)$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "^PostScript is not supported: convert it"),
    ],
)
def test_what_is_no_picture(data: bytes, message: str) -> None:
    with pytest.raises(ItemError, match=message) as caught:
        decode(data)
    assert caught.value.stage == "decode"


# What is read with the extra "pictures" alone, and what it is called; what is read, and of which something is left out.
RARE = {
    "five_bands.tif": "TIFF of 5 samples per pixel (unsigned, 8 bits)",
    "floatrgb.tif": "TIFF of 3 samples per pixel (floating-point, 32 bits)",
    "heic.heic": "HEIC",
    "jls.jls": "JPEG-LS of 8 bits",
    "lossless.jpg": "lossless JPEG of 16 bits",
    "mono1.dcm": "DICOM",
    "mono2.dcm": "DICOM",
    "svg.svg": "SVG",
    "twelve_bit.jpg": "JPEG of 12 bits",
    "xl.jxl": "JPEG XL",
}
SEVERAL = "some files hold several pictures (frames or pages): the first of each is scored (--pages all scores each)"
TRANSPARENT = (
    "some pictures are partly transparent: transparency is dropped, and what is stored beneath it is scored "
    "(--background white lays them on white)"
)
BANDS = "some pictures have more bands than red, green and blue: the first three are scored"
LEFT_OUT = {
    **{key: [SEVERAL] for key in ["anim.gif", "anim.webp", "apng.png", "multipage.tiff", "pages.tif"]},
    "five_bands.tif": [BANDS],
    **{key: [TRANSPARENT] for key in ["la.png", "palette_alpha.png", "rgba0.png", "transparent_black.png"]},
}
GREYS = {"lossless.jpg": [[156] * 3, [16] * 3], "twelve_bit.jpg": [[199] * 3, [20] * 3]}
RED_AND_BLUE = [[200, 40, 20], [20, 60, 220]]
OTHERS = {
    "dark.png": [10, 20, 30],
    "light.png": [240, 230, 220],
    "float.tif": [128] * 3,
    "gray16.png": [156] * 3,
    "gray16.tif": [156] * 3,
    "sixteen_pgm.pgm": [156] * 3,
    "la.png": [90] * 3,
    "multipage.tiff": [0, 128, 0],
    "one_bit.png": [255] * 3,
    "orange.jpg": [200, 100, 50],
    "five_bands.tif": [0] * 3,
    "mono1.dcm": [130] * 3,
    "mono2.dcm": [125] * 3,
    "svg.svg": [255, 0, 0],
}


def test_every_found_picture(data: Path) -> None:
    seen = 0
    for path in sorted((data / "found" / "pictures").iterdir()):
        told: list[str] = []
        if path.name == "xr.jxr":
            with pytest.raises(ItemError, match=r"^JPEG XR is not supported: convert it to a PNG or JPEG"):
                decode(path.read_bytes())
            continue
        pixels, _ = decode(path.read_bytes(), tell=told.append)
        assert told == LEFT_OUT.get(path.name, []), path.name
        if path.name == "transparent_black.png":
            continue
        height, width = pixels.shape[:2]
        corners = pixels[[height // 4, -height // 4], [width // 4, -width // 4]].astype(int)
        wanted = [OTHERS[path.name]] * 2 if path.name in OTHERS else GREYS.get(path.name, RED_AND_BLUE)
        if path.name in ("exif2.png", "exif3.png", "exif7.png", "exif8.png"):
            wanted = wanted[::-1]
        assert np.abs(corners - wanted).max() <= 6, path.name
        seen += 1
    assert seen > 30


def test_a_damaged_header_is_not_called_an_unsupported_format() -> None:
    for data in (b"II*\0" + bytes(40), b"MM\0*\xff\xff\xff\xff", b"\xff\xd8\xff\xc0\0\x11\x08", b"<?xml ?><html/>"):
        with pytest.raises(ItemError, match=r"damaged|not an image|truncated"):
            decode(data)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "bmp", "tiff", "webp"])
def test_cut_files_are_never_half_a_picture(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    for part in (0.5, 0.9):
        with pytest.raises(ItemError) as caught:
            decode(data[: int(len(data) * part)])
        assert "Traceback" not in caught.value.message
        assert "\n" not in caught.value.message


def test_warnings_are_silenced_without_touching_those_of_others() -> None:
    image = gradient(32, 32).quantize(8)
    data = encoded(image, "png", transparency=bytes([0, 128, 255]))
    failures: list[BaseException] = []

    def many() -> None:
        try:
            for _ in range(50):
                decode(data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    # Pillow blames some warnings on its caller: they are silent, though the suite makes errors of warnings.
    warnings.warn_explicit("deprecated", DeprecationWarning, "images.py", 1, module=decode.__module__)
    with pytest.warns(UserWarning, match="still seen"):
        warnings.warn("still seen", UserWarning, stacklevel=1)


def test_suffixes_are_those_that_can_be_read() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".avif", ".bmp", ".gif"} <= suffixes()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".csv"} & suffixes()


def test_the_orientation_set_comes_out_upright_and_alike(data: Path) -> None:
    files = sorted((data / "images" / "exif_orientation").glob("*.jpg"))
    assert len(files) == 9
    small = []
    for file in files:
        for size in (None, (200, 200)):
            pixels, info = decode(file.read_bytes(), size)
            assert info == {"width": 1200, "height": 1800}
            small.append(np.asarray(Image.fromarray(pixels).resize((120, 180))))
    assert all(difference(small[0], each) < 1 for each in small)


def test_every_odd_format_is_read(data: Path) -> None:
    files = [file for file in sorted((data / "images" / "odd").iterdir()) if file.suffix != ".md"]
    assert len(files) == 35
    hopper = np.asarray(Image.open(data / "images/odd/hopper.png"))
    for file in files:
        pixels, info = decode(file.read_bytes())
        assert pixels.shape == (info["height"], info["width"], 3), file.name
        if file.stem in ("hopper", "hopper_lzw", "hopper_bigtiff", "hopper.Lab") and pixels.shape == hopper.shape:
            grey = file.suffix in (".fits", ".pfm")
            reference = np.asarray(Image.fromarray(hopper).convert("L").convert("RGB")) if grey else hopper
            assert difference(pixels, reference) < 20, file.name


def test_what_needs_more_libraries_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rare, "installed", lambda module: False)
    for name, what in RARE.items():
        content = (data / "found" / "pictures" / name).read_bytes()
        for asked in (decode, pages):
            with pytest.raises(ItemError, match=r"pip install 'tally-scoring\[pictures\]'") as caught:
                asked(content)
            assert caught.value.message.startswith(f"{what} is not supported without more libraries")
        assert Path(name).suffix in suffixes()


def test_rare_pictures_are_refused_by_their_header(data: Path) -> None:
    for name in RARE:
        content = (data / "found" / "pictures" / name).read_bytes()
        assert decode(content, max_pixels=64 * 48)[1] == {"width": 64, "height": 48}
        with pytest.raises(ItemError, match=r"64x48 = 0\.0 million pixels is over the limit"):
            decode(content, max_pixels=64 * 48 - 1)


@pytest.mark.parametrize("size", [(8, 8), (64, 48), (640, 360), (300, 200), (5000, 3), (1, 700)])
def test_the_size_of_jpeg_xl(size: tuple[int, int]) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    content = imagecodecs.jpegxl_encode(np.zeros((size[1], size[0], 3), np.uint8))
    found = rare.find(content)
    assert found is not None
    assert found.size == size


def test_cut_rare_pictures_are_damaged(data: Path) -> None:
    for name in RARE.keys() - {"five_bands.tif", "svg.svg"}:
        content = (data / "found" / "pictures" / name).read_bytes()
        with pytest.raises(ItemError) as caught:
            decode(content[: len(content) * 2 // 3])
        assert caught.value.stage == "decode"


@pytest.mark.parametrize(
    "inside",
    ['<image href="/etc/a.png"/>', "<image xlink:href='http://x/a.png'/>", "<style>a{fill:url(http://x)}</style>"],
)
def test_drawings_read_nothing_else(inside: str) -> None:
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{inside}</svg>'
    with pytest.raises(ItemError, match="SVG that refers to other files is not supported"):
        decode(drawing.encode())


def test_a_drawing_is_as_large_as_it_says() -> None:
    pytest.importorskip("resvg_py")
    shape = '<rect width="30" height="20" fill="#00ff00" opacity="0.5"/></svg>'
    for sizes in ('width="30" height="20"', 'viewBox="0 0 30 20"', 'width="100%" viewBox="0 0 30 20"'):
        told: list[str] = []
        drawing = f'<svg xmlns="http://www.w3.org/2000/svg" {sizes}>{shape}'.encode()
        pixels, info = decode(drawing, background=(255, 255, 255), tell=told.append)
        assert (info, told) == ({"width": 30, "height": 20}, [])
        assert difference(pixels, np.full((20, 30, 3), (127, 255, 127))) < 2
    with pytest.raises(ItemError, match="is over the limit of 128 million"):
        decode(b'<svg xmlns="http://www.w3.org/2000/svg" width="90000" height="90000"/>')


def dicom(values: np.ndarray[Any, Any], **tags: Any) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian

    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.Rows, found.Columns = values.shape[-2:]
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 12, 11, 0
    if values.ndim == 3:
        found.NumberOfFrames = len(values)
    found.PixelData = values.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(found, name, value)
    out = BytesIO()
    found.save_as(out, enforce_file_format=True)
    return out.getvalue()


def test_a_scan_is_shown_as_it_is_meant_to_be() -> None:
    values = np.array([[0, 1000, 2000, 4095]])
    uids = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "SOPInstanceUID": "1.2.3"}
    assert decode(dicom(values, **uids))[0][0, :, 0].tolist() == [0, 62, 125, 255]
    window = {"WindowCenter": 1500, "WindowWidth": 1000, **uids}
    shown = decode(dicom(values, **window))[0][0, :, 0].tolist()
    assert shown[0] == 0
    assert shown[2:] == [255, 255]
    inverted = decode(dicom(values, PhotometricInterpretation="MONOCHROME1", **uids))[0][0, :, 0].tolist()
    assert inverted == [255, 193, 130, 0]
    several = dicom(np.stack([values, values[:, ::-1]]), **uids)
    assert pages(several) == 2
    assert decode(several, page=1)[0][0, :, 0].tolist() == [255, 125, 62, 0]


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"RescaleSlope": 1, "RescaleIntercept": -1024},
        {"RescaleSlope": 2, "RescaleIntercept": 0},
        {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15},
    ],
)
def test_the_window_of_a_scan_is_about_what_its_values_mean(stored: dict[str, int]) -> None:
    values = np.array([[0, 500, 1000, 1300, 4000]])
    units = values[0] * stored.get("RescaleSlope", 1) + stored.get("RescaleIntercept", 0)
    window = {"WindowCenter": [600, 40], "WindowWidth": [2001, 80]}  # the first of two counts
    uids = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "SOPInstanceUID": "1.2.3"}
    for form, share in {
        "LINEAR": np.clip((units - 599.5) / 2000 + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((units - 600) / 2001 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (units - 600) / 2001)),
    }.items():
        shown = decode(dicom(values, **window, **stored, **uids, VOILUTFunction=form))[0][0, :, 0]
        assert np.abs(shown - share * 255).max() <= 0.51
    with pytest.raises(ItemError, match="its window is"):
        decode(dicom(values, WindowCenter=1, WindowWidth=-5, **uids))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_an_animation_is_played_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (9, 8, 4), np.uint8), "RGBA") for _ in range(12)]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"disposal": 2} if kind == "gif" else {})
    )
    alone = [decode(data, page=page) for page in range(pages(data))]
    opened: list[bytes] = []
    open_one = Image.open

    def counted(*given: Any, **more: Any) -> Image.Image:
        opened.append(data)
        return open_one(*given, **more)

    monkeypatch.setattr(Image, "open", counted)
    for (pixels, info), (expected, also) in zip(each_page(data), alone, strict=True):
        assert info == also
        assert (pixels == expected).all()
    assert len(opened) <= (2 if kind != "tiff" else 14)


def test_the_picture_that_stands_for_a_heic_file_is_scored() -> None:
    heif = pytest.importorskip("pillow_heif").HeifFile()
    for side, color in ((64, "red"), (32, "lime"), (48, "blue")):
        heif.add_from_pillow(Image.new("RGB", (side, 32), color))
    out = BytesIO()
    heif.save(out, primary_index=1, quality=90)
    pixels, info = decode(out.getvalue())
    assert (info["width"], int(pixels[0, 0].argmax())) == (32, 1)
    shown = [decode(out.getvalue(), page=page) for page in range(pages(out.getvalue()))]
    assert [(info["width"], int(pixels[0, 0].argmax())) for pixels, info in shown] == [(64, 0), (32, 1), (48, 2)]
    with pytest.raises(ItemError, match="48x32"):
        decode(out.getvalue(), page=2, max_pixels=40 * 32)


def test_each_page_and_what_transparent_pictures_lie_on() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for kind in ("gif", "png", "webp", "tiff"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert pages(data) == 3
        for page, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
            told: list[str] = []
            assert difference(decode(data, page=page, tell=told.append)[0], np.full((8, 8, 3), color)) < 3, kind
            assert told == []
    assert pages(encoded(frames[0], "jpeg")) == 1
    clear = Image.new("RGBA", (8, 8), (200, 100, 0, 51))
    for image in (clear, clear.convert("LA"), clear.convert("P")):
        pixels = decode(encoded(image, "png"), background=(0, 0, 255))[0]
        grey = np.asarray(image.convert("RGBA"))[0, 0]
        expected = np.round(grey[:3] * (grey[3] / 255) + np.array([0, 0, 255]) * (1 - grey[3] / 255))
        assert difference(pixels, np.broadcast_to(expected, (8, 8, 3))) < 2
