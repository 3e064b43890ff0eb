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
import warnings
from typing import cast

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
from raydet.images.jpeg_scan import without_scan

# Pillow reports tolerable damage through `warnings` and `logging`; this module either decodes a file or refuses it with
# a reason. The filters apply to the process, since `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# An explicit list instead of Image.open, for three reasons: its lazy loading of plugins is not thread-safe, some
# plugins start other programs (Ghostscript), and its size limit is global. MPO and Ultra HDR files start with a
# complete JPEG, which is the image to decode, so their plugins are not needed.
_FORMATS = (
    ("JPEG", JpegImagePlugin.JpegImageFile),
    ("PNG", PngImagePlugin.PngImageFile),
    ("WEBP", WebPImagePlugin.WebPImageFile),
    ("GIF", GifImagePlugin.GifImageFile),
    ("BMP", BmpImagePlugin.BmpImageFile),
    ("TIFF", TiffImagePlugin.TiffImageFile),
    ("AVIF", AvifImagePlugin.AvifImageFile),
    ("JPEG2000", Jpeg2KImagePlugin.Jpeg2KImageFile),
    ("PPM", PpmImagePlugin.PpmImageFile),
)
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""
_PNG_EXIF_KEYS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_WHITE = (255, 255, 255)
_END_OF_JPEG = b"\xff\xd9"
_TRUNCATED = re.compile("truncated|unexpected end|not enough|requires a buffer|but only got", re.IGNORECASE)
_UNINFORMATIVE = ("", "not identified by this driver")


class DecodeError(Exception):
    """Failure to decode an image; the message is one short, human-readable reason."""


class TruncatedError(DecodeError):
    """Failure caused by a truncated file; `repair` may recover a part of the image."""


