"""A listing of videos → one row per frame in Arrow batches; such rows → encoded frames."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import NamedTuple

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.common.packages import require_packages
from raydet.common.threads import available_cpus, in_order
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.images.files import ReadError
from raydet.images.isolation import IsolationError
from raydet.images.listing import Listing
from raydet.images.references import FileReader
from raydet.images.video.process import VideoProcess
from raydet.images.video.times import FrameGroup, FrameTimes, PacketTimes, VideoError, chosen_frames

FRAME_FIELDS = (pa.field("frame", pa.int64()), pa.field("time_s", pa.float64()))
"""Columns of a detections table of videos."""
VIDEO_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("uri", pa.string()),
        *FRAME_FIELDS,
        *((name, pa.int64()) for name in ("pts", "repetition", "key_pts", "key_dts", "next_key_pts")),
        pa.field("error", pa.string()),
    ]
)
"""A frame in the index of videos: see `FrameTimes`; `next_key_pts` is null at the end. Or a video that cannot be read,
with the reason in `error`, and nulls between it and the file."""
_BATCH_ROWS = 2**16


class ListedFrame(NamedTuple):
    """A row of an index, with the columns of `VIDEO_SCHEMA`."""

    image_id: int
    path: str
    uri: str | None
    frame: int | None
    time_s: float | None
    pts: int | None
    repetition: int | None
    key_pts: int | None
    key_dts: int | None
    next_key_pts: int | None
    error: str | None


def with_frames(listing: Listing, reader: FileReader, fps: float | None) -> Listing:
    """List the frames of videos, reading each file once without decoding it, several at a time.

    A video that cannot be read gets one row, with the reason, unless it is the only one.

    Args:
        listing: The videos.
        reader: Reader of their files.
        fps: As for `chosen_frames`.

    Raises:
        UserError: None of the videos can be read, or PyAV is not installed.
        OSError: The storage failed.
    """
    require_packages("video")
    skipped, batches = Counter[str](), _frame_batches(listing, reader, fps)
    unreadable = []
    for batch, num_missing in batches:
        if not batch["error"].null_count:
            unreadable.append(batch)
            continue
        skipped["frames"] += num_missing
        return Listing("video", chain(unreadable, [batch], _counted(batches, skipped)), skipped, VIDEO_SCHEMA)
    path, uri, reason = (unreadable[0][column][0].as_py() for column in ("path", "uri", "error"))
    which = f"the video {uri or path}" if len(unreadable) == 1 else f"any of {len(unreadable):,} videos, such as {path}"
    raise UserError(f"cannot read {which}: {reason}")


def _counted(batches: Iterable[tuple[pa.RecordBatch, int]], skipped: Counter[str]) -> Iterator[pa.RecordBatch]:
    for batch, num_missing in batches:
        skipped["frames"] += num_missing
        yield batch


def _frame_batches(listing: Listing, reader: FileReader, fps: float | None) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield the rows of one video after another, each time with the number of frames that only its header states."""

    def examine(video: tuple[str, str | None]) -> tuple[FrameTimes, int] | str:
        try:
            times = _times_of(video[1], reader)
            return chosen_frames(times, fps), max(0, times.num_stated - len(times.pts))
        except (IsolationError, VideoError, ReadError) as error:
            return str(error)

    for batch in listing.batches:
        videos = list(zip(batch["path"].to_pylist(), batch["uri"].to_pylist(), strict=True))
        found = in_order(examine, videos, num_threads=min(len(videos), available_cpus()), ahead=2 * available_cpus())
        for (path, uri), result in zip(videos, found, strict=True):
            if isinstance(result, str):
                nothing = [None] * (len(VIDEO_SCHEMA) - 3)
                row = zip(VIDEO_SCHEMA.names, (path, uri, *nothing, result), strict=True)
                yield pa.RecordBatch.from_pylist([dict(row)], schema=VIDEO_SCHEMA), 0
                continue
            chosen, num_missing = result
            for rows in _rows_of(path, uri, chosen):
                yield rows, num_missing
                num_missing = 0


def _times_of(uri: str | None, reader: FileReader) -> PacketTimes:
    with reader.open_file(uri) as file:
        video = VideoProcess(file, max_pixels=DEFAULT_MAX_PIXELS)
        try:
            return video.times()
        finally:
            video.close()


def _rows_of(path: str, uri: str | None, chosen: FrameTimes) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(chosen.frame), _BATCH_ROWS):
        rows = slice(start, start + _BATCH_ROWS)
        numbers = chosen.frame[rows].tolist()
        columns = [
            pa.array([f"{path}/frame_{number:06d}" for number in numbers], pa.string()),
            pa.array([uri] * len(numbers), pa.string()),
            *(pa.array(column[rows]) for column in (chosen.frame, chosen.time_s, chosen.pts, chosen.repetition)),
            *(pa.array(column[rows]) for column in (chosen.key_pts, chosen.key_dts)),
            pa.array(chosen.next_key_pts[rows], mask=~chosen.has_next[rows]),
            pa.nulls(len(numbers), pa.string()),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=VIDEO_SCHEMA)


def read_frames(
    rows: Iterable[ListedFrame], reader: FileReader
) -> Iterator[tuple[ListedFrame, bytes | None, str | None]]:
    """Yield each row with its frame as an encoded image, or with the reason why there is none.

    Args:
        rows: Consecutive rows of an index.
        reader: Reader of the videos.

    Raises:
        UserError: PyAV is not installed.
        OSError: The storage failed, independently of this file.
    """
    require_packages("video")
    for (uri, reason), own in groupby(rows, key=lambda row: (row.uri, row.error)):
        if reason is not None:
            yield from ((row, None, reason) for row in own)
            continue
        try:
            opened = reader.open_file(uri)
        except ReadError as error:
            yield from ((row, None, str(error)) for row in own)
            continue
        with opened as file:
            video = VideoProcess(file, max_pixels=DEFAULT_MAX_PIXELS)
            try:
                for _, group in groupby(own, key=lambda row: row.key_pts):
                    yield from _frames_of(video, list(group))
            finally:
                video.close()


def _frames_of(video: VideoProcess, rows: list[ListedFrame]) -> Iterator[tuple[ListedFrame, bytes | None, str | None]]:
    first = rows[0]
    assert first.key_pts is not None and first.key_dts is not None
    pts = tuple(row.pts for row in rows if row.pts is not None)
    repetition = tuple(row.repetition for row in rows if row.repetition is not None)
    group = FrameGroup(pts, repetition, first.key_pts, first.key_dts, first.next_key_pts)
    found, reason = video.frames(group), "the decoder returned no frame"
    left = iter(rows)
    try:
        for (data, error), row in zip(found, left, strict=False):
            yield row, data, error
    except IsolationError as error:
        reason = str(error)
    yield from ((row, None, reason) for row in left)
