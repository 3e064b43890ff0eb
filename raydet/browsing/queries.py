"""Filters → images in order, their boxes, and counts that follow the filter."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import duckdb
import msgspec
import numpy as np
import numpy.typing as npt

from raydet.browsing.codes import SCORE_BINS
from raydet.browsing.filters import WITHOUT_SUSPECTS, Condition, ImageFilter, box_conditions, image_conditions, where
from raydet.browsing.index import Index
from raydet.common.errors import UserError

SORTS = {
    "id": ("Image id", "images.image"),
    "boxes": ("Most boxes", "num_boxes DESC NULLS LAST"),
    "highest": ("Highest score", "highest DESC NULLS LAST"),
    "lowest": ("Lowest score", "lowest ASC NULLS LAST"),
    "suspect": ("Most suspect labels", "suspect ASC NULLS LAST"),
    "false": ("Most false positives", "false_1 DESC"),
    "missed": ("Most missed objects", "missed_1 DESC"),
    "f1": ("Lowest F1", "f1_1 ASC NULLS LAST"),
    "better": ("Second run better", "f1_2 - f1_1 DESC NULLS LAST"),
    "worse": ("Second run worse", "f1_2 - f1_1 ASC NULLS LAST"),
    "size": ("Largest image", "width::BIGINT * height DESC"),
    "path": ("Path", "path ASC NULLS LAST"),
}
"""Name in requests → title, and the SQL to order by."""
_BOX_SORTS = ("num_boxes", "highest", "lowest")
_NEEDS = {"suspect": "suspect", "false": "false_1", "missed": "missed_1", "f1": "f1_1", "better": "f1_2"}
_NEEDS |= {"worse": "f1_2", "highest": "first", "lowest": "first"}
MOST_IN_ORDER = 100_000
"""Images that the page can scroll through in one order."""
_MOST_BOXES, _MOST_BOXES_OF_ONE = 60, 1000
_MOST_CLASSES = 50
_MOST_ANSWERS = 50
_LONGEST_TEXT = 1000
"""Characters of a path or error that the page shows."""
_ORDERS_KEPT = 8
_BOX_FACETS = {
    "sides": "side",
    "classes": "category",
    "scores": f"if(score < 1, floor(score * {SCORE_BINS}), if(score = 1, {SCORE_BINS - 1}, NULL))::INTEGER",
    "sizes": "size",
    "outcomes": "outcome",
    "second_outcomes": "second_outcome",
    "errors": "error",
    "any_box": "0",
}
_BOX_COLUMNS = "image, side, category, score, size, outcome, second_outcome, error, detected, x, y, w, h"
Images = npt.NDArray[np.int32]


class Queries:
    """Answers about an index; thread-safe.

    Attributes:
        index: The database.
        sorts: Names of the orders that the data has numbers for.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        columns = {name for name, *_ in index.database.execute("DESCRIBE images").fetchall()}
        self.sorts = tuple(name for name in SORTS if _NEEDS.get(name, "image") in columns)
        self._columns = tuple(name for name in _IMAGE_COLUMNS if name in columns)
        self._orders: OrderedDict[tuple[ImageFilter, str, int], Images] = OrderedDict()
        self._lock, self._finding = threading.Lock(), threading.Lock()
        self._num_changes = 0  # of the selection

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        return self.index.database.cursor()

    def _image_conditions(self, chosen: ImageFilter) -> list[Condition]:
        return image_conditions(chosen, len(self.index.groups))

    def _box_conditions(self, chosen: ImageFilter) -> list[Condition]:
        return box_conditions(chosen, len(self.index.answers))

    def order(self, chosen: ImageFilter, sort: str) -> Images:
        """Return the images that pass a filter, in an order, int32 [N].

        Raises:
            UserError: A value of the filter is out of range, or there is no such order.
        """
        if sort not in self.sorts:
            raise UserError(f"sort must be one of {', '.join(self.sorts)}")
        key = (chosen, sort, self._num_changes if chosen.images == "selected" else 0)
        with self._lock:
            if key in self._orders:
                self._orders.move_to_end(key)
                return self._orders[key]
        # The page asks for counts and for images at once; the second of both takes what the first has found.
        with self._finding:
            if key not in self._orders:
                found = self._find(chosen, SORTS[sort][1])
                with self._lock:
                    self._orders[key] = found
                    while len(self._orders) > _ORDERS_KEPT:
                        self._orders.popitem(last=False)
            return self._orders[key]

    def _find(self, chosen: ImageFilter, order_by: str) -> Images:
        source, values = self._images_in(chosen, is_about_boxes=order_by.startswith(_BOX_SORTS))
        query = f"SELECT images.image {source} ORDER BY {order_by}, images.image"
        return np.asarray(self._cursor().execute(query, values).fetchnumpy()["image"], np.int32)

    def _images_in(self, chosen: ImageFilter, *, is_about_boxes: bool = False) -> tuple[str, list[Any]]:
        """Return the FROM and WHERE clause of the images that pass a filter, and the parameters."""
        conditions = self._box_conditions(chosen)
        of_boxes, values = where(conditions or [WITHOUT_SUSPECTS])
        of_images, more_values = where(self._image_conditions(chosen))
        if not conditions and not is_about_boxes:
            return f"FROM images {of_images}", more_values
        join = (
            f"{'JOIN' if conditions else 'LEFT JOIN'} (SELECT image, count(*) AS num_boxes, max(score) AS highest, "
            f"min(score) AS lowest FROM boxes {of_boxes} GROUP BY image) AS own ON own.image = images.image"
        )
        return f"FROM images {join} {of_images}", [*values, *more_values]

    def facets(self, chosen: ImageFilter) -> dict[str, Any]:
        """Count images and boxes that pass a filter.

        Returns:
            `images`, `boxes`, and for each property of boxes pairs of a value and a number of boxes; for `groups`,
            pairs of a value and a number of images for each group; for `answers`, the most frequent values of each
            column, with the number of boxes and the text. The counts of a property are those without the filter's own
            condition on it, so that they show what else could be chosen.
        """
        boxes = self._box_conditions(chosen) or [WITHOUT_SUSPECTS]
        images = self._image_conditions(chosen)
        properties = [name for name in _BOX_FACETS if name != "any_box"]
        alike = [name for name in properties if all(one.of != name for one in boxes)]
        counts = self._count_boxes([*alike, "any_box"], boxes, images)
        num_boxes = sum(number for _, number in counts.pop("any_box"))
        for name in properties:
            if name not in alike:
                counts |= self._count_boxes([name], [one for one in boxes if one.of != name], images)
        counts["classes"] = sorted(counts["classes"], key=lambda pair: (-pair[1], pair[0]))[:_MOST_CLASSES]
        groups = [self._count_images(chosen, number) for number in range(len(self.index.groups))]
        answers = [self._count_answers(chosen, number, boxes, images) for number in range(len(self.index.answers))]
        whole = {"images": len(self.order(chosen, "id")), "boxes": num_boxes}
        return {**whole, "groups": groups, "answers": answers, **counts}

    def _count_boxes(
        self, names: Sequence[str], boxes: Sequence[Condition], images: Sequence[Condition]
    ) -> dict[str, list[tuple[int, int]]]:
        """Count the boxes by several properties in one pass."""
        source, values = _boxes_in(boxes, images)
        columns = ", ".join(f"{_BOX_FACETS[name]} AS {name}" for name in names)
        sets = ", ".join(f"({name})" for name in names)
        places = " ".join(f"WHEN grouping({name}) = 0 THEN {place}" for place, name in enumerate(names))
        query = (
            f"SELECT CASE {places} END, coalesce({', '.join(names)}), count(*) FROM (SELECT {columns} {source}) "
            f"GROUP BY GROUPING SETS ({sets})"
        )
        counts: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
        for place, value, number in self._cursor().execute(query, values).fetchall():
            if value is not None:
                counts[names[place]].append((value, number))
        return {name: sorted(pairs) for name, pairs in counts.items()}

    def _count_images(self, chosen: ImageFilter, group: int) -> list[tuple[int, int]]:
        others = tuple(pair for pair in chosen.groups if pair[0] != group)
        images = self.order(msgspec.structs.replace(chosen, groups=others), "id")
        counts = np.bincount(self.index.groups[group].codes[images] + 1)[1:]
        return [(value, number) for value, number in enumerate(counts.tolist()) if number]

    def _count_answers(
        self, chosen: ImageFilter, column: int, boxes: Sequence[Condition], images: Sequence[Condition]
    ) -> list[tuple[int, int, str]]:
        """Count the boxes by their answers, the chosen and the most frequent ones: value, number and text."""
        name, answers = f"answer_{column}", self.index.answers[column]
        is_there = Condition("", f"{name} IS NOT NULL")
        source, values = _boxes_in([*(one for one in boxes if one.of != f"answer {column}"), is_there], images)
        wanted = [value for place, value in chosen.answers if place == column and value < len(answers.values)]
        is_wanted = f"{name} IN ({', '.join('?' * len(wanted))}) DESC, " if wanted else ""
        query = f"SELECT {name}, count(*) AS number {source} GROUP BY {name} ORDER BY {is_wanted}number DESC, {name}"
        found = self._cursor().execute(f"{query} LIMIT {_MOST_ANSWERS}", [*values, *wanted]).fetchall()
        known = {value for value, _ in found}
        found += [(value, 0) for value in dict.fromkeys(wanted) if value not in known]
        return [(value, number, answers.text(value, None) or "") for value, number in found]

    def classes_like(self, text: str) -> list[int]:
        """Return the first classes whose names contain a text, whatever its case."""
        wanted = text.strip().lower()
        found = (index for index, name in enumerate(self.index.names) if wanted in name.lower())
        return [index for index, _ in zip(found, range(_MOST_CLASSES), strict=False)]

    def cards(self, images: Sequence[int], chosen: ImageFilter, *, is_single: bool = False) -> list[dict[str, Any]]:
        """Return images with their boxes, those with the highest scores if there are many.

        Each box is a list of the columns of `_BOX_COLUMNS` without the image, the texts of its answers, and whether it
        meets the filter.
        """
        if not images:
            return []
        rows = self._cursor().execute(
            f"SELECT {', '.join(self._columns)} FROM images WHERE image IN ({', '.join('?' * len(images))})",
            list(images),
        )
        by_image = {row[0]: dict(zip(self._columns, row, strict=True)) for row in rows.fetchall()}
        for card in by_image.values():
            shortened = {name: card[name][:_LONGEST_TEXT] for name in ("path", "error") if card[name] is not None}
            card |= {**shortened, "boxes": []}
        conditions = self._box_conditions(chosen)
        hit = " AND ".join(one.sql for one in conditions) or "TRUE"
        values = [value for one in conditions for value in one.parameters]
        most = _MOST_BOXES_OF_ONE if is_single else _MOST_BOXES
        boxes = self._cursor().execute(
            f"SELECT {_BOX_COLUMNS}, {self._answer_columns()}, coalesce({hit}, FALSE) AS hit FROM boxes "
            f"WHERE image IN ({', '.join('?' * len(images))}) "
            f"QUALIFY row_number() OVER (PARTITION BY image, side ORDER BY hit DESC, score DESC, number) <= {most} "
            "ORDER BY number",
            [*values, *images],
        )
        for image, *box, codes, numbers, is_hit in boxes.fetchall():
            entry = [*map(_short, box), self._answer_texts(codes, numbers), is_hit]
            by_image[image]["boxes"].append(entry)
        return [by_image[image] for image in images if image in by_image]

    def _answer_columns(self) -> str:
        """Return SQL for a list of the answers' values, and one of their numbers."""
        columns = range(len(self.index.answers))
        return ", ".join(f"[{', '.join(f'{name}_{column}' for column in columns)}]" for name in ("answer", "number"))

    def _answer_texts(self, codes: Sequence[int | None], numbers: Sequence[float | None]) -> list[str | None]:
        triples = zip(self.index.answers, codes, numbers, strict=True)
        return [None if code is None else answers.text(code, number) for answers, code, number in triples]

    def select(self, images: Sequence[int], chosen: ImageFilter | None, *, is_selected: bool) -> int:
        """Select or deselect some images, or all that pass a filter; return the number of selected images."""
        if chosen is None:
            source, values = f"IN ({', '.join('?' * len(images))})", list(images)
        else:
            source, values = self._images_in(chosen)
            source = f"IN (SELECT images.image {source})"
        cursor = self._cursor()
        with self._lock:
            if chosen is not None or images:
                self._num_changes += 1
                cursor.execute(f"UPDATE images SET selected = ? WHERE image {source}", [is_selected, *values])
            return int(cursor.execute("SELECT count(*) FROM images WHERE selected").fetchall()[0][0])

    def selected(self) -> Any:
        """Return the selected images as an Arrow table: `image`, `image_id` and `path`."""
        query = "SELECT image, image_id, path FROM images WHERE selected ORDER BY image"
        return self._cursor().sql(query).to_arrow_table()


_IMAGE_COLUMNS = (
    *("image", "image_id", "path", "width", "height", "error", "labels", "first", "second", "selected", "suspect"),
    *("false_1", "missed_1", "f1_1", "false_2", "missed_2", "f1_2"),
)


def _boxes_in(boxes: Sequence[Condition], images: Sequence[Condition]) -> tuple[str, list[Any]]:
    """Return the FROM and WHERE clause of the boxes that pass a filter, and the parameters."""
    conditions = list(boxes)
    if images:
        clause, values = where(images)
        conditions.append(Condition("images", f"image IN (SELECT image FROM images {clause})", tuple(values)))
    clause, values = where(conditions)
    return f"FROM boxes {clause}", values


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
