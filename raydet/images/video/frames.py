"""An open video → the timestamps of its frames, and upright RGB frames by their timestamps.

A video is decoded in groups: from a frame that is decodable by itself, the key frame, up to the next one. Each group is
decoded from its key frame with an empty decoder. A frame therefore depends on the file alone, and not on the frames
that were decoded before it, so any division of a video into ranges gives the same pixels.

Only the isolated process of `process.py` imports this module: PyAV's libraries are C code that believes what a file
states.
"""

import contextlib
import io
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from raydet.images.limits import refusal_of_size
from raydet.images.video.times import MAX_FRAMES, NO_TIME, FrameGroup, PacketTimes, VideoError

if TYPE_CHECKING:
    from av.packet import Packet

    _Packet: TypeAlias = Packet[VideoStream]  # generic for type checkers only
else:
    _Packet = Any

_DECODERS = (
    "h264,hevc,vp8,vp9,av1,libdav1d,mpeg4,mpeg2video,mpeg1video,mjpeg,h263,prores,dnxhd,ffv1,msmpeg4v2,msmpeg4,"
    "rawvideo,dvvideo,huffyuv"
)
_WITH_MEMORY = ("h264", "hevc")
_MOST_LEADING = 64
"""Maximum number of packets after a key frame that show frames before it; encoders write at most 16."""
_BYTES_PER_PIXEL = 40
"""Memory of a decoder with its reference frames, and of one RGB frame."""
_READ_BYTES = 2**20
_SEEK_BACK_S = (0, 2, 16, 128, 10**6)
"""Attempts to find a key frame: seconds before it to look for."""
_MOST_ATTEMPTS = 4
_TRANSPORT_STEPS = (188, 192)

Pixels = NDArray[np.uint8]
Matrix = tuple[int, int, int, int]
"""Signs (a, b, c, d) of a display matrix: x' = a·x + c·y, y' = b·x + d·y."""
UPRIGHT: Matrix = (1, 0, 0, 1)


def format_of(start: bytes) -> str | None:
    """Return FFmpeg's name of a video file's format by its first 512 bytes; None for an unknown one.

    FFmpeg is never asked to guess, because it also knows formats that make it open other files.
    """
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if start.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return "avi"
    for step in _TRANSPORT_STEPS:
        if all(start[step - 188 + step * number :][:1] == b"\x47" for number in (0, 1)):
            return "mpegts"
    return None


