"""Images of any mode and orientation as Pillow decodes them → upright RGB pixels.

Transparency is composed onto white, grey of more than 8 bits is scaled to 8. Large images are converted in bands, since
conversions need several times the memory of the result.
"""

import contextlib
from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}
"""The same for arrays."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""
_WHITE = (255, 255, 255)
_PIXELS_AT_ONCE = 16_000_000
"""Larger images are converted in bands of about this many pixels."""


def upright_rgb(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    """Convert a loaded image to RGB, uint8 [height, width, 3], contiguous and writable; a large one is closed."""
    orientation = orientation_of(image)
    transpose = _TRANSPOSE.get(orientation)
    if image.width * image.height <= _PIXELS_AT_ONCE:
        rgb = _to_rgb(image, _peak_of(image))
        return np.array(rgb if transpose is None else rgb.transpose(transpose), dtype=np.uint8)
    # In bands, since conversions need several times the memory of the result.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    num_rows = max(1, _PIXELS_AT_ONCE // image.width)
    peak = _peak_of(image)
    for top in range(0, image.height, num_rows):
        band = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        pixels[top : top + num_rows] = np.asarray(_to_rgb(band, peak))
    if transpose is None:
        return pixels
    image.close()
    return turned(pixels, orientation)


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return pixels [height, width, 3] that are stored in an EXIF orientation, 1 to 8, upright and contiguous."""
    return np.ascontiguousarray(_TURNS[orientation](pixels) if orientation in _TURNS else pixels)


def ppm_header(size_hw: tuple[int, int]) -> bytes:
    """Return what precedes RGB pixels of this size in a PPM image, which `decode` reads like any other."""
    return b"P6 %d %d 255\n" % size_hw[::-1]


def check_conversion(image: ImageFile.ImageFile) -> None:
    """Convert a loaded image, or the start of a large one, and drop the result; raise as `upright_rgb` does."""
    is_large = image.width * image.height > _PIXELS_AT_ONCE
    _to_rgb(image.crop((0, 0, image.width, max(1, _PIXELS_AT_ONCE // image.width))) if is_large else image)


def orientation_of(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 if it is not stated."""
    with contextlib.suppress(Exception):  # broken EXIF does not affect the pixels
        value = image.getexif().get(ORIENTATION_TAG, 1)
        if value in _TRANSPOSE:
            return int(value)
    return 1


def _to_rgb(image: Image.Image, peak: float | None = None) -> Image.Image:
    """Convert an image of any Pillow mode to 8-bit RGB.

    Args:
        image: The image, or a band of one.
        peak: Maximum of the whole image, for grey of more than 8 bits.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if _is_deep(image):
        return _deep_to_rgb(image, _peak_of(image) if peak is None else peak)
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


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _peak_of(image: Image.Image) -> float:
    """Return the maximum of grey of more than 8 bits; 0 for other images."""
    if not _is_deep(image):
        return 0.0
    num_rows = max(1, _PIXELS_AT_ONCE // image.width)
    tops = range(0, image.height, num_rows)
    bands = (image.crop((0, top, image.width, min(top + num_rows, image.height))) for top in tops)
    return max(float(_samples_of(band).max()) for band in bands)


def _samples_of(image: Image.Image) -> NDArray[np.float64]:
    samples = np.asarray(image).astype(np.float64)
    samples[~np.isfinite(samples)] = 0.0
    return samples


def _deep_to_rgb(image: Image.Image, peak: float) -> Image.Image:
    """Convert grey of more than 8 bits to RGB, scaled instead of clipped.

    16-bit integers use their full range. 32-bit and float samples state no range, so the smallest common range that
    contains the maximum is used (1 and 255 for floats; 65535; 2³¹ - 1).
    """
    samples = _samples_of(image)
    scales = (1.0, 255.0, 65535.0, 2.0**31 - 1) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    scale = next((scale for scale in scales if peak <= scale), peak)
    grey = np.rint(np.clip(samples, 0.0, scale) * (255.0 / scale)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
