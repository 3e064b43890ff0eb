"""Images and their detections → crops: each image is decoded once, and its detections are cut from it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raydet.common.errors import RunError, UserError
from raydet.common.threads import in_order
from raydet.images.collection import ImageRow
from raydet.images.decode import DecodeError, decode
from raydet.second_looks.models.looker import Pixels
from raydet.second_looks.work import CropsWork
from raydet.tables.columns import image_ids_in
from raydet.tables.table import Table, refusing_damage

_MOST_BYTES_AHEAD = 512 * 2**20
"""Decoded pixels that wait for the model."""
_COLUMNS = ("image_id", "path", "detections")


@dataclass(frozen=True)
class Crop:
    """One detection.

    Attributes:
        row: Its columns in the table, without those of the model.
        pixels: RGB, uint8 [height, width, 3]; None if `error` says why there are none.
    """

    row: dict[str, Any]
    pixels: Pixels | None
    error: str | None = None


@dataclass
class _OpenedImage:
    """An image and its detections."""

    row: ImageRow
    detections: list[dict[str, Any]]
    pixels: Pixels | None = None
    error: str | None = field(default=None)


def crops_of(work: CropsWork, rows: range, *, num_threads: int) -> Iterator[Crop]:
    """Yield the crops of some images, in order, decoding a few images ahead in threads.

    Raises:
        UserError: The images are not those of the detections.
        OSError: The storage failed.
    """

    def open_image(image: _OpenedImage) -> _OpenedImage:
        if image.detections and image.error is None:
            try:
                image.pixels = decode(image.row.data or b"", max_pixels=work.config.max_pixels)
            except DecodeError as error:
                image.error = str(error)
        return image

    opened = in_order(
        open_image,
        _images(work, rows),
        num_threads=num_threads,
        ahead=2 * num_threads,
        weigh=lambda image: 0 if image.pixels is None else image.pixels.nbytes,
        most=_MOST_BYTES_AHEAD,
    )
    for image in opened:
        for detection in image.detections:
            yield _cut(image, detection, work.config.margin, work.config.min_side)


def _images(work: CropsWork, rows: range) -> Iterator[_OpenedImage]:
    names = [category.name for category in work.found.categories]
    read = work.images.read(rows.start, rows.stop)
    for batch in detections_in(work.found, rows, _COLUMNS):
        ids, paths, lists = image_ids_in(batch).tolist(), batch.column("path").to_pylist(), batch.column("detections")
        for image_id, path, found, image in zip(ids, paths, lists.to_pylist(), read, strict=False):
            if image.image_id != image_id:
                raise UserError(
                    f"the images of --data are not those of {work.found.uri}: image {image.image_id} is in the place "
                    f"of image {image_id}; name the images that predict scored"
                )
            detections = [
                {
                    "image_id": image_id,
                    "path": path,
                    "detection": place,
                    "category": names[category],
                    "bbox": box,
                    "score": score,
                }
                for place, (category, box, score) in enumerate(_boxes_in(found))
                if score >= work.config.score_threshold
            ]
            yield _OpenedImage(image, detections, error=image.error)


def _boxes_in(found: dict[str, Any] | None) -> Iterator[tuple[int, list[float], float]]:
    """Yield category, box and score of each detection of a row, which may be null if there are none."""
    lists = [found[name] or [] for name in ("category", "bbox", "score")] if found else []
    return zip(*lists, strict=True)


def detections_in(found: Table, rows: range, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield some rows of a detections table, in order: all columns, or the given ones.

    Raises:
        RunError: The table has fewer rows.
        UserError: It is damaged, or cannot be read.
    """
    num_rows = 0
    with refusing_damage(found.uri):
        for batch in found.read_rows(rows.start, rows.stop, columns):
            num_rows += batch.num_rows
            yield batch
    if num_rows != len(rows):
        raise RunError(f"{found.uri} changed during the run; run the same command again")


def _cut(image: _OpenedImage, detection: dict[str, Any], margin: float, min_side: int) -> Crop:
    """Cut a detection from its image: its box, larger by the margin, whole pixels, inside the image."""
    if image.pixels is None:
        return Crop(detection, None, image.error)
    left, top, right, bottom = box_of(detection["bbox"], margin, (image.pixels.shape[0], image.pixels.shape[1]))
    if min(right - left, bottom - top) < max(1, min_side):
        return Crop(detection, None, f"smaller than {max(1, min_side)} pixels")
    # A copy, so that the image is freed while its crops wait for the model.
    return Crop(detection, image.pixels[top:bottom, left:right].copy())


def box_of(bbox_xywh: list[float], margin: float, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixels of a crop: left and top inclusive, right and bottom exclusive.

    Args:
        bbox_xywh: Box in absolute pixels.
        margin: Share of its width and height that is added on each side.
        size_hw: Height and width of the image.
    """
    x, y, width, height = bbox_xywh
    return (
        max(0, math.floor(x - margin * width)),
        max(0, math.floor(y - margin * height)),
        min(size_hw[1], math.ceil(x + (1 + margin) * width)),
        min(size_hw[0], math.ceil(y + (1 + margin) * height)),
    )
