"""Names of what the index stores as small integers."""

SIDES = ("labels", "first", "second", "suspects")
"""Origins of boxes: labels, detections of the two runs, and labels that the evaluation doubts."""
SIZES = ("small", "medium", "large")
"""COCO's size classes: below 32², below 96², and larger areas in square pixels."""
SIZE_LIMITS = (32.0**2, 96.0**2)
OUTCOMES = ("unjudged", "correct", "false", "found", "missed", "ignored")
"""Of detections: correct or false; of labels: found or missed; of both: ignored, such as crowds."""
ERROR_KINDS = (
    "none",
    *("class", "location", "both", "duplicate", "background", "missed"),
    *("no_truth", "not_found", "other_class"),
)
"""Errors of detections and labels as in the `errors` table, then the kinds of suspects."""
SCORE_BINS = 20
