"""Statistics of a data set, counted batch by batch; memory grows with the classes, not with the rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from raydet.inspection.rows import Rows
from raydet.tables.columns import Floats, Integers

SMALL_PX2, MEDIUM_PX2 = 32.0**2, 96.0**2
"""COCO's limits between small, medium and large objects, by area in square pixels."""
GRID = 24
"""Number of rows and columns of the grid in which box centres are counted."""

_INF = float("inf")
_RATIOS = (0, 1 / 20, 1 / 10, 1 / 5, 1 / 3, 1 / 2, 2 / 3, 4 / 5, 5 / 4, 3 / 2, 2, 3, 5, 10, 20, _INF)


@dataclass(frozen=True)
class Quantity:
    """Histogram definition: name, title, unit, whether boxes or images are counted, and bin edges."""

    name: str
    title: str
    unit: str
    of_boxes: bool
    edges: tuple[float, ...]


QUANTITIES = (
    Quantity(
        "box_side_px", "Box sizes", "px, root of width × height", True,
        (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, _INF),
    ),
    Quantity(
        "box_side_share", "Box sizes within the image", "root of the share of the image's area", True,
        (0, .01, .02, .03, .05, .07, .1, .15, .2, .25, .3, .4, .5, .6, .7, .8, .9, 1),
    ),
    Quantity("box_aspect_ratio", "Aspect ratios of boxes", "width / height", True, _RATIOS),
    Quantity(
        "boxes_per_image", "Boxes in an image", "boxes", False,
        (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, _INF),
    ),
    Quantity(
        "image_side_px", "Image sizes", "px, the longer side", False,
        (0, 128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 8192, _INF),
    ),
    Quantity("image_aspect_ratio", "Aspect ratios of images", "width / height", False, _RATIOS),
)  # fmt: skip
"""A value on an edge belongs to the upper bin; the outermost bins include all values beyond."""