def decode(data: bytes, *, max_pixels: int, at_least_hw: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode one image file.

    Args:
        data: Content of the file.
        max_pixels: Larger images are refused by their header, before any pixel is decoded.
        at_least_hw: Minimum height and width in pixels of the upright image. A JPEG is decoded at the smallest of 1,
            1/2, 1/4 and 1/8 of its size (rounded up) that meets the minimum on both sides, which saves most of the
            work; other formats, and JPEGs below the minimum, are decoded at full size. `upright_size_hw` returns the
            full size. The last row and column of a reduced image may cover fewer source pixels than the others, so
            positions are accurate to one reduced pixel.

    Returns:
        RGB pixels of the upright image, uint8 [height, width, 3], contiguous and writable.

    Raises:
        TruncatedError: The file is truncated.
        DecodeError: The file is empty, broken, too large, or not an image. No other exception is raised, except
            MemoryError.
    """
    try:
        image = _open(data, max_pixels)
        if at_least_hw is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            _reduce(image, at_least_hw)
        image.load()
        return _upright_rgb(image)
    except (DecodeError, MemoryError):  # lack of memory is not a property of the file
        raise
    except Exception as error:
        raise _error(error, data, max_pixels) from None


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
    if _accepts("JPEG", data) and (rest := without_scan(data)) is not None:
        with contextlib.suppress(DecodeError):  # checking the complete file gives the same reason as `decode`
            return _check(rest, max_pixels)
    return _check(data, max_pixels)


def _check(data: bytes, max_pixels: int) -> tuple[int, int]:
    try:
        image = _open(data, max_pixels)
        full_size = image.size
        is_jpeg = False
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            is_jpeg = True
            _reduce(image, (1, 1))
        image.load()
        is_turned = _orientation_of(image) in _SIDEWAYS
        _to_rgb(image)
        width, height = full_size if is_jpeg else image.size
        return (width, height) if is_turned else (height, width)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        raise _error(error, data, max_pixels) from None


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
    try:
        if _accepts("JPEG", data):
            repaired = data + _END_OF_JPEG
            pixels = decode(repaired, max_pixels=max_pixels)
        else:
            pixels = _part_of(_open(data, max_pixels))
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
            repaired = stream.getvalue()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        raise _error(error, data, max_pixels) from None
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
    return _upright_rgb(image)


def upright_size_hw(data: bytes) -> tuple[int, int]:
    """Return height and width in pixels of the upright image, from the file's header.

    Raises:
        DecodeError: The file is not an image. Undecodable pixels behind an intact header do not raise.
    """
    try:
        image = _open(data, sys.maxsize)
        # A PNG may store EXIF after its pixels, so Pillow decodes the pixels to find it.
        is_plain_png = isinstance(image, PngImagePlugin.PngImageFile) and not any(key in data for key in _PNG_EXIF_KEYS)
        is_turned = not is_plain_png and _orientation_of(image) in _SIDEWAYS
        # For a rotated TIFF Pillow reports the upright size.
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION_TAG) in _SIDEWAYS:
            is_turned = False
        return (image.width, image.height) if is_turned else (image.height, image.width)
    except DecodeError:
        raise
    except Exception as error:
        raise _error(error, data, sys.maxsize) from None


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 (upright) to 8; 1 if not stated.

    Raises:
        DecodeError: The file is not an image.
    """
    try:
        return _orientation_of(_open(data, sys.maxsize))
    except DecodeError:
        raise
    except Exception as error:
        raise _error(error, data, sys.maxsize) from None


def _upright_rgb(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    transpose = _TRANSPOSE.get(_orientation_of(image))
    rgb = _to_rgb(image)
    return np.array(rgb if transpose is None else rgb.transpose(transpose), dtype=np.uint8)


def _reduce(image: JpegImagePlugin.JpegImageFile, at_least_hw: tuple[int, int]) -> None:
    """Configure a JPEG to be decoded at reduced size."""
    least_height, least_width = at_least_hw if _orientation_of(image) not in _SIDEWAYS else at_least_hw[::-1]
    for part in (8, 4, 2):
        # Rounded up, as libjpeg does.
        if -(-image.height // part) >= least_height and -(-image.width // part) >= least_width:
            image.draft(None, (max(1, image.width // part), max(1, image.height // part)))
            return


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header; refuse files that are not images or have too many pixels."""
    if not data:
        raise DecodeError("empty file")
    for name, factory in _FORMATS:
        if _accepts(name, data):
            _refuse_empty_side(name, data)
            image = factory(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise DecodeError(_too_large(image.width * image.height, max_pixels))
            return image
    raise DecodeError(f"not an image Pillow can read{_looks_like(data)}")


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


def _too_large(num_pixels: int, max_pixels: int) -> str:
    if min(num_pixels, max_pixels) < 1e6:
        return f"{num_pixels:,} pixels is over the limit of {max_pixels:,} pixels"
    return f"{num_pixels / 1e6:,.0f} Mpx is over the limit of {max_pixels / 1e6:,.0f} Mpx"


def _orientation_of(image: ImageFile.ImageFile) -> int:
    with contextlib.suppress(Exception):  # broken EXIF does not affect the pixels
        value = image.getexif().get(_ORIENTATION_TAG, 1)
        if value in _TRANSPOSE:
            return int(value)
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_to_rgb(image)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        rgb = Image.new("RGB", image.size, _WHITE)
        rgb.paste(rgba, mask=rgba)
        return rgb
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        return cast(Image.Image, converted)
    return image.convert("RGB")


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to RGB, scaled instead of clipped.

    16-bit integers use their full range. 32-bit and float samples state no range, so the smallest common range that
    contains the maximum is used (1 and 255 for floats; 65535; 2³¹ - 1).
    """
    samples = np.asarray(image).astype(np.float64)
    samples[~np.isfinite(samples)] = 0.0
    peak = float(samples.max())
    scales = (1.0, 255.0, 65535.0, 2.0**31 - 1) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    scale = next((scale for scale in scales if peak <= scale), peak)
    grey = np.rint(np.clip(samples, 0.0, scale) * (255.0 / scale)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _error(error: Exception, data: bytes, max_pixels: int) -> DecodeError:
    """Convert an exception of Pillow to a one-line error."""
    name = next((name for name, _ in _FORMATS if _accepts(name, data)), "image")
    is_cut_webp = name == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    is_file_error = not isinstance(error, (Image.DecompressionBombError, MemoryError))
    if is_file_error and (is_cut_webp or _TRUNCATED.search(str(error))):
        return TruncatedError(f"truncated: the {name} file ends in the middle of the image data")
    return DecodeError(_reason(error, name, max_pixels))


def _reason(error: Exception, name: str, max_pixels: int) -> str:
    message = one_line(str(error))
    if isinstance(error, Image.DecompressionBombError):
        num_pixels = int((re.findall(r"\d+", message) or ["0"])[0])
        return _too_large(num_pixels, max_pixels) if num_pixels > max_pixels else f"{message} (Pillow's limit)"
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
