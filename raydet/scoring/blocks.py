"""Rows of the input → blocks of decoded images, cut into views and resized to the model's input size.

A block is one Arrow table. Its pixels are copied into one buffer, the only copy between decoder and model. Decode
processes import this module: torch and torchvision are imported only to resize, transformers never.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.augmentation.view import decoded
from raydet.cluster.stopwatch import ProcessStats, Stopwatch
from raydet.config import PredictConfig
from raydet.engines.views import crop, planned_views
from raydet.images.collection import ImageRow
from raydet.images.decode import DecodeError
from raydet.models.geometry import BILINEAR, Image, PixelBuffer, ResizeRule, SizeHW, resized_planes
from raydet.scoring.plan import ScoringPlan, Work
from raydet.tables.schema import THUMBNAIL_COLUMN, THUMBNAIL_SHAPE, THUMBNAIL_TYPE

MOST_BLOCK_BYTES = 32 * 2**20

_Bytes = npt.NDArray[np.uint8]


def blocks_of(
    work: Work, rows: range, rule: ResizeRule | None, *, most_bytes: int = MOST_BLOCK_BYTES
) -> Iterator[tuple[pa.Table, ProcessStats]]:
    """Decode consecutive rows of a chunk and yield blocks, each with the seconds that it took.

    The rows begin at the start of a chunk or after one of its blocks. Without a rule the images keep their size, as
    with `resize_on` = "device". A block of at least `most_bytes` of pixels ends with its current batch, and one of
    twice as many immediately.

    Yields:
        Tables with the columns `image_id`, `path`, `error`, `height` and `width` of the upright image, `pixel_height`
        and `pixel_width` of the decoded one, null if it cannot be read, those of the collection's `extra_fields`,
        `thumbnail` if the run keeps it, and `pixels`: the views of the image one after the other, each
        uint8 [3, height, width] as resized by the rule; the image, uint8 [height, width, 3], if the decoder does not
        resize.
    """
    watch = Stopwatch("decoder")
    images = iter(work.images.read(rows.start, rows.stop))
    plan, position = work.plan, rows.start
    while position < rows.stop:
        block = _Block(work, rule, watch, most_bytes)
        while position < rows.stop and not block.is_full(plan, most_bytes):
            with watch.measuring("read"):
                row = next(images)
            block.add(row)
            position += 1
        yield block.to_table(), watch.lap()


class _Block:
    """A block that is being filled."""

    def __init__(self, work: Work, rule: ResizeRule | None, watch: Stopwatch, most_bytes: int) -> None:
        self._config, self._rule, self._watch = work.config, rule, watch
        self._extra_fields = work.images.extra_fields
        self._rows: list[ImageRow] = []
        self._decoded_hw: list[SizeHW | None] = []
        # Pages that are not written take no memory.
        self._pixels = PixelBuffer(2 * most_bytes)
        self._ends: list[int] = []
        self._keeps_thumbnail = "thumbnail" in (work.config.keep or ())
        self._thumbnails: list[_Bytes | None] = []

    def is_full(self, plan: ScoringPlan, most_bytes: int) -> bool:
        num_images = len(self._rows)
        num_bytes = len(self._pixels.content)
        if num_bytes >= 2 * most_bytes or num_images == plan.images_per_block:
            return True
        return num_bytes >= most_bytes and num_images % plan.images_per_batch == 0

    def add(self, row: ImageRow) -> None:
        error, size_hw, decoded_hw, thumbnail = row.error, row.size_hw, None, None
        if error is None:
            try:
                with self._watch.measuring("decode"):
                    reduce_to = self._rule.target_size_hw if self._rule and self._config.reduced_decode else None
                    image, size_hw = decoded(row.data or b"", max_pixels=self._config.max_pixels, reduce_to=reduce_to)
            except DecodeError as reason:
                error = str(reason)
            else:
                decoded_hw = (image.shape[0], image.shape[1])
                with self._watch.measuring("prepare"):
                    if self._keeps_thumbnail:
                        thumbnail = _thumbnail_of(image)
                    for pixels in _resized_views(image, decoded_hw, self._config, self._rule):
                        self._pixels.append(pixels.shape)[:] = pixels
        self._rows.append(replace(row, data=None, error=error, size_hw=size_hw))
        self._decoded_hw.append(decoded_hw)
        self._ends.append(len(self._pixels.content))
        self._thumbnails.append(thumbnail)

    def to_table(self) -> pa.Table:
        offsets = np.array([0, *self._ends], np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._pixels.content)]
        heights, widths = _columns([row.size_hw for row in self._rows])
        pixel_heights, pixel_widths = _columns(self._decoded_hw)
        return pa.table(
            {
                "image_id": pa.array([row.image_id for row in self._rows], pa.int64()),
                "path": pa.array([row.path for row in self._rows], pa.string()),
                "error": pa.array([row.error for row in self._rows], pa.string()),
                "height": heights,
                "width": widths,
                "pixel_height": pixel_heights,
                "pixel_width": pixel_widths,
                **{
                    field.name: pa.array([row.extra[number] for row in self._rows], field.type)
                    for number, field in enumerate(self._extra_fields)
                },
                **({THUMBNAIL_COLUMN: pa.array(self._thumbnails, THUMBNAIL_TYPE)} if self._keeps_thumbnail else {}),
                "pixels": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self._rows), buffers),
            }
        )


def _columns(sizes_hw: Sequence[SizeHW | None]) -> tuple[pa.Array, pa.Array]:
    heights, widths = zip(*(size_hw or (None, None) for size_hw in sizes_hw), strict=True)
    return pa.array(heights, pa.int64()), pa.array(widths, pa.int64())


def _resized_views(image: Image, size_hw: SizeHW, config: PredictConfig, rule: ResizeRule | None) -> Iterator[Image]:
    if rule is None or config.resize_on == "device":
        yield image
        return
    for view in planned_views(size_hw, config):
        yield resized_planes(crop(image, view), rule.target_size_hw(view.size_hw), rule.resample)


def _thumbnail_of(image: Image) -> _Bytes:
    # Of all resampling filters that see every pixel, this one has the fastest implementation.
    planes = resized_planes(image, THUMBNAIL_SHAPE[:2], BILINEAR)
    return planes.transpose(1, 2, 0).reshape(-1)


def images_in(block: pa.Table) -> tuple[list[SizeHW], list[_Bytes]]:
    """Return the decoded height and width of each readable image of a block, and its bytes without a copy."""
    block = block.combine_chunks()
    pixels = block["pixels"].chunk(0)
    offsets = np.frombuffer(pixels.buffers()[1], np.int64)[pixels.offset : pixels.offset + len(pixels) + 1]
    data = pixels.buffers()[2]
    flat = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    heights, widths = (block[name].to_numpy() for name in ("pixel_height", "pixel_width"))
    readable = np.flatnonzero(~np.isnan(heights.astype(np.float64)))
    sizes_hw = [(int(heights[row]), int(widths[row])) for row in readable]
    return sizes_hw, [flat[offsets[row] : offsets[row + 1]] for row in readable]


def planes_in(pixels: _Bytes, size_hw: SizeHW, config: PredictConfig, rule: ResizeRule) -> list[Image]:
    """Split an image's bytes, from `images_in`, into its resized views, uint8 [3, height, width] each, without a copy.

    `size_hw` is the decoded height and width.
    """
    planes, start = [], 0
    for view in planned_views(size_hw, config):
        height, width = rule.target_size_hw(view.size_hw)
        planes.append(pixels[start : start + 3 * height * width].reshape(3, height, width))
        start += 3 * height * width
    return planes
