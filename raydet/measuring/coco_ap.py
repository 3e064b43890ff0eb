"""COCO's metrics for any evaluation loop: detections and truth as tensors → the numbers of pycocotools.

A metric of torchmetrics with the inputs and the keys of its `MeanAveragePrecision`. Its states are tables of numbers
that can be concatenated in any order, so ranks with any number of images, or none, can be combined.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.distributed import gather_all_tensors

from raydet.common.boxes import Boxes, as_boxes, normalised_cxcywh_to_xywh, xyxy_to_xywh
from raydet.measuring.numbers.matching import match, match_in_parts
from raydet.measuring.numbers.metrics import CocoNumbers, accumulate
from raydet.tables.columns import (
    DetectionColumns,
    Floats,
    Integers,
    TruthColumns,
    starts_of,
    take_detections,
    take_truth,
)
from raydet.tables.schema import MAX_IMAGE_ID, Category

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
Items = Sequence[Mapping[str, Any]]

_TO_XYWH: dict[str, Callable[[Boxes], Boxes]] = {
    "xyxy": xyxy_to_xywh,
    "xywh": as_boxes,
    "cxcywh": partial(normalised_cxcywh_to_xywh, size_hw=(1, 1)),  # pixels remain pixels
}
_WIDTHS = {"images": 3, "truth": 7, "detections": 6}
"""Columns of the states: (image id or -1, number of labelled boxes, number of detections), (x, y, width, height, label,
area, 1 for a crowd), (x, y, width, height, label, score)."""
_OPTIONAL = ("area", "iscrowd")
_NAMES = {
    "map": "AP",
    "map_50": "AP50",
    "map_75": "AP75",
    "map_small": "APs",
    "map_medium": "APm",
    "map_large": "APl",
    "mar_1": "AR1",
    "mar_10": "AR10",
    "mar_100": "AR100",
    "mar_small": "ARs",
    "mar_medium": "ARm",
    "mar_large": "ARl",
}
"""Names of the metrics in torchmetrics, and COCO's."""


