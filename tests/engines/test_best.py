"""The best detections of a batch equal those of the image processors, to the last bit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raydet.common.boxes import xyxy_to_xywh
from raydet.engines.best import best_detections
from raydet.models.families import FAMILIES, Family
from raydet.models.processors import default_processor

SIZES_HW = [(480, 640), (1333, 801), (7, 9999)]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_equal_the_image_processor_s(family: Family, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((len(SIZES_HW), 130, 7), generator=generator, dtype=torch.float32).to(dtype)
    boxes_cxcywh = torch.rand((len(SIZES_HW), 130, 4), generator=generator).to(dtype)
    # Scores that are equal, and some that are zero.
    logits[0, 5:9] = logits[0, 4]
    logits[1, 3, :-1] = -torch.inf
    found = best_detections(family, logits, boxes_cxcywh, SIZES_HW)()
    outputs = SimpleNamespace(logits=logits.float(), pred_boxes=boxes_cxcywh.float())
    expected = default_processor(family).post_process_object_detection(outputs, threshold=0.0, target_sizes=SIZES_HW)
    assert len(found) == len(expected) == len(SIZES_HW)
    for one, other in zip(found, expected, strict=True):
        scores = other["scores"].numpy().astype(np.float64)
        order = np.argsort(-scores, kind="stable")
        assert one.scores.tolist() == scores[order].tolist()
        assert one.categories.tolist() == other["labels"].numpy()[order].tolist()
        boxes_xywh = xyxy_to_xywh(other["boxes"].numpy().astype(np.float64)[order])
        assert one.boxes_xywh.tolist() == boxes_xywh.tolist()
        assert str(one.boxes_xywh.dtype) == "float64" and str(one.categories.dtype) == "int64"
