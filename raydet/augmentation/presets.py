"""The named augmentations: a preset → the steps that an image passes through."""

from collections.abc import Callable
from typing import Any

import numpy as np

from raydet.augmentation.families import ZoomAndCrop, detr_crop, photometric
from raydet.augmentation.mixing import copy_small, mixup, mosaic
from raydet.augmentation.pipeline import Pipeline
from raydet.augmentation.samples import FILL, MIN_VISIBLE, Partners, Sample, WorkingSize, flip
from raydet.config import Augmentation

COPY_SMALL_P = 0.3
"""Probability that `strong` copies small objects; `ordering` has the probabilities of mosaic and mixup."""
CROP_P = 0.3
"""Probability that `strong` crops."""

Step = Callable[[Sample, np.random.Generator, Partners], Sample]
Change = Callable[[Sample, np.random.Generator], Sample]


def steps_of(preset: Augmentation, working_size: WorkingSize | None) -> list[Step]:
    """Return the steps of a preset.

    Args:
        preset: Name of the preset.
        working_size: Size at which images are augmented, if it is limited.
    """
    if preset == "none":
        return []
    if preset == "flip":
        return [_FLIP]
    if preset == "light":
        return [Pipeline(_light(), min_visible=0.0)]
    if preset in ("detr", "rfdetr"):
        # The two recipes differ in the model's resize only, which comes afterwards.
        return [_FLIP, _sometimes(0.5, detr_crop)]
    if preset in ("rtdetr", "dfine"):
        return [_always(photometric), _always(ZoomAndCrop(working_size)), _FLIP]
    return [_mix, _sometimes(CROP_P, _clear_crop), _FLIP, Pipeline(_strong(), min_visible=MIN_VISIBLE)]


def _always(change: Change) -> Step:
    return lambda sample, rng, _: change(sample, rng)


def _sometimes(p: float, change: Change) -> Step:
    return lambda sample, rng, _: change(sample, rng) if rng.random() < p else sample


_FLIP = _sometimes(0.5, lambda sample, _: flip(sample))


def _clear_crop(sample: Sample, rng: np.random.Generator) -> Sample:
    """Apply DETR's crop, and drop boxes that it leaves hard to recognise."""
    return detr_crop(sample, rng, min_visible=MIN_VISIBLE, min_area_px=sample.min_area_px)


def _mix(sample: Sample, rng: np.random.Generator, partners: Partners) -> Sample:
    if partners.mosaic:
        sample = mosaic(sample, partners.mosaic, rng)
    if rng.random() < COPY_SMALL_P:
        sample = copy_small(sample, rng)
    for partner in partners.mixup:
        sample = mixup(sample, partner, rng)
    return sample


def _light() -> list[Any]:
    import albumentations as A

    return [
        A.Perspective(p=0.1),
        A.HorizontalFlip(p=0.5),
        A.RandomBrightnessContrast(p=0.5),
        A.HueSaturationValue(p=0.1),
    ]


def _strong() -> list[Any]:
    import albumentations as A

    return [
        A.Affine(scale=(0.7, 1.2), translate_percent=(-0.1, 0.1), rotate=0, fill=FILL, p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=20, val_shift_limit=15, p=0.3),
        A.OneOf([A.GaussianBlur(blur_limit=(3, 5)), A.GaussNoise(std_range=(0.02, 0.06))], p=0.1),
    ]
