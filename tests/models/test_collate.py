"""Padding at the bottom and on the right; boxes relative to the image."""

import numpy as np
import pytest
import torch

from raydet.models.collate import Batch, Example, collate


def example(image_id: int, size_hw: tuple[int, int], num_boxes: int) -> Example:
    generator = np.random.default_rng(image_id)
    return Example(
        image_id=image_id,
        image=generator.integers(1, 256, (*size_hw, 3), dtype=np.uint8),
        original_size_hw=(size_hw[0] * 2, size_hw[1] * 3),
        boxes=generator.random((num_boxes, 4)).astype(np.float32),
        categories=generator.integers(0, 3, num_boxes),
    )


def test_pads_to_the_largest_image() -> None:
    examples = [example(1, (10, 20), 2), example(2, (15, 8), 0)]
    batch = collate(examples)
    assert len(batch) == 2
    assert batch.pixels.shape == (2, 3, 15, 20)
    assert batch.pixels.dtype == torch.uint8
    for item, pixels, (height, width) in zip(examples, batch.pixels, batch.sizes_hw, strict=True):
        np.testing.assert_array_equal(pixels[:, :height, :width].permute(1, 2, 0).numpy(), item.image)
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()
    assert batch.image_ids == [1, 2]
    assert batch.sizes_hw == [(10, 20), (15, 8)]
    assert batch.original_sizes_hw == [(20, 60), (30, 24)]


def test_labels_are_as_given_and_empty_ones_keep_their_shape() -> None:
    examples = [example(1, (4, 4), 3), example(2, (4, 4), 0)]
    batch = collate(examples)
    assert batch.labels[0]["boxes"].dtype == torch.float32
    assert batch.labels[0]["class_labels"].dtype == torch.int64
    np.testing.assert_array_equal(batch.labels[0]["boxes"].numpy(), examples[0].boxes)
    np.testing.assert_array_equal(batch.labels[0]["class_labels"].numpy(), examples[0].categories)
    assert batch.labels[1]["boxes"].shape == (0, 4)
    assert batch.labels[1]["class_labels"].shape == (0,)


def test_pads_to_a_given_size() -> None:
    batch = collate([example(1, (10, 20), 1)], pad_to_hw=(32, 32))
    assert batch.pixels.shape == (1, 3, 32, 32)
    assert batch.sizes_hw == [(10, 20)]
    with pytest.raises(AssertionError, match="exceeds"):
        collate([example(1, (10, 20), 1)], pad_to_hw=(32, 16))


def test_takes_read_only_arrays_and_does_not_alias_them() -> None:
    item = example(1, (6, 5), 1)
    for array in (item.image, item.boxes, item.categories):
        array.flags.writeable = False
    batch = collate([item])
    batch.pixels.zero_()
    assert item.image.all()


def test_moves_all_tensors() -> None:
    batch = collate([example(1, (6, 5), 1)]).to("meta")
    assert isinstance(batch, Batch)
    assert batch.pixels.device.type == "meta"
    assert {value.device.type for value in batch.labels[0].values()} == {"meta"}
    assert batch.sizes_hw == [(6, 5)]