class OpenVideo:
    """A video file that is open for reading."""

    def __init__(self, file: io.RawIOBase, *, max_pixels: int, limit: Callable[[int], None]) -> None:
        """Open the file.

        Args:
            file: Content of the file, seekable.
            max_pixels: Larger frames are refused.
            limit: Called with the bytes of memory that decoding needs, before it begins.

        Raises:
            VideoError: It is not a video, or has too large frames.
        """
        start = file.read(512) or b""
        file.seek(0)
        name = format_of(start)
        if not start:
            raise VideoError("empty file")
        if name is None:
            raise VideoError("it is not an MP4, MOV, MKV, WebM, AVI or MPEG-TS video")
        options = {"protocol_whitelist": "none", "codec_whitelist": _DECODERS, "max_pixels": str(max_pixels)}
        try:
            opened = av.open(
                file, "r", format=name, container_options=options, metadata_errors="replace", buffer_size=_READ_BYTES
            )
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(f"broken or truncated {name} video: {_reason(error)}") from None
        self._container: InputContainer = opened
        self._stream = self._first_stream()
        decoder = self._stream.codec_context
        if decoder is None:
            raise VideoError("its codec is not supported")
        self._max_pixels = max_pixels
        self._refuse_size(decoder.width, decoder.height)
        decoder.thread_count = 1
        self._options = {"max_pixels": str(max_pixels), "err_detect": "explode"}
        decoder.options = self._options
        self._matrix: Matrix | None = None
        self._limit = limit
        self.needed_bytes = _BYTES_PER_PIXEL * decoder.width * decoder.height
        limit(self.needed_bytes)
        self._packets: Iterator[_Packet] = iter(())
        self._upcoming: deque[_Packet] = deque()
        self._next_key_pts: int | None = None
        """Key frame that comes next in `_upcoming` and `_packets`, if the last group was read to its end."""

    def _first_stream(self) -> VideoStream:
        for stream in self._container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic:
                return stream
        raise VideoError("it has no video stream")

    def _refuse_size(self, width: int, height: int) -> None:
        if min(width, height) < 1:
            raise VideoError("it states no size")
        reason = refusal_of_size((width, height), self._max_pixels)
        if reason is not None:
            raise VideoError(reason)

    def times(self) -> PacketTimes:
        """Read the timestamps of all frames, without decoding them.

        Raises:
            VideoError: The file has too many frames, or none with a timestamp.
        """
        pts, dts, is_key, is_shown = array("q"), array("q"), array("B"), array("B")
        for packet in self._demuxed():
            if packet.pts is None:
                if pts:
                    raise VideoError("it has frames without timestamps; convert it to MP4 or MKV first")
                continue
            if not pts and not packet.is_keyframe:
                continue
            if len(pts) == MAX_FRAMES:
                raise VideoError(f"it has more than {MAX_FRAMES:,} frames")
            pts.append(packet.pts)
            dts.append(NO_TIME if packet.dts is None else packet.dts)
            is_key.append(packet.is_keyframe)
            is_shown.append(not packet.is_discard)
        base = self._stream.time_base
        if not pts or base is None or base <= 0:
            raise VideoError("it has no frame that can be decoded by itself, or no timestamps")
        return PacketTimes(
            pts=np.array(pts, np.int64),
            dts=np.array(dts, np.int64),
            is_key=np.array(is_key, np.uint8),
            is_shown=np.array(is_shown, np.uint8),
            time_base=(base.numerator, base.denominator),
            num_stated=self._stream.frames,
        )

    def frames(self, group: FrameGroup) -> Iterator[tuple[Pixels | None, str | None]]:
        """Yield the wanted frames of a group, in order: upright RGB pixels, uint8 [height, width, 3], or a reason.

        If not all can be decoded from their key frame, the rest is decoded from one of the key frames before it: some
        encoders renew the picture bit by bit, over several of them.

        Raises:
            VideoError: The group's key frame is not there any more.
        """
        if self._matrix is None:
            self._matrix = self._matrix_of_stream()
        wanted, reason = deque(zip(group.pts, group.repetition, strict=True)), ""
        self._start_at(group)
        for _ in range(_MOST_ATTEMPTS):
            start = self._upcoming[0]
            reason = yield from self._found(group, wanted)
            if not wanted or not self._start_before(start):
                break
        for _ in wanted:
            yield None, reason

    def _found(
        self, group: FrameGroup, wanted: deque[tuple[int, int]]
    ) -> Generator[tuple[Pixels | None, str | None], None, str]:
        """Yield frames up to the first that is missing, and remove them from `wanted`.

        Returns:
            The reason why the frames that remain are missing.
        """
        found = (NO_TIME, 0)
        # Closed at once, so that the packets that it has not used come next.
        with contextlib.closing(self._decoded(group, self._empty_decoder())) as frames:
            for frame in frames:
                if isinstance(frame, str):
                    return frame
                assert frame.pts is not None
                found = (frame.pts, found[1] + 1 if frame.pts == found[0] else 0)
                if found == wanted[0]:
                    yield self._picture(frame)
                    wanted.popleft()
                if not wanted or found > wanted[0]:
                    break
        return "the video has no frame at this time; it was damaged, or has changed"

    def _empty_decoder(self) -> VideoCodecContext:
        """Return a decoder that has seen nothing; those of H.264 remember more than `flush_buffers` forgets."""
        own = self._stream.codec_context
        if own.name not in _WITH_MEMORY:
            own.flush_buffers()
            return own
        decoder = VideoCodecContext.create(own.name, "r")
        assert isinstance(decoder, VideoCodecContext)
        decoder.extradata, decoder.thread_count, decoder.options = own.extradata, 1, self._options
        return decoder

    def _decoded(self, group: FrameGroup, decoder: VideoCodecContext) -> Generator[VideoFrame | str, None, None]:
        """Yield the frames of a group in the order of their timestamps; the reason as last item if one is damaged.

        The frames after a damaged one depend on it.
        """
        packets = self._packets_of(group)
        while True:
            packet = next(packets, None)
            self._limit(0)
            try:
                frames: Sequence[VideoFrame] = decoder.decode(packet)
            except (av.error.FFmpegError, ValueError) as error:
                # Frames shown before the key frame may refer to frames that the decoder has not seen.
                if packet is not None and packet.pts is not None and packet.pts < group.key_pts:
                    continue
                yield f"damaged: {_reason(error)}"
                return
            for frame in frames:
                if frame.pts is None or frame.pts < group.key_pts:
                    continue
                if frame.is_corrupt:
                    yield "damaged: the decoder had to guess a part of this frame, or of one that it depends on"
                    return
                yield frame
            if packet is None:
                return

    def _picture(self, frame: VideoFrame) -> tuple[Pixels | None, str | None]:
        try:
            self._refuse_size(frame.width, frame.height)
            pixels: Any = frame.to_ndarray(format="rgb24", threads=1)
        except (VideoError, av.error.FFmpegError, ValueError) as error:
            return None, str(error)
        return np.ascontiguousarray(turned(pixels, display_matrix_of(frame) or self._matrix or UPRIGHT)), None

    def _matrix_of_stream(self) -> Matrix:
        """Return the display matrix in the header, which only the stream's own decoder passes on to its frames."""
        if self._seek(NO_TIME // 2):
            with contextlib.suppress(av.error.FFmpegError, ValueError):
                for packet in self._packets:
                    for frame in self._stream.codec_context.decode(packet):
                        return display_matrix_of(frame) or UPRIGHT
        return UPRIGHT

    def _demuxed(self) -> Iterator[_Packet]:
        """Yield the packets from the current position of the file on; the end of a truncated file is its end."""
        try:
            for packet in self._container.demux(self._stream):
                self._limit(0)
                if packet.size:
                    yield packet
        except (av.error.FFmpegError, ValueError):
            return

    def _next(self) -> _Packet | None:
        return self._upcoming.popleft() if self._upcoming else next(self._packets, None)

    def _start_at(self, group: FrameGroup) -> None:
        """Make the group's key frame the next packet."""
        if self._next_key_pts == group.key_pts and self._skip_to(group.key_pts) == group.key_pts:
            return
        base = self._stream.time_base
        assert base is not None
        target = group.key_pts if group.key_dts == NO_TIME else group.key_dts
        for back_s in _SEEK_BACK_S:
            if self._seek(target - int(back_s / base)) and self._skip_to(group.key_pts) == group.key_pts:
                return
        raise VideoError("the video has changed since its frames were listed")

    def _start_before(self, key: _Packet) -> bool:
        """Make the key frame before another one the next packet; return False if there is none."""
        time = key.pts if key.dts is None else key.dts
        assert time is not None and key.pts is not None
        return self._seek(time - 1) and self._skip_to(NO_TIME) < key.pts

    def _seek(self, timestamp: int) -> bool:
        self._upcoming.clear()
        try:
            self._container.seek(timestamp, stream=self._stream, backward=True)
        except (av.error.FFmpegError, ValueError, OverflowError):
            return False
        self._packets = self._demuxed()
        return True

    def _skip_to(self, pts: int) -> int:
        """Drop the packets before the first key frame that is shown at a time or later, and return its timestamp."""
        while (packet := self._next()) is not None:
            if packet.is_keyframe and packet.pts is not None and packet.pts >= pts:
                self._upcoming.appendleft(packet)
                return packet.pts
        return -NO_TIME

    def _packets_of(self, group: FrameGroup) -> Iterator[_Packet]:
        """Yield the packets of a group; the next key frame and what follows remains the next packet afterwards.

        Some packets after the next key frame may show frames before it. They are packets of both groups.
        """
        leading: list[_Packet] = []
        self._next_key_pts = group.next_key_pts
        try:
            while (packet := self._next()) is not None:
                is_next_key = packet.is_keyframe and packet.pts == group.next_key_pts
                if group.next_key_pts is not None and (leading or is_next_key):
                    leading.append(packet)
                    is_later = packet.pts is not None and packet.pts > group.next_key_pts
                    if is_later or len(leading) > _MOST_LEADING:
                        break
                yield packet
        finally:
            self._upcoming.extendleft(reversed(leading))


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]


def display_matrix_of(frame: VideoFrame) -> Matrix | None:
    """Return the signs of the display matrix of a frame; None if it has none.

    Other angles than quarter turns count as upright, as in most players.
    """
    data: Any = frame.side_data.get(SideDataType.DISPLAYMATRIX)  # type: ignore[call-overload]
    if data is None or data.buffer_size < 36:
        return None
    numbers = np.frombuffer(bytes(data), np.int32, 9)
    a, b, _, c, d = (int(np.sign(number)) for number in numbers[:5])
    is_quarter = (a == d == 0 and b != 0 != c) or (b == c == 0 and a != 0 != d)
    return (a, b, c, d) if is_quarter else UPRIGHT


def turned(pixels: Pixels, matrix: Matrix) -> Pixels:
    """Apply a display matrix to pixels [height, width, 3]."""
    a, b, c, d = matrix
    if a == 0:
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
