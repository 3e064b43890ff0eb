"""Proof of an exported graph: its detections beside those of the checkpoint, on a table of labelled images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from raydet.common.boxes import as_boxes, xywh_to_xyxy, xyxy_to_xywh
from raydet.common.class_names import indices_in
from raydet.common.display.progress import Progress
from raydet.common.errors import RunError, UserError
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.engines.in_memory.loaded import LoadedModel, load
from raydet.images.collection import open_collection
from raydet.images.decode import DecodeError, decode
from raydet.measuring.numbers.accumulator import CocoAccumulator, ImageDetections, ImageTruth
from raydet.models.detector import Detector
from raydet.models.geometry import Image
from raydet.models.graph import example_inputs, input_names
from raydet.tables.columns import Floats, Integers
from raydet.tables.schema import LABELLED_COLUMN
from raydet.tables.table import Table

Run = Callable[[list[npt.NDArray[Any]]], Sequence[npt.NDArray[Any]]]
"""Runs a graph on its inputs, and returns its outputs."""
MAX_DIFFERENCE = 1e-3
"""Largest accepted difference from torch in scores and boxes; boxes are fractions of the image's sides."""
Detect = Callable[[Sequence[Image]], Sequence[ImageDetections]]
"""Runs a model on pictures, RGB uint8 [H, W, 3]."""

