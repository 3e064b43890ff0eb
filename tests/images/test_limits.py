"""Images that would take too much memory or time: refused or isolated, by `check` as by `decode`."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydet.images import isolation, limits, pixels
from raydet.images.decode import DecodeError, check, decode, orientation, repair, upright_size_hw

LIMIT = 178_956_970


def noise(height: int, width: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8).squeeze())


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, before: bytes = b"") -> bytes:
    """Build a black PNG of any size."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    packer, row = zlib.compressobj(6), bytes(1 + (width * channels * depth + 7) // 8)
    rows = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """Build an animated WebP of two tiny frames on a canvas of any size."""
    data = encoded(noise(8, 8), "WEBP", save_all=True, append_images=[noise(8, 9).crop((1, 0, 9, 8))], duration=100)
    assert data[12:16] == b"VP8X"
    return data[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[30:]


def jpeg_of_scans(num_scans: int, side: int = 512) -> bytes:
    data = encoded(noise(side, side), "JPEG", progressive=True)
    scan, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:scan] + data[scan:end] * num_scans + data[end:]


def refusal(data: bytes, max_pixels: int = LIMIT) -> str:
    """Return the reason for which both `check` and `decode` refuse a file."""
    reasons = []
    for look in (check, decode):
        with pytest.raises(DecodeError) as caught:
            look(data, max_pixels=max_pixels)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1] and "\n" not in reasons[0]
    return reasons[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: png(65_536, 1), "a side of 65,536 pixels is over the limit of 65,535"),
        (lambda: png(1, 89_478), "a side of 89,478 pixels"),
        (lambda: webp(16_383, 10_900), "decoding it takes 3,393 MB, over the limit of 1,790 MB"),
        (lambda: jpeg_of_scans(3_000), "more than 381 scans"),
        (
            lambda: encoded(noise(8, 8), "JPEG")[:2] + b"\xff\xfe\x00\x02" * 2_000_000,
            "more than 1,000 segments, or much filling",
        ),
        (lambda: encoded(noise(8, 8), "JPEG")[:2] + b"\xff" * 10**7 + b"\xc0", "much filling"),
        (lambda: b"P6\n4 #" + b"x" * 10**6 + b"\n4\n255\n" + bytes(48), "a header of more than 4,096 bytes"),
        (lambda: png(8, 8, before=chunk(b"abCd", b"") * 100_000), "too many chunks"),
        (lambda: png(8, 8, before=chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8)))), "broken PNG"),
        (lambda: b"P6\n#" + b"x" * 10**6 + b"\n2 2\n255\n" + bytes(12), "a header of more than 4,096 bytes"),
        (lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(20), "more than 1,000 tags"),
        (
            lambda: b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 273, 4, 2**31, 8) + bytes(20),
            "a tag of 2,147,483,648 values",
        ),
    ],
)
@pytest.mark.timeout(60)
def test_files_beyond_the_limits(make: Callable[[], bytes], words: str) -> None:
    assert words in refusal(make())


@pytest.mark.timeout(60)
def test_what_a_small_file_states_is_decoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(operation: str, *rest: object) -> object:
        asked.append(operation)
        return original(operation, *rest)  # type: ignore[arg-type]

    original = isolation.run
    monkeypatch.setattr(isolation, "run", run)
    stub = b"RIFF" + struct.pack("<I", 26) + webp(9_000, 9_000)[8:34]
    assert "broken WEBP" in refusal(stub)
    assert check(webp(5_000, 5_000), max_pixels=LIMIT) == (5_000, 5_000)
    assert asked == ["check", "decode", "check"]
    asked.clear()
    flat = png(9_000, 3_000, depth=1)
    assert decode(flat, max_pixels=LIMIT).shape == (3_000, 9_000, 3)
    assert check(flat, max_pixels=LIMIT) == upright_size_hw(flat) == (3_000, 9_000)
    assert asked == ["decode", "check", "upright_size_hw"]
    asked.clear()
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        decode(encoded(noise(60, 80), file_format), max_pixels=LIMIT)
    assert not asked


