"""Opened sources → a DuckDB database in memory: one row an image, one row a box."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydet.browsing.codes import ERROR_KINDS, OUTCOMES, SIDES, SIZE_LIMITS
from raydet.browsing.outcomes import judge_boxes
from raydet.browsing.sources import ShownRun, Sources
from raydet.common.class_names import indices_in
from raydet.common.errors import UserError
from raydet.measuring.answers.columns import Answers
from raydet.measuring.slices import slices_of
from raydet.tables.columns import Floats, Integers, places_in

_LABELS, _FIRST, _SECOND, _SUSPECTS = range(len(SIDES))
_PROPERTIES = ("crowding", "image_size")
_MAX_SLICES = 40
_MOST_PIXELS = 1e9
_LONGEST_NAME = 200
_Column = npt.NDArray[Any]


@dataclass(frozen=True)
class Group:
    """A way to divide the images: a column of the images table, or a property of the images.

    Attributes:
        name: Column or property.
        values: Names of its values.
        codes: Value of each image, int8 [I], -1 for none; in the database, the column `slice_N` of group N.
    """

    name: str
    values: tuple[str, ...]
    codes: npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class Index:
    """The database, and the names of what it holds as numbers.

    Table `images`, ordered by `image`, from 0: `image_id`, `path`, `width`, `height`, `error`, the number of boxes
    `labels`, `first` and `second`; for run 1 and 2, if judged, `false_N`, `missed_N` and `f1_N`; `suspect`, the rank of
    its first suspect; `slice_N`, value of the group N; `selected`. Table `boxes`: `number` from 0, `image`, `side`,
    `category`, `score`, `size`, `outcome`, `second_outcome` (of labels), `error`, `detected` (class of the detection
    that contradicts a suspect), `x`, `y`, `w`, `h` in pixels, and, of the column N of answers, `answer_N`, null without
    an answer, and `number_N`. Table `answers`, their values: `question` (N), `code` and `value`.

    Attributes:
        database: Connection; each thread uses a cursor of its own.
        names: Class names.
        sides: Indices in `SIDES` of the kinds of boxes that there are.
        groups: Ways to divide the images.
        answers: Columns of answers about the detections.
        num_images: Number of images.
        num_boxes: Number of boxes.
    """

    database: duckdb.DuckDBPyConnection
    names: tuple[str, ...]
    sides: tuple[int, ...]
    groups: tuple[Group, ...]
    answers: tuple[Answers, ...]
    num_images: int
    num_boxes: int


def build_index(sources: Sources) -> Index:
    """Judge the boxes and load everything but the pictures into a database, which can reach no file afterwards."""
    truth, num_images = sources.truth, len(sources.images.image_ids)
    of_images: dict[str, Any] = {
        "image": np.arange(num_images, dtype=np.int32),
        "image_id": sources.images.image_ids,
        "path": pa.nulls(num_images, pa.large_string()) if sources.images.paths is None else sources.images.paths,
        "width": sources.images.sizes_hw[:, 1].astype(np.int32),
        "height": sources.images.sizes_hw[:, 0].astype(np.int32),
        "labels": np.diff(truth.starts).astype(np.int32),
        "selected": np.zeros(num_images, np.bool_),
    }
    label_rows = np.repeat(np.arange(num_images), np.diff(truth.starts))
    labels = _boxes(_LABELS, label_rows, truth.category, truth.boxes_xywh, area=truth.area)
    labels["outcome"][truth.iscrowd] = OUTCOMES.index("ignored") if sources.runs else 0
    parts = [labels]
    errors: dict[int, str] = {}
    for number, run in enumerate(sources.runs):
        parts.append(_of_run(number, run, sources, labels, of_images))
        errors |= run.scored.errors
    of_images["error"] = _texts_of(errors, sources.images.image_ids)
    if sources.runs and sources.runs[0].suspects is not None:
        parts.append(_suspects(sources, sources.runs[0].suspects, of_images))
    groups = _groups(sources)
    for number, group in enumerate(groups):
        of_images[f"slice_{number}"] = group.codes
    whole = {name: np.concatenate([part[name] for part in parts]) for name in labels}
    whole["number"] = np.arange(len(whole["image"]), dtype=np.int32)
    whole["score"] = pa.array(whole["score"], from_pandas=True)
    whole |= _answer_columns(sources.answers, len(labels["image"]), len(whole["image"]))
    return Index(
        database=_database(images=pa.table(of_images), boxes=pa.table(whole), answers=_values_of(sources.answers)),
        names=tuple(category.name for category in sources.categories),
        sides=tuple(side for side in range(len(SIDES)) if _is_there(side, sources)),
        groups=tuple(groups),
        answers=sources.answers,
        num_images=num_images,
        num_boxes=len(whole["image"]),
    )


def _texts_of(errors: dict[int, str], image_ids: Integers) -> pa.Array:
    """Return the error of each image, null for most."""
    if not errors:
        return pa.nulls(len(image_ids), pa.string())
    known = pa.array(list(errors), pa.int64())
    return pa.array(list(errors.values()), pa.string()).take(pc.index_in(pa.array(image_ids), value_set=known))


def _is_there(side: int, sources: Sources) -> bool:
    runs = sources.runs
    has_suspects = bool(runs) and runs[0].suspects is not None
    return (sources.has_labels, len(runs) > 0, len(runs) > 1, has_suspects)[side]


def _database(**tables: pa.Table) -> duckdb.DuckDBPyConnection:
    settings: dict[str, Any] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "temp_directory": "",
    }
    database = duckdb.connect(":memory:", config=settings)
    for name, rows in tables.items():
        database.register("incoming", rows)
        database.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")  # names of this module
        database.unregister("incoming")
    database.execute("SET python_enable_replacements = false")
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")
    return database


def _boxes(side: int, image: Integers, category: Integers, boxes_xywh: Floats, **more: Any) -> dict[str, _Column]:
    """Return columns of the table `boxes`; `more` are `area`, if it is not that of the box, and known columns."""
    count = len(image)
    drawn = np.clip(boxes_xywh, -_MOST_PIXELS, _MOST_PIXELS)  # a table may hold any finite number
    area = more.pop("area", drawn[:, 2] * drawn[:, 3])
    columns: dict[str, _Column] = {
        "image": image.astype(np.int32),
        "side": np.full(count, side, np.int8),
        "category": category.astype(np.int32),
        "score": np.full(count, np.nan),
        "size": np.searchsorted(SIZE_LIMITS, area, side="right").astype(np.int8),
        "outcome": np.zeros(count, np.int8),
        "second_outcome": np.zeros(count, np.int8),
        "error": np.zeros(count, np.int8),
        "detected": np.full(count, -1, np.int32),
    }
    columns |= {name: drawn[:, place].astype(np.float32) for place, name in enumerate("xywh")}
    return columns | more


def _of_run(
    number: int, run: ShownRun, sources: Sources, labels: dict[str, _Column], of_images: dict[str, Any]
) -> dict[str, _Column]:
    """Return the boxes of a run; add the outcomes of the labels to `labels`, and counts to `of_images`."""
    scored, num_images = run.scored, len(sources.images.image_ids)
    found = scored.columns
    image = np.repeat(scored.truth_rows, np.diff(found.starts))
    boxes = _boxes(_FIRST + number, image, found.category, found.boxes_xywh, score=found.scores)
    of_images[SIDES[_FIRST + number]] = np.bincount(image, minlength=num_images).astype(np.int32)
    if run.threshold is None:
        return boxes
    judged = judge_boxes(
        scored.truth_columns,
        found,
        len(sources.categories),
        threshold=run.threshold,
        class_agnostic=run.class_agnostic,
    )
    boxes["outcome"], boxes["error"] = judged.detection, judged.detection_error
    is_measured = np.zeros(num_images, np.bool_)
    is_measured[scored.truth_rows] = True
    own = np.flatnonzero(is_measured[labels["image"]])
    labels["second_outcome" if number else "outcome"][own] = judged.truth
    if not number:
        labels["error"][own] = judged.truth_error

    def count(image: _Column, codes: _Column, outcome: str) -> Integers:
        return np.bincount(image[codes == OUTCOMES.index(outcome)], minlength=num_images)

    correct, false = (count(image, judged.detection, outcome) for outcome in ("correct", "false"))
    missed = count(labels["image"][own], judged.truth, "missed")
    total = 2 * correct + false + missed
    of_images[f"false_{number + 1}"] = false.astype(np.int32)
    of_images[f"missed_{number + 1}"] = missed.astype(np.int32)
    of_images[f"f1_{number + 1}"] = pa.array(2 * correct / np.maximum(total, 1), mask=(total == 0) | ~is_measured)
    return boxes


def _suspects(sources: Sources, rows: pa.Table, of_images: dict[str, Any]) -> dict[str, _Column]:
    """Return the suspects as boxes, most probable first; those of unknown images, or without a box, are left out."""
    names = [category.name for category in sources.categories]
    rows = rows.filter(pc.is_valid(rows["bbox"]))
    places, is_known = places_in(sources.images.image_ids, rows["image_id"].to_numpy())
    rows, image = rows.filter(pa.array(is_known)), places[is_known]
    labelled, detected = (
        indices_in([one or "" for one in rows[name].to_pylist()], names) for name in ("category", "detected")
    )
    kinds = {name: index for index, name in enumerate(ERROR_KINDS)}
    error = np.array([kinds.get(kind, 0) for kind in rows["kind"].to_pylist()], np.int8)
    boxes_xywh = np.array(rows["bbox"].to_pylist(), np.float64).reshape(-1, 4)
    rank = np.full(len(of_images["image"]), -1, np.int32)
    rank[image[::-1]] = np.arange(len(image), dtype=np.int32)[::-1]
    of_images["suspect"] = pa.array(rank, mask=rank < 0)
    score = rows["score"].to_numpy()
    return _boxes(_SUSPECTS, image, labelled, boxes_xywh, error=error, score=score, detected=detected.astype(np.int32))


def _answer_columns(columns: Sequence[Answers], num_before: int, num_boxes: int) -> dict[str, pa.Array]:
    """Return columns of the table `boxes`; the boxes with answers are consecutive."""
    found = {}
    for number, answers in enumerate(columns):
        codes, numbers = np.full(num_boxes, -1, np.int32), np.full(num_boxes, np.nan)
        own = slice(num_before, num_before + len(answers.codes))
        codes[own] = answers.codes
        found[f"answer_{number}"] = pa.array(codes, mask=codes < 0)
        if answers.numbers is not None:
            numbers[own] = answers.numbers
        found[f"number_{number}"] = pa.array(numbers, from_pandas=True)
    return found


def _values_of(columns: Sequence[Answers]) -> pa.Table:
    lengths = [len(answers.values) for answers in columns]
    return pa.table(
        {
            "question": pa.array(np.repeat(np.arange(len(lengths)), lengths), pa.int32()),
            "code": pa.array([code for length in lengths for code in range(length)], pa.int32()),
            "value": pa.array([value for answers in columns for value in answers.values], pa.string()),
        }
    )


def _groups(sources: Sources) -> list[Group]:
    """Return the ways to divide the images; columns without a few values are left out."""
    sizes_hw, truth = sources.images.sizes_hw, sources.truth
    names = [*(_PROPERTIES if sources.has_labels else _PROPERTIES[1:]), *sources.columns]
    found = []
    for name in names[:_MAX_SLICES]:
        try:
            parts = slices_of(name, truth, columns=sources.columns, sizes_hw=sizes_hw)
        except UserError:
            continue
        codes = np.full(len(truth.image_ids), -1, np.int8)
        for value, part in enumerate(parts):
            codes[part.images] = value
        if len(parts) > 1:
            values = (part.name[len(name) + 1 :][:_LONGEST_NAME] for part in parts)
            found.append(Group(name[:_LONGEST_NAME], tuple(values), codes))
    return found
