"""Rows for annotation tools: an images table with labels, or a detections table with boxes to correct."""

import numpy as np

from raydet.common.errors import UserError
from raydet.exports.label_files import LabelRows
from raydet.tables import storage
from raydet.tables.table import Table, open_table


def open_for_tool(uri: str, score_threshold: float) -> Table:
    """Open an images or detections table.

    Raises:
        UserError: There is no such table, or it has no scores but `score_threshold` is set.
    """
    uri = storage.absolute_uri(uri)
    table = open_table(uri, ("images", "detections"))
    if table.kind == "images" and score_threshold > 0:
        raise UserError(f"{uri} is an images table, which has no scores; omit --score-threshold")
    return table


class ToolNotes:
    """Score filter that counts the items an export omits."""

    def __init__(self, score_threshold: float) -> None:
        self._score_threshold = score_threshold
        self._num_low = self._num_unreadable = 0

    def keep(self, rows: LabelRows) -> LabelRows:
        """Return the rows with the boxes above the threshold, or all boxes if it is 0."""
        is_low = (rows.scores <= self._score_threshold) & (self._score_threshold > 0)
        self._num_low += int(is_low.sum())
        self._num_unreadable += int(rows.errors.sum())
        return rows.keep(np.logical_not(is_low))

    def counts(self) -> dict[str, int]:
        """Return the number of omitted items by description."""
        return {
            "detections at or below the threshold omitted": self._num_low,
            "unreadable images omitted": self._num_unreadable,
        }
