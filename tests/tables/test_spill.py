"""Lists on disk."""

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raydet.common.errors import RunError
from raydet.preparation.sources.source import Finding
from raydet.tables import spill
from raydet.tables.spill import Spilled

KILOBYTE = "x" * 1000


def bytes_on_disk() -> int:
    """Return the total size of this process's open, unlinked files."""
    sizes = [0]
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()).endswith(" (deleted)"):
                sizes.append(link.stat().st_size)
        except OSError:  # the descriptor of the listing itself
            continue
    return sum(sizes)


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_was_written_is_found_in_order_and_at_its_place() -> None:
    items = [Finding("a", "b.jpg", 2**53, count=3), Finding("ä", None, detail="x\0"), Finding("c", annotation_id=-1)]
    spilled = Spilled(Finding, iter(items))
    spilled.append(items[0])
    assert list(spilled) == list(spilled) == [*items, items[0]] and len(spilled) == 4
    assert spilled[1] == items[1]
    with pytest.raises(IndexError, match="4"):
        spilled[4]


def test_two_readers_do_not_disturb_each_other() -> None:
    spilled = Spilled(int, range(1000))
    assert all(left == right == spilled[left] for left, right in zip(spilled, spilled, strict=True))


def test_what_exceeds_the_cache_is_on_disk_and_gone_with_the_list() -> None:
    before = bytes_on_disk()
    spilled = Spilled(str, (KILOBYTE for _ in range(2000)), cache_bytes=2**16)
    assert bytes_on_disk() - before > 1_900_000
    num_bytes = sum(map(len, spilled))
    assert num_bytes == 2_000_000
    del spilled
    gc.collect()
    assert bytes_on_disk() == before


def test_a_full_disk_is_one_line_in_writing_and_in_reading() -> None:
    twice_the_cache = [KILOBYTE] * (spill.CACHE_BYTES * 2 // 1000)
    # Rows that fit into the cache reach the disk only when other pages displace them.
    spilled = Spilled(str, twice_the_cache)
    with no_file_larger_than(2**20):
        with pytest.raises(RunError, match="TMPDIR"):
            Spilled(str, twice_the_cache)
        with pytest.raises(RunError, match="TMPDIR"):
            list(spilled)
