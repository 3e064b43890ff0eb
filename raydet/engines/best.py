"""Outputs of a model → the best detections of each image, chosen on the model's device and copied once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydet.common.boxes import xyxy_to_xywh
from raydet.models.detector import Detections, QueryVectors
from raydet.models.families import Family
from raydet.models.geometry import SizeHW

_LARGEST_HALF = torch.finfo(torch.float16).max


def best_detections(
    family: Family,
    logits: Tensor,
    boxes_cxcywh: Tensor,
    original_sizes_hw: Sequence[SizeHW],
    *,
    keeps_class_scores: bool = False,
    vectors: Mapping[str, Tensor] | None = None,
) -> Callable[[], list[Detections]]:
    """Start choosing the best detections of each image, as the family's image processor does at threshold 0.

    The order of the operations is the processor's, so that scores and boxes equal its own to the last bit.

    Args:
        family: Family of the model.
        logits: [B, Q, C], on any device and in any precision.
        boxes_cxcywh: [B, Q, 4], centre form relative to the image without its padding.
        original_sizes_hw: Height and width in pixels of each upright image before the resize, B of them.
        keeps_class_scores: Detections have the vectors of all class scores of their queries.
        vectors: Further vectors that they have, by field of `QueryVectors`, [B, …] on the same device.

    Returns:
        A function that waits for the device and returns one `Detections` for each image, in order.
    """
    # In full precision: half-precision boxes would be off by more than a pixel.
    logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
    centres, half_sides = boxes_cxcywh[..., :2], 0.5 * boxes_cxcywh[..., 2:]
    boxes_xyxy = torch.cat([centres - half_sides, centres + half_sides], dim=-1)
    if family.softmax:
        class_scores = logits.softmax(-1)[..., :-1]
        scores, labels = class_scores.max(-1)
        queries = torch.arange(logits.shape[1], device=logits.device).expand_as(labels)
    else:
        num_queries, num_classes = logits.shape[1:]
        num_best = min(family.top_k or num_queries, num_queries * num_classes)
        class_scores = logits.sigmoid()
        scores, index = class_scores.flatten(1).topk(num_best, dim=1)
        labels, queries = index % num_classes, index // num_classes
        boxes_xyxy = boxes_xyxy.gather(1, queries[..., None].expand(-1, -1, 4))
    sides_wh = torch.tensor([(width, height) * 2 for height, width in original_sizes_hw], dtype=torch.float32)
    boxes_xyxy = boxes_xyxy * sides_wh.to(boxes_xyxy.device, non_blocking=True)[:, None]
    # A float holds any index of a class or a query exactly. One array is one copy from the device.
    numbers = [scores[..., None], labels[..., None].float(), queries[..., None].float()]
    kept = {**({"class_scores": class_scores} if keeps_class_scores else {}), **(vectors or {})}
    return _fetching(
        torch.cat([boxes_xyxy, *numbers], dim=-1), {name: _in_half(values) for name, values in kept.items()}
    )


def _in_half(values: Tensor) -> Tensor:
    """Convert to half precision, without NaN and infinities, which no table may hold."""
    return values.float().nan_to_num(0.0).clamp(-_LARGEST_HALF, _LARGEST_HALF).half()


def _fetching(packed: Tensor, vectors: Mapping[str, Tensor]) -> Callable[[], list[Detections]]:
    """Start the copy from the device; packed is [B, K, 7]."""
    if packed.device.type != "cuda":
        return lambda: _unpacked(packed, vectors)
    on_cpu, *more = (_copying(values) for values in (packed, *vectors.values()))
    is_there = torch.cuda.current_stream(packed.device).record_event()

    def fetch() -> list[Detections]:
        is_there.synchronize()
        return _unpacked(on_cpu, dict(zip(vectors, more, strict=True)))

    return fetch


def _copying(values: Tensor) -> Tensor:
    on_cpu = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return on_cpu.copy_(values, non_blocking=True)


def _unpacked(packed: Tensor, vectors: Mapping[str, Tensor]) -> list[Detections]:
    values = packed.numpy().astype(np.float64)
    boxes_xywh = xyxy_to_xywh(values[..., :4].reshape(-1, 4)).reshape(*values.shape[:2], 4)
    scores, (categories, queries) = values[..., 4], np.moveaxis(values[..., 5:].astype(np.int64), -1, 0)
    order = np.argsort(-scores, axis=1, kind="stable")
    num_kept = (scores > 0).sum(axis=1)
    arrays = {name: own.numpy() for name, own in vectors.items()}
    found = []
    for image, kept in enumerate(row[:count] for row, count in zip(order, num_kept, strict=True)):
        own: dict[str, Any] = {}
        if arrays:
            kept_vectors = QueryVectors(**{name: array[image] for name, array in arrays.items()})
            own = {"queries": queries[image, kept], "vectors": kept_vectors}
        found.append(Detections(boxes_xywh[image, kept], scores[image, kept], categories[image, kept], **own))
    return found
