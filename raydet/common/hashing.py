"""Deterministic pseudorandom numbers from ids and a seed."""

import numpy as np
import numpy.typing as npt


def hashes_of(image_ids: npt.NDArray[np.generic], seed: int) -> npt.NDArray[np.uint64]:
    """Hash integer ids, [N] → uint64 [N]; distinct ids have distinct hashes.

    The function is SplitMix64's finaliser: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014.
    """
    mixed = image_ids.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
