"""Selection of the boxes to show for each class: smallest, median, largest and random ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.common.hashing import hashes_of
from raydet.inspection.rows import Rows
from raydet.tables.columns import Integers

_SAMPLE = 31
"""Number of boxes per class sampled at random; the median of the sample by area represents the median of all."""


@dataclass(frozen=True)
class Pick:
    """Box to show: class, reason (smallest, …), position of its image in the table, and its index in the image."""

    category: int
    kind: str
    position: int
    number: int


class Picker:
    """Selector of boxes from a streamed table; the same table and seed always yield the same boxes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._smallest, self._largest, self._sample = _Best(1), _Best(1), _Best(_SAMPLE)

    def add(self, rows: Rows) -> None:
        """Consider the boxes of some images; crowds are never selected."""
        kept = np.flatnonzero(~rows.iscrowd)
        areas = rows.boxes_xywh[kept, 2] * rows.boxes_xywh[kept, 3]
        of_image = hashes_of(rows.image_ids, self._seed)[rows.owners[kept]]
        shuffled = hashes_of(of_image + rows.numbers[kept].astype(np.uint64), self._seed)
        about = (rows.categories[kept], areas, rows.first + rows.owners[kept], rows.numbers[kept])
        self._smallest.add(areas, *about)
        self._largest.add(-areas, *about)
        self._sample.add(shuffled, *about)

    def picks(self, count: int) -> dict[int, list[Pick]]:
        """Return up to `count` boxes per class, each of a different image: smallest, median, largest, then random."""
        chosen: dict[int, list[Pick]] = {}
        for category in np.unique(self._sample.categories).tolist():
            sample = self._sample.of_class(category)
            by_area = sorted(sample, key=lambda box: (box[0], box[1:]))
            candidates = [
                *(("smallest", box) for box in self._smallest.of_class(category)),
                ("median", by_area[len(by_area) // 2]),
                *(("largest", box) for box in self._largest.of_class(category)),
                *(("random", box) for box in sample),
            ]
            taken: dict[int, Pick] = {}
            for kind, (_, position, number) in candidates:
                if position not in taken and len(taken) < count:
                    taken[position] = Pick(category, kind, position, number)
            chosen[category] = list(taken.values())
        return chosen


class _Best:
    """Boxes with the smallest keys, by class."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._columns: tuple[npt.NDArray[Any], ...] = ()

    @property
    def categories(self) -> Integers:
        return self._columns[1] if self._columns else np.empty(0, np.int64)

    def add(self, *columns: npt.NDArray[Any]) -> None:
        """Consider boxes given by key, category, area, position and number, [N] each."""
        if self._columns:
            columns = tuple(np.concatenate(pair) for pair in zip(self._columns, columns, strict=True))
        keys, categories, _, positions, numbers = columns
        order = np.lexsort((numbers, positions, keys, categories))
        starts = np.searchsorted(categories[order], categories[order], side="left")
        order = order[np.arange(len(order)) - starts < self._count]
        self._columns = tuple(column[order] for column in columns)

    def of_class(self, category: int) -> list[tuple[float, int, int]]:
        """Return area, position and number of the boxes of a class, in ascending key order."""
        rows = self.categories == category
        return list(zip(*(column[rows].tolist() for column in self._columns[2:]), strict=True))
