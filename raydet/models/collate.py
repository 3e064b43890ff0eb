"""Resized images with their boxes → one batch of tensors, whose pixels stay uint8 until they are on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raydet.models.geometry import SizeHW, fill_padded

LABELLED = "labelled"
"""Key in the labels of an image: the indices of the classes that it is labelled for, int64 [K]; absent: all."""

TAUGHT = {
    "boxes_cxcywh": "teacher_boxes",
    "class_scores": "teacher_scores",
    "owners": "teacher_owners",
    "weights": "teacher_weights",
    "known": "teacher_known",
}
"""Keys in the labels of an image that teachers have scored, by the attribute of `raydet.augmentation.taught.Taught`."""


@dataclass(frozen=True)
class Example:
    """One image with its boxes, resized for the model.

    Attributes:
        image_id: Id of the image, as in its table.
        image: uint8 [H, W, 3], RGB, already resized by the model's `ResizeRule`.
        original_size_hw: Height and width in pixels of the upright image before the resize.
        boxes: float32 [N, 4], centre x, centre y, width, height, relative to the image without its padding.
        categories: int64 [N], category indices.
        labelled_categories: int64 [K], the classes that the image is labelled for; None for all.
    """

    image_id: int
    image: npt.NDArray[np.uint8]
    original_size_hw: SizeHW
    boxes: npt.NDArray[np.float32]
    categories: npt.NDArray[np.int64]
    labelled_categories: npt.NDArray[np.int64] | None = None


@dataclass
class Batch:
    """Images of one forward pass.

    Attributes:
        image_ids: Ids of the B images, as in their table.
        pixels: uint8 [B, 3, H, W], RGB, padded with zeros at the bottom and on the right.
        sizes_hw: Height and width in pixels of each image without its padding.
        original_sizes_hw: Height and width in pixels of each upright image before the resize.
        labels: Per image, `class_labels` int64 [N] and `boxes` float32 [N, 4], centre form relative to the image; if it
            is not labelled for all classes, `labelled` int64 [K], those that it is labelled for; and `TAUGHT`.
    """

    image_ids: list[int]
    pixels: Tensor
    sizes_hw: list[SizeHW]
    original_sizes_hw: list[SizeHW]
    labels: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on a device, apart from the lists of labelled classes."""
        # The host reads the lists of labelled classes.
        labels = [
            {name: value if name == LABELLED else value.to(device) for name, value in label.items()}
            for label in self.labels
        ]
        pixels = self.pixels.to(device, non_blocking=True)
        return Batch(self.image_ids, pixels, self.sizes_hw, self.original_sizes_hw, labels)


def collate(examples: Sequence[Example], *, pad_to_hw: SizeHW | None = None) -> Batch:
    """Batch images in one padded tensor, copying their pixels once.

    Args:
        examples: The images; at least one.
        pad_to_hw: Height and width of the batch in pixels; by default the largest height and width of its images.
    """
    assert examples, "a batch needs at least one image"
    sizes_hw = [(example.image.shape[0], example.image.shape[1]) for example in examples]
    largest_hw = (max(height for height, _ in sizes_hw), max(width for _, width in sizes_hw))
    height, width = pad_to_hw or largest_hw
    assert largest_hw[0] <= height and largest_hw[1] <= width, f"an image of {largest_hw} exceeds {pad_to_hw}"
    pixels = torch.empty((len(examples), 3, height, width), dtype=torch.uint8)
    fill_padded(pixels.numpy(), [example.image.transpose(2, 0, 1) for example in examples])
    labels = [
        {
            "class_labels": torch.tensor(example.categories, dtype=torch.int64).reshape(-1),
            "boxes": torch.tensor(example.boxes, dtype=torch.float32).reshape(-1, 4),
        }
        for example in examples
    ]
    for label, example in zip(labels, examples, strict=True):
        if example.labelled_categories is not None:
            label[LABELLED] = torch.tensor(example.labelled_categories, dtype=torch.int64).reshape(-1)
    return Batch(
        [example.image_id for example in examples],
        pixels,
        sizes_hw,
        [example.original_size_hw for example in examples],
        labels,
    )