class Counts:
    """Sums over all images and boxes of a table.

    Attributes:
        num_empty: Number of images without boxes.
        boxes: Number of boxes by class, crowds included, int64 [C].
        crowds: Number of crowd boxes by class, int64 [C].
        sizes: Number of small, medium and large boxes by class and COCO's areas, crowds excluded, int64 [C, 3].
        images: Number of images that contain the class, int64 [C].
        histograms: Histograms by quantity, int64 [C + 1, bins]: a row per class and, last, one for all classes. The
            class rows of image quantities count the images that contain the class; `boxes_per_image` then counts
            only boxes of that class.
        centres: Number of boxes by the position of their centre in the image, int64 [C, GRID, GRID]: class, row,
            column.
        smallest_wh: Smallest width and smallest height of all images, in pixels.
        largest_wh: Largest width and largest height of all images, in pixels.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.num_images = 0
        self.num_empty = 0
        self.boxes: Integers = np.zeros(num_classes, np.int64)
        self.crowds: Integers = np.zeros(num_classes, np.int64)
        self.sizes: Integers = np.zeros((num_classes, 3), np.int64)
        self.images: Integers = np.zeros(num_classes, np.int64)
        self.histograms = {
            quantity.name: np.zeros((num_classes + 1, len(quantity.edges) - 1), np.int64) for quantity in QUANTITIES
        }
        self.centres: Integers = np.zeros((num_classes, GRID, GRID), np.int64)
        self.smallest_wh: Floats = np.full(2, np.inf)
        self.largest_wh: Floats = np.zeros(2)
        self._together: Any = sparse.csr_array((num_classes, num_classes), dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of images and boxes; the tables hold the rest."""
        names = ("num_images", "num_empty", "num_boxes", "boxes", "crowds", "images", "sizes")
        return {name: getattr(self, name) for name in names}

    @property
    def num_boxes(self) -> int:
        """Number of boxes of all classes, crowds included."""
        return int(self.boxes.sum())

    def together(self) -> tuple[Integers, Integers, Integers]:
        """Return pairs of different classes that share an image, first < second, and the number of such images."""
        upper = sparse.triu(self._together, k=1).tocoo()
        return upper.row.astype(np.int64), upper.col.astype(np.int64), upper.data

    def add(self, rows: Rows) -> None:
        """Count some images."""
        self.num_images += len(rows.image_ids)
        self.num_empty += int((rows.num_boxes == 0).sum())
        if len(rows.image_ids):
            self.smallest_wh = np.minimum(self.smallest_wh, rows.sizes_wh.min(axis=0))
            self.largest_wh = np.maximum(self.largest_wh, rows.sizes_wh.max(axis=0))
        self._add_boxes(rows)
        self._add_images(rows)

    def _add_boxes(self, rows: Rows) -> None:
        number, categories = self.num_classes, rows.categories
        self.boxes += np.bincount(categories, minlength=number)
        self.crowds += np.bincount(categories[rows.iscrowd], minlength=number)
        places = np.digitize(rows.areas, (SMALL_PX2, MEDIUM_PX2))
        flat = (categories * 3 + places)[~rows.iscrowd]
        self.sizes += np.bincount(flat, minlength=3 * number).reshape(number, 3)

        sizes_wh = np.maximum(rows.sizes_wh, 1.0)[rows.owners]
        width, height = rows.boxes_xywh[:, 2], rows.boxes_xywh[:, 3]
        side = np.sqrt(np.maximum(width, 0) * np.maximum(height, 0))
        self._count("box_side_px", side, categories)
        self._count("box_side_share", side / np.sqrt(sizes_wh.prod(axis=1)), categories)
        self._count("box_aspect_ratio", _ratio(width, height), categories)

        centres = (rows.boxes_xywh[:, :2] + rows.boxes_xywh[:, 2:] / 2) / sizes_wh
        column, row = np.clip(np.nan_to_num(centres) * GRID, 0, GRID - 1).astype(np.int64).T
        flat = (categories * GRID + row) * GRID + column
        self.centres += np.bincount(flat, minlength=number * GRID * GRID).reshape(number, GRID, GRID)

    def _add_images(self, rows: Rows) -> None:
        number = self.num_classes
        pairs, boxes_of_pair = np.unique(rows.owners * max(number, 1) + rows.categories, return_counts=True)
        owners, categories = np.divmod(pairs, max(number, 1))
        self.images += np.bincount(categories, minlength=number)
        present = sparse.csr_array(
            (np.ones(len(pairs), np.int64), (owners, categories)), shape=(len(rows.image_ids), number)
        )
        self._together = self._together + present.T @ present

        sides, ratios = rows.sizes_wh.max(axis=1, initial=0.0), _ratio(rows.sizes_wh[:, 0], rows.sizes_wh[:, 1])
        self._count("image_side_px", sides[owners], categories, of_all=sides)
        self._count("image_aspect_ratio", ratios[owners], categories, of_all=ratios)
        self._count("boxes_per_image", boxes_of_pair, categories, of_all=rows.num_boxes)

    def _count(
        self, name: str, values: Floats | Integers, categories: Integers, of_all: Floats | Integers | None = None
    ) -> None:
        """Add values to a histogram's class rows, and the same or other values to the row of all classes."""
        histogram = self.histograms[name]
        edges = next(quantity.edges for quantity in QUANTITIES if quantity.name == name)
        num_bins = len(edges) - 1
        # The outermost bins are open: they include values beyond the first and last edge.
        bins = np.searchsorted(edges[1:-1], values, side="right")
        by_class = np.bincount(categories * num_bins + bins, minlength=self.num_classes * num_bins)
        histogram[:-1] += by_class.reshape(self.num_classes, num_bins)
        every = bins if of_all is None else np.searchsorted(edges[1:-1], of_all, side="right")
        histogram[-1] += np.bincount(every, minlength=num_bins)


def _ratio(width: Floats, height: Floats) -> Floats:
    """Return width over height; 1 if both are zero."""
    safe = np.maximum(height, 1e-9)
    return np.asarray(np.where((width <= 0) & (height <= 0), 1.0, np.maximum(width, 0) / safe))


def distance(one: Integers, other: Integers) -> float | None:
    """Return the distance of two histograms, from 0 (equal shares) to 1 (nothing in common); None if one is empty.

    This is the total variation distance: half the sum of the absolute differences of the shares.
    """
    if not one.sum() or not other.sum():
        return None
    return float(np.abs(one / one.sum() - other / other.sum()).sum() / 2)