COMPARED_SCORE = 0.3
"""Boxes are compared for detections above this score."""
_IMAGES_AT_ONCE = 16
_CHECKED_BATCHES = (1, 3)
_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Agreement of a graph with the checkpoint that it was made from.

    Attributes:
        data: Images table.
        num_images: Images that both have seen; those that cannot be read are left out.
        num_compared: Detections of either side above a score of 0.3.
        num_without_partner: Those of them for which the other side has no box of the class within half of their longer
            side.
        max_box_difference_px: Largest difference of a coordinate among the others; None if there are none.
        share_within_half_px: Share of the others whose coordinates all differ by at most half a pixel; None likewise.
        ap_checkpoint: AP of the checkpoint in torch; None if no image has a labelled box.
        ap_graph: AP of the graph; None likewise.
    """

    data: str
    num_images: int
    num_compared: int
    num_without_partner: int
    max_box_difference_px: float | None
    share_within_half_px: float | None
    ap_checkpoint: float | None
    ap_graph: float | None

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        difference = "–" if self.max_box_difference_px is None else f"{self.max_box_difference_px:.2f} px"
        within = "–" if self.share_within_half_px is None else f"{self.share_within_half_px:.2%}"
        alone = f", {self.num_without_partner:,} without a partner" if self.num_without_partner else ""
        agreement = (
            f"boxes of {self.num_compared:,} detections above {COMPARED_SCORE}: {within} within half a pixel, largest "
            f"difference {difference}{alone}"
        )
        graph, checkpoint = ("–" if ap is None else f"{ap:.4f}" for ap in (self.ap_graph, self.ap_checkpoint))
        return [f"AP on {self.num_images:,} images: {graph}, in torch {checkpoint}", agreement]


def compare(detect: Detect, checkpoint: str, table: Table, progress: Progress) -> Receipt:
    """Run a graph and its checkpoint on the images of a table.

    Args:
        detect: Runs the graph.
        checkpoint: Model folder or Hub name.
        table: Images table with boxes.
        progress: Advances by images.

    Raises:
        UserError: The table is damaged, or has none of the model's classes or no readable image.
    """
    model = load(checkpoint, score_threshold=0.0)
    index_of = class_indices(table, [category.name for category in model.categories], checkpoint)
    sides = detect_with(model), detect
    accumulators = CocoAccumulator(model.categories), CocoAccumulator(model.categories)
    distances: list[Floats] = []
    num_images = 0
    progress.begin("comparing on images", total=table.num_rows)
    for batch in labelled_images(table, index_of):
        found = [side([image.pixels for image in batch]) for side in sides]
        for image, *both in zip(batch, *found, strict=True):
            for accumulator, own in zip(accumulators, both, strict=True):
                accumulator.add(image.image_id, image.truth, own)
            distances += [_distances(*both), _distances(*both[::-1])]
        num_images += len(batch)
        progress.advance(len(batch))
    if not num_images:
        raise UserError(f"{table.uri} has no image that can be read")
    every = np.concatenate(distances)
    partners = every[np.isfinite(every)]
    ap_checkpoint, ap_graph = (accumulator.result().values["AP"] for accumulator in accumulators)
    return Receipt(
        data=table.uri,
        num_images=num_images,
        num_compared=len(every),
        num_without_partner=len(every) - len(partners),
        max_box_difference_px=float(partners.max()) if len(partners) else None,
        share_within_half_px=float((partners <= 0.5).mean()) if len(partners) else None,
        ap_checkpoint=ap_checkpoint,
        ap_graph=ap_graph,
    )


def detect_with(model: LoadedModel) -> Detect:
    """Return a function that runs a loaded model."""

    def detect(pictures: Sequence[Image]) -> list[ImageDetections]:
        return [ImageDetections(own.boxes_xywh, own.scores, own.class_indices) for own in model(list(pictures))]

    return detect


def class_indices(table: Table, class_names: Sequence[str], checkpoint: str) -> Integers:
    """Return the index of each class of a table among those of a model; −1 for classes that the model lacks.

    Raises:
        UserError: The model lacks all of them.
    """
    index_of = indices_in([category.name for category in table.categories], class_names)
    if not (index_of >= 0).any():
        raise UserError(f"{table.uri} has none of the classes of {checkpoint}: {', '.join(class_names)}")
    return index_of


@dataclass(frozen=True)
class LabelledImage:
    """Readable image of a table; pixels are RGB uint8 [H, W, 3]."""

    image_id: int
    pixels: Image
    truth: ImageTruth


def labelled_images(table: Table, index_of: Integers) -> Iterator[list[LabelledImage]]:
    """Yield the readable images of a table, a few at a time, without the boxes of classes whose index is −1."""
    rest = _labelled(table, index_of)
    while batch := list(islice(rest, _IMAGES_AT_ONCE)):
        yield batch


def _labelled(table: Table, index_of: Integers) -> Iterator[LabelledImage]:
    images = open_collection(table.uri, index_uri=None)
    columns = ["image_id", "objects", *([LABELLED_COLUMN] if LABELLED_COLUMN in table.schema.names else [])]
    position = 0
    for batch in table.iter_batches(columns, 64):
        rows = images.read(position, position + batch.num_rows)
        position += batch.num_rows
        for image, row in zip(rows, batch.to_pylist(), strict=True):
            if image.data is None:
                continue
            try:
                pixels = decode(image.data, max_pixels=DEFAULT_MAX_PIXELS)
            except DecodeError:
                continue
            yield LabelledImage(image.image_id, pixels, _truth(row, index_of))


def _truth(row: dict[str, Any], index_of: Integers) -> ImageTruth:
    objects, labelled = row["objects"], row.get(LABELLED_COLUMN)
    category = index_of[np.array(objects["category"], np.int64)]
    known = category >= 0
    classes = None if labelled is None else index_of[np.array(labelled, np.int64)]
    return ImageTruth(
        boxes_xywh=as_boxes(objects["bbox"])[known],
        category=category[known],
        area=np.array(objects["area"], np.float64)[known],
        iscrowd=np.array(objects["iscrowd"], np.bool_)[known],
        labelled=None if classes is None else classes[classes >= 0],
    )


def _distances(found: ImageDetections, other: ImageDetections) -> Floats:
    """Return, for each detection above the score, the largest difference of a coordinate from its partner, or infinity.

    The partner is the nearest box of the same class on the other side.
    """
    clear = found.scores > COMPARED_SCORE
    boxes, category = found.boxes_xywh[clear], found.category[clear]
    if not len(other.scores):
        return np.full(len(boxes), np.inf)
    between = np.abs(xywh_to_xyxy(boxes)[:, None] - xywh_to_xyxy(other.boxes_xywh)[None]).max(axis=-1)
    between[category[:, None] != other.category[None]] = np.inf
    nearest: Floats = between.min(axis=1)
    return np.where(nearest <= boxes[:, 2:].max(axis=1, initial=0.0) / 2, nearest, np.inf)


def detect_from_pixels(run: Run) -> Detect:
    """Return a function that runs a graph with pixels in, picture by picture, because their sizes differ."""

    def detect(pictures: Sequence[Image]) -> list[ImageDetections]:
        return [_first(run([pixels[None]])) for pixels in pictures]

    return detect


def _first(outputs: Sequence[Any]) -> ImageDetections:
    """Return the detections of the first image in the outputs of a graph with pixels in."""
    boxes_xyxy, scores, labels = (output[0] for output in outputs)
    return ImageDetections(xyxy_to_xywh(as_boxes(boxes_xyxy)), scores.astype(np.float64), labels)


def difference_from_torch(detector: Detector, run: Run, *, where: str) -> float:
    """Return the largest difference in scores and boxes between torch and a graph on one and on three random images.

    If it is too large, other images are tried: of two proposals with equal scores either may be taken, after which all
    boxes of an image differ. A wrong graph differs on all images.

    Args:
        detector: Detector with weights, on the CPU.
        run: Runs the graph on arrays in the order of `input_names`, and returns logits and boxes.
        where: The graph, for the error message.

    Raises:
        RunError: It is larger than `MAX_DIFFERENCE`.
    """
    for attempt in range(_ATTEMPTS):
        difference = max(_difference(detector, run, size, seed=size + 10 * attempt) for size in _CHECKED_BATCHES)
        if difference <= MAX_DIFFERENCE:
            return difference
    raise RunError(
        f"{where} differs from torch by {difference:.1e} in scores or boxes, more than {MAX_DIFFERENCE:.0e}; nothing "
        "was written"
    )


def _difference(detector: Detector, run: Run, batch_size: int, *, seed: int) -> float:
    inputs = example_inputs(detector, batch_size, seed=seed)
    theirs = run([value.numpy() for value in inputs])
    with torch.inference_mode():
        outputs = detector.model(**dict(zip(input_names(detector), inputs, strict=True)))
    mine = _answers(detector, outputs.logits, outputs.pred_boxes)
    others = _answers(detector, *map(torch.from_numpy, theirs))
    return max(_distance(own, other) for own, other in zip(mine, others, strict=True))


def _answers(detector: Detector, logits: Tensor, boxes: Tensor) -> Any:
    """Return class scores and cxcywh boxes, float64 [B, Q, C + 4]."""
    scores = logits.softmax(-1)[..., :-1] if detector.family.softmax else logits.sigmoid()
    return torch.cat([scores, boxes], dim=-1).double().numpy()


def _distance(mine: Any, other: Any) -> float:
    """Return the largest difference between the queries of an image after optimal matching.

    Families that select their queries may order them differently, and rounding may change the last ones selected;
    therefore the lower half by score is ignored.
    """
    assert mine.shape == other.shape, f"output shapes differ: {mine.shape} and {other.shape}"
    if not np.isfinite(other).all():
        return float("inf")
    between = np.abs(mine[:, None] - other[None]).max(axis=-1)
    rows, columns = linear_sum_assignment(between)
    best = np.argsort(-mine[:, :-4].max(axis=-1))[: max(1, len(mine) // 2)]
    return float(between[rows, columns][best].max())
