"""Crops tables → the answers about given detections.

An answer depends on nothing but the pixels of a crop, so a detection has the answer of the crop with its box: also in
the table that `crops --relabel` writes, and where detections of some classes or low scores are left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.boxes import Boxes, as_boxes
from raydet.common.errors import UserError, shortened
from raydet.measuring.slices import EMPTY, groups_in
from raydet.tables.columns import BATCH_ROWS, Floats, Integers, image_ids_in, numbers_of
from raydet.tables.schema import parse_metadata
from raydet.tables.table import Table, open_table

Codes = npt.NDArray[np.int32]
_NAMES = re.compile(r"label|caption|answer_[1-9][0-9]*|depth")
_SCORES = {"label": "label_score"}
_LONGEST_TEXT = 200


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One column of answers, for D detections.

    Attributes:
        name: Column of the crops table, such as `label` or `answer_1`.
        title: Question that was asked, or the name.
        values: Distinct answers, ascending; for a column of numbers, ranges of them.
        codes: Index in `values` of each detection's answer, -1 without one, int32 [D].
        numbers: Score of the label, or the number that lies in the range, NaN without one, float64 [D]; None for texts.
    """

    name: str
    title: str
    values: tuple[str, ...]
    codes: Codes
    numbers: Floats | None = None

    @property
    def are_numbers(self) -> bool:
        """True if the answers are numbers."""
        return self.name == "depth"

    def text(self, code: int, number: float | None) -> str | None:
        """Return an answer for readers; None without one.

        With its number, a label is followed by its score, and a range is replaced by the number.
        """
        if code < 0:
            return None
        if self.are_numbers and number is not None:
            return f"{number:.3g}"
        value = shortened(self.values[code], _LONGEST_TEXT) or EMPTY
        return value if number is None else f"{value} {number:.2f}"

    def text_of(self, row: int) -> str | None:
        """Return the answer about a detection for readers; see `text`."""
        return self.text(int(self.codes[row]), None if self.numbers is None else float(self.numbers[row]))


def read_answers(uris: Sequence[str], image_ids: Integers, boxes_xywh: Boxes) -> list[Answers]:
    """Read the answers about detections from crops tables; a column of two tables is two columns of answers.

    Args:
        uris: Crops tables.
        image_ids: Image of each detection, in the numbering of its detections table, int64 [D].
        boxes_xywh: Absolute pixels, float64 [D, 4].

    Raises:
        UserError: A table is missing, damaged or of another kind, has no answers in words or numbers, or is about none
            of the detections.
    """
    found = [answers for uri in uris for answers in _answers_in(open_table(uri, "crops"), image_ids, boxes_xywh)]
    titles = [answers.title for answers in found]
    return [
        replace(answers, title=f"{answers.title} ({place})") if titles.count(answers.title) > 1 else answers
        for place, answers in enumerate(found, start=1)
    ]


def _answers_in(table: Table, image_ids: Integers, boxes_xywh: Boxes) -> list[Answers]:
    names = [name for name in table.schema.names if _NAMES.fullmatch(name)]
    content = parse_metadata(table.schema, kind="crops", where=table.uri)
    if not names:
        raise UserError(
            f"{table.uri} has no answers in words or numbers: it was written with --task {content.get('task')}"
        )
    scores = [_SCORES[name] for name in names if name in _SCORES]
    rows = _read(table, [*names, *scores])
    known_xywh = as_boxes(numbers_of(rows.column("bbox").flatten()))
    place = _place_of_each(image_ids, boxes_xywh, image_ids_in(rows), known_xywh)
    if rows.num_rows and len(place) and (place < 0).all():
        raise UserError(f"{table.uri} is about none of these detections; set --crops to a table of crops of them")
    asked = content.get("ask")
    questions = asked if isinstance(asked, list) else []
    found = []
    for name in names:
        number = int(name.rpartition("_")[2]) if name.startswith("answer_") else 0
        title = str(questions[number - 1]) if 0 < number <= len(questions) else name
        found.append(_column(rows, name, title, place))
    return found


def _read(table: Table, names: Sequence[str]) -> pa.RecordBatch:
    """Read columns of a crops table as one batch.

    Raises:
        UserError: A column of answers does not have the type that `crops` writes.
    """
    for name in names:
        wanted = pa.float64() if name in ("depth", *_SCORES.values()) else pa.string()
        types = [field.type for field in table.schema if field.name == name]
        if types != [wanted]:
            raise UserError(f"{table.uri} is damaged: it must have one column {name} of type {wanted}")
    columns = ["image_id", "bbox", *names]
    schema = pa.schema([table.schema.field(name) for name in columns])
    whole = pa.Table.from_batches([batch.cast(schema) for batch in table.iter_batches(columns, BATCH_ROWS)], schema)
    arrays = [whole.column(name).combine_chunks() for name in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _column(rows: pa.RecordBatch, name: str, title: str, place: Integers) -> Answers:
    """Return a column of answers about detections; `place` is the row of each detection's crop, -1 for none."""
    column = rows.column(name)
    numbers: Floats | None
    if name == "depth":
        groups, values = groups_in(name, {name: column})
        codes, numbers = np.where(groups == len(values) - 1, -1, groups), _floats(column)
        values = values[:-1]
    else:
        texts = pc.unique(column).drop_null()
        texts = texts.take(pc.sort_indices(texts))
        codes = numbers_of(pc.fill_null(pc.index_in(column, value_set=texts), -1))
        values, numbers = texts.to_pylist(), _floats(rows.column(_SCORES[name])) if name in _SCORES else None
    return Answers(
        name=name,
        title=shortened(title, _LONGEST_TEXT),
        values=tuple(values),
        codes=_taken(codes, place, -1).astype(np.int32),
        numbers=None if numbers is None else _taken(numbers, place, np.nan),
    )


def _floats(column: pa.Array) -> Floats:
    return np.where(numbers_of(column.is_valid()), numbers_of(column), np.nan)


def _taken(values: npt.NDArray[Any], place: Integers, without: float) -> npt.NDArray[Any]:
    return np.append(values, values.dtype.type(without))[place]  # -1 is the last one


def _place_of_each(image_ids: Integers, boxes_xywh: Boxes, known_ids: Integers, known_xywh: Boxes) -> Integers:
    """Return the first row of known boxes with the same image and the same box, -1 for none, int64 [D]."""
    num_known = len(known_ids)
    ids, boxes = np.concatenate([known_ids, image_ids]), np.concatenate([known_xywh, boxes_xywh])
    order = np.lexsort((*boxes.T, ids))  # stable: of equal ones, the known box comes first
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (np.diff(ids[order]) != 0) | (np.diff(boxes[order], axis=0) != 0).any(axis=1)
    first = order[np.flatnonzero(is_new)][np.cumsum(is_new) - 1]
    place = np.empty(len(order), np.int64)
    place[order] = np.where(first < num_known, first, -1)
    return place[num_known:]
