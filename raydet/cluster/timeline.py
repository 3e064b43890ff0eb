"""The timeline of a run: images that each stage finished, in a bounded number of time spans."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

MOST_SPANS = 240


class Timeline:
    """Image counts by stage and time span; too many spans are merged in pairs."""

    def __init__(self, started_unix_s: float) -> None:
        """Start with spans of one second.

        Args:
            started_unix_s: Start of the run, Unix time in seconds.
        """
        self._started_unix_s = started_unix_s
        self._span_s = 1.0
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


@dataclass(frozen=True)
class Window:
    """The part of a scoring run in which all processes are up and busy.

    Attributes:
        began_unix_s: Unix time at which the model had finished the first quarter of the images.
        ended_unix_s: Unix time shortly before it finished the last images.
        num_images: Images that each stage finished in between.
    """

    began_unix_s: float
    ended_unix_s: float
    num_images: Mapping[str, float]

    @property
    def images_per_s(self) -> float:
        """Images per second through the model."""
        return self.num_images["model"] / (self.ended_unix_s - self.began_unix_s)

    @classmethod
    def of(cls, timeline: Mapping[str, Any]) -> Self:
        """Find the window in the result of `Timeline.to_dict`; a run that is too short yields the complete run."""
        counts = {stage: np.array(values) for stage, values in timeline["images"].items()}
        scored = counts["model"]
        last = int(np.flatnonzero(scored)[-1])
        first = int(np.searchsorted(scored.cumsum(), scored.sum() / 4)) + 1
        if first >= last:
            first, last = int(np.flatnonzero(scored)[0]), last + 1
        began_unix_s = timeline["started_unix_s"] + first * timeline["span_s"]
        ended_unix_s = timeline["started_unix_s"] + last * timeline["span_s"]
        return cls(began_unix_s, ended_unix_s, {stage: float(one[first:last].sum()) for stage, one in counts.items()})
