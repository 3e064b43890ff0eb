"""Videos in isolated processes: timestamps and frames come back through a pipe.

FFmpeg believes what a file states, so it runs in an `Interpreter` whose memory and CPU time the system limits. That
process opens no file: it asks this one for the bytes of the video. A frame travels as an uncompressed PPM image, which
`decode` reads like any other image.
"""

import atexit
import io
import itertools
import json
import os
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydet.common.threads import available_cpus
from raydet.common.untrusted.opening import LocalFile
from raydet.images import isolation
from raydet.images.isolation import Interpreter, IsolationError
from raydet.images.pixels import ppm_header
from raydet.images.video.times import MAX_FRAMES, FrameGroup, PacketTimes, VideoError

_PROGRAM = "from raydet.images.video import frames, process; process.serve(frames)"
_CPU_BYTES = 500_000_000
"""Each packet may take as much CPU time as an image of this memory."""
_MOST_READ_BYTES = 2**24
_BYTES_PER_LISTED = 18
_LISTING_BYTES = 64 * MAX_FRAMES
"""Memory of FFmpeg's index and of the listed timestamps."""
_HEADER_BYTES = 64
_KEYS = ("key_pts", "key_dts", "next_key_pts")


_idle: list[Interpreter] = []
"""Interpreters to use again, since it takes half a second to start one."""
_numbers = itertools.count()


class VideoProcess:
    """A video that is open in an isolated process; used by one thread at a time."""

    def __init__(self, file: pa.NativeFile | LocalFile, *, max_pixels: int) -> None:
        """Prepare the process; it opens the video with the first question."""
        self._file, self._num_bytes, self._max_pixels = file, file.size(), max_pixels
        self._number = next(_numbers)
        self._interpreter: Interpreter | None = None

    def times(self) -> PacketTimes:
        """Read the timestamps of all frames.

        Raises:
            IsolationError: The file is not a video, is damaged, or exceeds the limits; it says which.
            OSError: The storage failed.
        """
        ((answer, content),) = self._ask({"operation": "times"})
        num_packets = len(content) // _BYTES_PER_LISTED
        times = np.frombuffer(content[: 16 * num_packets], np.int64).reshape(2, num_packets)
        flags = np.frombuffer(content[16 * num_packets :], np.uint8).reshape(2, num_packets)
        time_base = int(answer["time_base"][0]), int(answer["time_base"][1])
        return PacketTimes(times[0], times[1], flags[0], flags[1], time_base, int(answer["num_stated"]))

    def frames(self, group: FrameGroup) -> Iterator[tuple[bytes | None, str | None]]:
        """Yield the wanted frames of a group: each an encoded image, or the reason why there is none.

        Raises:
            IsolationError: The process failed; there are no further frames of this group.
            OSError: The storage failed.
        """
        question = {"operation": "frames", **{name: getattr(group, name) for name in _KEYS}}
        for answer, content in self._ask(question, np.array([group.pts, group.repetition], np.int64).tobytes()):
            if "reason" in answer:  # all but the last
                yield (content or None), answer["reason"]

    def close(self) -> None:
        """Keep the process for another video, or end it if there are enough."""
        if self._interpreter is not None and len(_idle) < available_cpus():
            _idle.append(self._interpreter)
            self._interpreter = None
        self._end()

    def _end(self) -> None:
        if self._interpreter is not None:
            self._interpreter.end()
            self._interpreter = None

    def _started(self) -> Interpreter:
        if self._interpreter is None:
            try:
                self._interpreter = _idle.pop()
            except IndexError:
                self._interpreter = Interpreter(_PROGRAM)
        return self._interpreter

    def _ask(self, question: dict[str, Any], data: bytes = b"") -> Iterator[tuple[dict[str, Any], bytes]]:
        """Ask a question, answer the process's own ones about the file, and yield its answers up to the last one."""
        question |= {"video": self._number, "file_bytes": self._num_bytes, "max_pixels": self._max_pixels}
        is_finished = False
        try:
            it = self._started()
            it.to_it.write(json.dumps({**question, "data_bytes": len(data)}).encode() + b"\n" + data)
            it.to_it.flush()
            while not is_finished:
                answer = it.read_header()
                if "offset" in answer:
                    self._send(int(answer["offset"]), int(answer["size"]))
                    continue
                content = it.read_content(self._checked(int(answer["num_bytes"])))
                if "error" in answer:
                    raise IsolationError(str(answer["error"]))
                is_finished = bool(answer["is_last"])
                yield answer, content
        except (BrokenPipeError, ValueError, EOFError, KeyError, TypeError):
            failed, self._interpreter = self._interpreter, None
            raise (IsolationError("no process") if failed is None else failed.failure()) from None
        finally:
            if not is_finished:
                self._end()

    def _send(self, offset: int, size: int) -> None:
        if offset < 0 or not 0 <= size <= _MOST_READ_BYTES:
            raise ValueError("an impossible place in the file")
        assert self._interpreter is not None
        data = self._file.read_at(max(0, min(size, self._num_bytes - offset)), offset)
        self._interpreter.to_it.write(len(data).to_bytes(8, "little") + data)
        self._interpreter.to_it.flush()

    def _checked(self, num_bytes: int) -> int:
        if not 0 <= num_bytes <= max(3 * self._max_pixels + _HEADER_BYTES, _BYTES_PER_LISTED * MAX_FRAMES):
            raise ValueError("an impossible size")
        return num_bytes


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # they belong to the process that was forked


