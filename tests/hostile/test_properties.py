"""Properties of everything that reads a stranger's bytes: no exception but the documented one, and bounded time."""

import contextlib
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydet.common.errors import UserError
from raydet.config import DEFAULT_MAX_PIXELS, PrepareCocoConfig, PrepareCsvConfig, PrepareVocConfig
from raydet.images.collection import WindowedCollection, open_collection
from raydet.images.decode import DecodeError, check, decode
from raydet.images.files import ImageFolder
from raydet.images.references import Reference
from raydet.images.tars import image_members
from raydet.images.windows.directory import WindowError
from raydet.images.windows.index import MAX_WINDOWS, WindowSize, open_picture
from raydet.preparation.sources.coco import read_coco
from raydet.preparation.sources.lists import ImageList, read_list
from raydet.preparation.sources.source import Source
from raydet.preparation.sources.tools.csv_labels import read_csv
from raydet.preparation.sources.voc import read_voc
from raydet.preparation.sources.yolo import read_yolo
from raydet.preparation.sources.yolo_files import find_in_folders
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.table import open_table
from tests.hostile import base, tables, tiffs
from tests.hostile.mutation import (
    TARS,
    addresses_of,
    damaged,
    damaged_text,
    with_foreign_fields,
    with_foreign_values,
)
from tests.hostile.pictures import saved
from tests.videos import write_video

EXAMPLES = pytest.mark.parametrize(
    "num_examples", [50, pytest.param(10_000, marks=[pytest.mark.hostile, pytest.mark.timeout(1800)])]
)
_MAX_PIXELS = 1_000_000
_SIDE = 640
"""Of the windows of pictures."""
_LONGEST_S = 10.0


def holds(num_examples: int, strategy: st.SearchStrategy[Any], claim: Callable[[Any], None]) -> None:
    """Check a claim for many examples, each within its time."""

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=num_examples < 1_000,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def checked(example: Any) -> None:
        with _in_time():
            claim(example)

    checked()


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {_LONGEST_S:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _check_message(error: UserError | WindowError) -> None:
    assert "\n" not in str(error), "a message of several lines"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data sets and tables."""
    folder = tmp_path_factory.mktemp("good")
    base.make(folder)
    return folder


@EXAMPLES
def test_tar_headers(num_examples: int) -> None:
    def claim(data: bytes) -> None:
        try:
            members = image_members(pa.PythonFile(pa.BufferReader(data), mode="r"), "x.tar")
        except UserError as error:
            _check_message(error)
            return
        assert all(item.offset >= 0 and item.size >= 0 and item.offset + item.size <= len(data) for item in members)

    good = archive_of_two()
    holds(num_examples, TARS | damaged(good), claim)


@pytest.mark.parametrize(
    ("name", "codec", "num_examples"),
    [
        ("a.mp4", "libx264", 4),
        *(
            pytest.param(name, codec, 200, marks=[pytest.mark.hostile, pytest.mark.timeout(1800)])
            for name, codec in (
                ("a.mp4", "libx264"),
                ("a.mkv", "libx264"),
                ("a.ts", "libx264"),
                ("a.avi", "mpeg4"),
                ("a.webm", "libvpx-vp9"),
            )
        ),
    ],
)
def test_damaged_videos(tmp_path: Path, name: str, codec: str, num_examples: int) -> None:
    path = write_video(tmp_path / name, 24, codec=codec, group=6)

    def claim(data: bytes) -> None:
        path.write_bytes(data)
        try:
            frames = open_collection(str(path), index_uri=None)
        except UserError as error:
            _check_message(error)
            return
        rows = list(frames.read(0, frames.num_rows))
        assert [row.image_id for row in rows] == list(range(frames.num_rows))
        for row in rows:
            assert (row.data is None) != (row.error is None)
            if row.data is not None:
                decode(row.data, max_pixels=_MAX_PIXELS)

    holds(num_examples, damaged(path.read_bytes()), claim)


def archive_of_two() -> bytes:
    from tests.hostile import archives

    return archives.member("a.png", saved("PNG")) + archives.member("b.png", saved("PNG")) + archives.END


PICTURES = {
    "jpeg": saved("JPEG"),
    "progressive": saved("JPEG", progressive=True),
    "png": saved("PNG"),
    "palette": saved("PNG", "P"),
    "webp": saved("WEBP"),
    "lossless": saved("WEBP", lossless=True),
    "tiff": saved("TIFF"),
    "tiff lzw": saved("TIFF", compression="tiff_lzw"),
    "gif": saved("GIF"),
    "bmp": saved("BMP"),
}


@EXAMPLES
@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "tiff", "others"])
def test_images(num_examples: int, name: str) -> None:
    def claim(data: bytes) -> None:
        size_hw = pixels = None
        with contextlib.suppress(DecodeError):
            size_hw = check(data, max_pixels=_MAX_PIXELS)
        with contextlib.suppress(DecodeError):
            pixels = decode(data, max_pixels=_MAX_PIXELS)
        assert (size_hw is None) == (pixels is None), "check and decode disagree"
        if pixels is not None and size_hw is not None:
            assert pixels.shape == (*size_hw, 3) and size_hw[0] * size_hw[1] <= _MAX_PIXELS

    groups = {"jpeg": ("jpeg", "progressive"), "png": ("png", "palette"), "webp": ("webp", "lossless")}
    groups |= {"tiff": ("tiff", "tiff lzw"), "others": ("gif", "bmp")}
    holds(num_examples, st.one_of([damaged(PICTURES[own]) for own in groups[name]]), claim)


def _windows_or_refused(path: Path, data: bytes, max_pixels: int) -> None:
    """Check that the corners of a picture can be read by windows, or that there is a reason in one line."""
    path.write_bytes(data)
    try:
        pictures = open_collection(str(path), index_uri=None, windows=WindowSize(_SIDE, max_pixels))
    except UserError as error:
        _check_message(error)
        return
    assert isinstance(pictures, WindowedCollection)
    ((reference, size_hw),) = ((Reference(*own[2:5]), own.size_hw) for own in pictures.pictures(0, 1))
    assert size_hw is not None and size_hw[0] * size_hw[1] <= MAX_WINDOWS * _SIDE**2
    height, width = (min(side, _SIDE) for side in size_hw)
    try:
        with open_picture(reference, pictures.reader(), max_pixels=max_pixels) as picture:
            for top, left in ((0, 0), (size_hw[0] - height, size_hw[1] - width)):
                assert picture.window(left, top, width, height).shape == (height, width, 3)
    except WindowError as error:
        _check_message(error)


@contextlib.contextmanager
def _in_little_memory() -> Iterator[None]:
    """Let this process map another gigabyte at most."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", tiffs.TIFFS)
