"""The C library's allocator, tuned for models on a CPU.

By default glibc returns each large block to the operating system, so that every activation of a model begins with page
faults: a fifth of the time of an RT-DETRv2-R18 in fp32, a third in bf16.
"""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 2**10, 65536
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep freed memory in this process for its next allocations; without effect unless the C library is glibc.

    Each thread keeps its own heap: if they shared one, the threads of a training step in bf16 would wait for it for a
    sixth of the time.
    """
    _set(_LARGEST_INT, 0)


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Context manager: keep freed memory while the block runs, and return it to the operating system afterwards."""
    keep_freed_memory()
    try:
        yield
    finally:
        _set(_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX)
        if _is_glibc():
            ctypes.CDLL(None).malloc_trim(0)


def _set(trim_threshold: int, mmap_max: int) -> None:
    if _is_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
        libc.mallopt(_M_MMAP_MAX, mmap_max)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
