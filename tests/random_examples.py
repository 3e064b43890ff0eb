"""Random training examples, for tests of optimizer steps."""

import numpy as np

from raydet.models.collate import Example


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
