"""Proof of an exported graph: its detections beside those of the checkpoint, on a table of labelled images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydet.common.boxes import as_boxes, xywh_to_xyxy, xyxy_to_xywh
from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.engines.in_memory.loaded import load
from raydet.exports.pixels_in import DETECTIONS, PIXELS
from raydet.images.collection import open_collection
from raydet.images.decode import DecodeError, decode
from raydet.models.geometry import Image
from raydet.tables.table import Table, open_table

COMPARED_SCORE = 0.3
"""Boxes are compared for detections above this score."""

Found = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]
"""Boxes (x, y, width, height) [N, 4] in pixels, scores [N] and labels [N] of one picture."""


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
        ap_checkpoint: AP of the checkpoint in torch.
        ap_graph: AP of the graph.
    """

    data: str
    num_images: int
    num_compared: int
    num_without_partner: int
    max_box_difference_px: float | None
    share_within_half_px: float | None
    ap_checkpoint: float
    ap_graph: float

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        difference = "–" if self.max_box_difference_px is None else f"{self.max_box_difference_px:.2f} px"
        within = "–" if self.share_within_half_px is None else f"{self.share_within_half_px:.2%}"
        alone = f", {self.num_without_partner:,} without a partner" if self.num_without_partner else ""
        agreement = (
            f"boxes of {self.num_compared:,} detections above {COMPARED_SCORE}: {within} within half a pixel, largest "
            f"difference {difference}{alone}"
        )
        return [
            f"AP on {self.num_images:,} images: {self.ap_graph:.4f}, in torch {self.ap_checkpoint:.4f}",
            agreement,
        ]


def compare(detect: Callable[[Image], Found], checkpoint: str, data: str, progress: Progress) -> Receipt:
    """Run a graph and its checkpoint on the images of a table.

    Args:
        detect: Runs the graph on one picture, RGB uint8 [H, W, 3].
        checkpoint: Model folder or Hub name.
        data: Images table with boxes.
        progress: Advances by images.

    Raises:
        UserError: The table is missing or damaged, or has none of the model's classes or no readable image.
    """
    from raydet.measuring.coco_ap import CocoAP  # imports torchmetrics

    table = open_table(data, "images")
    model = load(checkpoint, score_threshold=0.0)
    names = [category.name for category in model.categories]
    index_of = {index: names.index(own.name) for index, own in enumerate(table.categories) if own.name in names}
    if not index_of:
        raise UserError(f"{table.uri} has none of the classes of {checkpoint}: {', '.join(names)}")
    metrics = CocoAP("xywh"), CocoAP("xywh")
    distances: list[npt.NDArray[np.float64]] = []
    num_images = 0
    progress.begin("comparing on images", total=table.num_rows)
    for pixels, truth in _labelled(table, index_of):
        own = model(pixels)
        both = (own.boxes_xywh, own.scores, own.class_indices), detect(pixels)
        for metric, found in zip(metrics, both, strict=True):
            metric.update([_tensors(found)], [truth])
        distances += [_distances(*both), _distances(*both[::-1])]
        num_images += 1
        progress.advance(1)
    if not num_images:
        raise UserError(f"{table.uri} has no image that can be read")
    every = np.concatenate(distances)
    partners = every[np.isfinite(every)]
    ap_checkpoint, ap_graph = (float(metric.compute()["map"]) for metric in metrics)
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


def _labelled(table: Table, index_of: dict[int, int]) -> Iterator[tuple[Image, dict[str, Any]]]:
    """Yield pixels and truth of each readable image; boxes of other classes are left out."""
    images = open_collection(table.uri, index_uri=None)
    position = 0
    for batch in table.iter_batches(["image_id", "objects"], 64):
        rows = images.read(position, position + batch.num_rows)
        position += batch.num_rows
        for image, row in zip(rows, batch.to_pylist(), strict=True):
            if image.data is None:
                continue
            try:
                pixels = decode(image.data, max_pixels=DEFAULT_MAX_PIXELS)
            except DecodeError:
                continue
            objects = row["objects"]
            kept = [place for place, category in enumerate(objects["category"]) if category in index_of]
            truth = {
                "boxes": torch.tensor([objects["bbox"][place] for place in kept], dtype=torch.float64).reshape(-1, 4),
                "labels": torch.tensor([index_of[objects["category"][place]] for place in kept]).long(),
                "iscrowd": torch.tensor([int(objects["iscrowd"][place]) for place in kept]).long(),
                "area": torch.tensor([objects["area"][place] for place in kept], dtype=torch.float64),
                "image_id": row["image_id"],
            }
            yield pixels, truth


def _tensors(found: Found) -> dict[str, Any]:
    boxes_xywh, scores, labels = found
    return {
        "boxes": torch.as_tensor(as_boxes(boxes_xywh)),
        "scores": torch.as_tensor(np.asarray(scores, np.float64)),
        "labels": torch.as_tensor(np.asarray(labels, np.int64)),
    }


def _distances(found: Found, other: Found) -> npt.NDArray[np.float64]:
    """Return, for each detection above the score, the largest difference of a coordinate from its partner, or infinity.

    The partner is the nearest box of the same class on the other side.
    """
    boxes, scores, labels = found
    clear = scores > COMPARED_SCORE
    boxes, labels = as_boxes(boxes)[clear], labels[clear]
    corners, others = xywh_to_xyxy(boxes), xywh_to_xyxy(as_boxes(other[0]))
    if not len(others):
        return np.full(len(boxes), np.inf)
    between = np.abs(corners[:, None] - others[None]).max(axis=-1)
    between[labels[:, None] != other[2][None]] = np.inf
    nearest: npt.NDArray[np.float64] = between.min(axis=1)
    return np.where(nearest <= boxes[:, 2:].max(axis=1, initial=0.0) / 2, nearest, np.inf)


def graph_of(session: Any) -> Callable[[Image], Found]:
    """Return a function that runs an ONNX Runtime session with pixels in on one picture."""

    def detect(pixels: Image) -> Found:
        boxes_xyxy, scores, labels = session.run(DETECTIONS, {PIXELS: pixels[None]})
        return xyxy_to_xywh(boxes_xyxy[0].astype(np.float64)), scores[0].astype(np.float64), labels[0]

    return detect
