"""Frames of a video: each once, equal to those of a sequential decode in any range, and bounded for broken files."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raydet import UserError
from raydet.images.collection import Collection, ImageRow, VideoCollection, open_collection
from raydet.images.decode import decode
from raydet.images.video import process
from raydet.images.video.times import PacketTimes, chosen_frames
from raydet.tables import storage
from tests.videos import frames_in_sequence, write_video

NUM_FRAMES = 40
UNEVEN = [0, 7, 90, 100, 133, 134, 300, 301, *range(400, 400 + 32 * 33, 33)]
VIDEOS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("mp4", {}),
    "h264 of variable frame rate": ("mp4", {"times_ms": UNEVEN}),
    "h264 with open groups": ("mkv", {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0", "b_frames": 3}),
    "h264 renewed bit by bit": ("mp4", {"x264-params": "intra-refresh=1:log-level=0", "group": 8}),
    "h264 in a transport stream": ("ts", {}),
    "mpeg4": ("mp4", {"codec": "mpeg4"}),
    "mpeg4 in an AVI file": ("avi", {"codec": "mpeg4"}),
    "hevc": ("mp4", {"codec": "libx265", "x265-params": "log-level=none:bframes=3:pools=1"}),
    "vp9": ("webm", {"codec": "libvpx-vp9", "cpu-used": "8", "deadline": "realtime"}),
    "av1": ("mp4", {"codec": "libsvtav1", "preset": "12"}),
}


def pixels_of(row: ImageRow) -> NDArray[np.uint8]:
    assert row.error is None and row.data is not None, row.error
    return decode(row.data, max_pixels=10**6)


def numbers(collection: Collection) -> list[object]:
    return [row.extra[0] for row in collection.read(0, collection.num_rows)]


@pytest.mark.parametrize(
    "name", [name if number < 3 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(VIDEOS)]
)
def test_ranges_hold_the_frames_of_a_sequential_decode(tmp_path: Path, name: str) -> None:
    ending, options = VIDEOS[name]
    path = write_video(tmp_path / f"movie.{ending}", NUM_FRAMES, **options)
    expected = frames_in_sequence(path)
    assert len(expected) == NUM_FRAMES
    images = open_collection(str(path), index_uri=None)
    assert (images.kind, images.num_rows) == ("video", NUM_FRAMES)
    rows = list(images.read(0, NUM_FRAMES))
    assert [(row.image_id, row.path, row.extra[0]) for row in rows] == [
        (number, f"{path.name}/frame_{number:06d}", number) for number in range(NUM_FRAMES)
    ]
    times_s = np.array([row.extra[1] for row in rows], np.float64)
    expected_s = np.array(options.get("times_ms", range(0, 1600, 40)), np.float64) / 1000
    np.testing.assert_allclose(times_s, expected_s, atol=0.045)
    for row, pixels in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(pixels_of(row), pixels)
    for start, stop in ((1, 3), (11, 14), (13, 14), (30, 40), (39, 40)):
        assert [row.data for row in images.read(start, stop)] == [row.data for row in rows[start:stop]]


def test_frames_per_second_are_those_on_screen(tmp_path: Path) -> None:
    path = write_video(tmp_path / "movie.mp4", NUM_FRAMES, times_ms=UNEVEN)
    images = open_collection(str(path), index_uri=None, fps=10)
    # At 0, 100, 200, … ms: the frame of 134 ms is on screen at 200 ms, that of 300 ms at 300 ms.
    on_screen = [max(n for n in range(NUM_FRAMES) if UNEVEN[n] <= 100 * step) for step in range(15)]
    assert numbers(images)[:14] == list(dict.fromkeys(on_screen))[:14]
    every = frames_in_sequence(path)
    for row in images.read(0, images.num_rows):
        np.testing.assert_array_equal(pixels_of(row), every[int(str(row.extra[0]))])
    assert open_collection(str(path), index_uri=None, fps=0.01).num_rows == 1
    assert open_collection(str(path), index_uri=None, fps=5000).num_rows == NUM_FRAMES


@pytest.mark.parametrize(("fps", "every"), [(29.97, 1), (14.985, 2), (2.997, 10)])
def test_rates_are_exact(fps: float, every: int) -> None:
    """An hour at 30000/1001 frames per second, in which rounded numbers would drift by a frame."""
    count = 10**5
    times = PacketTimes(
        pts=np.arange(count, dtype=np.int64) * 1001,
        dts=np.arange(count, dtype=np.int64) * 1001,
        is_key=np.ones(count, np.uint8),
        is_shown=np.ones(count, np.uint8),
        time_base=(1, 30000),
        num_stated=count,
    )
    chosen = chosen_frames(times, fps)
    steps = Fraction(str(fps)) * Fraction(1001, 30000)
    assert set(np.diff(chosen.frame).tolist()) <= {every, every + 1}
    assert abs(len(chosen.frame) - count * steps) <= 1
    assert chosen.time_s[1] == pytest.approx(float(chosen.frame[1]) * 1001 / 30000)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_are_upright(tmp_path: Path, degrees: int, turns: int, codec: str) -> None:
    path = write_video(tmp_path / "movie.mp4", 3, rotation=degrees, codec=codec)
    images = open_collection(str(path), index_uri=None)
    for row, pixels in zip(images.read(0, 3), frames_in_sequence(path), strict=True):
        np.testing.assert_array_equal(pixels_of(row), np.rot90(pixels, turns))


def test_an_index_keeps_its_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "movie.mp4", 20)
    index = str(tmp_path / "index.parquet")
    first = open_collection(str(path), index_uri=index, fps=5)
    again = open_collection(str(path), index_uri=index)
    assert again == first and again.num_rows == 4
    assert open_collection(str(path), index_uri=None, fps=4).fingerprint != first.fingerprint
    assert open_collection(str(path), index_uri=None, fps=5).id_space == first.id_space
    path.unlink()
    assert {row.error for row in again.read(0, 4)} == {"no such file"}
    write_video(path, 3)
    assert [row.error is None for row in again.read(0, 4)] == [True, False, False, False]


def test_what_is_not_a_video_is_refused_with_one_line(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", 30).read_bytes()
    broken = {
        "empty": (b"", "empty file"),
        "text": (b"#EXTM3U\nfile:///etc/passwd\n", "not an MP4"),
        "cut": (whole[: len(whole) // 2], "broken or truncated"),
        "head": (whole[:40], "broken or truncated"),
        "zeros": (b"\0" * 1000, "not an MP4"),
    }
    for name, (content, words) in broken.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            open_collection(str(path), index_uri=None)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match="no image file"):
        open_collection(str(tmp_path / "folder.mp4"), index_uri=None)
    (tmp_path / "whole.mp4").unlink()
    with pytest.raises(UserError, match=r"cannot read any of 5 videos, such as cut.mp4: broken or truncated"):
        open_collection(str(tmp_path), index_uri=None, fps=2)


def test_folders_and_lists_of_videos(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    (folder / "day").mkdir(parents=True)
    write_video(folder / "day" / "a.mp4", 12)
    write_video(folder / "c.mkv", 7)
    (folder / "b.mov").write_bytes(b"no video")
    (folder / "notes.md").write_text("not listed")
    (tmp_path / "outside.mp4").write_bytes((folder / "c.mkv").read_bytes())
    (folder / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    images = open_collection(str(folder), index_uri=None, fps=1000)
    rows = list(images.read(0, images.num_rows))
    frames = [f"day/a.mp4/frame_{number:06d}" for number in range(12)]
    frames = ["b.mov", *(f"c.mkv/frame_{number:06d}" for number in range(7)), *frames, "link.mp4"]
    assert [row.path for row in rows] == frames
    assert {row.path: row.error for row in rows if row.error} == {
        "b.mov": "it is not an MP4, MOV, MKV, WebM, AVI or MPEG-TS video",
        "link.mp4": "the file name leaves its folder through a symbolic link; --allow-root permits folders outside",
    }
    assert rows[0].extra == (None, None) and rows[3].extra == (2, pytest.approx(0.08))
    # Any range holds the same rows.
    middle = list(images.read(5, 14))
    assert [(row.path, row.data) for row in middle] == [(row.path, row.data) for row in rows[5:14]]

    named = tmp_path / "videos.txt"
    named.write_text("videos/c.mkv\nvideos/absent.mp4\n")
    listed = open_collection(str(named), index_uri=None, fps=5)
    found = [(row.path, row.error) for row in listed.read(0, listed.num_rows)]
    assert found[-1] == ("videos/absent.mp4", "no such file") and found[0] == ("videos/c.mkv/frame_000000", None)

    named.write_text("videos/c.mkv\na.jpg\n")
    with pytest.raises(UserError, match=r"--fps needs videos, but .*videos.txt names a.jpg"):
        open_collection(str(named), index_uri=None, fps=5)
    with pytest.raises(UserError, match=r"no image file below .*, but videos; set --fps"):
        open_collection(str(folder), index_uri=None)
    for video in (folder / "day" / "a.mp4", folder / "c.mkv", folder / "b.mov", folder / "link.mp4"):
        video.unlink()
    with pytest.raises(UserError, match=r"there is none below .*1 other files.*video files end in avi"):
        open_collection(str(folder), index_uri=None, fps=5)


def test_videos_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    local = tmp_path / "videos"
    (local / "day").mkdir(parents=True)
    for name in ("day/a.mp4", "b.mkv"):
        write_video(local / name, 9)
        with storage.open_output(f"{bucket}/videos/{name}") as file:
            file.write((local / name).read_bytes())
    here, there = (open_collection(uri, index_uri=None, fps=10) for uri in (str(local), f"{bucket}/videos"))
    assert [(row.path, row.data) for row in there.read(0, there.num_rows)] == [
        (row.path, row.data) for row in here.read(0, here.num_rows)
    ]


def test_missing_frames_of_a_truncated_file_are_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "movie.mp4", NUM_FRAMES, movflags="faststart")
    assert open_collection(str(path), index_uri=None).num_missing == 0  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    images = open_collection(str(path), index_uri=None)
    assert isinstance(images, VideoCollection) and 0 < images.num_missing < NUM_FRAMES
    assert images.num_rows + images.num_missing == NUM_FRAMES
    errors = [row.error for row in images.read(0, images.num_rows)]
    assert errors[:10] == [None] * 10


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "movie.mp4", 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"video requires av; run: pip install \"raydet\[video\]\""):
        open_collection(str(path), index_uri=None)


def test_damage_in_the_middle_costs_its_group(tmp_path: Path) -> None:
    path = write_video(tmp_path / "movie.mkv", NUM_FRAMES, group=10, b_frames=0)
    images = open_collection(str(path), index_uri=None)
    whole = [row.data for row in images.read(0, NUM_FRAMES)]
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = np.random.default_rng(0).bytes(500)
    path.write_bytes(content)
    rows = list(images.read(0, NUM_FRAMES))
    damaged = [row.image_id for row in rows if row.error]
    assert 1 <= len(damaged) <= 10 and len({number // 10 for number in damaged}) == 1
    assert all("\n" not in (row.error or "") for row in rows)
    assert [row.data for row in rows if not row.error] == [
        data for number, data in enumerate(whole) if number not in damaged
    ]
    for start in (damaged[0], damaged[-1]):
        assert [row.error for row in images.read(start, start + 1)] == [rows[start].error]


def test_a_crash_costs_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"x264-params": "scenecut=0"}
    path = write_video(tmp_path / "movie.mp4", 20, group=10, b_frames=0, **options)
    images = open_collection(str(path), index_uri=None)
    crash = """
