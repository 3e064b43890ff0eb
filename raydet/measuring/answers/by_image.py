"""Answers about detections → a column with one answer for each image, to slice metrics by."""

import numpy as np
import pyarrow as pa

from raydet.measuring.answers.columns import Answers, read_answers
from raydet.measuring.detections import Scored
from raydet.tables.columns import DetectionColumns, image_places


def answers_by_image(uri: str, scored: Scored) -> dict[str, pa.Array]:
    """Return the columns of a crops table by image: the answer about the best-scoring detection that has one.

    Returns:
        By name of the column, a text or number for each measured image, null for images without an answer, [I].

    Raises:
        UserError: As in `read_answers`.
    """
    image_ids = scored.found_ids[image_places(scored.columns)]
    found = read_answers([uri], image_ids, scored.columns.boxes_xywh)
    return {answers.name: _by_image(answers, scored.columns) for answers in found}


def _by_image(answers: Answers, detections: DetectionColumns) -> pa.Array:
    image = image_places(detections)
    known = np.flatnonzero(answers.codes >= 0)
    known = known[np.lexsort((-detections.scores[known], image[known]))]  # stable: among equal scores the earlier
    images, first = np.unique(image[known], return_index=True)
    best = np.full(len(detections.starts) - 1, -1)
    best[images] = known[first]
    if answers.are_numbers:
        assert answers.numbers is not None
        return pa.array(np.append(answers.numbers, np.nan)[best], from_pandas=True)
    codes = np.append(answers.codes, -1)[best]
    return pa.array(answers.values, pa.string()).take(pa.array(codes, mask=codes < 0))
