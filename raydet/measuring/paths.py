"""Paths of the same files on two machines: what stands before the part that both have in common."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from raydet.tables.columns import Flags, Integers, numbers_of

_SAMPLED = 32


def differ(truth_paths: pa.LargeStringArray, found_paths: pa.LargeStringArray) -> Flags:
    """Paths that differ once the prefixes that most images suggest are taken off, bool [N]."""
    import pyarrow.compute as pc

    rows = sampled(np.arange(len(truth_paths)))
    prefixes = common_prefixes((truth_paths[row].as_py(), found_paths[row].as_py()) for row in rows)
    (in_truth, begins), (in_found, begins_too) = (
        behind_prefix(paths, prefix)
        for paths, prefix in zip((truth_paths, found_paths), prefixes or ("", ""), strict=True)
    )
    is_same: Flags = begins & begins_too & numbers_of(pc.equal(in_truth, in_found))
    return ~is_same


def sampled(rows: Integers) -> list[int]:
    """Some of the rows, at equal distances."""
    places = np.unique(np.linspace(0, max(len(rows) - 1, 0), _SAMPLED).astype(np.int64))
    chosen: list[int] = rows[places[: len(rows)]].tolist()
    return chosen


def common_prefixes(pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """What most pairs of paths have before the part that is equal in both; None where no pair has the same file name.

    If any pair of prefixes fits all images, each of these shows it.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for pair in pairs:
        num_equal = num_equal_parts(*pair)
        if num_equal:
            first, second = ("".join(f"{part}/" for part in path.split("/")[:-num_equal]) for path in pair)
            counts[first, second] += 1
    return counts.most_common(1)[0][0] if counts else None


def num_equal_parts(first: str, second: str) -> int:
    """How many parts between slashes, counted from the end, are equal."""
    count = 0
    for one, other in zip(reversed(first.split("/")), reversed(second.split("/")), strict=False):
        if one != other:
            break
        count += 1
    return count


def behind_prefix(paths: pa.LargeStringArray, prefix: str) -> tuple[pa.LargeStringArray, Flags]:
    """The paths behind a prefix, and which paths are known and begin with it, bool [N]."""
    import pyarrow.compute as pc

    begins = numbers_of(pc.starts_with(paths, prefix)) & (numbers_of(pc.binary_length(paths)) > 0)
    return pc.utf8_slice_codeunits(paths, start=len(prefix)), begins
