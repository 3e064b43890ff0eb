import csv
import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from raydet.images.decode import DecodeError, TruncatedError, check, decode, orientation, repair, upright_size_hw

LIMIT = 178_956_970


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def noise(height: int = 24, width: int = 40) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def outcome(data: bytes, *, max_pixels: int) -> NDArray[np.uint8] | str:
    try:
        return decode(data, max_pixels=max_pixels)
    except DecodeError as error:
        return str(error)


SEEDS = [
    encoded(Image.fromarray(noise()), "JPEG"),
    encoded(Image.fromarray(noise()), "JPEG", progressive=True),
    encoded(Image.fromarray(noise()), "PNG"),
    encoded(Image.fromarray(noise()).convert("P"), "PNG", transparency=3),
    encoded(Image.fromarray(noise()), "GIF"),
    encoded(Image.fromarray(noise()), "BMP"),
    encoded(Image.fromarray(noise()), "WEBP"),
    encoded(Image.fromarray(noise()), "AVIF"),
    encoded(Image.fromarray(noise()), "JPEG2000"),
    encoded(Image.fromarray(noise()), "PPM"),
    encoded(Image.fromarray(noise()), "TIFF"),
    encoded(Image.fromarray(noise()), "TIFF", compression="tiff_lzw"),
]


def test_awkward_files_are_decoded_or_refused_as_the_manifest_says(test_data: Path) -> None:
    folder = test_data / "awkward"
    with (folder / "MANIFEST.csv").open() as manifest:
        rows = list(csv.DictReader(manifest))
    assert len(rows) == 29
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        if row["pillow_13_load"] == "ok":
            pixels = decode(data, max_pixels=LIMIT)
            with Image.open(folder / row["file"]) as image:
                width, height = ImageOps.exif_transpose(image).size
            assert pixels.shape == (height, width, 3), row["file"]
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous and pixels.flags.writeable
        else:
            with pytest.raises(DecodeError) as caught:
                decode(data, max_pixels=LIMIT)
            reason = str(caught.value)
            assert 5 <= len(reason) <= 200 and "\n" not in reason and "0x" not in reason and "PIL." not in reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zero_byte.jpg", "empty file"),
        ("text_named.jpg", "not an image Pillow can read (it is text)"),
        ("truncated_jpeg.jpg", "truncated: the JPEG file ends in the middle of the image data"),
        ("truncated_image.png", "truncated: the PNG file ends in the middle of the image data"),
        ("zero_width.gif", "zero width"),
        ("decompression_bomb.gif", "4,365 Mpx is over the limit of 179 Mpx"),
        ("bmp_b_reallybig.bmp", "6,000,000 Mpx is over the limit of 179 Mpx"),
    ],
)
def test_reasons_are_for_people(test_data: Path, name: str, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode((test_data / "awkward" / name).read_bytes(), max_pixels=LIMIT)
    assert str(caught.value) == reason


def test_rgb_files_keep_their_exact_pixels() -> None:
    pixels = noise()
    for file_format in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), file_format), max_pixels=LIMIT), pixels)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_turned_upright(file_format: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255  # white upper left corner of the stored image
    options = {} if file_format in ("PNG", "TIFF") else {"quality": 100}
    data = encoded(Image.fromarray(pixels), file_format, exif=exif, **options)
    upright = decode(data, max_pixels=LIMIT)
    assert upright.shape == ((16, 32, 3) if tag < 5 else (32, 16, 3))
    assert orientation(data) == tag
    # Table of the EXIF standard: displayed positions of the stored row 0 and column 0.
    corners = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}
    row, column = 0 if corners[tag][0] == "t" else -1, 0 if corners[tag][1] == "l" else -1
    assert upright[row, column].min() > 200
    assert sum(int(upright[r, c].min() > 200) for r in (0, -1) for c in (0, -1)) == 1


