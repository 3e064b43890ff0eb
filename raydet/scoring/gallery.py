"""The gallery of a scoring run: some of its images with their boxes drawn, in OUT/__drawn.

The selection depends on the detections alone: the same table yields the same images, regardless of the number of
workers that wrote it and of their order.
"""

import csv
import heapq
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from raydet.common.boxes import Boxes, as_boxes
from raydet.common.hashing import hashes_of
from raydet.config import DEFAULT_MAX_PIXELS, DrawIf
from raydet.images.decode import DecodeError, decode
from raydet.images.drawing import RgbImage, at_readable_size, class_colours, draw_boxes
from raydet.tables import storage
from raydet.tables.schema import Category
from raydet.tables.table import Table

if TYPE_CHECKING:
    from raydet.images.collection import Collection

DRAWN_FOLDER = "__drawn"
INDEX_FILE = "index.csv"

_COLUMNS = ("image_id", "path", "file", "best_score", "num_boxes")
_OWN_FILE = re.compile(r"\d{4,}-[\w.-]+\.jpg|" + re.escape(INDEX_FILE))
_UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)
_MOST_NAME_CHARS = 80
_MIN_SIDE = 640
_MAX_SIDE = 1600
"""Longest side of a drawn image in pixels; `draw_boxes` fits its labels to it, so that they can be read."""
_JPEG_QUALITY = 90

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Chosen:
    """An image to draw.

    Attributes:
        position: Row in the detections table, with its files in name order; equals the position in the inputs.
        path: Path or URI of the image.
        size_hw: Height and width in pixels of the upright image.
        boxes_xywh: Boxes to draw, absolute pixels of the upright image, float64 [N, 4].
        scores: Scores of these boxes, float64 [N].
        categories: Class indices of these boxes, int64 [N].
        best_score: Highest score of all detections of the image; None without detections.
    """

    image_id: int
    position: int
    path: str
    size_hw: tuple[int, int]
    boxes_xywh: Boxes
    scores: _Floats
    categories: _Integers
    best_score: float | None


@dataclass(frozen=True)
class GalleryReport:
    """Outcome of drawing a gallery.

    Attributes:
        folder: Folder of the drawn images and of `index.csv`.
        failures: One line with the reason for each chosen image that could not be drawn.
    """

    folder: str
    num_drawn: int
    failures: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        return [*self.failures, f"{self.num_drawn:,} images drawn with their boxes: {self.folder}"]


