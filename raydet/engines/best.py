"""Outputs of a model → the best detections of each image, chosen on the model's device and copied once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raydet.common.boxes import xyxy_to_xywh
from raydet.models.detector import Detections
from raydet.models.families import Family
from raydet.models.geometry import SizeHW


def best_detections(
    family: Family, logits: Tensor, boxes_cxcywh: Tensor, original_sizes_hw: Sequence[SizeHW]
) -> Callable[[], list[Detections]]:
    """Start choosing the best detections of each image, as the family's image processor does at threshold 0.

    The order of the operations is the processor's, so that scores and boxes equal its own to the last bit.

    Args:
        family: Family of the model.
        logits: [B, Q, C], on any device and in any precision.
        boxes_cxcywh: [B, Q, 4], centre form relative to the image without its padding.
        original_sizes_hw: Height and width in pixels of each upright image before the resize, B of them.

    Returns:
        A function that waits for the device and returns one `Detections` for each image, in order.
    """
    # In full precision: half-precision boxes would be off by more than a pixel.
    logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
    centres, half_sides = boxes_cxcywh[..., :2], 0.5 * boxes_cxcywh[..., 2:]
    boxes_xyxy = torch.cat([centres - half_sides, centres + half_sides], dim=-1)
    if family.softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    else:
        num_queries, num_classes = logits.shape[1:]
        num_best = min(family.top_k or num_queries, num_queries * num_classes)
        scores, index = logits.sigmoid().flatten(1).topk(num_best, dim=1)
        labels = index % num_classes
        boxes_xyxy = boxes_xyxy.gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))
    sides_wh = torch.tensor([(width, height) * 2 for height, width in original_sizes_hw], dtype=torch.float32)
    boxes_xyxy = boxes_xyxy * sides_wh.to(boxes_xyxy.device, non_blocking=True)[:, None]
    # A float holds any class index exactly. One array is one copy from the device.
    return _fetching(torch.cat([boxes_xyxy, scores[..., None], labels[..., None].float()], dim=-1))


def _fetching(packed: Tensor) -> Callable[[], list[Detections]]:
    """Start the copy from the device; packed is [B, K, 6]."""
    if packed.device.type != "cuda":
        return lambda: _unpacked(packed)
    on_cpu = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    on_cpu.copy_(packed, non_blocking=True)
    is_there = torch.cuda.current_stream(packed.device).record_event()

    def fetch() -> list[Detections]:
        is_there.synchronize()
        return _unpacked(on_cpu)

    return fetch


def _unpacked(packed: Tensor) -> list[Detections]:
    values = packed.numpy().astype(np.float64)
    boxes_xywh = xyxy_to_xywh(values[..., :4].reshape(-1, 4)).reshape(*values.shape[:2], 4)
    scores, categories = values[..., 4], values[..., 5].astype(np.int64)
    order = np.argsort(-scores, axis=1, kind="stable")
    num_kept = (scores > 0).sum(axis=1)
    return [
        Detections(boxes_xywh[image, kept], scores[image, kept], categories[image, kept])
        for image, kept in enumerate(row[:count] for row, count in zip(order, num_kept, strict=True))
    ]