LOOKS: list[Callable[[bytes], object]] = [
    partial(decode, max_pixels=LIMIT),
    partial(check, max_pixels=LIMIT),
    partial(repair, max_pixels=LIMIT),
    upright_size_hw,
    orientation,
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("file_format", ["AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM", "PNG"])
def test_isolation_changes_nothing(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if file_format in ("PNG", "AVIF") else {}
    data = encoded(noise(60, 80), file_format, **options)
    files = [data, data[: len(data) // 2], data[:30]]

    def outcomes() -> list[object]:
        found: list[object] = []
        for content in files:
            for look in LOOKS:
                try:
                    result = look(content)
                    found.append(result.tolist() if isinstance(result, np.ndarray) else result)
                except DecodeError as error:
                    found.append((type(error), str(error)))
        return found

    is_isolated = []
    for answer in (True, False):
        monkeypatch.setattr("raydet.images.decode.must_be_isolated", lambda *_, answer=answer: answer)
        is_isolated.append(outcomes())
    assert is_isolated[0] == is_isolated[1]


@pytest.mark.timeout(120)
def test_limits_of_the_isolated_process(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(60, 80), "PNG")
    whole = decode(data, max_pixels=LIMIT)
    monkeypatch.setattr("raydet.images.decode.must_be_isolated", lambda *_: True)
    programs = {
        "too long": "isolation._limit = lambda needed: [isolation._set_soft(isolation_cpu, 1), any(iter(int, 1))]",
        "crashed": "isolation._limit = lambda needed: __import__('os').abort()",
    }
    for words, program in programs.items():
        monkeypatch.setattr(isolation, "_idle", [])
        start = "import resource; from raydet.images import decode, isolation; isolation_cpu = resource.RLIMIT_CPU; "
        monkeypatch.setattr(isolation, "_PROGRAM", f"{start}{program}; isolation.serve(decode)")
        with pytest.raises(DecodeError, match=words):
            decode(data, max_pixels=LIMIT)
    monkeypatch.undo()
    monkeypatch.setattr("raydet.images.decode.must_be_isolated", lambda *_: True)
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT), whole)


def test_threads_share_the_isolated_processes() -> None:
    data = encoded(noise(60, 80), "JPEG2000")
    results: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(decode(data, max_pixels=LIMIT).shape)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(60, 80, 3)] * 12
    assert 1 <= len(isolation._idle) <= (os.cpu_count() or 1)


def test_isolated_processes_end_with_the_one_that_started_them() -> None:
    program = """
import io, os, sys
from PIL import Image
from raydet.images import isolation
from raydet.images.decode import decode
stream = io.BytesIO()
Image.new("RGB", (8, 8)).save(stream, "JPEG2000")
decode(stream.getvalue(), max_pixels=1000)
print(isolation._idle[0]._process.pid, flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
"""
    for how in ("exit", "kill"):
        run = subprocess.run([sys.executable, "-c", program, how], capture_output=True, timeout=60, text=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(run.stdout)).wait(timeout=20)
        assert not run.stderr


def test_lack_of_memory_is_the_image_s_reason() -> None:
    code = """
import resource, sys
from raydet.images.decode import DecodeError, check, decode
from raydet.images import limits
data = sys.stdin.buffer.read()
limits._PACKED_RATIO = 10**9  # decode it in this process
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 100 * 2**20,) * 2)
for look in (check, decode):
    try:
        look(data, max_pixels=10**8)
    except DecodeError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], input=png(7_000, 7_000, colour=2), capture_output=True, timeout=60
    )
    assert run.stdout.decode().splitlines() == ["not enough memory to decode the image"] * 2, run.stderr


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "P", "CMYK"])
@pytest.mark.parametrize("turn", [1, 3, 6])
def test_large_images_are_converted_in_bands(mode: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    grey = np.random.default_rng(0).integers(0, 65_536, (61, 37), np.uint16)
    image = Image.fromarray(grey) if mode == "I;16" else noise(61, 37)
    image = image if mode == "I;16" else image.convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
    whole = decode(data, max_pixels=LIMIT)
    monkeypatch.setattr(pixels, "_PIXELS_AT_ONCE", 200)
    banded = decode(data, max_pixels=LIMIT)
    np.testing.assert_array_equal(banded, whole)
    assert banded.flags.c_contiguous and banded.flags.writeable
    assert check(data, max_pixels=LIMIT) == whole.shape[:2]


SEEDS = [
    encoded(noise(40, 60), "JPEG"),
    encoded(noise(40, 60), "JPEG", progressive=True),
    encoded(noise(40, 60), "PNG"),
    encoded(noise(40, 60, 4), "PNG"),
    encoded(noise(40, 60), "WEBP"),
    encoded(noise(40, 60), "TIFF", compression="tiff_lzw"),
    encoded(noise(40, 60), "GIF"),
    encoded(noise(40, 60), "BMP"),
    encoded(noise(40, 60), "PPM"),
]


@settings(max_examples=400, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    damage=st.lists(st.tuples(st.one_of(st.integers(0, 60), st.integers(0, 5000)), st.integers(0, 255)), max_size=4),
    end=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
)
def test_check_and_decode_refuse_the_same_images(seed: bytes, damage: list[tuple[int, int]], end: float) -> None:
    data = bytearray(seed)
    for place, value in damage:
        data[place % len(data)] = value
    content = bytes(data[: int(end * len(data))])
    outcomes: list[object] = []
    for look in (check, lambda data, max_pixels: decode(data, max_pixels=max_pixels).shape[:2]):
        try:
            outcomes.append(look(content, max_pixels=10**6))
        except DecodeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_the_limit_grows_with_max_pixels() -> None:
    assert "decoding it takes" in refusal(webp(9_000, 9_000), max_pixels=90_000_000)
    assert limits.refusal_of_size((10, 10), 99) == "100 pixels is over the limit of 99 pixels"
