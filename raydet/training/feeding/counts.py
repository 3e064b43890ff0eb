"""Images and boxes of an epoch by table and class, and repeat factors of images with rare classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydet.common.console import counted
from raydet.tables.columns import Floats, Integers, flatten
from raydet.training.feeding.mixture import Mixture, WeightedTable

_BATCH_ROWS = 65_536
_MOST_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class EpochShare:
    """Images and boxes of a table in an epoch.

    Attributes:
        uri: The images table.
        weight: Its weight.
        num_images: Its images.
        num_boxes: Its boxes of each class of the mixture, int64 [C].
        images_per_epoch: Images per epoch, on average.
        boxes_per_epoch: Boxes per epoch of each class of the mixture, on average, float64 [C].
    """

    uri: str
    weight: float
    num_images: int
    num_boxes: Integers
    images_per_epoch: float
    boxes_per_epoch: Floats


def shown_of(mixture: Mixture) -> list[EpochShare]:
    """Return what an epoch shows of each table; reads the classes of all boxes.

    Raises:
        UserError: A table is damaged.
    """
    result, first = [], 0
    num_classes = len(mixture.categories)
    for source in mixture.sources:
        own, boxes, images = np.zeros(num_classes, np.int64), np.zeros(num_classes), 0.0
        for num_rows, owners, classes in _classes_of(source):
            factors = np.ones(num_rows) if mixture.repeats is None else mixture.repeats.factors[first:][:num_rows]
            own += np.bincount(classes, minlength=num_classes)
            boxes += np.bincount(classes, weights=factors[owners], minlength=num_classes)
            images += float(factors.sum())
            first += num_rows
        result.append(EpochShare(source.table.uri, source.weight, source.table.num_rows, own, images, boxes))
    return result


def lines_of(shown: Sequence[EpochShare], names: Sequence[str]) -> list[str]:
    """Describe for the terminal what an epoch shows of each table; `names` are those of the classes."""
    num_images = sum(one.num_images for one in shown)
    num_shown = sum(one.images_per_epoch for one in shown)
    lines = [f"{counted(max(1, round(num_shown)), 'image')} per epoch, of {counted(num_images, 'image')}:"]
    lines += [
        f"  {one.images_per_epoch:,.0f} of {one.num_images:,} in {one.uri}"
        + (f" (weight {one.weight:g})" if one.weight != 1 else "")
        for one in shown
    ]
    boxes = np.stack([one.boxes_per_epoch for one in shown], axis=1)
    order = np.argsort(-boxes.sum(axis=1), kind="stable")
    lines.append("boxes per epoch by class" + (", and of each table:" if len(shown) > 1 else ":"))
    for index in order[:_MOST_CLASSES_SHOWN].tolist():
        of_each = " + ".join(f"{number:,.0f}" for number in boxes[index])
        parts = f" = {of_each}" if len(shown) > 1 else ""
        lines.append(f"  {names[index]}: {boxes[index].sum():,.0f}{parts}")
    if len(order) > _MOST_CLASSES_SHOWN:
        rest = order[_MOST_CLASSES_SHOWN:]
        lines.append(f"  {counted(len(rest), 'other class', 'other classes')}: {boxes[rest].sum():,.0f}")
    return lines


def record_of(mixture: Mixture, shown: Sequence[EpochShare]) -> dict[str, Any]:
    """Return what an epoch shows, for a JSON file."""
    names = [category.name for category in mixture.categories]
    return {
        "images_per_epoch": mixture.num_shown,
        "tables": [
            {
                "uri": one.uri,
                "weight": one.weight,
                "images": one.num_images,
                "images_per_epoch": round(one.images_per_epoch, 3),
                "boxes_per_epoch": dict(zip(names, one.boxes_per_epoch.round(3).tolist(), strict=True)),
            }
            for one in shown
        ],
    }


def repeat_factors(mixture: Mixture, threshold: float) -> Floats:
    """Return how often each image is shown per epoch.

    An image is shown `weight` times its repeat factor (Gupta et al., "LVIS", 2019): the largest √(threshold / f) of its
    classes, at least 1, where f is the fraction of the images with the class. Images count by the weight of their
    table.
    """
    num_classes = len(mixture.categories)
    with_class, total = np.zeros(num_classes), 0.0
    for source in mixture.sources:
        for num_rows, owners, classes in _classes_of(source):
            distinct = np.unique(owners * num_classes + classes) % num_classes
            with_class += source.weight * np.bincount(distinct, minlength=num_classes)
            total += source.weight * num_rows
    of_class = np.sqrt(threshold * total / np.maximum(with_class, 1e-9))
    of_class = np.maximum(of_class, 1.0)
    parts = []
    for source in mixture.sources:
        for num_rows, owners, classes in _classes_of(source):
            factors = np.ones(num_rows)
            np.maximum.at(factors, owners, of_class[classes])
            parts.append(source.weight * factors)
    return np.concatenate(parts)


def _classes_of(source: WeightedTable) -> Iterator[tuple[int, Integers, Integers]]:
    """Yield, for each batch of rows, their number, and for each box the place of its row and its class."""
    class_map = np.asarray(source.class_map, np.int64)
    for batch in source.table.iter_batches(("objects",), batch_size=_BATCH_ROWS):
        num_boxes, columns = flatten(batch, "objects", ("category",), source.table.uri)
        yield batch.num_rows, np.repeat(np.arange(batch.num_rows), num_boxes), class_map[columns["category"]]
