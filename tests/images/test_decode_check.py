"""`check` is cheaper than `decode` and must reach the same verdict."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydet.images.decode import DecodeError, check, decode

MAX_PIXELS = 10**7


def verdicts(data: bytes) -> tuple[str | tuple[int, int], str | tuple[int, int]]:
    """Return the results of `check` and `decode`: the size or the reason."""
    try:
        checked: str | tuple[int, int] = check(data, max_pixels=MAX_PIXELS)
    except DecodeError as error:
        checked = str(error)
    try:
        height, width = decode(data, max_pixels=MAX_PIXELS).shape[:2]
        decoded: str | tuple[int, int] = (height, width)
    except DecodeError as error:
        decoded = str(error)
    return checked, decoded


def encode(mode: str, file_format: str = "JPEG", orientation: int = 1, **options: object) -> bytes:
    rng = np.random.default_rng(0)
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (61, 83, channels), dtype=np.uint8)
    pixels[10:40] //= 8  # include long runs of zeros
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode=mode)
    image.save(stream, file_format, exif=exif, **options)
    return stream.getvalue()


FILES = {
    "baseline": encode("RGB"),
    "sideways": encode("RGB", orientation=6),
    "no subsampling": encode("RGB", subsampling=0, quality=95),
    "progressive": encode("RGB", progressive=True, orientation=8),
    "progressive grey": encode("L", progressive=True),
    "cmyk": encode("CMYK"),
    "restarts": encode("RGB", restart_marker_blocks=3),
    "optimised": encode("RGB", optimize=True, quality=40),
    "png": encode("RGB", "PNG", orientation=5),
}


@pytest.mark.parametrize("folder", ["awkward", "bccd/images", "coco_mini/val"])
def test_the_same_for_real_files(test_data: Path, folder: str) -> None:
    paths = sorted(path for path in (test_data / folder).rglob("*") if path.is_file())[:100]
    assert len(paths) > 25
    for path in paths:
        checked, decoded = verdicts(path.read_bytes())
        assert checked == decoded, path.name


@pytest.mark.parametrize("name", FILES)
def test_the_same_wherever_a_file_is_cut_off(name: str) -> None:
    data = FILES[name]
    ends = sorted({*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 20, len(data) + 1)})
    outcomes = [verdicts(data[:end]) for end in ends]
    assert all(checked == decoded for checked, decoded in outcomes)
    assert isinstance(outcomes[-1][0], tuple) and isinstance(outcomes[len(ends) // 2][0], str)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    markers=st.lists(st.tuples(st.floats(0, 1), st.integers(0xC0, 0xFF)), max_size=2),
    end=st.one_of(st.just(1.0), st.floats(0.3, 1.0)),
)
def test_the_same_for_damaged_files(
    name: str, damage: list[tuple[float, int]], markers: list[tuple[float, int]], end: float
) -> None:
    data = bytearray(FILES[name])
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    for place, value in markers:
        start = int(place * (len(data) - 2))
        data[start : start + 2] = bytes([0xFF, value])
    checked, decoded = verdicts(bytes(data[: int(end * len(data))]))
    assert checked == decoded