from raydet.images.video import frames, process
def found(self, group):
    for number, frame in enumerate(whole(self, group)):
        if group.key_pts == 0 and number == 4:
            import os; os.abort()
        yield frame
whole, frames.OpenVideo.frames = frames.OpenVideo.frames, found
process.serve(frames)
"""
    monkeypatch.setattr(process, "_idle", [])
    monkeypatch.setattr(process, "_PROGRAM", crash)
    errors = [row.error for row in images.read(0, 20)]
    assert errors == [*[None] * 4, *["the decoder crashed"] * 6, *[None] * 10]


def test_time_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "movie.mp4", 3)
    endless = """
from raydet.images import isolation
from raydet.images.video import frames, process
frames.OpenVideo.times = lambda self: any(iter(int, 1))
isolation._CPU_S = 0
process._CPU_BYTES = 0
process.serve(frames)
"""
    monkeypatch.setattr(process, "_idle", [])
    monkeypatch.setattr(process, "_PROGRAM", endless)
    with pytest.raises(UserError, match="takes too long"):
        open_collection(str(path), index_uri=None)


def test_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "movie.mp4", 3, size_hw=(64, 96))
    monkeypatch.setattr("raydet.images.video.index.DEFAULT_MAX_PIXELS", 64 * 95)
    with pytest.raises(UserError, match="6,144 pixels is over the limit"):
        open_collection(str(path), index_uri=None)


def test_an_abandoned_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_idle", [])
    path = write_video(tmp_path / "movie.mp4", 20)
    images = open_collection(str(path), index_uri=None)
    (idle,) = process._idle
    rows = images.read(0, 20)
    next(rows)
    assert not process._idle and idle._process.poll() is None
    rows.close()  # type: ignore[attr-defined]
    assert idle._process.poll() is not None
