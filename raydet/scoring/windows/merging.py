"""The detections in the tiles of pictures → the detections table: one row per picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydet.engines.selection import least_score_of_views
from raydet.engines.views import tiles_of
from raydet.images.collection import WindowedCollection
from raydet.images.windows.directory import WindowError
from raydet.images.windows.index import PICTURE_FIELDS, ListedPicture
from raydet.scoring.chunks import rows_of, write_chunk
from raydet.scoring.plan import OWN_TABLE, ChunkStats, ScoringPlan, Work, part_name, table_uri
from raydet.scoring.windows.rows import WindowRows, place_of
from raydet.tables import storage
from raydet.tables.schema import build_schema, token_of, with_token

if TYPE_CHECKING:
    from raydet.models.detector import Detections

WINDOWS_FOLDER = "__windows"
"""Subfolder of OUT with the detections in tiles, until the table is complete."""
_PICTURES_PER_FILE = 16
_COLUMNS = ("detections", "error")


def plan_of_pictures(num_pictures: int) -> ScoringPlan:
    """Return the division of pictures into files."""
    return ScoringPlan(
        num_rows=num_pictures, rows_per_file=_PICTURES_PER_FILE, images_per_block=1, images_per_batch=1, batch_size=1
    )


def work_of_windows(work: Work) -> Work:
    """Return the work of scoring each tile of the pictures as an image by itself."""
    assert isinstance(work.images, WindowedCollection), "its index states sizes"
    config, rows = work.config, WindowRows.of(work.images, work.config)
    # Nothing is selected before the tiles of a picture are merged, but what does not matter for the result.
    least = 0.0 if work.point is not None else least_score_of_views(config.score_threshold or 0.0, config.merge)
    config = replace(
        config,
        tile=None,
        windowed=False,
        flip=False,
        score_threshold=least,
        top_k=None,
        class_agnostic_nms=None,
        operating_point=False,
    )
    schema = with_token(build_schema("detections"), token_of(work.schemas[OWN_TABLE].metadata) or "")
    plan = ScoringPlan.of(config, rows.num_rows, 1)
    return replace(work, config=config, images=rows, plan=plan, schemas={WINDOWS_FOLDER: schema}, point=None)


@dataclass(frozen=True)
class PictureWriter:
    """Writer of the final files; can be pickled to any worker.

    Attributes:
        work: Work of the pictures.
        windows: Work of their tiles, all of whose files are there.
    """

    work: Work
    windows: Work

    def __call__(self, chunk: int) -> ChunkStats:
        """Merge the detections of some pictures, one picture after the other, and write their file."""
        rows, pictures = self.work.plan.rows_of(chunk), self.work.images
        assert isinstance(pictures, WindowedCollection), "its index states sizes"
        found: list[Detections] = []
        listed: list[ListedPicture] = []
        tiles = _TileRows(self.windows)
        for number, picture in zip(rows, pictures.pictures(rows.start, rows.stop), strict=True):
            if picture.size_hw is not None:
                try:
                    found.append(self._merged(number, picture.size_hw, tiles))
                except WindowError as error:
                    picture = picture._replace(error=str(error))
            listed.append(picture)
        tables = {name: rows_of(_block(listed), found, schema) for name, schema in self.work.schemas.items()}
        return write_chunk(self.work, chunk, tables)

    def _merged(self, number: int, size_hw: tuple[int, int], tiles: "_TileRows") -> "Detections":
        """Merge the detections of a picture; raise WindowError if not all of its tiles could be read."""
        from raydet.engines.scorer import merged_and_selected

        config, views = self.work.config, tiles_of(size_hw, self.work.config)
        found: list[Detections] = []
        errors: list[str] = []
        for part in tiles.read_picture(number):
            errors += [
                f"window {place_of(views[len(found) + at])}: {reason}"
                for at, reason in enumerate(part["error"].to_pylist())
                if reason is not None
            ]
            found += _detections_of(part)
        if errors:
            more = f" (and {len(errors) - 1:,} more windows)" if len(errors) > 1 else ""
            raise WindowError(f"{errors[0]}{more}")
        most = config.top_k or sum(len(one.scores) for one in found)
        return merged_and_selected(views, found, size_hw, config, max_detections=most, point=self.work.point)


class _TileRows:
    """The rows of tiles in the files of chunks, of which the last one is kept."""

    def __init__(self, windows: Work) -> None:
        assert isinstance(windows.images, WindowRows), "it knows the tiles of each picture"
        self._windows, self._images = windows, windows.images
        self._chunk, self._table = -1, pa.table({})

    def read_picture(self, number: int) -> Iterator[pa.Table]:
        """Yield the rows of a picture's tiles, file by file."""
        plan, rows = self._windows.plan, self._images.rows_of(number)
        position = rows.start
        while position < rows.stop:
            chunk = position // plan.rows_per_file
            own = plan.rows_of(chunk)
            if chunk != self._chunk:
                place = storage.join(table_uri(self._windows.folder, WINDOWS_FOLDER), part_name(chunk))
                filesystem, path = storage.resolve(place)
                self._table = pq.read_table(path, filesystem=filesystem, columns=list(_COLUMNS), partitioning=None)
                self._chunk = chunk
            end = min(own.stop, rows.stop)
            yield self._table.slice(position - own.start, end - position).combine_chunks()
            position = end


def _detections_of(rows: pa.Table) -> list["Detections"]:
    """Return the detections of each row."""
    from raydet.models.detector import Detections

    lists = rows["detections"].chunk(0).flatten()
    boxes, scores, categories = (own.flatten() for own in lists)
    ends = np.cumsum([0, *np.asarray(lists[1].value_lengths())])
    boxes_xywh = boxes.flatten().to_numpy().reshape(-1, 4)
    return [
        Detections(boxes_xywh[start:end], scores.to_numpy()[start:end], categories.to_numpy()[start:end])
        for start, end in pairwise(ends)
    ]


def _block(pictures: Sequence[ListedPicture]) -> pa.Table:
    """Return pictures as `blocks_of` returns images, without pixels."""
    sizes = {name: pa.array([getattr(one, name) for one in pictures], pa.int64()) for name in ("height", "width")}
    is_read = pa.array([one.error is None for one in pictures])
    decoded = {f"pixel_{name}": pc.if_else(is_read, column, None) for name, column in sizes.items()}
    return pa.table(
        {
            "image_id": pa.array([one.image_id for one in pictures], pa.int64()),
            "path": pa.array([one.path for one in pictures], pa.string()),
            "error": pa.array([one.error for one in pictures], pa.string()),
            **sizes,
            **decoded,
            **{
                field.name: pa.array([getattr(one, field.name) for one in pictures], field.type)
                for field in PICTURE_FIELDS
            },
        }
    )
