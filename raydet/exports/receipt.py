"""Proof of an exported graph: its detections beside those of the checkpoint, on a table of labelled images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydet.common.boxes import as_boxes, xywh_to_xyxy, xyxy_to_xywh
from raydet.common.class_names import indices_in
from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.engines.in_memory.loaded import load
from raydet.exports.pixels_in import DETECTIONS, PIXELS
from raydet.images.collection import open_collection
from raydet.images.decode import DecodeError, decode
from raydet.measuring.numbers.accumulator import CocoAccumulator, ImageDetections, ImageTruth
from raydet.models.geometry import Image
from raydet.tables.columns import Floats, Integers
from raydet.tables.table import Table

COMPARED_SCORE = 0.3
"""Boxes are compared for detections above this score."""


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


def compare(detect: Callable[[Image], ImageDetections], checkpoint: str, table: Table, progress: Progress) -> Receipt:
    """Run a graph and its checkpoint on the images of a table.

    Args:
        detect: Runs the graph on one picture, RGB uint8 [H, W, 3].
        checkpoint: Model folder or Hub name.
        table: Images table with boxes.
        progress: Advances by images.

    Raises:
        UserError: The table is damaged, or has none of the model's classes or no readable image.
    """
    model = load(checkpoint, score_threshold=0.0)
    names = [category.name for category in model.categories]
    index_of = indices_in([category.name for category in table.categories], names)
    if not (index_of >= 0).any():
        raise UserError(f"{table.uri} has none of the classes of {checkpoint}: {', '.join(names)}")
    accumulators = CocoAccumulator(model.categories), CocoAccumulator(model.categories)
    distances: list[Floats] = []
    num_images = 0
    progress.begin("comparing on images", total=table.num_rows)
    for image_id, pixels, truth in _labelled(table, index_of):
        own = model(pixels)
        both = ImageDetections(own.boxes_xywh, own.scores, own.class_indices), detect(pixels)
        for accumulator, found in zip(accumulators, both, strict=True):
            accumulator.add(image_id, truth, found)
        distances += [_distances(*both), _distances(*both[::-1])]
        num_images += 1
        progress.advance(1)
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


def _labelled(table: Table, index_of: Integers) -> Iterator[tuple[int, Image, ImageTruth]]:
    """Yield id, pixels and truth of each readable image; boxes of other classes are left out."""
    images = open_collection(table.uri, index_uri=None)
    position = 0
    for batch in table.iter_batches(["image_id", "objects"], 64):
        rows = images.read(position, position + batch.num_rows)
        position += batch.num_rows
        for image, objects in zip(rows, batch.column("objects").to_pylist(), strict=True):
            if image.data is None:
                continue
            try:
                pixels = decode(image.data, max_pixels=DEFAULT_MAX_PIXELS)
            except DecodeError:
                continue
            category = index_of[np.array(objects["category"], np.int64)]
            known = category >= 0
            truth = ImageTruth(
                boxes_xywh=as_boxes(objects["bbox"])[known],
                category=category[known],
                area=np.array(objects["area"], np.float64)[known],
                iscrowd=np.array(objects["iscrowd"], np.bool_)[known],
            )
            yield image.image_id, pixels, truth


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


def graph_of(session: Any) -> Callable[[Image], ImageDetections]:
    """Return a function that runs an ONNX Runtime session with pixels in on one picture."""

    def detect(pixels: Image) -> ImageDetections:
        boxes_xyxy, scores, labels = session.run(DETECTIONS, {PIXELS: pixels[None]})
        return ImageDetections(xyxy_to_xywh(as_boxes(boxes_xyxy[0])), scores[0].astype(np.float64), labels[0])

    return detect
