"""Labels and detections → the outcome of every box at IoU 0.5, and the kind of every error."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydet.browsing.codes import ERROR_KINDS, OUTCOMES
from raydet.common.threads import available_cpus
from raydet.measuring.diagnosis.errors import ERRORS, find_errors, gather
from raydet.measuring.diagnosis.scores import IOU
from raydet.measuring.numbers.matches import Protocol
from raydet.measuring.numbers.matching import match
from raydet.tables.columns import (
    DetectionColumns,
    Integers,
    TruthColumns,
    keep_detections,
    take_detections,
    take_truth,
)

_BOXES_PER_PART = 200_000
Codes = npt.NDArray[np.int8]
_UNJUDGED, _CORRECT, _FALSE, _FOUND, _MISSED, _IGNORED = range(len(OUTCOMES))
_FIRST_ERROR, _MISSED_ERROR = ERROR_KINDS.index(ERRORS[0]), ERROR_KINDS.index("missed")


@dataclass(frozen=True, kw_only=True)
class BoxOutcomes:
    """Codes of the boxes of both sides: indices in `OUTCOMES` and `ERROR_KINDS`.

    Attributes:
        detection: int8 [D]; detections below the threshold are not judged.
        detection_error: int8 [D].
        truth: int8 [G].
        truth_error: int8 [G].
    """

    detection: Codes
    detection_error: Codes
    truth: Codes
    truth_error: Codes


def judge_boxes(
    truth: TruthColumns,
    detections: DetectionColumns,
    num_categories: int,
    *,
    threshold: float,
    class_agnostic: bool = False,
) -> BoxOutcomes:
    """Match the detections that score at least `threshold` with the labels, in parallel for ranges of images.

    The images are in ascending id order. The kinds of errors are those of the report (`find_errors`).
    """
    if class_agnostic:
        num_categories = 1
    outcomes = BoxOutcomes(
        detection=np.zeros(len(detections.scores), np.int8),
        detection_error=np.zeros(len(detections.scores), np.int8),
        truth=np.zeros(len(truth.category), np.int8),
        truth_error=np.zeros(len(truth.category), np.int8),
    )
    protocol = Protocol(iou_thresholds=(IOU,), class_agnostic=class_agnostic)

    def judge_part(first: int, last: int) -> None:
        images = np.arange(first, last)
        of_truth, of_found = (slice(int(side.starts[first]), int(side.starts[last])) for side in (truth, detections))
        part = _judge_part(
            take_truth(truth, images), take_detections(detections, images), num_categories, threshold, protocol
        )
        outcomes.detection[of_found], outcomes.detection_error[of_found] = part.detection, part.detection_error
        outcomes.truth[of_truth], outcomes.truth_error[of_truth] = part.truth, part.truth_error

    work = truth.starts + detections.starts
    num_images = len(truth.image_ids)
    num_parts = -(-int(work[-1]) // _BOXES_PER_PART)
    cuts = np.searchsorted(work, np.linspace(0, int(work[-1]), num_parts + 1)[1:-1])
    bounds = np.unique([0, *cuts.tolist(), num_images]).tolist()
    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(judge_part, bounds[:-1], bounds[1:]))
    return outcomes


def _judge_part(
    truth: TruthColumns, detections: DetectionColumns, num_categories: int, threshold: float, protocol: Protocol
) -> BoxOutcomes:
    kept, rows = _at_least(detections, threshold)
    evidence = gather(truth, kept, match(truth, kept, num_categories, protocol))
    outcomes = evidence.outcomes
    errors = find_errors(outcomes, evidence.overlaps)
    detection, detection_error = (np.zeros(len(detections.scores), np.int8) for _ in range(2))
    detection[rows] = _IGNORED
    counted = rows[outcomes.detection_row]
    detection[counted] = np.where(outcomes.is_right, _CORRECT, _FALSE)
    detection_error[counted] = np.where(errors.kind >= 0, errors.kind + _FIRST_ERROR, 0)
    truth_outcome, truth_error = np.full(len(truth.category), _IGNORED, np.int8), np.zeros(len(truth.category), np.int8)
    truth_outcome[outcomes.truth_row] = np.where(outcomes.is_found, _FOUND, _MISSED)
    truth_error[outcomes.truth_row] = np.where(errors.is_missed, _MISSED_ERROR, 0)
    return BoxOutcomes(
        detection=detection, detection_error=detection_error, truth=truth_outcome, truth_error=truth_error
    )


def _at_least(detections: DetectionColumns, threshold: float) -> tuple[DetectionColumns, Integers]:
    """Return the detections at or above a score, and their rows."""
    is_kept = detections.scores >= threshold
    return keep_detections(detections, is_kept), np.flatnonzero(is_kept)
