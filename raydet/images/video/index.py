"""A video → one row per frame in Arrow batches; such rows → encoded frames."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.common.packages import require_packages
from raydet.common.untrusted.opening import NotAFileError
from raydet.config import DEFAULT_MAX_PIXELS
from raydet.images.files import ReadError, read_error
from raydet.images.isolation import IsolationError
from raydet.images.references import FileReader
from raydet.images.video.process import VideoProcess
from raydet.images.video.times import FrameGroup, VideoError, chosen_frames

VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "mts", "m2ts")
FRAME_FIELDS = (pa.field("frame", pa.int64()), pa.field("time_s", pa.float64()))
"""Columns of a detections table of a video."""
VIDEO_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("uri", pa.string()),
        *FRAME_FIELDS,
        *((name, pa.int64()) for name in ("pts", "repetition", "key_pts", "key_dts", "next_key_pts")),
    ]
)
"""A frame in the index of a video: see `FrameTimes`; the last column is null at the end."""
_BATCH_ROWS = 2**16


class ListedFrame(NamedTuple):
    """A row of an index, with the columns of `VIDEO_SCHEMA`."""

    image_id: int
    path: str
    uri: str
    frame: int
    time_s: float
    pts: int
    repetition: int
    key_pts: int
    key_dts: int
    next_key_pts: int | None


def is_video_name(name: str) -> bool:
    """Return True if a file has the extension of a video."""
    return name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS


def video_batches(uri: str, fps: float | None, skipped: Counter[str]) -> Iterator[pa.RecordBatch]:
    """List the frames of a video, reading the file once without decoding it.

    Args:
        uri: Absolute path or URI of the file.
        fps: As for `chosen_frames`.
        skipped: Counts the frames that the header states, but which the file does not have.

    Raises:
        UserError: The file is not a video, is damaged, or PyAV is not installed.
    """
    require_packages("video")
    try:
        with FileReader().open(uri) as file:
            video = VideoProcess(file, max_pixels=DEFAULT_MAX_PIXELS)
            try:
                times = video.times()
            finally:
                video.close()
        chosen = chosen_frames(times, fps)
    except (IsolationError, VideoError, NotAFileError, ReadError) as error:
        raise UserError(f"cannot read the video {uri}: {read_error(error) or error}") from None
    skipped["frames"] = max(0, times.num_stated - len(times.pts))
    name = uri.rpartition("/")[2]
    for start in range(0, len(chosen.frame), _BATCH_ROWS):
        rows = slice(start, start + _BATCH_ROWS)
        numbers = chosen.frame[rows].tolist()
        columns = [
            pa.array([f"{name}/frame_{number:06d}" for number in numbers], pa.string()),
            pa.array([uri] * len(numbers), pa.string()),
            *(pa.array(column[rows]) for column in (chosen.frame, chosen.time_s, chosen.pts, chosen.repetition)),
            *(pa.array(column[rows]) for column in (chosen.key_pts, chosen.key_dts)),
            pa.array(chosen.next_key_pts[rows], mask=~chosen.has_next[rows]),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=VIDEO_SCHEMA)


def read_frames(rows: Iterable[ListedFrame]) -> Iterator[tuple[ListedFrame, bytes | None, str | None]]:
    """Yield each row with its frame as an encoded image, or with the reason why there is none.

    Args:
        rows: Consecutive rows of an index.

    Raises:
        UserError: PyAV is not installed.
        OSError: The storage failed, independently of this file.
    """
    require_packages("video")
    reader = FileReader()
    for uri, own in groupby(rows, key=lambda row: row.uri):
        try:
            opened = reader.open(uri)
        except (OSError, ReadError) as error:
            reason = read_error(error) if isinstance(error, OSError) else error
            if reason is None:
                raise
            yield from ((row, None, str(reason)) for row in own)
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
    pts, repetition = tuple(row.pts for row in rows), tuple(row.repetition for row in rows)
    group = FrameGroup(pts, repetition, first.key_pts, first.key_dts, first.next_key_pts)
    found, reason = video.frames(group), "the decoder returned no frame"
    left = iter(rows)
    try:
        for (data, error), row in zip(found, left, strict=False):
            yield row, data, error
    except IsolationError as error:
        reason = str(error)
    yield from ((row, None, reason) for row in left)