def test_hostile_tiffs(name: str, tmp_path: Path) -> None:
    data = tiffs.TIFFS[name]()
    with _in_time(), _in_little_memory():
        _windows_or_refused(tmp_path / "a.tif", data, DEFAULT_MAX_PIXELS)


@EXAMPLES
@pytest.mark.parametrize("name", tiffs.GOOD)
def test_damaged_tiffs(num_examples: int, name: str, tmp_path: Path) -> None:
    good = tiffs.GOOD[name]()

    def claim(data: bytes) -> None:
        with _in_little_memory():
            _windows_or_refused(tmp_path / "a.tif", data, _MAX_PIXELS)

    holds(num_examples, with_foreign_fields(good) | damaged(good), claim)


@pytest.mark.hostile
@pytest.mark.timeout(600)
def test_each_field_of_a_directory_with_each_wrong_value(tmp_path: Path) -> None:
    for _, data in tiffs.altered():
        with _in_time(), _in_little_memory():
            _windows_or_refused(tmp_path / "a.tif", data, _MAX_PIXELS)


def _consumed(make: Callable[[], Source]) -> None:
    """Check that a source yields all its records, or is refused in one line."""
    try:
        source = make()
        records = list(source.images)
    except UserError as error:
        _check_message(error)
        return
    assert len(records) == source.num_images
    assert len({record.image_id for record in records}) == len(records)
    for record in records:
        record.path.encode()
        assert 0 <= record.image_id < 2**53


@EXAMPLES
def test_coco_text(num_examples: int, good: Path, tmp_path: Path) -> None:
    folder, path = ImageFolder(str(good / "coco" / "images")), tmp_path / "coco.json"
    config = PrepareCocoConfig(annotations=str(path), images=folder.uri, out="unused")

    def claim(text: bytes) -> None:
        path.write_bytes(text)
        _consumed(lambda: read_coco(config, folder))

    content = base.coco()
    foreign = with_foreign_values(content, addresses_of(content)).map(str.encode)
    holds(num_examples, foreign | damaged_text(json.dumps(content)), claim)


