"""Compare paths of the same files on two machines after removing one common prefix from each side."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from raydet.tables.columns import Flags, Integers, numbers_of

_SAMPLED = 32


def paths_differ(truth_paths: pa.LargeStringArray, found_paths: pa.LargeStringArray) -> Flags:
    """Return a mask of the paths that differ after the most common prefixes are removed, bool [N]."""
    import pyarrow.compute as pc

    rows = sampled(np.arange(len(truth_paths)))
    prefixes = common_prefixes((truth_paths[row].as_py(), found_paths[row].as_py()) for row in rows)
    (in_truth, in_truth_starts), (in_found, in_found_starts) = (
        remove_prefix(paths, prefix)
        for paths, prefix in zip((truth_paths, found_paths), prefixes or ("", ""), strict=True)
    )
    is_same: Flags = in_truth_starts & in_found_starts & numbers_of(pc.equal(in_truth, in_found))
    return ~is_same


def sampled(rows: Integers) -> list[int]:
    """Return up to 32 of the rows, evenly spaced."""
    places = np.unique(np.linspace(0, max(len(rows) - 1, 0), _SAMPLED).astype(np.int64))
    chosen: list[int] = rows[places[: len(rows)]].tolist()
    return chosen


def common_prefixes(pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the most common pair of prefixes that precede the equal part of each pair of paths.

    If one pair of prefixes fits all images, every pair of paths yields it.

    Returns:
        The prefixes of the first and second paths; None if no pair shares a file name.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for pair in pairs:
        num_equal = num_equal_parts(*pair)
        if num_equal:
            first, second = ("".join(f"{part}/" for part in path.split("/")[:-num_equal]) for path in pair)
            counts[first, second] += 1
    return counts.most_common(1)[0][0] if counts else None


def num_equal_parts(first: str, second: str) -> int:
    """Return the number of equal path components, counted from the end."""
    count = 0
    for one, other in zip(reversed(first.split("/")), reversed(second.split("/")), strict=False):
        if one != other:
            break
        count += 1
    return count


def remove_prefix(paths: pa.LargeStringArray, prefix: str) -> tuple[pa.LargeStringArray, Flags]:
    """Return the paths with the prefix removed, and a mask of the non-empty paths that start with it, bool [N]."""
    import pyarrow.compute as pc

    starts_with_it = numbers_of(pc.starts_with(paths, prefix)) & (numbers_of(pc.binary_length(paths)) > 0)
    return pc.utf8_slice_codeunits(paths, start=len(prefix)), starts_with_it
