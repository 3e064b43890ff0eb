"""Freed memory stays in the process, and returns to the operating system afterwards."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading
import numpy as np
from raydet.common.allocator import keeping_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(64 * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def kept():
    with keeping_freed_memory():
        faults()
        return faults()

counts = [faults(), kept()]
thread = threading.Thread(target=lambda: counts.append(kept()))
thread.start()
thread.join()
counts.append(faults())
print(*counts)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_repeated_allocations_cause_page_faults_only_outside() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    before, kept, kept_in_thread, after = map(int, result.stdout.split())
    assert min(before, after) > 100  # with pages of 2 MB
    assert max(kept, kept_in_thread) < min(before, after) / 2  # the system may take back a few
