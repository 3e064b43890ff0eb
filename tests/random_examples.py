"""Random training examples and batches without any, for tests of optimizer steps."""

import numpy as np
import torch

from raydet.models.collate import Batch, Example


def random_examples(num_examples: int, side: int) -> list[Example]:
    """Return square examples with two boxes each, of two classes; the same in every call."""
    generator = np.random.default_rng(0)
    return [
        Example(
            number,
            generator.integers(0, 256, (side, side, 3), dtype=np.uint8),
            (side, side),
            generator.uniform(0.2, 0.5, (2, 4)).astype(np.float32),
            generator.integers(0, 2, 2),
        )
        for number in range(num_examples)
    ]


def empty_batch(side: int) -> Batch:
    """Return a micro-batch without images, which would have this side."""
    return Batch([], torch.zeros((0, 3, side, side), dtype=torch.uint8), [], [], [])
