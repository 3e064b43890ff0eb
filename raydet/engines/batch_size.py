"""Search for the fastest batch size of a model on this machine."""

import time

import numpy as np
import numpy.typing as npt
import psutil

from raydet.engines.engine import Engine

LARGEST = 128
_WORTH_IT = 1.03
"""Minimum speed-up that justifies doubling the batch: larger batches cost memory and make the pipeline coarser."""
_SPARE_MEMORY = 0.5
"""Fraction of the initially free memory that must stay free."""
_TYPICAL_SIZE_HW = (480, 640)


def best_batch_size(engine: Engine) -> int:
    """Double the batch until it no longer fits or is no faster, and return the best size that fits.

    A batch fits on a GPU if the device does not run out of memory, on a CPU if half of the free memory stays free. The
    measurement uses images of 640 × 480 pixels.
    """
    generator = np.random.default_rng(0)
    image: npt.NDArray[np.uint8] = generator.integers(0, 255, (*_TYPICAL_SIZE_HW, 3), dtype=np.uint8)
    least_free = psutil.virtual_memory().available * _SPARE_MEMORY
    best, best_rate, size = 1, 0.0, 1
    while size <= LARGEST:
        rate = _images_per_s(engine, [image] * size)
        if rate is None or rate < best_rate * _WORTH_IT:
            break
        best, best_rate = size, rate
        if psutil.virtual_memory().available < least_free:
            break
        size *= 2
    return best


def _images_per_s(engine: Engine, images: list[npt.NDArray[np.uint8]]) -> float | None:
    """Return the rate of the faster of two runs after a warm-up; None if the batch does not fit."""
    import torch

    seconds = []
    try:
        for _ in range(3):
            prepared = engine.prepare(images)
            started = time.perf_counter()
            engine.start(prepared)()
            seconds.append(time.perf_counter() - started)
    except (torch.OutOfMemoryError, MemoryError):
        torch.cuda.empty_cache()
        return None
    return len(images) / min(seconds[1:])
