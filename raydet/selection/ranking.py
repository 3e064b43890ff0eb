"""Scores of images by several criteria → the images with the highest mean rank, in constant memory."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from raydet.tables.columns import Flags, Floats, Integers

_NUM_CODES = int(np.array(1, np.float16).view(np.uint16)) + 1
"""Half-precision numbers from 0 to 1; read as integers, they have the same order."""
_NO_CANDIDATE = 2**16 - 1
_ROWS_AT_ONCE = 65_536
_GOLDEN = (5**0.5 - 1) / 2

Codes = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Ranked:
    """Images, the best first.

    Attributes:
        rows: Their rows in the table, int64 [N].
        ranks: Share of the candidates below them by each criterion, 0 … 1, float64 [N, K].
        scores: [N, K].
    """

    rows: Integers
    ranks: Floats
    scores: Floats

    @property
    def mean_ranks(self) -> Floats:
        """Mean over the criteria, [N]."""
        return np.asarray(self.ranks.mean(axis=1))

    def best(self, num: int) -> "Ranked":
        """Return the best images, sorted. Equal ones are spread evenly over the table, instead of its first ones."""
        return self.take(np.lexsort((self.rows * _GOLDEN % 1, -self.mean_ranks))[:num])

    def take(self, places: Integers) -> "Ranked":
        """Return the images in some places."""
        return Ranked(self.rows[places], self.ranks[places], self.scores[places])

    def followed_by(self, other: "Ranked") -> "Ranked":
        """Return the images of both."""
        return Ranked(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.ranks, other.ranks]),
            np.concatenate([self.scores, other.scores]),
        )


class ImageScores:
    """Scores of a table's images by `num_criteria` criteria, at least one, in half precision in a temporary file.

    Attributes:
        num_candidates: Images that may be chosen.
    """

    def __init__(self, num_criteria: int) -> None:
        self._num_criteria = num_criteria
        self._file = tempfile.TemporaryFile(prefix="raydet-")  # noqa: SIM115
        self._counts = np.zeros((num_criteria, _NUM_CODES), np.int64)
        self.num_candidates = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, scores: Floats, is_candidate: Flags) -> None:
        """Add the scores of the next images, 0 … 1, [N, K]."""
        codes: Codes = scores.astype(np.float16).view(np.uint16)
        codes[~is_candidate] = _NO_CANDIDATE
        self._file.write(codes.tobytes())
        for counts, own in zip(self._counts, codes[is_candidate].T, strict=True):
            counts += np.bincount(own, minlength=_NUM_CODES)
        self.num_candidates += int(is_candidate.sum())

    def best(self, num: int) -> Ranked:
        """Return the `num` candidates with the highest mean rank, the best first.

        The rank of a score is the share of the candidates with lower ones, and half of those with the same.
        """
        below = self._counts.cumsum(axis=1) - self._counts
        ranks = (below + self._counts / 2) / max(1, self.num_candidates)
        nothing = np.zeros((0, self._num_criteria))
        best = Ranked(np.zeros(0, np.int64), nothing, nothing)
        for start, codes in self._blocks():
            rows = np.flatnonzero(codes[:, 0] != _NO_CANDIDATE)
            own = codes[rows]
            columns = [ranks[place, column] for place, column in enumerate(own.T)]
            found = Ranked(start + rows, np.stack(columns, axis=1), own.view(np.float16).astype(np.float64))
            best = best.followed_by(found).best(num)
        return best

    def _blocks(self) -> Iterator[tuple[int, Codes]]:
        """Yield the scores of consecutive images, each block with its first row."""
        self._file.seek(0)
        start = 0
        while data := self._file.read(_ROWS_AT_ONCE * self._num_criteria * 2):
            codes = np.frombuffer(data, np.uint16).reshape(-1, self._num_criteria)
            yield start, codes
            start += len(codes)
