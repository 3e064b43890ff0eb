"""Bytes of an image file → upright RGB pixels, or one short reason why not.

What comes out is what a person sees: the EXIF orientation is applied, transparent parts lie on white, palettes, CMYK
and grey become RGB, 16-bit and float samples are scaled to 8 bits, and of an animation the first frame is taken.
Decode workers import this module, so it needs numpy and Pillow alone. Of what a broken TIFF provokes, libtiff's own
lines still reach stderr.
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

# Pillow reports damage that it can live with through `warnings` and `logging`; here every file is either decoded or
# refused with a reason. Filters are per process, since `warnings.catch_warnings` is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# Formats are named, not looked up by Image.open, for three reasons: its late loading of plugins races among threads,
# some plugins start other programs (Ghostscript), and its size limit is global. JPEG comes without its MPO and
# Ultra HDR siblings: those begin with a whole JPEG, which is the picture wanted.
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
_SAY_NOTHING = ("", "not identified by this driver")


class DecodeError(Exception):
    """These bytes give no picture; the message is one short reason that a person understands."""


class TruncatedError(DecodeError):
    """The file ends before the picture does; `mend` may save what there is of it."""


def decode(data: bytes, *, max_pixels: int, at_least_hw: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decodes one image file.

    Args:
        data: The whole file.
        max_pixels: Pictures of more pixels are refused by their header, before any pixel is decoded.
        at_least_hw: Height and width, in pixels of the upright picture, that the caller needs at least. A JPEG is
            then decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size (rounded up) that is no smaller on either
            side, which leaves out most of the work; other formats come at full size, and so does a JPEG that is
            smaller already. `upright_size_hw` gives the full size. The last row and column of a reduced picture may
            stand for fewer pixels than the others, so that places in it are true to one of its own pixels.

    Returns:
        RGB pixels of the upright picture, uint8 [height, width, 3], contiguous and writable.

    Raises:
        TruncatedError: The file ends before the picture does.
        DecodeError: The file is empty, broken, too large, or no image. Nothing else is ever raised.
    """
    try:
        image = _open(data, max_pixels)
        if at_least_hw is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            _reduce(image, at_least_hw)
        image.load()
        return _upright_rgb(image)
    except (DecodeError, MemoryError):  # want of memory is not the file's fault
        raise
    except Exception as error:
        raise _error(error, data, max_pixels) from None


def check(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Makes sure that `decode` gives a picture, at less cost where that can be.

    Of a JPEG the coded picture need not be decoded where its markers tell that it can be (`jpeg_scan.py`). Another
    one is decoded at an eighth of its size: libjpeg then reads every coded coefficient as it does at full size, so that
    whatever is cut off or broken comes to light, and leaves out most of the arithmetic behind.

    Returns:
        Height and width in pixels of the upright picture.

    Raises:
        DecodeError: As `decode` raises it.
    """
    if _accepts("JPEG", data) and (rest := without_scan(data)) is not None:
        with contextlib.suppress(DecodeError):  # of the whole file, the reason is that which `decode` gives
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


def mend(data: bytes, *, max_pixels: int) -> bytes:
    """A truncated image file → a whole one that shows what there is of the picture.

    A JPEG gets the end mark that it lacks and is the same file else: every decoder then shows the rest in grey, or as
    coarse as the last scan of a progressive one left it. Of a PNG, GIF, BMP, PPM or uncompressed TIFF what is there
    goes into a new PNG, upright; the rest is black, or white where the picture has transparency. Pillow shows the same
    under its switch LOAD_TRUNCATED_IMAGES, which is one for all threads of a process and for that reason not used here.

    Args:
        data: The file, for which `decode` or `check` raised TruncatedError.
        max_pixels: As for `decode`.

    Raises:
        DecodeError: Nothing of the picture is there, or its format (WebP, AVIF, JPEG 2000) gives no part of it.
    """
    try:
        if _accepts("JPEG", data):
            whole = data + _END_OF_JPEG
            pixels = decode(whole, max_pixels=max_pixels)
        else:
            pixels = _part_of(_open(data, max_pixels))
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
            whole = stream.getvalue()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        raise _error(error, data, max_pixels) from None
    if (pixels == pixels[0, 0]).all():
        raise TruncatedError("truncated: nothing of the picture is there")
    return whole


def _part_of(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    """The upright RGB pixels of a truncated picture."""
    try:
        image.load()
    except OSError as error:
        if not _TRUNCATED.search(str(error)):
            raise
        # What was decoded until then is in the picture; without tiles to decode, Pillow takes it for loaded.
        image.tile = []
    return _upright_rgb(image)


def upright_size_hw(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of the upright picture, as `decode` gives them, from the header of the file alone.

    Raises:
        DecodeError: The file is no image. One whose header is whole has a size even if its pixels cannot be decoded.
    """
    try:
        image = _open(data, sys.maxsize)
        # A PNG may carry its EXIF behind its pixels, so that Pillow decodes those to look for it.
        is_plain_png = isinstance(image, PngImagePlugin.PngImageFile) and not any(key in data for key in _PNG_EXIF_KEYS)
        is_turned = not is_plain_png and _orientation_of(image) in _SIDEWAYS
        # Of a TIFF that lies on its side Pillow states the upright size from the start.
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION_TAG) in _SIDEWAYS:
            is_turned = False
        return (image.width, image.height) if is_turned else (image.height, image.width)
    except DecodeError:
        raise
    except Exception as error:
        raise _error(error, data, sys.maxsize) from None


