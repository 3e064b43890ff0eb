"""Tiles and mirrored views of an image: windows that the model sees as separate images.

Decode processes import this module, so it depends on numpy only.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raydet.config import PredictConfig
from raydet.models.geometry import Image, SizeHW


@dataclass(frozen=True)
class TileView:
    """A window of an image, as input for the model.

    Attributes:
        left: First column, in pixels of the whole image.
        top: First row.
        width: Columns of the window.
        height: Rows of the window.
        is_mirrored: Left and right are swapped within the window.
        is_whole: The window is the whole image.
    """

    left: int
    top: int
    width: int
    height: int
    is_mirrored: bool = False
    is_whole: bool = False

    @property
    def window_xyxy(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels of the whole image; a view and its mirror image share it."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    @property
    def size_hw(self) -> SizeHW:
        """Height and width of the window in pixels."""
        return self.height, self.width


def planned_views(size_hw: SizeHW, config: PredictConfig) -> list[TileView]:
    """Return the views of an image of this size that a config requests."""
    return views_of(
        size_hw, tile=config.tile, overlap=config.tile_overlap, whole_image=config.whole_image, flip=config.flip
    )


def tiles_of(size_hw: SizeHW, config: PredictConfig) -> list[TileView]:
    """Return the views of an image of this size that a config with `windowed` requests."""
    return _kept_views(size_hw, tile=config.tile, overlap=config.tile_overlap, whole_image=False, flip=config.flip)


def num_tiles(size_hw: SizeHW, config: PredictConfig) -> int:
    """Return the number of `tiles_of` without building them."""
    assert config.tile is not None, "windows have a size"
    height, width = (len(_starts(side, config.tile, config.tile_overlap)) for side in size_hw)
    return height * width * (2 if config.flip else 1)


def views_of(size_hw: SizeHW, *, tile: int | None, overlap: float, whole_image: bool, flip: bool) -> list[TileView]:
    """Plan the views of an image.

    Tiles are spread evenly from border to border, as few as the requested overlap allows.

    Args:
        size_hw: Height and width of the image in pixels.
        tile: Side of the square tiles in pixels; None for no tiles. Tiles are cropped to an image that is narrower,
            and an image that fits into one tile is not cut.
        overlap: Minimum fraction of a tile's side that neighbours share, 0 ≤ overlap < 1.
        whole_image: Add the whole image after the tiles.
        flip: Add the mirror image of each view after it.

    Returns:
        At least one view, tiles row by row; no two are equal.
    """
    height, width = size_hw
    views = [TileView(0, 0, width, height, is_whole=True)]
    if tile is not None and max(size_hw) > tile:
        tiles = [
            TileView(left, top, min(tile, width), min(tile, height))
            for top in _starts(height, tile, overlap)
            for left in _starts(width, tile, overlap)
        ]
        views = tiles + views if whole_image else tiles
    if not flip:
        return views
    return [
        TileView(view.left, view.top, view.width, view.height, is_mirrored, view.is_whole)
        for view in views
        for is_mirrored in (False, True)
    ]


_kept_views = lru_cache(maxsize=4)(views_of)
"""A large picture has thousands of tiles, and each chunk asks for them."""


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Return the offsets of tiles along one side; the last tile ends at the end of the side."""
    if length <= tile:
        return [0]
    most_apart = max(1, tile - math.ceil(tile * overlap))
    num_steps = -(-(length - tile) // most_apart)
    return [step * (length - tile) // num_steps for step in range(num_steps + 1)]


def crop(image: Image, view: TileView) -> Image:
    """Cut a view out of an image.

    Args:
        image: The whole image, uint8 [H, W, 3].
        view: One of `views_of` for its size.

    Returns:
        uint8 [view.height, view.width, 3], contiguous; the image itself if the view covers it unmirrored.
    """
    left, top, right, bottom = view.window_xyxy
    window = image[top:bottom, left:right]
    return np.ascontiguousarray(window[:, ::-1] if view.is_mirrored else window)
