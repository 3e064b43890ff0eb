"""Boxes of teachers, which go through the augmentation together with the labels of their image."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.augmentation.samples import Sample, area_of, chosen
from raydet.common.boxes import as_boxes, xywh_to_normalised_cxcywh

TEACHER = "teacher"
"""Key of a row with the boxes of teachers: a mapping with the fields of `TEACHER_TYPE` of the stream, or None."""
_MOST_BOXES = 1_000_000
_LARGEST_ID = -(2**62)
"""Ids of teachers' boxes descend from here; those of labels are larger."""


@dataclass(frozen=True)
class Taught:
    """Findings of teachers in an image.

    Attributes:
        boxes_cxcywh: Boxes normalised to the image, float32 [T, 4].
        class_scores: Scores of all classes, float16 [T, C]; 0 for a class that the teacher does not know.
        owners: Number of the teacher that found each box, int64 [T].
        weights: Weight of each teacher, float32 [K]; 0 if it has not scored the image, and then it has no boxes.
        known: The classes that each teacher knows, bool [K, C].
    """

    boxes_cxcywh: npt.NDArray[np.float32]
    class_scores: npt.NDArray[np.float16]
    owners: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    known: npt.NDArray[np.bool_]


def with_teacher(sample: Sample, row: Mapping[str, Any], part: int) -> Sample:
    """Append the teachers' boxes to those of a sample, before it is resized and augmented.

    Args:
        sample: The full-size image with its labels.
        row: Its row, perhaps with teachers.
        part: Number of the image among those that are mixed.

    Returns:
        A sample whose further boxes have ids from which `without_teacher` finds their vectors.
    """
    teacher = row.get(TEACHER)
    if teacher is None or not len(teacher["bbox"]):
        return sample
    boxes_xywh = as_boxes(teacher["bbox"])
    num_boxes = len(boxes_xywh)
    assert num_boxes <= _MOST_BOXES, f"an image has at most {_MOST_BOXES:,} boxes of teachers, got {num_boxes:,}"
    ids = _LARGEST_ID - part * _MOST_BOXES - np.arange(num_boxes)
    return replace(
        sample,
        boxes_xywh=np.concatenate([sample.boxes_xywh, boxes_xywh]),
        categories=np.concatenate([sample.categories, np.zeros(num_boxes, np.int64)]),
        areas=np.concatenate([sample.areas, area_of(boxes_xywh)]),
        iscrowd=np.concatenate([sample.iscrowd, np.zeros(num_boxes, np.bool_)]),
        ids=np.concatenate([sample.ids, ids]),
    )


def without_teacher(sample: Sample, rows: Mapping[int, Mapping[str, Any]]) -> tuple[Sample, Taught | None]:
    """Separate the teachers' boxes from the labels, after the augmentation.

    Args:
        sample: The augmented image.
        rows: The rows of the images in it by their `part`.

    Returns:
        The sample with its labels, and what is left of the teachers' boxes. A teacher counts only if it has scored all
        images that are mixed; None without any.
    """
    is_label = is_labels(sample)
    labels = sample if is_label.all() else chosen(sample, is_label)
    teachers = {part: row[TEACHER] for part, row in rows.items() if row.get(TEACHER) is not None}
    if len(teachers) < len(rows):
        return labels, None
    weights = np.min([np.asarray(teacher["weights"], np.float32) for teacher in teachers.values()], axis=0)
    if not weights.any():
        return labels, None
    known = np.asarray(rows[0][TEACHER]["known"], np.bool_).reshape(len(weights), -1)
    num_classes = known.shape[1]
    part, number = np.divmod(_LARGEST_ID - sample.ids[~is_label], _MOST_BOXES)
    vectors, owners = [], []
    for one, place in zip(part.tolist(), number.tolist(), strict=True):
        teacher = teachers[one]
        vectors.append(teacher["class_scores"][place * num_classes : (place + 1) * num_classes])
        owners.append(int(teacher["owner"][place]))
    boxes_cxcywh = xywh_to_normalised_cxcywh(sample.boxes_xywh[~is_label], sample.size_hw).astype(np.float32)
    found_by = np.asarray(owners, np.int64)
    is_kept = weights[found_by] > 0
    scores = np.array(vectors, np.float16).reshape(len(vectors), num_classes)
    return labels, Taught(boxes_cxcywh[is_kept], scores[is_kept], found_by[is_kept], weights, known)


def is_labels(sample: Sample) -> npt.NDArray[np.bool_]:
    """Return a mask of the boxes that are labels and not a teacher's, bool [N]."""
    return sample.ids > _LARGEST_ID
