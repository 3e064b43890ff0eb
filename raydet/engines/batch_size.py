"""How many images a model should see at once on the machine that it runs on, found by trying."""

import time

import numpy as np
import numpy.typing as npt
import psutil

from raydet.engines.engine import Engine

LARGEST = 128
_WORTH_IT = 1.03
"""A batch twice as large must be faster by this much: larger ones cost memory and make the pipeline coarser."""
_SPARE_MEMORY = 0.5
"""Part of the memory that is free before which must still be free with the batch."""
_TYPICAL_SIZE_HW = (480, 640)


def best_batch_size(engine: Engine) -> int:
    """Doubles the batch until it does not fit or is no faster, and returns the best size that fits.

    On a GPU what counts is that the device does not run out of memory; on a CPU, that half of the free memory stays
    free. Images of 640 × 480 pixels stand for those to come.
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
    """The rate of the faster of two runs after a first one; None where the batch does not fit."""
    import torch

    seconds = []
    try:
        for _ in range(3):
            prepared = engine.prepare(images)
            started = time.perf_counter()
            engine.predict(prepared)
            seconds.append(time.perf_counter() - started)
    except (torch.OutOfMemoryError, MemoryError):
        torch.cuda.empty_cache()
        return None
    return len(images) / min(seconds[1:])
