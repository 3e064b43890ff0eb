"""Augmentation: one image with its boxes and one seed → one image with its boxes.

albumentations augments; the resize to the model's size, which is the image processor's own, comes after it.
"""

import os
from dataclasses import dataclass
from typing import Any

# Or albumentations asks the network for a newer version at each import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from raydet.boxes import Boxes, clip_xywh, has_area
from raydet.config import Augmentation

# One image is too little work to share among threads, and the workers fill the cores already.
cv2.setNumThreads(0)

MIN_AREA_PX = 25.0
"""Boxes smaller than this after augmentation are dropped, as the Hugging Face guide does."""
MIN_VISIBLE = 0.25
"""Boxes of which a smaller part is left in a crop are dropped: too little to be recognised."""


@dataclass(frozen=True)
class Sample:
    """An image and its boxes; row i of each array belongs to box i.

    Attributes:
        image: uint8 RGB, [H, W, 3].
        boxes_xywh: Absolute pixels, float64 [N, 4].
        labels: Category indices, int64 [N].
    """

    image: npt.NDArray[np.uint8]
    boxes_xywh: Boxes
    labels: npt.NDArray[np.int64]

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]


class Augmenter:
    """A named augmentation, deterministic by the seed given with each image."""

    def __init__(self, name: Augmentation) -> None:
        self._pipeline = A.Compose(
            _PRESETS[name](),
            bbox_params=A.BboxParams(
                format="coco",
                label_fields=["row"],
                clip=True,
                min_area=0.0 if name == "flip" else MIN_AREA_PX,
                # Crops are the one thing that hides parts of objects; without them only the guide's limit counts.
                min_visibility=MIN_VISIBLE if name == "strong" else 0.0,
            )
            if name != "none"
            else None,
        )
        self._is_identity = name == "none"

    def __call__(self, sample: Sample, *, seed: int) -> Sample:
        """Augments one image.

        Args:
            sample: The image as decoded; it is not changed.
            seed: The same seed and image give the same result.

        Returns:
            The new image with the boxes that are still to be seen in it.
        """
        sample = _with_area(sample)
        if self._is_identity:
            return sample
        self._pipeline.set_random_seed(seed)
        result = self._pipeline(
            image=sample.image, bboxes=sample.boxes_xywh, row=np.arange(len(sample.labels), dtype=np.int64)
        )
        rows = np.asarray(result["row"], dtype=np.int64).reshape(-1)
        boxes_xywh = np.asarray(result["bboxes"], dtype=np.float64).reshape(-1, 4)
        return _with_area(Sample(np.ascontiguousarray(result["image"]), boxes_xywh, sample.labels[rows]))


def _with_area(sample: Sample) -> Sample:
    boxes_xywh = clip_xywh(sample.boxes_xywh, sample.size_hw)
    keep = has_area(boxes_xywh)
    return Sample(sample.image, boxes_xywh[keep], sample.labels[keep])


def _light() -> list[Any]:
    return [
        A.Perspective(p=0.1),
        A.HorizontalFlip(p=0.5),
        A.RandomBrightnessContrast(p=0.5),
        A.HueSaturationValue(p=0.1),
    ]


def _strong() -> list[Any]:
    return [
        A.HorizontalFlip(p=0.5),
        A.RandomSizedBBoxSafeCrop(height=480, width=480, erosion_rate=0.2, p=0.3),
        A.Affine(scale=(0.7, 1.2), translate_percent=(-0.1, 0.1), rotate=0, fill=114, p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=20, val_shift_limit=15, p=0.3),
        A.OneOf([A.GaussianBlur(blur_limit=(3, 5)), A.GaussNoise(std_range=(0.02, 0.06))], p=0.1),
    ]


_PRESETS: dict[Augmentation, Any] = {
    "none": list,
    "flip": lambda: [A.HorizontalFlip(p=0.5)],
    "light": _light,
    "strong": _strong,
}
