"""Chunks of decoded images → batches for the model, in a training worker."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.boxes import as_boxes
from raydet.common.errors import UserError
from raydet.measuring.numbers.accumulator import ImageTruth
from raydet.models.geometry import ResizeRule
from raydet.tables.schema import LABELLED_COLUMN
from raydet.training.feeding.chunks import TAUGHT_TYPE, header_of, images_of, micro_batches_of, pixels_of
from raydet.training.feeding.ordering import Kind, MicroBatch

if TYPE_CHECKING:
    from raydet.models.collate import Batch, Example


ClassMap = npt.NDArray[np.int64]
"""The model's index of each class of a table; -1 for an unused one, which no box has."""


@dataclass(frozen=True)
class ReadyBatch:
    """One micro-batch as a worker receives it, ready for the model.

    Attributes:
        micro_batch: Position in the plan; its `rows` are empty.
        resize_rule: Resize rule of all images in the batch.
        batch: Images that could be read, with their targets; possibly none.
        unreadable: Reasons why images could not be read, by image id.
        truths: In validation, the annotations of every image from the table, by image id in the order of the rows;
            empty in training.
    """

    micro_batch: MicroBatch
    resize_rule: ResizeRule
    batch: "Batch"
    unreadable: dict[int, str]
    truths: dict[int, ImageTruth]

    @property
    def num_images(self) -> int:
        """Number of images, including those that could not be read."""
        return len(self.batch) + len(self.unreadable)

    @property
    def image_ids(self) -> list[int]:
        """Ids of all images; those that could not be read come last."""
        return [*self.batch.image_ids, *self.unreadable]

    @property
    def examples(self) -> "list[Example]":
        """The readable images one by one; their pixels are views into the batch."""
        from raydet.models.collate import Example

        pixels, batch = self.batch.pixels.numpy(), self.batch
        return [
            Example(
                image_id,
                pixels[place, :, :height, :width].transpose(1, 2, 0),
                original_size_hw,
                label["boxes"].numpy(),
                label["class_labels"].numpy(),
            )
            for place, (image_id, (height, width), original_size_hw, label) in enumerate(
                zip(batch.image_ids, batch.sizes_hw, batch.original_sizes_hw, batch.labels, strict=True)
            )
        ]


class BatchReader:
    """One rank's part of a run's stream, checked against the plan.

    Attributes:
        has_begun: True once the first batch has arrived.
    """

    def __init__(
        self, batches: Iterator[ReadyBatch], rank: int, class_maps: Mapping[Kind, ClassMap] | None = None
    ) -> None:
        """Read batches; `class_maps` holds the model's index of each class of a table that orders them differently."""
        self._batches, self._rank = batches, rank
        self._class_maps = class_maps or {}
        self.has_begun = False

    def take(self, kind: Kind, epoch: int, step: int, part: int) -> ReadyBatch:
        """Wait for this micro-batch, which must be the next one."""
        batch = next(self._batches)
        expected = MicroBatch(kind, epoch, step, part, self._rank, ())
        assert batch.micro_batch == expected, f"the stream is out of step: got {batch.micro_batch}, not {expected}"
        self.has_begun = True
        class_map = self._class_maps.get(kind)
        return batch if class_map is None else _with_classes(batch, class_map)


def _with_classes(batch: ReadyBatch, class_map: ClassMap) -> ReadyBatch:
    """Replace the category indices of a table by those of the model."""
    import torch

    from raydet.models.collate import LABELLED, TAUGHT

    unused = [image_id for image_id, truth in batch.truths.items() if (class_map[truth.category] < 0).any()]
    if unused:
        raise UserError(f"--val-data: image {unused[0]} has a box of a class that --train-data lacks")
    to_model = torch.from_numpy(class_map)
    labels = [{**label, "class_labels": to_model[label["class_labels"]]} for label in batch.batch.labels]
    for label in labels:
        if LABELLED in label:
            label[LABELLED] = _used(to_model[label[LABELLED]])
        for name in (TAUGHT["class_scores"], TAUGHT["known"]):
            if name in label:
                label[name] = _permuted(label[name], to_model)
    truths = {
        image_id: replace(
            truth,
            category=class_map[truth.category],
            labelled=None if truth.labelled is None else _used(class_map[truth.labelled]),
        )
        for image_id, truth in batch.truths.items()
    }
    return replace(batch, batch=replace(batch.batch, labels=labels), truths=truths)


