"""Step that runs a pipeline of albumentations, whose import takes seconds in every new worker."""

import os
import warnings
from typing import Any

import numpy as np

from raydet.augmentation.samples import Partners, Sample, clipped, moved
from raydet.common.boxes import as_boxes

# Otherwise albumentations checks for a newer version over the network at each import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


class Pipeline:
    """Step that applies an albumentations pipeline."""

    def __init__(self, transforms: list[Any], *, min_visible: float) -> None:
        import albumentations as A

        self._boxes = A.BboxParams(format="coco", label_fields=["row"], clip=True, min_visibility=min_visible)
        with warnings.catch_warnings():
            # albumentations warns about pipelines that change only colours.
            warnings.filterwarnings("ignore", message="Got processor for bboxes")
            self._compose = A.Compose(transforms, bbox_params=self._boxes)

    def __call__(self, sample: Sample, rng: np.random.Generator, _: Partners) -> Sample:
        """Apply the pipeline."""
        self._compose.set_random_seed(int(rng.integers(2**32)))
        # Albumentations reads it with each image, like the other parameters of its boxes.
        self._boxes.min_area = sample.min_area_px
        rows = np.arange(len(sample.ids), dtype=np.int64)
        result = self._compose(image=np.ascontiguousarray(sample.image), bboxes=sample.boxes_xywh, row=rows)
        # albumentations returns the row of each remaining box; the other arrays are selected by row.
        rows = np.asarray(result["row"], dtype=np.int64).reshape(-1)
        return clipped(moved(sample, result["image"], as_boxes(result["bboxes"]), rows))