class CocoAP(Metric):
    """COCO's AP and AR as a torchmetrics metric, bit-identical to pycocotools.

    A replacement for `torchmetrics.detection.MeanAveragePrecision` with bounding boxes. `compute` returns a dict of
    tensors on the CPU: `map`, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, `mar_1`, `mar_10`,
    `mar_100`, `mar_small`, `mar_medium`, `mar_large`, `map_per_class` and `mar_100_per_class`, float64 in [0, 1], -1 if
    undefined, and `classes`, int64: the labels of all boxes in ascending order, to which the values per class belong.
    As in torchmetrics, a tensor with one element has no dimensions.

    `compute` is collective: it covers the images of all ranks, each of which may have any number of them. Where every
    rank already has all images, as in `compute_metrics` of a Hugging Face `Trainer`, pass `sync_on_compute=False`.

    Args:
        box_format: Format of all boxes, in absolute pixels: "xyxy" (left, top, right, bottom), "xywh" (left, top,
            width, height; COCO's own, which needs no rounding) or "cxcywh" (centre, width, height).
        class_metrics: Also compute the values per class, which are -1 otherwise.
        kwargs: Options of every metric, such as `sync_on_compute` and `process_group`; see `torchmetrics.Metric`.

    Raises:
        ValueError: `box_format` is not one of the three, or another option is unknown.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, box_format: BoxFormat = "xyxy", *, class_metrics: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if box_format not in _TO_XYWH:
            raise ValueError(f"box_format must be one of {', '.join(_TO_XYWH)}, got {box_format!r}")
        self.box_format, self.class_metrics = box_format, class_metrics
        self._cpu_groups: dict[Any, Any] = {}
        for name in _WIDTHS:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, preds: Items, target: Items) -> None:
        """Add images; nothing is added if an error is raised.

        Args:
            preds: A dict for each image: `boxes`, float [N, 4]; `scores`, float [N]; `labels`, integer [N]. Of equal
                scores in an image, the earlier is matched first. Tensors may be on any device.
            target: A dict for each image, in the same order: `boxes`, float [N, 4]; `labels`, integer [N]; optionally
                `iscrowd`, 0 or 1 [N], by default 0, and `area` in square pixels, float [N], by default (and where it is
                not above 0) width × height. An optional `image_id`, an integer from 0 to 2⁵³ - 1, makes the result
                independent of the order of the images and their distribution over ranks, to the last bit, and an image
                that was added more than once, for example by a sampler that pads, counts once. Without it, equal
                scores in different images are ordered by rank, then by arrival.

        Raises:
            ValueError: The lists differ in length, a key is missing, or a value has a wrong shape or type or is not
                finite.
        """
        if len(preds) != len(target):
            raise ValueError(f"preds has {len(preds)} images, target has {len(target)}")
        num_found, found = _columns("preds", preds, ("boxes", "labels", "scores"))
        num_truth, truth = _columns("target", target, ("boxes", "labels", "area", "iscrowd"))
        to_xywh = _TO_XYWH[self.box_format]
        found["boxes"], truth["boxes"] = to_xywh(as_boxes(found["boxes"])), to_xywh(as_boxes(truth["boxes"]))
        areas = truth["boxes"][:, 2] * truth["boxes"][:, 3]
        truth["area"] = np.where(truth["area"] > 0, truth["area"], areas)
        image_ids = [_image_id(number, item) for number, item in enumerate(target)]
        images = {"ids": np.array(image_ids), "truth": np.array(num_truth), "found": np.array(num_found)}
        for name, columns in (("images", images), ("truth", truth), ("detections", found)):
            rows = np.column_stack([column.astype(np.float64) for column in columns.values()])
            getattr(self, name).append(torch.from_numpy(rows))

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics over the images of all ranks; see the class.

        Raises:
            ValueError: Only some images have an `image_id`, or images with the same id have different labelled boxes.
        """
        images, truth, found = (self._whole(name).numpy() for name in _WIDTHS)
        labels, category = np.unique(np.concatenate([truth[:, 4], found[:, 4]]), return_inverse=True)
        # Without any box, every metric is undefined, for any class.
        categories = [Category(int(label), str(int(label))) for label in labels] or [Category(0, "none")]
        num_truth, num_found = images[:, 1:].astype(np.int64).T
        labelled = TruthColumns(
            image_ids=images[:, 0].astype(np.int64),
            starts=starts_of(num_truth),
            boxes_xywh=truth[:, :4],
            category=category[: len(truth)],
            area=truth[:, 5],
            iscrowd=truth[:, 6] != 0,
        )
        detections = DetectionColumns(
            starts=starts_of(num_found),
            boxes_xywh=found[:, :4],
            scores=found[:, 5],
            category=category[len(truth) :],
        )
        labelled, rows = _each_once(labelled)
        matches = match_in_parts(
            labelled, take_detections(detections, rows), lambda some, own, _: match(some, own, len(categories))
        )
        result = accumulate(matches, categories)
        values = {name: _values([result], metric) for name, metric in _NAMES.items()}
        by_class = result.per_class[: len(labels)] if self.class_metrics else (CocoNumbers(values={}),)
        for name, metric in (("map_per_class", "AP"), ("mar_100_per_class", "AR100")):
            values[name] = _values(by_class, metric)
        return {**values, "classes": torch.from_numpy(labels.astype(np.int64))}

    def _whole(self, name: str) -> Tensor:
        """Return all rows of a state, float64 [N, columns] on the CPU, even if there are none."""
        rows = getattr(self, name)
        if isinstance(rows, Tensor):
            return rows
        return torch.cat([torch.zeros((0, _WIDTHS[name]), dtype=torch.float64), *rows])

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        # Lists of unequal lengths would make the ranks take part in unequal numbers of collectives.
        for name in _WIDTHS:
            setattr(self, name, [self._whole(name)])
        group = process_group or self.process_group
        super()._sync_dist(dist_sync_fn, self._cpu_group(group) if dist_sync_fn is gather_all_tensors else group)

    def _cpu_group(self, group: Any) -> Any:
        """Return a process group of the same ranks that can exchange tensors on the CPU, unlike NCCL."""
        group = group or dist.group.WORLD
        if "cpu:" in dist.get_backend_config(group):
            return group
        if group not in self._cpu_groups:
            ranks = dist.get_process_group_ranks(group)
            self._cpu_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return self._cpu_groups[group]

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        # `to` and `set_dtype` leave the states in float64 on the CPU.
        return super()._apply(fn, exclude_state=[*_WIDTHS, *exclude_state])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cpu_groups": {}}  # process groups can be neither copied nor pickled


