"""Timestamps of a video's packets → the frames to score, and the groups in which they are decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_FRAMES = 10_000_000
"""Four days of 30 frames per second."""
NO_TIME = -(2**63)
"""Stands for a decoding time that the file does not state, as in FFmpeg."""


class VideoError(Exception):
    """A video, or a part of one, that cannot be read; the message is one short reason."""


@dataclass(frozen=True)
class FrameGroup:
    """Frames that are decoded together, from one key frame.

    Attributes:
        pts: Timestamps of the wanted frames, ascending, in the time base of the video.
        repetition: Number of earlier frames with the same timestamp, for each.
        key_pts: Timestamp of the key frame.
        key_dts: Decoding time of the key frame, for seeking.
        next_key_pts: Timestamp of the following key frame; None at the end.
    """

    pts: tuple[int, ...]
    repetition: tuple[int, ...]
    key_pts: int
    key_dts: int
    next_key_pts: int | None


@dataclass(frozen=True)
class PacketTimes:
    """The packets of a video from its first key frame on, in the order of the file.

    Attributes:
        pts: Timestamps, int64.
        dts: Decoding times, `NO_TIME` if unknown, int64.
        is_key: 1 for packets that are decodable by themselves, uint8.
        is_shown: 0 for frames that the file says not to show, uint8.
        time_base: Numerator and denominator of the unit of the timestamps in seconds.
        num_stated: Number of frames in the header; 0 if it states none.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    is_key: NDArray[np.uint8]
    is_shown: NDArray[np.uint8]
    time_base: tuple[int, int]
    num_stated: int


@dataclass(frozen=True)
class FrameTimes:
    """The chosen frames of a video, in the order in which they are shown.

    Attributes:
        frame: Number of each frame in the video, from 0, int64 [N].
        time_s: Seconds since the first frame, float64 [N].
        pts: Timestamp in the time base of the video, int64 [N].
        repetition: Number of earlier frames with the same timestamp, which AVI files have, int64 [N].
        key_pts: Timestamp of the key frame of its group, int64 [N].
        key_dts: Decoding time of that key frame, int64 [N].
        next_key_pts: Timestamp of the following key frame, int64 [N].
        has_next: True if there is a following key frame, bool [N].
    """

    frame: NDArray[np.int64]
    time_s: NDArray[np.float64]
    pts: NDArray[np.int64]
    repetition: NDArray[np.int64]
    key_pts: NDArray[np.int64]
    key_dts: NDArray[np.int64]
    next_key_pts: NDArray[np.int64]
    has_next: NDArray[np.bool_]


def chosen_frames(times: PacketTimes, fps: float | None) -> FrameTimes:
    """Choose frames of a video.

    Args:
        times: Its packets.
        fps: Choose the frames that are on screen 0, 1/fps, 2/fps, … seconds after the first one, each once; None for
            all frames.

    Raises:
        VideoError: There is no frame to show.
    """
    is_key = times.is_key.astype(np.bool_)
    key_pts, places = np.unique(times.pts[is_key], return_index=True)
    key_dts = times.dts[is_key][places]
    # Frames before the first key frame refer to frames that are not in the file.
    is_shown = times.is_shown.astype(np.bool_) & (times.pts >= times.pts[0])
    pts = np.sort(times.pts[is_shown])
    if not len(pts):
        raise VideoError("it shows no frame")
    unit_s = Fraction(*times.time_base)
    numbers = np.arange(len(pts)) if fps is None else np.array(list(_at_rate(pts, unit_s, fps)), np.int64)
    group = np.searchsorted(key_pts, pts[numbers], side="right") - 1
    following = np.minimum(group + 1, len(key_pts) - 1)
    return FrameTimes(
        frame=numbers,
        time_s=np.array([float((time - int(pts[0])) * unit_s) for time in pts[numbers].tolist()]),
        pts=pts[numbers],
        repetition=numbers - np.searchsorted(pts, pts[numbers]),
        key_pts=key_pts[group],
        key_dts=key_dts[group],
        next_key_pts=key_pts[following],
        has_next=group + 1 < len(key_pts),
    )


def _at_rate(pts: NDArray[np.int64], unit_s: Fraction, fps: float) -> Iterator[int]:
    """Yield the number of each frame during which a multiple of 1/fps seconds passes, in exact arithmetic.

    The last frame is shown for as long as the one before it.
    """
    steps = Fraction(str(fps)) * unit_s  # 29.97 is 2997/100
    first, last = int(pts[0]), int(pts[-1])
    end = 2 * last - int(pts[-2]) if len(pts) > 1 else last + 1
    due = [-(-(time - first) * steps.numerator // steps.denominator) for time in [*pts.tolist(), end]]
    for number, (step, following) in enumerate(pairwise(due)):
        if step != following or len(pts) == 1:
            yield number