@EXAMPLES
def test_voc_text(num_examples: int, good: Path, tmp_path: Path) -> None:
    images, folder = ImageFolder(str(good / "voc" / "images")), tmp_path / "xml"
    shutil.copytree(good / "voc" / "xml", folder)
    config = PrepareVocConfig(annotations=str(folder), images=images.uri, out="unused")

    def claim(text: bytes) -> None:
        (folder / "b.xml").write_bytes(text)
        _consumed(lambda: read_voc(config, images))

    holds(num_examples, damaged_text(base.voc("b.png", "dog")), claim)


@EXAMPLES
def test_yolo_text(num_examples: int, good: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(good / "yolo" / "labels", labels)

    def claim(text: bytes) -> None:
        (labels / "train" / "b.txt").write_bytes(text)
        _consumed(lambda: read_yolo(find_in_folders(str(good / "yolo" / "images"), str(labels), list(base.CLASSES))))

    holds(num_examples, damaged_text("1 0.3 0.25 0.5 0.3\n0 0.1 0.1 0.5 0.1 0.5 0.5\n"), claim)


@EXAMPLES
def test_csv_text(num_examples: int, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"

    def claim(text: bytes) -> None:
        path.write_bytes(text)
        _consumed(lambda: read_list(ImageList(str(path))))

    holds(num_examples, damaged_text("path,camera,number\na.png,north,1\nb.png,south,2\n"), claim)


@EXAMPLES
@pytest.mark.parametrize("place", ["csv/boxes.csv", "csv/retinanet.csv"])
def test_csv_labels(num_examples: int, place: str, good: Path, tmp_path: Path) -> None:
    images, path = ImageFolder(str(good / "csv" / "images")), tmp_path / "boxes.csv"
    config = PrepareCsvConfig(annotations=str(path), images=images.uri, out="unused")

    def claim(text: bytes) -> None:
        path.write_bytes(text)
        _consumed(lambda: read_csv(config, images))

    holds(num_examples, damaged_text(base.TEXTS[place]), claim)


def _read_or_refused(folder: Path, kind: Any) -> None:
    """Check that a table can be read whole, or is refused in one line."""
    try:
        table = open_table(str(folder), kind)
        num_rows = sum(batch.num_rows for batch in table.iter_batches())
    except UserError as error:
        _check_message(error)
        return
    assert num_rows == table.num_rows


@EXAMPLES
def test_manifests(num_examples: int, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(good / "tables" / "images", folder)
    text = (folder / MANIFEST_NAME).read_text()
    content = json.loads(text)

    def claim(changed: bytes) -> None:
        (folder / MANIFEST_NAME).write_bytes(changed)
        _read_or_refused(folder, "images")

    foreign = with_foreign_values(content, addresses_of(content)).map(str.encode)
    holds(num_examples, foreign | damaged_text(text), claim)


_TYPES = st.sampled_from(
    [
        pa.int64(),
        pa.int32(),
        pa.uint64(),
        pa.float32(),
        pa.float64(),
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.bool_(),
        pa.null(),
        pa.list_(pa.int64()),
        pa.list_(pa.list_(pa.float64())),
        pa.list_(pa.list_(pa.float64(), 4)),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.dictionary(pa.int32(), pa.string()),
        pa.timestamp("us"),
        pa.decimal128(20, 2),
    ]
)


@EXAMPLES
def test_parquet_columns(num_examples: int, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(good / "tables" / "images", folder)
    source = good / "tables" / "images"
    whole = tables.read(source)

    def claim(changes: dict[str, pa.DataType | None]) -> None:
        table = whole
        for name, dtype in changes.items():
            place = table.column_names.index(name)
            if dtype is None:
                table = table.remove_column(place)
            else:
                table = table.set_column(place, name, _column(table[name], dtype))
        tables.write(folder, table)
        _read_or_refused(folder, "images")

    names = st.sampled_from(whole.column_names)
    holds(num_examples, st.dictionaries(names, st.none() | _TYPES, min_size=1, max_size=3), claim)


def _column(column: pa.ChunkedArray, dtype: pa.DataType) -> pa.ChunkedArray:
    """Return the values in another type, or nulls where they do not fit."""
    try:
        return column.cast(dtype)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return pa.chunked_array([pa.nulls(len(column), dtype)])
