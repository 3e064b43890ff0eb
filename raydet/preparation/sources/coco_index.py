"""On-disk index of a COCO file: entries in any order → images with their annotations.

Entries must be valid; `coco` checks them before adding them.
"""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from raydet.preparation.sources.source import SourceObjects
from raydet.tables.coco_json import MAX_INTEGER, BoxXywh
from raydet.tables.schema import Category
from raydet.tables.spill import open_database, select

# Without declared types, SQLite keeps texts and integers apart.
_TABLES = (
    "images (place INTEGER PRIMARY KEY, id UNIQUE, path, height, width, extra)",
    "annotations (number INTEGER PRIMARY KEY, id, image_id, category_id, x, y, width, height, area, iscrowd)",
    "categories (id PRIMARY KEY, place)",
)


class ImageEntry(NamedTuple):
    """An entry of `images`."""

    image_id: int
    path: str
    size_hw: tuple[int, int] | None
    extra: dict[str, Any]


class AnnotationEntry(NamedTuple):
    """An entry of `annotations`; ids are arbitrary integers, and `annotation_id` may be missing."""

    annotation_id: int | None
    image_id: int
    category_id: int
    box_xywh: BoxXywh
    area: float
    iscrowd: bool


class OrphanAnnotation(NamedTuple):
    """An annotation of an unknown image (`path` is None) or of an unknown category."""

    annotation_id: int | None
    image_id: int
    category_id: int
    path: str | None


class CocoIndex:
    """On-disk index of images and their annotations."""

    def __init__(self) -> None:
        self.num_images = 0
        self._num_annotations = 0
        self._num_orphans = 0
        self._has_own_ids = True
        self._database = open_database()
        for table in _TABLES:
            self._database.execute(f"CREATE TABLE {table}")

    def add_image(self, entry: ImageEntry) -> int | None:
        """Add an image; if its id is taken, return the position of the existing image instead."""
        # JSON may contain lone surrogates, which SQLite does not accept as text.
        path = entry.path.encode(errors="surrogatepass")
        height, width = map(_storable, entry.size_hw or (None, None))
        row = (self.num_images, entry.image_id, path, height, width, json.dumps(entry.extra))
        if self._database.execute("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?, ?, ?)", row).rowcount:
            self.num_images += 1
            return None
        found = self._database.execute("SELECT place FROM images WHERE id = ?", (entry.image_id,)).fetchone()
        place: int = found[0]
        return place

    def add_annotations(self, entries: Iterable[AnnotationEntry]) -> None:
        """Add annotations, consuming the iterable lazily."""
        self._database.executemany("INSERT INTO annotations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._rows(entries))

    def _rows(self, entries: Iterable[AnnotationEntry]) -> Iterator[tuple[Any, ...]]:
        for number, entry in enumerate(entries, start=1):
            self._num_annotations = number
            self._has_own_ids &= entry.annotation_id is not None and 0 < entry.annotation_id < MAX_INTEGER
            ids = map(_storable, (entry.annotation_id, entry.image_id, entry.category_id))
            yield number, *ids, *entry.box_xywh, entry.area, entry.iscrowd

    def join(self, categories: tuple[Category, ...]) -> bool:
        """Assign annotations to images; call once, after all entries are added.

        Returns:
            True if the annotations keep their ids, because all are present, unique and positive. Otherwise they are
            numbered from 1.
        """
        self._database.executemany(
            "INSERT INTO categories VALUES (?, ?)", [(category.id, place) for place, category in enumerate(categories)]
        )
        repeated = "SELECT id FROM annotations GROUP BY id HAVING COUNT(*) > 1 LIMIT 1"
        keep = self._has_own_ids and not list(select(self._database, repeated))
        if not keep:
            self._database.execute("UPDATE annotations SET id = number")
        self._database.execute(
            """
            CREATE TABLE boxes AS SELECT images.place AS image, annotations.id AS id, categories.place AS category,
                x, y, annotations.width AS width, annotations.height AS height, area, iscrowd
            FROM annotations JOIN images ON images.id = image_id JOIN categories ON categories.id = category_id
            ORDER BY images.place, number
            """
        )
        ((num_boxes,),) = select(self._database, "SELECT COUNT(*) FROM boxes")
        self._num_orphans = self._num_annotations - num_boxes
        return keep

    def orphans(self) -> Iterator[OrphanAnnotation]:
        """Yield the annotations that `join` did not assign, in file order."""
        if not self._num_orphans:
            return
        query = """
            SELECT annotations.id, image_id, category_id, path
            FROM annotations LEFT JOIN images ON images.id = image_id
                LEFT JOIN categories ON categories.id = category_id
            WHERE images.id IS NULL OR categories.id IS NULL ORDER BY number
            """
        for annotation_id, image_id, category_id, path in select(self._database, query):
            shown = None if path is None else path.decode(errors="surrogatepass")
            yield OrphanAnnotation(annotation_id, int(image_id), int(category_id), shown)

    def images(self) -> Iterator[tuple[ImageEntry, SourceObjects]]:
        """Yield all images with their boxes, both in file order; call `join` first."""
        boxes = groupby(select(self._database, "SELECT * FROM boxes ORDER BY rowid"), key=lambda row: int(row[0]))
        place_of_boxes, rows = next(boxes, (-1, iter(())))
        images = select(self._database, "SELECT * FROM images ORDER BY place")
        for place, image_id, path, height, width, extra in images:
            objects = SourceObjects()
            if place == place_of_boxes:
                objects = _objects(rows)
                place_of_boxes, rows = next(boxes, (-1, iter(())))
            size_hw = (int(height), int(width)) if height is not None else None
            yield ImageEntry(image_id, path.decode(errors="surrogatepass"), size_hw, json.loads(extra)), objects


def _storable(value: int | None) -> int | str | None:
    """Return an integer unchanged if it fits into 64 bits, otherwise as text."""
    return value if value is None or abs(value) < MAX_INTEGER else str(value)


def _objects(rows: Iterable[tuple[Any, ...]]) -> SourceObjects:
    objects = SourceObjects()
    for _, annotation_id, category, *box_xywh, area, iscrowd in rows:
        # SQLite stores NaN as null.
        left, top, width, height = (math.nan if number is None else float(number) for number in box_xywh)
        objects.ids.append(annotation_id)
        objects.boxes_xywh.append((left, top, width, height))
        objects.categories.append(category)
        objects.areas.append(math.nan if area is None else float(area))
        objects.iscrowd.append(bool(iscrowd))
    return objects
