"""Bytes of an image file → upright RGB pixels, or a short reason for failure.

The result looks like the image in a viewer: the EXIF orientation is applied, transparency is composed onto white,
palette, CMYK and grey images become RGB, 16-bit and float samples are scaled to 8 bits, and an animation yields its
first frame. Decode workers import this module, so it depends on numpy and Pillow only. libtiff prints its own messages
about broken TIFFs to stderr.
"""

import contextlib
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from raydet.common.errors import one_line
from raydet.images import isolation as isolated
from raydet.images.isolation import IsolationError
from raydet.images.jpeg_scan import find_scan, without_scan
from raydet.images.limits import (
    BIG_BYTES,
    must_be_isolated,
    needed_bytes,
    refusal_of_size,
    refusal_of_structure,
    refusal_of_webp,
    refusal_of_work,
    should_be_isolated,
    too_large,
)
from raydet.images.pixels import ORIENTATION_TAG, SIDEWAYS, check_conversion, orientation_of, upright_rgb

# Pillow reports tolerable damage through `warnings` and `logging`; this module either decodes a file or refuses it with
# a reason. The filters apply to the process, since `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# An explicit list instead of Image.open, for three reasons: its lazy loading of plugins is not thread-safe, some
# plugins start other programs (Ghostscript), and its size limit is global. MPO and Ultra HDR files start with a
# complete JPEG, which is the image to decode, so their plugins are not needed.
_FORMATS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
_PNG_EXIF_KEYS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_END_OF_JPEG = b"\xff\xd9"
_ON_HEADERS = ("upright_size_hw", "orientation")
_big_images = threading.Lock()
_TRUNCATED = re.compile("truncated|unexpected end|not enough|requires a buffer|but only got", re.IGNORECASE)
_UNINFORMATIVE = ("", "not identified by this driver")


Limit = Callable[[int], None]


class DecodeError(Exception):
    """Failure to decode an image; the message is one short, human-readable reason."""


class TruncatedError(DecodeError):
    """Failure caused by a truncated file; `repair` may recover a part of the image."""