def test_grey_and_cmyk_and_palette_become_rgb() -> None:
    pixels = noise()
    for mode in ("L", "1", "P", "CMYK", "LAB"):
        image = Image.fromarray(pixels).convert("RGB" if mode == "LAB" else mode)
        if mode == "LAB":
            image = Image.frombytes("LAB", image.size, bytes([128, 0, 0]) * (image.width * image.height))
        data = encoded(image, "TIFF")
        result = decode(data, max_pixels=LIMIT)
        assert result.shape == pixels.shape
        if mode == "LAB":
            assert np.ptp(result.reshape(-1, 3).astype(int), axis=1).max() <= 4  # a = b = 0 is grey
        else:
            np.testing.assert_array_equal(result, np.asarray(image.convert("RGB")))


def test_what_is_transparent_lies_on_white() -> None:
    colours = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    expected = np.array([[[200, 0, 0], [255, 255, 255], [127, 127, 127]]], np.uint8)
    assert np.abs(decode(encoded(Image.fromarray(colours), "PNG"), max_pixels=LIMIT).astype(int) - expected).max() <= 1
    grey_alpha = Image.fromarray(np.array([[[60, 255], [60, 0]]], np.uint8), "LA")
    np.testing.assert_array_equal(
        decode(encoded(grey_alpha, "PNG"), max_pixels=LIMIT), [[[60, 60, 60], [255, 255, 255]]]
    )
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        decode(encoded(palette, "PNG", transparency=1), max_pixels=LIMIT), [[[10, 20, 30], [255, 255, 255]]]
    )
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    np.testing.assert_array_equal(
        decode(encoded(keyed, "PNG", transparency=(4, 5, 6)), max_pixels=LIMIT), [[[1, 2, 3], [255, 255, 255]]]
    )


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    samples = np.array([[0, 257, 32768, 65535]], np.uint16)
    for file_format in ("PNG", "TIFF", "PPM"):
        grey = decode(encoded(Image.fromarray(samples), file_format), max_pixels=LIMIT)[0, :, 0]
        np.testing.assert_array_equal(grey, [0, 1, 128, 255])


def test_float_samples_are_scaled_to_the_range_that_holds_them() -> None:
    for values, expected in [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 128.0, 255.0], [0, 128, 255]),
        ([-5.0, float("nan"), 0.2], [0, 0, 51]),
    ]:
        data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
        np.testing.assert_array_equal(decode(data, max_pixels=LIMIT)[0, :, 1], expected)


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for file_format in ("GIF", "PNG", "WEBP", "MPO"):
        data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True, quality=100)
        red, _, blue = decode(data, max_pixels=LIMIT)[4, 4]
        assert red > 250 and blue < 5, file_format


def test_the_size_limit_is_checked_in_the_header() -> None:
    data = encoded(Image.fromarray(noise(24, 40)), "PNG")
    assert decode(data, max_pixels=24 * 40).shape == (24, 40, 3)
    with pytest.raises(DecodeError, match=r"960 pixels .* 959 pixels"):
        decode(data, max_pixels=24 * 40 - 1)
    # The header claims 400 Mpx that the file does not contain, so the size comes from the header.
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    claims = data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    with pytest.raises(DecodeError, match=r"400 Mpx .* 179 Mpx"):
        decode(claims, max_pixels=LIMIT)


def test_what_is_no_image_is_named() -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(64)
    for data, words in [
        (heic, "type heic"),
        (b"%PDF-1.7\n\xff", "PDF"),
        (b"<html>", "text"),
        (b"\xff\x00" * 40, "not"),
    ]:
        with pytest.raises(DecodeError, match=words):
            decode(data, max_pixels=LIMIT)
        with pytest.raises(DecodeError, match=words):
            orientation(data)


