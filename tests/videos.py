"""Generated videos, each frame of which shows its number."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

MILLISECOND = Fraction(1, 1000)


def picture(number: int, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a frame: noise, and a square that moves with the number."""
    height, width = size_hw
    pixels = np.random.default_rng(number).integers(60, 90, (height, width, 3), np.uint8)
    left, top = number * 5 % (width - 16), number * 3 % (height - 16)
    pixels[top : top + 16, left : left + 16] = (250, number * 7 % 256, 40)
    return pixels


def write_video(
    path: Path,
    num_frames: int,
    *,
    codec: str = "libx264",
    size_hw: tuple[int, int] = (64, 96),
    times_ms: Sequence[int] | None = None,
    group: int = 12,
    b_frames: int = 2,
    rotation: int = 0,
    movflags: str = "",
    **options: str,
) -> Path:
    """Write a video.

    Args:
        path: File; its ending decides the format.
        num_frames: Number of frames.
        codec: FFmpeg's name of the encoder.
        size_hw: Height and width in pixels.
        times_ms: When each frame is shown, from 0; by default every 40 ms.
        group: Largest number of frames from one key frame to the next.
        b_frames: Largest number of consecutive frames that refer to later ones.
        rotation: Degrees counter-clockwise by which a player turns the video.
        movflags: FFmpeg's flags for MP4; `faststart` puts the header first.
        options: Options of the encoder.
    """
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width = size_hw
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = MILLISECOND
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = group, b_frames
        stream.codec_context.thread_count = 1
        stream.codec_context.options = options
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, size_hw), format="rgb24")
            frame.pts, frame.time_base = (times_ms or range(0, 40 * num_frames, 40))[number], MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def frames_in_sequence(path: Path) -> list[NDArray[np.uint8]]:
    """Decode all frames of a video from its start, as any program does."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(stream)]