def decode(data: bytes, *, max_pixels: int, at_least_hw: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode one image file.

    Args:
        data: Content of the file.
        max_pixels: Larger images are refused by their header, before any pixel is decoded. So are images that need more
            memory or time than those of this size usually do; `limits.py` has the rules.
        at_least_hw: Minimum height and width in pixels of the upright image. A JPEG is decoded at the smallest of 1,
            1/2, 1/4 and 1/8 of its size (rounded up) that meets the minimum on both sides, which saves most of the
            work; other formats, and JPEGs below the minimum, are decoded at full size. `upright_size_hw` returns the
            full size. The last row and column of a reduced image may cover fewer source pixels than the others, so
            positions are accurate to one reduced pixel.

    Returns:
        RGB pixels of the upright image, uint8 [height, width, 3], contiguous and writable.

    Raises:
        TruncatedError: The file is truncated.
        DecodeError: The file is empty, broken, too large, or not an image, or memory does not suffice. No other
            exception is raised.
    """
    result: NDArray[np.uint8] = _run("decode", data, max_pixels, at_least_hw)
    return result


def check(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Check that `decode` succeeds, at lower cost where possible.

    The scan of a JPEG need not be decoded if its markers show that it is decodable (`jpeg_scan.py`). Other JPEGs are
    decoded at 1/8 of their size: libjpeg still reads every coefficient, so truncation and corruption are detected, but
    skips most of the arithmetic.

    Returns:
        Height and width in pixels of the upright image.

    Raises:
        DecodeError: As raised by `decode`.
    """
    size_hw: tuple[int, int] = _run("check", data, max_pixels)
    return size_hw


def run_here(operation: str, data: bytes, max_pixels: int, at_least_hw: tuple[int, int] | None, limit: Limit) -> Any:
    """Apply an operation to an image file in this process, without judging whether that is safe.

    Args:
        operation: Name of a public function of this module.
        data: Content of the file.
        max_pixels: As for `decode`.
        at_least_hw: As for `decode`.
        limit: Called with the bytes of memory that the operation needs, before it begins.

    Raises:
        DecodeError: The file is not what the operation needs.
    """
    return _run(operation, data, max_pixels, at_least_hw, limit)


def _run(
    operation: str,
    data: bytes,
    max_pixels: int,
    at_least_hw: tuple[int, int] | None = None,
    limit: Limit | None = None,
) -> Any:
    """Apply an operation to an image file, here or isolated; `limit` is set in an isolated process."""
    try:
        name = _format_of(data)
        scan = find_scan(data) if name == "JPEG" else None
        if limit is None and must_be_isolated(name, data):
            return _run_isolated(operation, data, max_pixels, at_least_hw)
        _refuse(refusal_of_structure(name, data, scan))
        rest = without_scan(data, scan) if operation == "check" and scan is not None else None
        try:
            image = _open(name, data if rest is None else rest, max_pixels)
        except Exception:
            if rest is None:
                raise
            image, rest = _open(name, data, max_pixels), None
        if operation not in _ON_HEADERS:
            _refuse(refusal_of_work(name, image, data, max_pixels, scan))
        needed = needed_bytes(name, image)
        if limit is not None:
            limit(needed)
        elif should_be_isolated(name, image, len(data)):
            return _run_isolated(operation, data, max_pixels, at_least_hw)
        with _big_images if needed > BIG_BYTES else contextlib.nullcontext():
            try:
                return _OPERATIONS[operation](image, data, at_least_hw)
            except Exception:
                if rest is None:
                    raise
                # Checking the complete file gives the same reason as `decode`.
                return _OPERATIONS[operation](_open(name, data, max_pixels), data, at_least_hw)
    except DecodeError:
        raise
    except IsolationError as error:
        raise DecodeError(str(error)) from None
    except Exception as error:
        raise _error(error, data, max_pixels) from None


def _run_isolated(operation: str, data: bytes, max_pixels: int, at_least_hw: tuple[int, int] | None) -> Any:
    answer, content = isolated.run(operation, data, max_pixels, at_least_hw)
    if "error" in answer:
        raise (TruncatedError if answer.get("is_truncated") else DecodeError)(str(answer["error"]))
    if operation == "decode":
        height, width = answer["size_hw"]
        return np.frombuffer(bytearray(content), np.uint8).reshape(height, width, 3)
    if operation == "repair":
        return content
    return tuple(answer["size_hw"]) if operation != "orientation" else int(answer["value"])


def _decode(image: ImageFile.ImageFile, data: bytes, at_least_hw: tuple[int, int] | None) -> NDArray[np.uint8]:
    if at_least_hw is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        _reduce(image, at_least_hw)
    image.load()
    return upright_rgb(image)


def _check(image: ImageFile.ImageFile, *_: object) -> tuple[int, int]:
    full_size = image.size
    is_jpeg = False
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        is_jpeg = True
        _reduce(image, (1, 1))
    image.load()
    is_turned = orientation_of(image) in SIDEWAYS
    check_conversion(image)
    width, height = full_size if is_jpeg else image.size
    return (width, height) if is_turned else (height, width)


def repair(data: bytes, *, max_pixels: int) -> bytes:
    """Convert a truncated image file to a complete one that shows the available part of the image.

    A JPEG only gets the missing end marker: decoders show the missing part in grey, or at the resolution of the last
    complete scan of a progressive JPEG. The available part of a PNG, GIF, BMP, PPM or uncompressed TIFF is written to a
    new upright PNG; the missing part is black, or white in images with transparency. Pillow's LOAD_TRUNCATED_IMAGES has
    the same effect but applies to all threads of the process.

    Args:
        data: File content for which `decode` or `check` raised TruncatedError.
        max_pixels: As for `decode`.

    Raises:
        DecodeError: No part of the image is available, or the format (WebP, AVIF, JPEG 2000) cannot be partially
            decoded.
    """
    repaired: bytes = _run("repair", data, max_pixels)
    return repaired


def _repair(image: ImageFile.ImageFile, data: bytes, *_: object) -> bytes:
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        repaired = data + _END_OF_JPEG
        pixels = _decode(JpegImagePlugin.JpegImageFile(io.BytesIO(repaired)), repaired, None)
    else:
        pixels = _part_of(image)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        repaired = stream.getvalue()
    if (pixels == pixels[0, 0]).all():
        raise TruncatedError("truncated: no part of the image can be decoded")
    return repaired


def _part_of(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    """Return the upright RGB pixels of a truncated image, with a filler for the missing part."""
    try:
        image.load()
    except OSError as error:
        if not _TRUNCATED.search(str(error)):
            raise
        # The pixels decoded so far are in the image; without pending tiles, Pillow considers it loaded.
        image.tile = []
    return upright_rgb(image)


def upright_size_hw(data: bytes) -> tuple[int, int]:
    """Return height and width in pixels of the upright image, from the file's header.

    Raises:
        DecodeError: The file is not an image. Undecodable pixels behind an intact header do not raise.
    """
    size_hw: tuple[int, int] = _run("upright_size_hw", data, sys.maxsize)
    return size_hw


def _upright_size_hw(image: ImageFile.ImageFile, data: bytes, *_: object) -> tuple[int, int]:
    # A PNG may store EXIF after its pixels, so Pillow decodes the pixels to find it.
    is_plain_png = isinstance(image, PngImagePlugin.PngImageFile) and not any(key in data for key in _PNG_EXIF_KEYS)
    is_turned = not is_plain_png and orientation_of(image) in SIDEWAYS
    # For a rotated TIFF Pillow reports the upright size.
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(ORIENTATION_TAG) in SIDEWAYS:
        is_turned = False
    return (image.width, image.height) if is_turned else (image.height, image.width)


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 (upright) to 8; 1 if not stated.

    Raises:
        DecodeError: The file is not an image.
    """
    value: int = _run("orientation", data, sys.maxsize)
    return value


def _reduce(image: JpegImagePlugin.JpegImageFile, at_least_hw: tuple[int, int]) -> None:
    """Configure a JPEG to be decoded at reduced size."""
    least_height, least_width = at_least_hw if orientation_of(image) not in SIDEWAYS else at_least_hw[::-1]
    for part in (8, 4, 2):
        # Rounded up, as libjpeg does.
        if -(-image.height // part) >= least_height and -(-image.width // part) >= least_width:
            image.draft(None, (max(1, image.width // part), max(1, image.height // part)))
            return


def _format_of(data: bytes) -> str:
    """Return the name of the format by the file's signature."""
    if not data:
        raise DecodeError("empty file")
    for name in _FORMATS:
        if _accepts(name, data):
            return name
    raise DecodeError(f"not an image Pillow can read{_looks_like(data)}")


def _open(name: str, data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header; refuse images with too many pixels."""
    _refuse_empty_side(name, data)
    if name == "WEBP":
        _refuse(refusal_of_webp(data, max_pixels))
    image = _FORMATS[name](io.BytesIO(data))
    _refuse(refusal_of_size(image.size, max_pixels))
    return image


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise DecodeError(reason)


def _refuse_empty_side(name: str, data: bytes) -> None:
    """Refuse images with zero width or height, which Pillow reports as an unknown format."""
    if name == "GIF" and len(data) >= 10:
        size = (int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"))
    elif name == "PNG" and data[12:16] == b"IHDR" and len(data) >= 24:
        size = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    else:
        return
    for side, word in zip(size, ("width", "height"), strict=True):
        if side == 0:
            raise DecodeError(f"zero {word}")


def _error(error: Exception, data: bytes, max_pixels: int) -> DecodeError:
    """Convert an exception of Pillow to a one-line error."""
    name = next((name for name in _FORMATS if _accepts(name, data)), "image")
    is_cut_webp = name == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    is_file_error = not isinstance(error, (Image.DecompressionBombError, MemoryError))
    if is_file_error and (is_cut_webp or _TRUNCATED.search(str(error))):
        return TruncatedError(f"truncated: the {name} file ends in the middle of the image data")
    return DecodeError(_reason(error, name, max_pixels))


def _reason(error: Exception, name: str, max_pixels: int) -> str:
    message = one_line(str(error))
    if isinstance(error, Image.DecompressionBombError):
        num_pixels = int((re.findall(r"\d+", message) or ["0"])[0])
        return too_large(num_pixels, max_pixels) if num_pixels > max_pixels else f"{message} (Pillow's limit)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode the image"
    if (
        not isinstance(error, (OSError, SyntaxError, ValueError, RuntimeError))
        or message in _UNINFORMATIVE
        or message.isdigit()
    ):
        return f"broken {name}: invalid header"
    message = "".join(character for character in message if character.isprintable())[:160]
    return message if message.startswith(f"broken {name}") else f"broken {name}: {message}"


def _accepts(name: str, data: bytes) -> bool:
    """Return True if the file starts with the signature of a format."""
    accept = Image.OPEN[name][1]
    return accept is not None and accept(data[:16].ljust(16, b"\0")) is True


def _looks_like(data: bytes) -> str:
    """Guess the type of a file without a known signature, in parentheses for a message."""
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("ascii", "replace").strip()
        return f" (an ISO media file of type {brand})" if brand.isprintable() else " (an ISO media file)"
    if data[:5] == b"%PDF-":
        return " (a PDF)"
    head = data[:64]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return " (it is text)"
    return ""


_OPERATIONS: dict[str, Callable[[ImageFile.ImageFile, bytes, tuple[int, int] | None], Any]] = {
    "decode": _decode,
    "check": _check,
    "repair": _repair,
    "upright_size_hw": _upright_size_hw,
    "orientation": lambda image, *_: orientation_of(image),
}
