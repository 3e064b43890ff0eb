"""The GeoTIFF tags of a picture → its coordinate reference system and the transform from pixels to coordinates.

The tags are those of the OGC GeoTIFF standard 1.1. raydet passes a reference system on and never computes with it, so a
code is enough where there is one, and needs no database of projections.
"""

from typing import NamedTuple

import numpy as np

from raydet.common.errors import one_line
from raydet.images.windows.directory import GEO_KEYS, GEO_TEXTS, PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, Directory

_MODEL_TYPE, _RASTER_TYPE = 1024, 1025
_CITATIONS = (3073, 1026, 2049)
"""Names of the projected system, of the file's model, and of the geographic system, the most specific first."""
_PROJECTED, _GEOGRAPHIC = 3072, 2048
_IS_GEOGRAPHIC, _IS_POINT = 2, 2
_USED = (_MODEL_TYPE, _RASTER_TYPE, _PROJECTED, _GEOGRAPHIC, *_CITATIONS)
_CODES = range(1024, 32767)
"""EPSG codes; 32767 stands for a system that the file describes itself."""
_LONGEST_NAME = 500


class Georeference(NamedTuple):
    """Position of a picture on Earth.

    Attributes:
        crs: `EPSG:` with a code, or the name that the file gives to a system of its own; None if it states none.
        transform: Numbers (a, b, c, d, e, f) with x = a · column + b · row + c and y = d · column + e · row + f, where
            (0, 0) is the upper left corner of the first pixel; None if the file states none.
    """

    crs: str | None
    transform: tuple[float, ...] | None


def georeference_of(directory: Directory) -> Georeference:
    """Return what a directory states; what is damaged counts as not stated."""
    keys = _keys_of(directory)
    return Georeference(_crs_of(keys), _transform_of(directory, is_point=keys.get(_RASTER_TYPE) == _IS_POINT))


def _keys_of(directory: Directory) -> dict[int, int | str]:
    texts = directory.tags[GEO_TEXTS].data.decode("ascii", "replace") if GEO_TEXTS in directory.tags else ""
    entries = directory.numbers(GEO_KEYS)[4:]
    if entries.dtype.kind != "u":
        return {}
    keys: dict[int, int | str] = {}
    for key, place, count, value in entries[: len(entries) // 4 * 4].reshape(-1, 4).tolist():
        if key not in _USED:  # all keys together may claim the same text, each for itself
            continue
        if place == 0:
            keys[key] = value
        elif place == GEO_TEXTS:
            keys[key] = texts[value : value + count].rstrip("|\0 ")
    return keys


def _crs_of(keys: dict[int, int | str]) -> str | None:
    kinds = [_GEOGRAPHIC] if keys.get(_MODEL_TYPE) == _IS_GEOGRAPHIC else [_PROJECTED, _GEOGRAPHIC]
    # A projected system of the file's own may name a geographic one that it is based on.
    stated = next((keys[kind] for kind in kinds if kind in keys), None)
    if isinstance(stated, int) and stated in _CODES:
        return f"EPSG:{stated}"
    names = (keys.get(citation) for citation in _CITATIONS)
    return next((one_line(name, limit=_LONGEST_NAME) for name in names if isinstance(name, str) and name), None)


def _transform_of(directory: Directory, *, is_point: bool) -> tuple[float, ...] | None:
    matrix, scale, ties = (directory.numbers(tag) for tag in (TRANSFORMATION, PIXEL_SCALE, TIE_POINTS))
    if len(matrix) == 16:
        a, b, c, d, e, f = matrix[[0, 1, 3, 4, 5, 7]].tolist()
    elif len(scale) >= 2 and len(ties) >= 6:
        (a, down), (column, row, _, x, y, _) = scale[:2].tolist(), ties[:6].tolist()
        b, c, d, e, f = 0.0, x - column * a, 0.0, -down, y + row * down
    else:
        return None
    if is_point:  # the coordinates are those of a pixel's centre
        c, f = c - (a + b) / 2, f - (d + e) / 2
    found = tuple(map(float, (a, b, c, d, e, f)))
    return found if np.isfinite(found).all() else None