class _AskedFile(io.RawIOBase):
    """The video in the isolated process, whose bytes the other process sends."""

    def __init__(self, source: IO[bytes], target: IO[bytes], num_bytes: int) -> None:
        super().__init__()
        self._source, self._target, self._num_bytes, self._place = source, target, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        if size < 0 or not 0 <= self._place < self._num_bytes:
            return b""
        isolation.send(self._target, {"offset": self._place, "size": min(size, _MOST_READ_BYTES)})
        data = self._source.read(int.from_bytes(self._source.read(8), "little"))
        self._place += len(data)
        return data


def serve(frames: Any) -> None:
    """Answer questions on stdin until it ends; the program of the isolated process.

    Args:
        frames: The module `raydet.images.video.frames`.
    """
    source, target = isolation.own_streams()
    isolation.limit_memory(_LISTING_BYTES)
    video, number = None, None
    while (question := isolation.read_question(source)) is not None:
        pts, repetition = np.frombuffer(source.read(question["data_bytes"]), np.int64).reshape(2, -1).tolist()
        isolation.limit_cpu(_CPU_BYTES)
        try:
            if video is None or question["video"] != number:
                number = question["video"]
                file = _AskedFile(source, target, question["file_bytes"])
                video = frames.OpenVideo(file, max_pixels=question["max_pixels"], limit=_limit)
            if question["operation"] == "times":
                _send_times(target, video.times())
            else:
                group = FrameGroup(tuple(pts), tuple(repetition), *(question[name] for name in _KEYS))
                _send_frames(target, video.frames(group))
        except (VideoError, MemoryError) as error:
            reason = "it needs too much memory" if isinstance(error, MemoryError) else str(error)
            isolation.send(target, {"error": reason})


def _limit(needed_bytes: int) -> None:
    """Limit what follows: the memory once, if it is stated, and the time of each packet."""
    isolation.limit_cpu(_CPU_BYTES)
    if needed_bytes:
        isolation.limit_memory(_LISTING_BYTES + needed_bytes)


def _send_times(target: IO[bytes], times: PacketTimes) -> None:
    columns = (column.tobytes() for column in (times.pts, times.dts, times.is_key, times.is_shown))
    answer = {"time_base": times.time_base, "num_stated": times.num_stated, "is_last": True}
    isolation.send(target, answer, *columns)


def _send_frames(target: IO[bytes], frames: Iterator[tuple[NDArray[np.uint8] | None, str | None]]) -> None:
    for pixels, reason in frames:
        content: list[bytes | memoryview] = []
        if pixels is not None:
            content = [ppm_header(pixels.shape[:2]), pixels.reshape(-1).data]
        isolation.send(target, {"reason": reason, "is_last": False}, *content)
    isolation.send(target, {"is_last": True})
