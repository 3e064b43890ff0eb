"""Generated images: coloured rectangles, ellipses and triangles on a textured background.

An image depends only on the seed, the split and its index, so that any number of threads draws the same images.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from raydet.preparation.sources.source import SourceObjects
from raydet.tables.schema import Category

Split = Literal["train", "val"]
Pixels = NDArray[np.float32]

CATEGORIES = (Category(1, "rectangle"), Category(2, "ellipse"), Category(3, "triangle"))

_STREAM_OF_SPLIT: dict[Split, int] = {"train": 0, "val": 1}
_LEAST_SIZE, _MOST_SIZE = 0.18, 0.37
_MOST_STRETCH = 0.2
_MOST_COVERED = 0.1
_OVERSAMPLING = 2
_LEAST_CONTRAST = 140.0
_TRIES = 20


@dataclass(frozen=True)
class DrawnImage:
    """One generated image.

    Attributes:
        pixels: RGB, uint8 [side, side, 3].
        objects: Tight boxes around the visible pixels of each shape; areas count these pixels. Ids start at 1.
    """

    pixels: NDArray[np.uint8]
    objects: SourceObjects


def draw(seed: int, split: Split, index: int, *, image_size: int, max_shapes: int) -> DrawnImage:
    """Draw one image.

    The image is square with this side in pixels. The width and height of a shape are 15 % to 45 % of it. Later shapes
    cover at most a tenth of an earlier one. Each split has independent random numbers.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM_OF_SPLIT[split], index)))
    ground_rgb = rng.uniform(70, 185, 3).astype(np.float32)
    canvas = _texture(rng, image_size, ground_rgb)
    owner = np.full((image_size, image_size), -1, dtype=np.int16)
    categories: list[int] = []
    num_drawn_pixels: list[int] = []
    for _ in range(int(rng.integers(0, max_shapes + 1))):
        category = int(rng.integers(len(CATEGORIES)))
        placed = _place(rng, category, owner, num_drawn_pixels)
        if placed is None:
            continue
        region, coverage = placed
        visible = coverage >= 0.5
        owner[region][visible] = len(categories)
        categories.append(category)
        num_drawn_pixels.append(int(visible.sum()))
        grain = 3 * rng.standard_normal(coverage.shape, dtype=np.float32)
        colour = _contrasting_colour(rng, ground_rgb) + grain[..., None]
        canvas[region] += coverage[..., None] * (colour - canvas[region])
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return DrawnImage(pixels, _objects(owner, categories))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Encode RGB pixels as a JPEG of high quality with full colour resolution."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def _texture(rng: np.random.Generator, image_size: int, ground_rgb: Pixels) -> Pixels:
    """Draw soft patches and fine grain around one colour, [side, side, 3]."""
    patches = Image.fromarray(rng.normal(0, 9, (7, 7)).astype(np.float32))
    soft = np.asarray(patches.resize((image_size, image_size), Image.Resampling.BICUBIC))
    grain = 4 * rng.standard_normal((image_size, image_size), dtype=np.float32)
    return ground_rgb + (soft + grain)[..., None]


def _contrasting_colour(rng: np.random.Generator, ground_rgb: Pixels) -> Pixels:
    """Choose a colour far from the background, which is near the middle of the colour cube, so that one exists."""
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if np.linalg.norm(colour - ground_rgb) >= _LEAST_CONTRAST:
            return colour


def _place(
    rng: np.random.Generator, category: int, owner: NDArray[np.int16], num_drawn_pixels: list[int]
) -> tuple[tuple[slice, slice], Pixels] | None:
    """Find room for a shape; return its rows and columns and its coverage per pixel, 0 to 1, or None."""
    side = owner.shape[0]
    num_visible = np.bincount(owner[owner >= 0], minlength=len(num_drawn_pixels))
    least_visible = (1 - _MOST_COVERED) * np.array(num_drawn_pixels, dtype=np.float64)
    for _ in range(_TRIES):
        stretch = np.exp(rng.uniform(-_MOST_STRETCH, _MOST_STRETCH, 2))
        width, height = np.rint(rng.uniform(_LEAST_SIZE, _MOST_SIZE) * side * stretch).astype(int)
        left, top = (int(rng.integers(0, side - extent + 1)) for extent in (width, height))
        region = (slice(top, top + height), slice(left, left + width))
        coverage = _OUTLINES[category](rng, int(width), int(height))
        below = owner[region][coverage >= 0.5]
        num_lost = np.bincount(below[below >= 0], minlength=len(num_drawn_pixels))
        if (num_visible - num_lost >= least_visible).all():
            return region, coverage
    return None


def _rectangle(rng: np.random.Generator, width: int, height: int) -> Pixels:
    return np.ones((height, width), dtype=np.float32)


def _ellipse(rng: np.random.Generator, width: int, height: int) -> Pixels:
    return _rasterise(width, height, lambda pen, right, bottom: pen.ellipse((0, 0, right, bottom), fill=255))


def _triangle(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draw a triangle with its base on the lower edge of its box and its tip near the middle of the upper edge."""
    tip = float(rng.uniform(0.3, 0.7))
    return _rasterise(
        width,
        height,
        lambda pen, right, bottom: pen.polygon([(0, bottom), (right, bottom), (tip * right, 0)], fill=255),
    )


def _rasterise(width: int, height: int, draw_shape: Callable[[ImageDraw.ImageDraw, int, int], None]) -> Pixels:
    """Draw at a larger size and reduce, which smooths the edges; coverage 0 to 1, [height, width]."""
    large = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    draw_shape(ImageDraw.Draw(large), large.width - 1, large.height - 1)
    return np.asarray(large.reduce(_OVERSAMPLING), dtype=np.float32) / np.float32(255)


_OUTLINES = (_rectangle, _ellipse, _triangle)


def _objects(owner: NDArray[np.int16], categories: list[int]) -> SourceObjects:
    objects = SourceObjects()
    for index, category in enumerate(categories):
        rows, columns = np.nonzero(owner == index)
        left, right = int(columns.min()), int(columns.max()) + 1
        top, bottom = int(rows.min()), int(rows.max()) + 1
        objects.ids.append(index + 1)
        objects.boxes_xywh.append((float(left), float(top), float(right - left), float(bottom - top)))
        objects.categories.append(category)
        objects.areas.append(float(rows.size))
        objects.iscrowd.append(False)
    return objects