def orientation(data: bytes) -> int:
    """The EXIF orientation of an image file, 1 (stored as it is seen) to 8; 1 where none is stated.

    Raises:
        DecodeError: The file is no image.
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
    """Sets a JPEG up to be decoded at a part of its size."""
    least_height, least_width = at_least_hw if _orientation_of(image) not in _SIDEWAYS else at_least_hw[::-1]
    for part in (8, 4, 2):
        # Rounded up, as libjpeg does.
        if -(-image.height // part) >= least_height and -(-image.width // part) >= least_width:
            image.draft(None, (max(1, image.width // part), max(1, image.height // part)))
            return


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Reads the header; refuses what is no image or has too many pixels."""
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
    """Pillow takes a picture without width or height for an unknown format; this names the true reason."""
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
    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels
        value = image.getexif().get(_ORIENTATION_TAG, 1)
        if value in _TRANSPOSE:
            return int(value)
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's → RGB, 8 bits a sample."""
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
    """Grey of more than 8 bits → RGB, scaled and not clipped.

    Whole 16-bit samples have their full range. 32-bit and float samples state no range: theirs is the smallest usual
    one that holds the greatest value (1 and 255 for floats; 65535; 2³¹ - 1).
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
    """Whatever Pillow raised, as one short line."""
    name = next((name for name, _ in _FORMATS if _accepts(name, data)), "image")
    is_cut_webp = name == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    is_of_the_file = not isinstance(error, (Image.DecompressionBombError, MemoryError))
    if is_of_the_file and (is_cut_webp or _TRUNCATED.search(str(error))):
        return TruncatedError(f"truncated: the {name} file ends before the picture does")
    return DecodeError(_reason(error, name, max_pixels))


def _reason(error: Exception, name: str, max_pixels: int) -> str:
    message = one_line(str(error))
    if isinstance(error, Image.DecompressionBombError):
        num_pixels = int((re.findall(r"\d+", message) or ["0"])[0])
        return _too_large(num_pixels, max_pixels) if num_pixels > max_pixels else f"{message} (Pillow's own limit)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if (
        not isinstance(error, (OSError, SyntaxError, ValueError, RuntimeError))
        or message in _SAY_NOTHING
        or message.isdigit()
    ):
        return f"broken {name}: its header makes no sense"
    message = "".join(character for character in message if character.isprintable())[:160]
    return message if message.startswith(f"broken {name}") else f"broken {name}: {message}"


def _accepts(name: str, data: bytes) -> bool:
    """Whether the file begins as one of this format does."""
    accept = Image.OPEN[name][1]
    return accept is not None and accept(data[:16].ljust(16, b"\0")) is True


def _looks_like(data: bytes) -> str:
    """What a file without a known signature may be instead, in brackets."""
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("ascii", "replace").strip()
        return f" (an ISO media file of type {brand})" if brand.isprintable() else " (an ISO media file)"
    if data[:5] == b"%PDF-":
        return " (a PDF)"
    head = data[:64]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return " (it is text)"
    return ""