@dataclass(frozen=True)
class GalleryPainter:
    """Selection and drawing of images of a finished detections table.

    Images that could not be read are never chosen. `draw_if` selects:

    - `any`: a random sample by a hash of seed and image id, including images without detections.
    - `low_score`: images whose best score is nearest to the threshold, on either side, where the model is least
      certain. The best box is drawn even if it does not exceed the threshold.
    - `many_boxes`: the images with the most boxes above the threshold; images without any are never chosen.

    The hash breaks ties.

    Attributes:
        out: Folder or URI of the run; the drawn images are written to OUT/__drawn.
        categories: Classes of the detections, in index order.
        threshold: Boxes at or below this score are not drawn.
        seed: Seed of the random sample and of the tie-breaking.
        max_pixels: Images with more pixels than this are not decoded.
    """

    out: str
    categories: Sequence[Category]
    max_images: int
    draw_if: DrawIf = "any"
    threshold: float = 0.3
    seed: int = 0
    max_pixels: int = DEFAULT_MAX_PIXELS

    def choose(self, table: Table) -> list[Chosen]:
        """Choose the images of a complete detections table to draw, in order of rank.

        Ids and scores of all rows are streamed once; boxes are read for the chosen images only.
        """
        if self.max_images == 0:
            return []
        columns = ["image_id", "error", *([] if self.draw_if == "any" else ["detections.score"])]
        # A heap of (-key, -hash, position) with the worst candidate on top: smaller keys and hashes rank higher.
        best: list[tuple[float, int, int]] = []
        start = 0
        for batch in table.iter_batches(columns, batch_size=4096):
            keys, hashes = self._keys(batch), hashes_of(batch.column("image_id").to_numpy(), self.seed)
            for row in _smallest(keys, hashes, self.max_images):
                item = (-float(keys[row]), -int(hashes[row]), start + int(row))
                if len(best) < self.max_images:
                    heapq.heappush(best, item)
                else:
                    heapq.heappushpop(best, item)
            start += batch.num_rows
        positions = [position for _, _, position in sorted(best, reverse=True)]
        rows = dict(table.rows_at(positions))
        return [self._chosen(position, rows[position]) for position in positions]

    def _keys(self, batch: pa.RecordBatch) -> _Floats:
        """Compute the sort key of each row, float64 [rows]: smaller ranks higher, infinity excludes the row."""
        is_readable = pc.is_null(batch.column("error")).to_numpy(zero_copy_only=False)
        keys = np.zeros(batch.num_rows)
        if self.draw_if != "any":
            scores = pc.struct_field(batch.column("detections"), "score")
            lengths = pc.fill_null(pc.list_value_length(scores), 0).to_numpy()
            owners, values = np.repeat(np.arange(len(lengths)), lengths), scores.flatten().to_numpy()
            if self.draw_if == "low_score":
                best = np.full(len(lengths), -np.inf)
                np.maximum.at(best, owners, values)
                keys = np.abs(best - self.threshold)
            else:
                counts = np.bincount(owners[values > self.threshold], minlength=len(lengths))
                keys = np.where(counts > 0, -counts.astype(np.float64), np.inf)
        return np.where(is_readable, keys, np.inf)

    def _chosen(self, position: int, row: pa.StructScalar) -> Chosen:
        found = row["detections"].as_py() or {"bbox": [], "score": [], "category": []}
        scores = np.array(found["score"], np.float64)
        is_drawn = scores > self.threshold
        if self.draw_if == "low_score":
            is_drawn[np.argmax(scores)] = True
        return Chosen(
            image_id=row["image_id"].as_py(),
            position=position,
            path=row["path"].as_py() or "",
            size_hw=(row["height"].as_py() or 0, row["width"].as_py() or 0),
            boxes_xywh=as_boxes(found["bbox"])[is_drawn],
            scores=scores[is_drawn],
            categories=np.array(found["category"], np.int64)[is_drawn],
            best_score=float(scores.max()) if scores.size else None,
        )

    def draw(self, images: "Collection", chosen: Sequence[Chosen]) -> GalleryReport:
        """Write OUT/__drawn/RANK-NAME.jpg, each atomically and named like its image, and then OUT/__drawn/index.csv.

        Drawn images of an earlier gallery are removed. Images that can no longer be read are omitted and reported.
        `images` is the collection that was scored, `chosen` the result of `choose`.
        """
        folder = storage.join(self.out, DRAWN_FOLDER)
        for name in storage.list_files(folder):
            if _OWN_FILE.fullmatch(name):
                storage.delete_file(storage.join(folder, name))
        entries: list[tuple[object, ...]] = []
        failures: list[str] = []
        for rank, item in enumerate(chosen, start=1):
            try:
                drawn = self._drawn(self._decoded(images, item), item)
            except (DecodeError, OSError) as error:
                failures.append(f"not drawn: image {item.image_id} ({item.path}): {error}")
                continue
            file = f"{rank:04d}-{_plain_name(item)}.jpg"
            storage.write_bytes(storage.join(folder, file), _jpeg(drawn))
            best_score = "" if item.best_score is None else item.best_score
            entries.append((item.image_id, item.path, file, best_score, len(item.scores)))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([_COLUMNS, *entries])
        storage.write_bytes(storage.join(folder, INDEX_FILE), text.getvalue().encode())
        return GalleryReport(folder, len(entries), tuple(failures))

    def _decoded(self, images: "Collection", item: Chosen) -> RgbImage:
        row = next(iter(images.read(item.position, item.position + 1)), None)
        if row is None or row.image_id != item.image_id:
            raise DecodeError("these are not the images that were scored")
        if row.data is None:
            raise DecodeError(row.error or "the image can no longer be read")
        return decode(row.data, max_pixels=self.max_pixels)

    def _drawn(self, image: RgbImage, item: Chosen) -> RgbImage:
        """Resize an image to suit a screen and draw its boxes."""
        # Boxes refer to the size in the table, which equals the image's unless the file has changed since.
        height, width = item.size_hw if all(item.size_hw) else image.shape[:2]
        resized = at_readable_size(image, min_side=_MIN_SIDE, max_side=_MAX_SIDE)
        scale = np.array([resized.shape[1] / width, resized.shape[0] / height] * 2)
        names = [category.name for category in self.categories]
        labels = [names[category] for category in item.categories]
        colours = class_colours(names)
        return draw_boxes(resized, item.boxes_xywh * scale, labels, scores=item.scores, colours=colours)


def _plain_name(item: Chosen) -> str:
    """Return the name of an image without its extension, in characters that every file system and URL accepts."""
    name = PurePosixPath(item.path.partition("?")[0]).stem
    return _UNSAFE.sub("_", name)[:_MOST_NAME_CHARS].strip(".") or str(item.image_id)


def _smallest(keys: _Floats, hashes: npt.NDArray[np.uint64], count: int) -> _Integers:
    """Return at most `count` rows with the smallest finite keys; the smaller hash breaks ties."""
    order = np.lexsort((hashes, keys))
    return order[: min(count, int(np.isfinite(keys).sum()))]


def _jpeg(image: RgbImage) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
