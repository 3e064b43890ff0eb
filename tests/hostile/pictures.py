"""Hostile image files: bombs, lies, damage and other formats' content, as bytes."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

Make = Callable[[], bytes]
_SIZE = (40, 30)


def saved(extension: str, mode: str = "RGB", size: tuple[int, int] = _SIZE, **options: Any) -> bytes:
    """Encode noise."""
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 1)
    pixels = np.random.default_rng(7).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    image = Image.fromarray(pixels if channels > 1 else pixels[..., 0])
    stream = io.BytesIO()
    (image if image.mode == mode else image.convert(mode)).save(stream, extension, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a chunk of a PNG, which may lie about its length."""
    stated = len(data) if length is None else length
    return struct.pack(">I", stated) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _zeros(num_bytes: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    parts = [packer.compress(block) for _ in range(num_bytes // len(block))]
    return b"".join(parts) + packer.compress(bytes(num_bytes % len(block))) + packer.flush()


def png(width: int, height: int, depth: int = 8, color: int = 2, *more: bytes, pixels: bytes | None = None) -> bytes:
    """Return a PNG of zeros, or with the given compressed pixels; `more` are chunks before them."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    row = 1 + (width * depth * samples + 7) // 8
    data = _zeros(row * height) if pixels is None else pixels
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) if color == 3 else b""
    body = b"".join((chunk(b"IHDR", header), palette, *more, chunk(b"IDAT", data), chunk(b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def _apng(frames: int) -> bytes:
    control = chunk(b"acTL", struct.pack(">II", frames, 0))
    frame = struct.pack(">IIIIHHBB", 8, 8, 0, 0, 1, 100, 0, 0)
    pixels = zlib.compress(bytes(25 * 8))
    rest = b"".join(
        chunk(b"fcTL", struct.pack(">I", 2 * n + 1) + frame) + chunk(b"fdAT", struct.pack(">I", 2 * n + 2) + pixels)
        for n in range(frames - 1)
    )
    whole = png(8, 8, 8, 2, control, chunk(b"fcTL", struct.pack(">I", 0) + frame), pixels=pixels)
    return whole[:-12] + rest + whole[-12:]


def _jpeg_size(width: int, height: int, data: bytes | None = None) -> bytes:
    """Return a JPEG whose header states another size."""
    data = saved("JPEG") if data is None else data
    place = next(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def _scans(count: int) -> bytes:
    """Return a progressive JPEG that repeats its last scan, at a size that makes each one expensive."""
    data = saved("JPEG", size=(640, 640), progressive=True, quality=20)
    place = data.rfind(b"\xff\xda")
    return data[:-2] + data[place:-2] * count + b"\xff\xd9"


def _cheap_scans(width: int, height: int, count: int) -> bytes:
    """Return a progressive JPEG of one colour with many scans, each a few bytes long."""
    data = io.BytesIO()
    Image.new("L", (64, 64), 128).save(data, "JPEG", progressive=True)
    whole = _jpeg_size(width, height, data.getvalue())
    place = whole.rfind(b"\xff\xda")
    return whole[:-2] + whole[place:-2] * count + b"\xff\xd9"


def _segments(data: bytes, segment: bytes, count: int) -> bytes:
    return data[:2] + segment * count + data[2:]


def _exif(tiff: bytes) -> bytes:
    body = b"Exif\0\0" + tiff
    return _segments(saved("JPEG"), b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body, 1)


_LOOPING_IFD = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 0x8769, 4, 1, 8) + b"\x08\0\0\0"
_HUGE_TAG = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 0x0112, 3, 2**31, 26) + bytes(4)


def riff(kind: bytes, data: bytes) -> bytes:
    """Return a WebP with one chunk."""
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _webp_canvas(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return riff(b"VP8X", bytes([0x10, 0, 0, 0]) + size)


def _webp_lossless(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    return riff(b"VP8L", b"\x2f" + struct.pack("<I", bits) + bytes(9))


def _animation(extension: str, frames: int) -> bytes:
    images = [Image.new("P", (16, 16), number % 255) for number in range(frames)]
    images = [image.convert("RGB") for image in images] if extension == "WEBP" else images
    stream = io.BytesIO()
    images[0].save(stream, extension, save_all=True, append_images=images[1:], duration=10)
    return stream.getvalue()


def _gif(width: int, height: int, data: bytes = b"\x02\x02\x44\x01\0") -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + data + b";"


def _bmp(width: int, height: int, bits: int, compression: int = 0, data: bytes = b"") -> bytes:
    colors = 1 << bits if bits <= 8 else 0
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colors, 0)
    offset = 14 + len(header) + 4 * colors
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + bytes(4 * colors) + data


def tiff(
    width: int, height: int, tags: dict[int, tuple[int, int, int]], data: bytes = b"", following: int = 0
) -> bytes:
    """Return a TIFF with one directory; a tag is its type, count and value."""
    whole = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), **tags}
    entries = b"".join(struct.pack("<HHII", tag, *whole[tag]) for tag in sorted(whole))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(whole)) + entries + struct.pack("<I", following) + data


def _tiff_strips(width: int, height: int, compression: int, data: bytes) -> bytes:
    offset = 8 + 2 + 12 * 9 + 4
    tags = {
        259: (3, 1, compression),
        273: (4, 1, offset),
        277: (3, 1, 1),
        278: (4, 1, height),
        279: (4, 1, len(data)),
    }
    return tiff(width, height, tags, data)


def _jpeg2000(width: int, height: int, components: int = 3) -> bytes:
    data = saved("JPEG2000")
    place = data.find(b"\xff\x51")
    changed = data[: place + 6] + struct.pack(">II", width, height) + data[place + 14 :]
    return changed if components == 3 else changed[: place + 38] + struct.pack(">H", components) + changed[place + 40 :]


def _avif(width: int, height: int) -> bytes:
    data = saved("AVIF")
    place = data.find(b"ispe")
    return data[: place + 8] + struct.pack(">II", width, height) + data[place + 16 :]


PICTURES: dict[str, Make] = {
    "png, 900 Mpx of 1 bit": lambda: png(30_000, 30_000, 1, 0),
    "png, 169 Mpx of RGBA": lambda: png(13_000, 13_000, 8, 6),
    "png, 144 Mpx of 16-bit RGBA": lambda: png(12_000, 12_000, 16, 6),
    "png, 169 Mpx of 16-bit grey": lambda: png(13_000, 13_000, 16, 0),
    "png, 89,478,485 wide": lambda: png(89_478_485, 1, 1, 0),
    "png, 89,478,485 high": lambda: png(1, 89_478_485, 1, 0),
    "png, 2^31 - 1 on each side": lambda: png(2**31 - 1, 2**31 - 1, pixels=b""),
    "png, 2^32 - 1 wide": lambda: png(2**32 - 1, 1, pixels=b""),
    "png, no pixels": lambda: png(40, 30, pixels=b""),
    "png, too few pixels": lambda: png(40, 30, pixels=zlib.compress(b"x" * 100)),
    "png, too many pixels": lambda: png(40, 30, pixels=_zeros(300_000_000)),
    "png, broken pixels": lambda: png(40, 30, pixels=b"\x78\x9c" + b"\xff" * 500),
    "png, zero width": lambda: png(0, 30, pixels=zlib.compress(b"")),
    "png, depth 64": lambda: png(40, 30, 64, 0, pixels=b""),
    "png, no IEND": lambda: saved("PNG")[:-12],
    "png, wrong checksum": lambda: saved("PNG")[:-20] + b"\0\0\0\0" + saved("PNG")[-16:],
    "png, a chunk of 2^31 bytes": lambda: png(40, 30, 8, 2, chunk(b"tEXt", b"a\0b", 2**31 - 1)),
    "png, a profile that is a bomb": lambda: png(40, 30, 8, 2, chunk(b"iCCP", b"a\0\0" + _zeros(500_000_000))),
    "png, a text that is a bomb": lambda: png(40, 30, 8, 2, chunk(b"zTXt", b"a\0\0" + _zeros(500_000_000))),
    "png, an iTXt that is a bomb": lambda: png(40, 30, 8, 2, chunk(b"iTXt", b"a\0\1\0\0\0" + _zeros(500_000_000))),
    "png, 200,000 texts": lambda: png(40, 30, 8, 2, chunk(b"tEXt", b"k\0v") * 200_000),
    "png, 200,000 unknown chunks": lambda: png(40, 30, 8, 2, chunk(b"abCd", b"") * 200_000),
    "png, no palette": lambda: png(40, 30, 8, 3).replace(b"PLTE", b"abCd"),
    "png, looping EXIF": lambda: png(40, 30, 8, 2, chunk(b"eXIf", _LOOPING_IFD)),
    "png, 20,000 frames": lambda: _apng(20_000),
    "png, half": lambda: saved("PNG")[: len(saved("PNG")) // 2],
    "png, 30 bytes": lambda: saved("PNG")[:30],
    "png, CMYK chunk order": lambda: saved("PNG")[:8] + saved("PNG")[33:],
    "jpeg, 65,500 on each side": lambda: _jpeg_size(65_500, 65_500),
    "jpeg, 13,000 on each side": lambda: _jpeg_size(13_000, 13_000),
    "jpeg, 65,500 x 1": lambda: _jpeg_size(65_500, 1),
    "jpeg, zero height": lambda: _jpeg_size(40, 0),
    "jpeg, progressive of 13,000": lambda: _jpeg_size(13_000, 13_000, saved("JPEG", progressive=True)),
    "jpeg, 3,000 scans": lambda: _scans(3_000),
    "jpeg, 3,000 cheap scans of 100 Mpx": lambda: _cheap_scans(10_000, 10_000, 3_000),
    "jpeg, 100,000 cheap scans": lambda: _cheap_scans(640, 640, 100_000),
    "jpeg, CMYK": lambda: saved("JPEG", "CMYK"),
    "jpeg, CMYK of 13,000": lambda: _jpeg_size(13_000, 13_000, saved("JPEG", "CMYK")),
    "jpeg, 12 bits": lambda: saved("JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "jpeg, lossless": lambda: saved("JPEG").replace(b"\xff\xc0", b"\xff\xc3"),
    "jpeg, arithmetic": lambda: saved("JPEG").replace(b"\xff\xc0", b"\xff\xc9"),
    "jpeg, no tables": lambda: saved("JPEG").replace(b"\xff\xc4", b"\xff\xfe"),
    "jpeg, no quantisation": lambda: saved("JPEG").replace(b"\xff\xdb", b"\xff\xfe"),
    "jpeg, four samplings": lambda: saved("JPEG").replace(b"\x01\x22\0", b"\x01\x44\0"),
    "jpeg, sampling zero": lambda: saved("JPEG").replace(b"\x01\x22\0", b"\x01\x00\0"),
    "jpeg, no end": lambda: saved("JPEG")[:-2],
    "jpeg, only headers": lambda: saved("JPEG")[: saved("JPEG").find(b"\xff\xda")],
    "jpeg, half": lambda: saved("JPEG")[: len(saved("JPEG")) // 2],
    "jpeg, 4 bytes": lambda: saved("JPEG")[:4],
    "jpeg, 30 MB of comments": lambda: _segments(saved("JPEG"), b"\xff\xfe\xff\xff" + b"c" * 65_533, 460),
    "jpeg, 10 MB of filling": lambda: _segments(saved("JPEG"), b"\xff" * 1000, 10_000),
    "jpeg, a million empty comments": lambda: _segments(saved("JPEG"), b"\xff\xfe\0\x02", 1_000_000),
    "jpeg, a segment of length 0": lambda: _segments(saved("JPEG"), b"\xff\xe5\0\0", 1),
    "jpeg, looping EXIF": lambda: _exif(_LOOPING_IFD),
    "jpeg, a tag of 2^31 values": lambda: _exif(_HUGE_TAG),
    "jpeg, EXIF beyond its end": lambda: _exif(b"II*\0\xff\xff\xff\x7f"),
    "jpeg, 255 profiles": lambda: _segments(
        saved("JPEG"), b"\xff\xe2\xff\xffICC_PROFILE\0\x01\xff" + b"p" * 65_519, 255
    ),
    "jpeg, a broken profile": lambda: saved("JPEG", icc_profile=b"not a profile" * 20),
    "jpeg, 20 MB appended": lambda: saved("JPEG") + bytes(20_000_000),
    "jpeg, a zip appended": lambda: saved("JPEG") + b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(18),
    "jpeg, HTML in a comment": lambda: _segments(saved("JPEG"), b"\xff\xfe\0\x1b<script>alert(1)</script>", 1),
    "jpeg, MPO of 10,000 images": lambda: _exif(b"MM\0*\0\0\0\x08").replace(b"Exif\0\0", b"MPF\0\0\0"),
    "jpeg, CMYK with inverted profile": lambda: saved("JPEG", "CMYK", icc_profile=bytes(200)),
    "webp, lossless 16,383 on each side": lambda: _webp_lossless(16_383, 16_383),
    "webp, lossless 13,000 on each side": lambda: _webp_lossless(13_000, 13_000),
    "webp, a canvas of 2^24": lambda: _webp_canvas(2**24, 2**24),
    "webp, a canvas of 13,000": lambda: _webp_canvas(13_000, 13_000),
    "webp, 2,000 frames": lambda: _animation("WEBP", 2_000),
    "webp, half": lambda: saved("WEBP")[: len(saved("WEBP")) // 2],
    "webp, wrong length": lambda: saved("WEBP")[:4] + b"\xff\xff\xff\x7f" + saved("WEBP")[8:],
    "gif, 65,535 on each side": lambda: _gif(65_535, 65_535),
    "gif, 13,000 on each side": lambda: _gif(13_000, 13_000),
    "gif, 5,000 frames": lambda: _animation("GIF", 5_000),
    "gif, a code size of 200": lambda: _gif(40, 30, b"\xc8" + b"\xff" * 200),
    "gif, no data": lambda: _gif(40, 30, b""),
    "gif, half": lambda: saved("GIF")[: len(saved("GIF")) // 2],
    "gif, 20 MB of comments": lambda: saved("GIF")[:-1] + b"!\xfe" + (b"\xff" + b"c" * 255) * 80_000 + b"\0;",
    "bmp, 2^31 - 1 wide": lambda: _bmp(2**31 - 1, 1, 24),
    "bmp, negative height": lambda: _bmp(40, -(2**31), 24, data=bytes(120)),
    "bmp, run length of 13,000": lambda: _bmp(13_000, 13_000, 8, 1, b"\xff\0" * 2_000 + b"\0\x01"),
    "bmp, jumps": lambda: _bmp(40, 30, 8, 1, b"\0\x02\xff\xff" * 10_000 + b"\0\x01"),
    "bmp, half": lambda: saved("BMP")[: len(saved("BMP")) // 2],
    "bmp, JPEG inside": lambda: _bmp(40, 30, 0, 4, saved("JPEG")),
    "tiff, looping directories": lambda: tiff(40, 30, {273: (4, 1, 8), 279: (4, 1, 10)}, following=8),
    "tiff, a deflate bomb": lambda: _tiff_strips(13_000, 13_000, 8, _zeros(169_000_000)),
    "tiff, deflate of 2^31": lambda: _tiff_strips(2**31 - 1, 2**31 - 1, 8, zlib.compress(bytes(100))),
    "tiff, 2^31 strips": lambda: tiff(40, 30, {273: (4, 2**31 - 1, 8), 279: (4, 2**31 - 1, 8)}),
    "tiff, 65,535 samples": lambda: tiff(40, 30, {277: (3, 1, 65_535), 273: (4, 1, 8), 279: (4, 1, 8)}),
    "tiff, 64 bits": lambda: tiff(40, 30, {258: (3, 1, 64), 273: (4, 1, 8), 279: (4, 1, 8)}),
    "tiff, tiles of 2^31": lambda: tiff(
        40, 30, {322: (4, 1, 2**31 - 1), 323: (4, 1, 2**31 - 1), 324: (4, 1, 8), 325: (4, 1, 8)}
    ),
    "tiff, beyond its end": lambda: b"II*\0\xff\xff\xff\x7f",
    "tiff, a tag of 2^32 - 1 values": lambda: tiff(40, 30, {270: (2, 2**32 - 1, 8), 273: (4, 1, 8), 279: (4, 1, 8)}),
    "tiff, lies about its strip": lambda: tiff(40, 30, {273: (4, 1, 8), 279: (4, 1, 2**32 - 1)}),
    "tiff, LZW rubbish": lambda: _tiff_strips(40, 30, 5, b"\xff" * 500),
    "tiff, JPEG rubbish": lambda: _tiff_strips(40, 30, 7, b"\xff\xd8\xff\xd9"),
    "tiff, packed bits": lambda: _tiff_strips(13_000, 13_000, 32_773, b"\x81\0" * 10_000),
    "tiff, 500 pages": lambda: saved("TIFF", save_all=True, append_images=[Image.new("L", (4, 4))] * 500),
    "tiff, CMYK": lambda: saved("TIFF", "CMYK"),
    "tiff, half": lambda: saved("TIFF")[: len(saved("TIFF")) // 2],
    "jpeg 2000, 2^31 on each side": lambda: _jpeg2000(2**31 - 1, 2**31 - 1),
    "jpeg 2000, 13,000 on each side": lambda: _jpeg2000(13_000, 13_000),
    "jpeg 2000, 16,384 components": lambda: _jpeg2000(40, 30, 16_384),
    "jpeg 2000, half": lambda: saved("JPEG2000")[: len(saved("JPEG2000")) // 2],
    "avif, 65,536 on each side": lambda: _avif(65_536, 65_536),
    "avif, half": lambda: saved("AVIF")[: len(saved("AVIF")) // 2],
    "ppm, 10^5 on each side": lambda: b"P6 100000 100000 255\n" + bytes(100),
    "ppm, 5,000 digits": lambda: b"P6 " + b"9" * 5_000 + b" 1 255\n",
    "ppm, negative": lambda: b"P6 -4 -4 255\n" + bytes(100),
    "ppm, maximum 0": lambda: b"P5 4 4 0\n" + bytes(16),
    "ppm, a comment of 20 MB": lambda: b"P6\n#" + b"c" * 20_000_000 + b"\n4 4 255\n" + bytes(48),
    "ppm, text of 13,000": lambda: b"P3 13000 13000 255\n" + b"1 " * 1000,
    "ppm, bits": lambda: b"P1 4 4\n" + b"2" * 16,
    "pfm, infinities": lambda: b"Pf\n4 4\n-1.0\n" + struct.pack("<16f", *[float("inf"), float("nan")] * 8),
    "one byte": lambda: b"\xff",
    "text": lambda: b"this is a text\n",
    "HTML": lambda: b"<html><script>alert(1)</script></html>",
    "SVG of a file": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>',
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n(/etc/hostname) (r) file\n",
    "PDF": lambda: b"%PDF-1.7\n" + bytes(100),
    "ICO": lambda: b"\0\0\1\0\1\0" + bytes(100),
    "HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200),
    "a program": lambda: b"\x7fELF" + bytes(200),
    "a pickle": lambda: b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
    "random": lambda: np.random.default_rng(3).bytes(5_000),
    "300 MB of zeros": lambda: bytes(300_000_000),
}
"""Each stands in place of one of several images."""


def made() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each picture."""
    for name, make in PICTURES.items():
        yield name, make()


def file_name(name: str) -> str:
    """Return the name of a picture's file in the base."""
    return "".join(character if character.isalnum() else "-" for character in name)