def _permuted(of_classes: Any, to_model: Any) -> Any:
    """Return values of all classes, [..., C], in the order of the model's classes."""
    permuted = of_classes.new_zeros(of_classes.shape)
    is_used = to_model >= 0
    permuted[:, to_model[is_used]] = of_classes[:, is_used]
    return permuted


def _used(indices: Any) -> Any:
    """Leave out the classes that the model lacks."""
    return indices[indices >= 0]


def ready_batches(chunk: pa.Table) -> Iterator[ReadyBatch]:
    """Yield the micro-batches of a decoded chunk without copying their pixels, which are read-only."""
    import torch

    from raydet.models.collate import LABELLED, Batch

    header, images = header_of(chunk), images_of(chunk)
    image_ids, errors = images["image_id"].to_pylist(), images["error"].to_pylist()
    sizes_hw, originals_hw = (_sizes_of(images[name]) for name in ("size_hw", "original_size_hw"))
    # Copied, because the labels of an image may be kept longer than its pixels.
    boxes = torch.tensor(images["boxes_cxcywh"].values.to_numpy()).reshape(-1, 4)
    num_boxes = np.diff(images["categories"].offsets.to_numpy()).tolist()
    labels = [
        {"class_labels": categories, "boxes": its_boxes}
        for categories, its_boxes in zip(
            torch.tensor(images["categories"].values.to_numpy()).split(num_boxes), boxes.split(num_boxes), strict=True
        )
    ]
    _add_taught(labels, images["taught"])
    lists = images[LABELLED_COLUMN]
    labelled = lists.to_pylist() if lists.null_count < len(lists) else [None] * len(lists)
    for label, own in zip(labels, labelled, strict=True):
        if own is not None:
            label[LABELLED] = torch.tensor(own, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the pixels are read-only, and nobody writes them
        pixels = torch.from_numpy(pixels_of(chunk))
    first = start = 0
    for (micro_batch, num_images), rule, shape in zip(
        micro_batches_of(header), header["resize_rule"], header["shape"], strict=True
    ):
        num_readable, height, width = shape
        size = num_readable * 3 * height * width
        places = range(first, first + num_images)
        readable = [place for place in places if errors[place] is None]
        batch = Batch(
            [image_ids[place] for place in readable],
            pixels[start : start + size].view(num_readable, 3, height, width),
            [sizes_hw[place] for place in readable],
            [originals_hw[place] for place in readable],
            [labels[place] for place in readable],
        )
        first, start = first + num_images, start + size
        unreadable = {image_ids[place]: errors[place] for place in places if errors[place] is not None}
        truths = {}
        if micro_batch.kind == "validate":
            truths = {image_ids[place]: _truth(images["objects"][place].as_py(), labelled[place]) for place in places}
        yield ReadyBatch(micro_batch, ResizeRule.from_dict(rule), batch, unreadable, truths)


def _sizes_of(column: pa.FixedSizeListArray) -> list[tuple[int, int]]:
    return [(height, width) for height, width in column.values.to_numpy().reshape(-1, 2).tolist()]


def _truth(objects: dict[str, Any], labelled: list[int] | None) -> ImageTruth:
    return ImageTruth(
        as_boxes(objects["bbox"]),
        np.asarray(objects["category"], np.int64),
        np.asarray(objects["area"], np.float64),
        np.asarray(objects["iscrowd"], bool),
        None if labelled is None else np.asarray(labelled, np.int64),
    )


def _add_taught(labels: Sequence[dict[str, Any]], images: pa.StructArray) -> None:
    """Add what teachers found to the labels of each image, under the keys `TAUGHT`."""
    if images.null_count == len(images):
        return
    import torch

    from raydet.models.collate import TAUGHT

    fields = {field.name: images.field(field.name) for field in TAUGHT_TYPE}
    for at, (label, is_valid) in enumerate(zip(labels, images.is_valid().to_pylist(), strict=True)):
        if is_valid:
            row = {name: lists[at].values.to_numpy(zero_copy_only=False) for name, lists in fields.items()}
            num_classes = len(row["known"]) // len(row["weights"])
            widths = {"boxes_cxcywh": 4, "class_scores": num_classes, "known": num_classes}
            label |= {
                TAUGHT[name]: torch.tensor(value.reshape(-1, widths[name]) if name in widths else value)
                for name, value in row.items()
            }
