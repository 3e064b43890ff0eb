"""Generated images with shapes of ten classes, as rows of an images table."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from raydet.preparation.sources.shapes import encode

CLASSES = ("rectangle", "ellipse", "triangle", "diamond", "pentagon", "hexagon", "star", "cross", "ring", "arrow")
_LEAST_SIZE, _MOST_SIZE = 0.14, 0.4
_MOST_SHAPES = 5
_TRIES = 20

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Colour = tuple[int, int, int]
PALETTE: tuple[Colour, ...] = (
    (220, 40, 40),
    (40, 190, 60),
    (50, 80, 225),
    (235, 215, 50),
    (200, 60, 210),
    (60, 210, 215),
)


def rows(num_images: int, *, side: int, seed: int, first_id: int) -> Iterator[dict[str, Any]]:
    """Draw square images of this side in pixels; the same arguments draw the same images."""
    for row, _ in coloured_rows(num_images, (), side=side, seed=seed, first_id=first_id):
        yield row


def coloured_rows(
    num_images: int, palette: Sequence[Colour], *, side: int, seed: int, first_id: int
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Draw images as `rows` does, with shapes in the colours of a palette, and yield the colour of each shape too.

    Without a palette, colours are random, and those yielded mean nothing.
    """
    for number in range(num_images):
        rng = np.random.default_rng([seed, number])
        pixels, boxes, categories, colours = _draw(rng, side, palette)
        row = {
            "image_id": first_id + number,
            "image": {"bytes": encode(pixels), "path": f"shapes-{seed}-{number:05d}.jpg"},
            "width": side,
            "height": side,
            "objects": {
                "id": list(range(1, len(boxes) + 1)),
                "bbox": boxes,
                "category": categories,
                "area": [width * height for _, _, width, height in boxes],
                "iscrowd": [False] * len(boxes),
            },
        }
        yield row, colours


def _draw(
    rng: np.random.Generator, side: int, palette: Sequence[Colour]
) -> tuple[Any, list[list[float]], list[int], list[int]]:
    ground = rng.uniform(70, 185, 3)
    canvas = ground + rng.normal(0, 8, (side, side, 1))
    is_free = np.ones((side, side), bool)
    boxes: list[list[float]] = []
    categories: list[int] = []
    colours: list[int] = []
    for _ in range(int(rng.integers(1, _MOST_SHAPES + 1))):
        category = int(rng.integers(len(CLASSES)))
        mask = _placed(rng, category, is_free)
        if mask is None:
            continue
        colour = (ground + rng.uniform(80, 150, 3) * rng.choice([-1, 1], 3)) % 256
        colours.append(int(rng.integers(len(palette))) if palette else 0)
        if palette:
            colour = np.array(palette[colours[-1]], float)
        canvas[mask] = colour + rng.normal(0, 4, (int(mask.sum()), 3))
        vertical, horizontal = np.nonzero(mask)
        left, top = int(horizontal.min()), int(vertical.min())
        boxes.append([left, top, int(horizontal.max()) + 1 - left, int(vertical.max()) + 1 - top])
        is_free[mask] = False
        categories.append(category)
    return np.clip(canvas, 0, 255).astype(np.uint8), boxes, categories, colours


def _placed(rng: np.random.Generator, category: int, is_free: Mask) -> Mask | None:
    """Return the pixels of a shape in a free place; None if none was found."""
    side = len(is_free)
    for _ in range(_TRIES):
        width, height = (rng.uniform(_LEAST_SIZE, _MOST_SIZE) * side * rng.uniform(0.8, 1.2, 2)).astype(int)
        left, top = (int(rng.integers(0, side - extent)) for extent in (width, height))
        picture = Image.new("1", (side, side))
        _OUTLINES[category](ImageDraw.Draw(picture), left, top, int(width), int(height))
        mask = np.asarray(picture)
        if (is_free | ~mask).all():
            return mask
    return None


Outline = Callable[[ImageDraw.ImageDraw, int, int, int, int], None]


def _polygon(points: Any) -> Outline:
    """Return a function that draws a polygon, whose points are relative to its box, [N, 2]."""
    relative = np.asarray(points, float)
    relative = (relative - relative.min(0)) / (relative.max(0) - relative.min(0))

    def draw(pen: ImageDraw.ImageDraw, left: int, top: int, width: int, height: int) -> None:
        pen.polygon([(left + x * width, top + y * height) for x, y in relative], fill=1)

    return draw


def _regular(corners: int, *, inner: float = 1.0) -> Outline:
    """Return a regular polygon with a corner at the top; every second corner is `inner` times as far out."""
    angles = np.arange(corners) * 2 * np.pi / corners
    radius = np.where(np.arange(corners) % 2, inner, 1.0)
    return _polygon(np.stack([radius * np.sin(angles), -radius * np.cos(angles)], 1))


def _ellipse(pen: ImageDraw.ImageDraw, left: int, top: int, width: int, height: int) -> None:
    pen.ellipse((left, top, left + width, top + height), fill=1)


def _ring(pen: ImageDraw.ImageDraw, left: int, top: int, width: int, height: int) -> None:
    pen.ellipse((left, top, left + width, top + height), outline=1, width=max(2, min(width, height) // 5))


_OUTLINES: tuple[Outline, ...] = (
    _polygon([(0, 0), (1, 0), (1, 1), (0, 1)]),
    _ellipse,
    _polygon([(0, 1), (1, 1), (0.5, 0)]),
    _regular(4),
    _regular(5),
    _regular(6),
    _regular(10, inner=0.4),
    _polygon([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]),
    _ring,
    _polygon([(0, 1), (2, 1), (2, 0), (4, 2), (2, 4), (2, 3), (0, 3)]),
)