def _columns(name: str, items: Items, keys: Sequence[str]) -> tuple[list[int], dict[str, Floats]]:
    """Return the number of boxes of each image, and the values of all images by key, float64, images in order."""
    counts: list[int] = []
    parts: dict[str, list[Tensor]] = {key: [] for key in keys}
    for number, item in enumerate(items):
        values = _checked(f"{name}[{number}]", item, keys)
        counts.append(values["labels"].numel())
        if counts[-1]:  # an empty tensor may have any type, which concatenating would adopt
            for key in keys:
                parts[key].append(values[key])
    # Concatenating before moving takes one transfer from a GPU for each key instead of one for each image.
    columns: dict[str, Floats] = {
        key: torch.cat(values).detach().cpu().double().numpy() if values else np.zeros(0)
        for key, values in parts.items()
    }
    for key, column in columns.items():
        (bad, *_) = np.nonzero(~np.isfinite(column))
        if bad.size:
            number = int(np.searchsorted(np.cumsum(counts), bad[0], side="right"))
            raise ValueError(f"{name}[{number}]: {key} must be finite numbers")
    return counts, columns


def _checked(where: str, item: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of an image; `area` and `iscrowd` are 0 if they are missing."""
    try:
        labels = torch.as_tensor(item["labels"])
        values = {key: torch.as_tensor(item[key]) for key in keys if key in item or key not in _OPTIONAL}
    except KeyError as error:
        raise ValueError(f"{where} lacks the key {error}") from None
    count = labels.numel()
    for key, value in values.items():
        shape = (count, 4) if key == "boxes" else (count,)
        if value.shape != shape and (count or value.numel()):
            raise ValueError(f"{where}: {key} must have the shape {shape}, got {tuple(value.shape)}")
    if count and labels.is_floating_point():
        raise ValueError(f"{where}: labels must be integers, got {labels.dtype}")
    return {key: values[key] if key in values else torch.zeros_like(labels) for key in keys}


def _image_id(number: int, item: Mapping[str, Any]) -> int:
    """Return the id of an image, -1 if it has none."""
    value = item.get("image_id")
    if value is None:
        return -1
    try:
        content: Any = torch.as_tensor(value).item()
        image_id = operator.index(content)
    except (TypeError, ValueError, RuntimeError):
        image_id = -1
    if not 0 <= image_id < MAX_IMAGE_ID:
        raise ValueError(f"target[{number}]: image_id must be an integer from 0 to 2**53 - 1, got {value!r}")
    return image_id


def _each_once(truth: TruthColumns) -> tuple[TruthColumns, Integers]:
    """Return the images in ascending id order, each once, and their rows in the input.

    Images without ids are numbered in input order.
    """
    ids = truth.image_ids
    if (ids < 0).all():
        rows = np.arange(len(ids))
        return replace(truth, image_ids=rows), rows
    if (ids < 0).any():
        raise ValueError(
            f"{(ids < 0).sum()} of {len(ids)} images have no image_id; either all images must have one, or none"
        )
    # The last of equal ids counts: if `reset` was forgotten, these are the detections of the last epoch.
    known, from_the_end = np.unique(ids[::-1], return_index=True)
    rows = len(ids) - 1 - from_the_end
    if len(rows) < len(ids):
        kept = take_truth(truth, rows[np.searchsorted(known, ids)])
        if not all(np.array_equal(getattr(truth, name), getattr(kept, name)) for name in ("starts", "boxes_xywh")):
            raise ValueError("images with the same image_id have different labelled boxes; image_id must be unique")
        rank_zero_warn(
            f"{len(ids) - len(rows)} images were added more than once, as by a sampler that pads, and count once; "
            "call reset() between epochs"
        )
    return take_truth(truth, rows), rows


def _values(numbers: Sequence[CocoNumbers], metric: str) -> Tensor:
    """Return one metric of several results, float64 [N], -1 if undefined."""
    found = [item.values.get(metric) for item in numbers]
    return torch.tensor([-1.0 if value is None else value for value in found], dtype=torch.float64)