def test_the_size_in_the_header_is_that_of_the_pixels(test_data: Path) -> None:
    folders = ["awkward", "coco_mini/train", "coco_mini/val"]
    files = [path for folder in folders for path in sorted((test_data / folder).iterdir())]
    num_readable = 0
    for path in [*files, *sorted((test_data / "bccd/images").iterdir())[::20]]:
        data = path.read_bytes()
        try:
            pixels = decode(data, max_pixels=10_000_000)
        except DecodeError:
            continue
        num_readable += 1
        assert upright_size_hw(data) == pixels.shape[:2], path.name
    assert num_readable == 17 + 47 + 57 + 19


@pytest.mark.parametrize("tag", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_size_in_the_header_is_upright(file_format: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    data = encoded(Image.fromarray(noise(24, 40)), file_format, exif=exif)
    assert upright_size_hw(data) == ((24, 40) if tag < 5 else (40, 24)) == decode(data, max_pixels=LIMIT).shape[:2]
    if file_format == "PNG":  # EXIF may also follow the pixels
        at = data.index(b"eXIf") - 4
        length = 12 + int.from_bytes(data[at : at + 4], "big")
        moved = data[:at] + data[at + length : -12] + data[at : at + length] + data[-12:]
        assert upright_size_hw(moved) == decode(moved, max_pixels=LIMIT).shape[:2] == upright_size_hw(data)


def test_the_size_is_read_from_the_header_alone() -> None:
    for file_format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"):
        data = encoded(Image.fromarray(noise(500, 300)), file_format)
        head = data if file_format == "TIFF" else data[:1000]  # the directory of a TIFF is at the end
        broken = head + b"\xaa" * 200 if file_format != "TIFF" else head
        assert upright_size_hw(broken) == (500, 300), file_format
    for data in (b"", b"text", encoded(Image.fromarray(noise()), "PNG")[:20]):
        with pytest.raises(DecodeError) as caught:
            upright_size_hw(data)
        with pytest.raises(DecodeError) as also:
            decode(data, max_pixels=LIMIT)
        assert str(caught.value) == str(also.value)


@pytest.mark.parametrize(
    ("at_least_hw", "size_hw"),
    [
        (None, (301, 403)),
        ((302, 10), (301, 403)),
        ((301, 403), (301, 403)),
        ((152, 10), (301, 403)),
        ((151, 202), (151, 202)),
        ((10, 102), (151, 202)),
        ((76, 101), (76, 101)),
        ((39, 10), (76, 101)),
        ((38, 51), (38, 51)),
        ((1, 1), (38, 51)),
    ],
)
@pytest.mark.parametrize("tag", [1, 3, 6, 8])
def test_a_jpeg_is_reduced_as_far_as_the_upright_picture_may_be(
    tag: int, at_least_hw: tuple[int, int] | None, size_hw: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = (301, 403) if tag < 5 else (403, 301)
    smooth = Image.fromarray(noise(6, 8)).resize(stored[::-1], Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", exif=exif, quality=95)
    reduced = decode(data, max_pixels=LIMIT, at_least_hw=at_least_hw)
    assert reduced.shape == (*size_hw, 3)
    assert reduced.flags.c_contiguous and reduced.flags.writeable
    assert upright_size_hw(data) == (301, 403)
    full = Image.fromarray(decode(data, max_pixels=LIMIT)).resize(size_hw[::-1], Image.Resampling.BOX)
    assert np.abs(reduced.astype(int) - np.asarray(full)).mean() < 6  # 60 for another or a rotated image


def test_only_jpegs_are_reduced_and_the_size_limit_is_for_the_full_size() -> None:
    for seed in SEEDS:
        is_jpeg = seed[:2] == b"\xff\xd8"
        assert decode(seed, max_pixels=LIMIT, at_least_hw=(3, 5)).shape == ((3, 5, 3) if is_jpeg else (24, 40, 3))
        with pytest.raises(DecodeError, match="959 pixels"):
            decode(seed, max_pixels=959, at_least_hw=(3, 5))
    for size_hw in ((1, 1), (1, 300), (5, 2)):
        data = encoded(Image.fromarray(noise(*size_hw)), "JPEG")
        height, width = decode(data, max_pixels=LIMIT, at_least_hw=(1, 1)).shape[:2]
        assert 1 <= height <= size_hw[0] and 1 <= width <= size_hw[1]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_decode_errors(data: bytes) -> None:
    for start in (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"P6 ",
        b"RIFF\x20\0\0\0WEBPVP8 ",
    ):
        result = outcome(start + data, max_pixels=10_000)
        # Random bytes may form an image: a PPM header is only a few bytes.
        assert result if isinstance(result, str) else result.ndim == 3 and result.size


@settings(max_examples=250, deadline=None)
@given(
    source=st.sampled_from(SEEDS),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
)
def test_damaged_files_raise_nothing_but_decode_errors(
    source: bytes, cut: float, changes: list[tuple[float, int]]
) -> None:
    damaged = bytearray(source[: round(cut * len(source))])
    for place, value in changes:
        if damaged:
            damaged[min(int(place * len(damaged)), len(damaged) - 1)] = value
    result = outcome(bytes(damaged), max_pixels=100_000)
    if isinstance(result, str):
        assert result
    else:
        assert result.ndim == 3 and result.size
        assert 1 <= orientation(bytes(damaged)) <= 8
        assert upright_size_hw(bytes(damaged)) == result.shape[:2]


@pytest.mark.parametrize("source", SEEDS[:8])
def test_half_a_file_is_refused(source: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(source[: len(source) // 2], max_pixels=LIMIT)


def test_threads_decode_side_by_side() -> None:
    expected = [decode(seed, max_pixels=LIMIT) for seed in SEEDS]
    failures: list[str] = []

    def work() -> None:
        for _ in range(10):
            for seed, pixels in zip(SEEDS, expected, strict=True):
                if not np.array_equal(decode(seed, max_pixels=LIMIT), pixels):
                    failures.append("other pixels")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_importing_it_is_cheap_and_decoding_is_silent(test_data: Path) -> None:
    script = """
import sys
from pathlib import Path
from raydet.images.decode import DecodeError, decode
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode(path.read_bytes(), max_pixels=10**12)
    except DecodeError:
        pass
heavy = {"torch", "torchvision", "ray", "transformers", "albumentations", "datasets", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    # 10**12 pixels exceed Pillow's own limit, which causes a warning.
    command = [sys.executable, "-W", "always", "-c", script, str(test_data / "awkward")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


REPAIRABLE: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "GIF": {"interlace": 0},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
}


def smooth(height: int = 96, width: int = 128) -> Image.Image:
    return Image.fromarray(noise(6, 8)).resize((width, height), Image.Resampling.BICUBIC)


def as_pillow_shows_it(data: bytes, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("cut", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("file_format", [*REPAIRABLE, "progressive"])
def test_what_is_there_of_a_truncated_file_is_kept(
    file_format: str, cut: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, Any] = REPAIRABLE.get(file_format, {"progressive": True})
    options = options | ({"exif": exif} if file_format in ("JPEG", "PNG") else {})
    whole = encoded(smooth(), "JPEG" if file_format == "progressive" else file_format, **options)
    data = whole[: round(cut * len(whole))]
    for look in (decode, check):
        with pytest.raises(TruncatedError, match=r"^truncated"):
            look(data, max_pixels=LIMIT)
    repaired = repair(data, max_pixels=LIMIT)
    pixels = decode(repaired, max_pixels=LIMIT)
    np.testing.assert_array_equal(pixels, as_pillow_shows_it(data, monkeypatch))
    assert check(repaired, max_pixels=LIMIT) == upright_size_hw(repaired) == pixels.shape[:2] == upright_size_hw(whole)
    if file_format != "progressive":  # the first rows; with EXIF 6 the last columns; in a BMP the last rows
        places: dict[str, Any] = {"JPEG": np.s_[:, -8:], "PNG": np.s_[:, -8:], "BMP": np.s_[-8:]}
        there = places.get(file_format, np.s_[:8])
        np.testing.assert_array_equal(pixels[there], decode(whole, max_pixels=LIMIT)[there])
    if file_format == "JPEG":
        assert repaired == data + b"\xff\xd9" and orientation(repaired) == 6
        assert decode(repaired, max_pixels=LIMIT, at_least_hw=(32, 24)).shape == (32, 24, 3)


@pytest.mark.parametrize("file_format", ["WEBP", "AVIF", "JPEG2000", "TIFF"])
def test_formats_that_give_no_part_stay_refused(file_format: str) -> None:
    whole = encoded(smooth(), file_format, **({"compression": "tiff_lzw"} if file_format == "TIFF" else {}))
    for look in (decode, repair):
        with pytest.raises(DecodeError):
            look(whole[: len(whole) // 2], max_pixels=LIMIT)


def test_a_file_without_any_pixels_is_not_repaired(test_data: Path) -> None:
    png = encoded(smooth(), "PNG")
    with pytest.raises(TruncatedError, match="no part of the image"):
        repair(png[: png.index(b"IDAT") + 6], max_pixels=LIMIT)
    for name in ("truncated_jpeg.jpg", "truncated_image.png"):
        data = (test_data / "awkward" / name).read_bytes()
        assert decode(repair(data, max_pixels=LIMIT), max_pixels=LIMIT).std() > 10
        with pytest.raises(DecodeError, match="over the limit"):
            repair(data, max_pixels=99)
    for data in (b"", b"text", png[:20]):
        with pytest.raises(DecodeError):
            repair(data, max_pixels=LIMIT)


@settings(max_examples=100, deadline=None)
@given(source=st.sampled_from(SEEDS), cut=st.floats(0, 1))
def test_repairing_gives_an_image_or_a_decode_error(source: bytes, cut: float) -> None:
    data = source[: round(cut * len(source))]
    try:
        repaired = repair(data, max_pixels=LIMIT)
    except DecodeError:
        return
    assert decode(repaired, max_pixels=LIMIT).shape == (24, 40, 3)


def test_threads_repair_while_others_refuse() -> None:
    data = [encoded(smooth(), "JPEG")[:-200], encoded(smooth(), "PNG")[:-200]]
    expected = [repair(item, max_pixels=LIMIT) for item in data]
    failures: list[str] = []

    def work(does_repair: bool) -> None:
        for _ in range(6):
            for item, repaired in zip(data, expected, strict=True):
                if does_repair and repair(item, max_pixels=LIMIT) != repaired:
                    failures.append("repaired otherwise")
                if not does_repair and not isinstance(outcome(item, max_pixels=LIMIT), str):
                    failures.append("not refused")

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(("mode", "file_format"), [("LA", "PNG"), ("PA", "TIFF"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_every_mode_with_transparency_lies_on_white(mode: str, file_format: str) -> None:
    image = Image.new("RGB", (2, 1), (51, 51, 51)).convert({"LA": "L", "PA": "P", "RGBA": "RGB"}[mode])
    image.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    assert image.mode == mode
    data = encoded(image, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    assert decode(data, max_pixels=LIMIT).tolist() == [[[51, 51, 51], [255, 255, 255]]]


def test_sixteen_bit_colour_and_animated_files_with_transparency() -> None:
    deep = np.zeros((2, 2, 3), ">u2")
    deep[..., 0], deep[..., 1] = 65535, 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode(png, max_pixels=LIMIT)[1, 1].tolist() == [255, 1, 0]
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    blue = Image.new("RGBA", (4, 4), (0, 0, 255, 255))
    for file_format in ("PNG", "WEBP"):
        data = encoded(clear, file_format, save_all=True, append_images=[blue], lossless=True)
        assert decode(data, max_pixels=LIMIT)[0, 0].tolist() == [255, 255, 255], file_format
