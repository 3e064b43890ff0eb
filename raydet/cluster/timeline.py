"""The timeline of a run: images that each stage finished, in a bounded number of time spans."""

from collections.abc import Mapping
from typing import Any

import numpy as np

MOST_SPANS = 240


class Timeline:
    """Image counts by stage and time span; too many spans are merged in pairs."""

    def __init__(self, started_unix_s: float) -> None:
        """Start with spans of an eighth of a second at a Unix time in seconds."""
        self._started_unix_s = started_unix_s
        self._span_s = 0.125
        self._counts: dict[str, list[float]] = {}

    def add(self, stage: str, unix_s: float, num_images: float) -> None:
        """Add images that a stage finished at the given Unix time."""
        # The clocks of machines differ slightly.
        after_s = max(unix_s - self._started_unix_s, 0.0)
        while after_s >= MOST_SPANS * self._span_s:
            self._span_s *= 2
            self._counts = {
                name: [sum(counts[at : at + 2]) for at in range(0, len(counts), 2)]
                for name, counts in self._counts.items()
            }
        counts = self._counts.setdefault(stage, [])
        span = int(after_s / self._span_s)
        counts.extend([0.0] * (span + 1 - len(counts)))
        counts[span] += num_images

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the start of the run, the length of a span in seconds, and images by stage and span."""
        length = max(map(len, self._counts.values()), default=0)
        images = {
            stage: [round(count, 1) for count in counts] + [0.0] * (length - len(counts))
            for stage, counts in self._counts.items()
        }
        return {"started_unix_s": self._started_unix_s, "span_s": self._span_s, "images": images}


def steady_rate(timeline: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the images per second while all processes are up and busy, and the seconds over which they were measured.

    The measured time runs from the moment at which the model had finished the first quarter of the images to that at
    which it had finished nine tenths. Both are ends of blocks, so that blocks of many images do not distort the rate.
    None if the run was too short; `timeline` is the result of `Timeline.to_dict`.
    """
    finished = np.cumsum(timeline["images"].get("model", ()))
    if not len(finished):
        return None
    first, last = (int(np.searchsorted(finished, share * finished[-1])) for share in (0.25, 0.9))
    seconds = (last - first) * timeline["span_s"]
    return (float(finished[last] - finished[first]) / seconds, seconds) if seconds else None
