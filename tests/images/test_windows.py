"""Windows of a TIFF have the pixels of the whole picture, whatever its layout, and hostile files are refused."""

import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from raydet.common.errors import UserError
from raydet.common.untrusted.opening import ANYWHERE
from raydet.images.collection import WindowedCollection, open_collection
from raydet.images.decode import decode
from raydet.images.references import Reference
from raydet.images.windows.directory import WindowError
from raydet.images.windows.index import WindowSize, open_picture
from raydet.images.windows.picture import OpenTiff
from raydet.tables import storage
from tests.tiffs import UTM_32_N, block_of, write_tiled

LIMIT = 178_956_970
SIZE_HW = (150, 230)


def smooth(channels: int = 3, size_hw: tuple[int, int] = SIZE_HW) -> np.ndarray:
    """Smooth colours with some noise, uint8 [H, W, channels]."""
    height, width = size_hw
    rng = np.random.default_rng(channels)
    y, x = np.mgrid[:height, :width]
    waves = [120 + 90 * np.sin(x / (9 + band) + y / (21 - band)) for band in range(channels)]
    return (np.stack(waves, axis=2) + rng.integers(0, 12, (height, width, channels))).clip(0, 255).astype(np.uint8)


def tiled(channels: int = 3, **options: Any) -> Callable[[Path], Path]:
    return lambda path: write_tiled(path, SIZE_HW, block_of(smooth(channels)), **options)


def striped(
    mode: str, compression: str = "raw", rows: int = 16, size_hw: tuple[int, int] = SIZE_HW, **tags: int
) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        if mode == "I;16":
            image = Image.fromarray(smooth(1, size_hw)[..., 0].astype(np.uint16) * 200)
        else:
            image = Image.fromarray(smooth(3, size_hw)).convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.fromarray(smooth(1, size_hw)[..., 0]))
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[278] = rows
        for name, value in tags.items():
            info[int(name.removeprefix("tag_"))] = value
        row_bytes = -(-image.width * (1 if mode == "1" else 8 * len(image.getbands())) // 8) * (
            2 if mode == "I;16" else 1
        )
        image.save(path, "TIFF", compression=compression, tiffinfo=info, strip_size=rows * row_bytes)
        return path

    return write


FORMATS = {
    "raw tiles": tiled(compression="raw"),
    "deflate": tiled(),
    "predictor": tiled(predictor=True),
    "jpeg": tiled(compression="jpeg"),
    "grey jpeg": tiled(1, compression="jpeg"),
    "grey": tiled(1),
    "grey and alpha": tiled(2),
    "transparent": tiled(4),
    "planes": tiled(is_planar=True),
    "big": tiled(is_big=True),
    "big-endian": tiled(order=">"),
    "large tiles": tiled(tile=256),
    **{f"turned {turn}": tiled(tags={274: ("H", [turn])}) for turn in range(2, 9)},
    "turned strips": striped("RGB", "tiff_lzw", tag_274=6),
    **{
        f"{mode} {compression}": striped(mode, compression)
        for mode, compression in [
            *[("RGB", name) for name in ("raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", "lzma", "zstd")],
            *[(name, "tiff_lzw") for name in ("RGBA", "L", "P", "CMYK", "I;16", "1")],
            *[(name, "raw") for name in ("RGBA", "P", "CMYK", "I;16", "1", "LAB")],
            ("1", "group4"),
            ("YCbCr", "jpeg"),
        ]
    },
    "one strip": striped("RGB", rows=10_000),
    "one row a strip": striped("RGB", "tiff_lzw", rows=1),
}


def opened(path: Path, max_pixels: int = LIMIT) -> OpenTiff:
    return OpenTiff(ANYWHERE.open(str(path)), max_pixels=max_pixels)


@pytest.mark.parametrize("name", FORMATS)
def test_windows_show_what_the_whole_picture_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small pieces, so that a small picture has several, and pieces are forgotten.
    monkeypatch.setattr("raydet.images.windows.layout._PIECE_PIXELS", 5_000)
    monkeypatch.setattr("raydet.images.windows.picture._KEPT_BYTES", 30_000)
    path = FORMATS[name](tmp_path / "picture.tif")
    whole = decode(path.read_bytes(), max_pixels=LIMIT)
    picture = opened(path)
    assert picture.size_hw == whole.shape[:2]
    rng = np.random.default_rng(0)
    for _ in range(12):
        height, width = (int(rng.integers(1, side + 1)) for side in whole.shape[:2])
        top, left = int(rng.integers(whole.shape[0] - height + 1)), int(rng.integers(whole.shape[1] - width + 1))
        window = picture.window(left, top, width, height)
        np.testing.assert_array_equal(window, whole[top : top + height, left : left + width])


def test_tiles_that_are_not_stored_are_empty(tmp_path: Path) -> None:
    pixels = smooth()
    for compression in ("jpeg", "deflate"):
        path = write_tiled(tmp_path / "p.tif", SIZE_HW, block_of(pixels), compression=compression, skipped=[1])
        window = opened(path).window(0, 0, 200, 64)
        assert not window[:, 64:128].any() and window[:, :64].any() and window[:, 128:].any()
    path = write_tiled(tmp_path / "p.tif", SIZE_HW, block_of(pixels), is_planar=True, skipped=[1])
    with pytest.raises(WindowError, match="some of its strips are missing"):
        opened(path).window(0, 0, 200, 64)


def test_the_georeference_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    def of(**more: Any) -> Any:
        tags = {**UTM_32_N, **{int(name.removeprefix("tag_")): value for name, value in more.items()}}
        return opened(write_tiled(tmp_path / "p.tif", SIZE_HW, block_of(smooth()), tags=tags)).georeference

    assert of() == ("EPSG:32632", (0.5, 0.0, 500_000.0, 0.0, -0.5, 5_400_000.0))
    # Coordinates of a pixel's centre.
    keys = [1, 1, 0, 3, 1024, 0, 1, 2, 1025, 0, 1, 2, 2048, 0, 1, 4326]
    assert of(tag_34735=("H", keys)) == ("EPSG:4326", (0.5, 0.0, 499_999.75, 0.0, -0.5, 5_400_000.25))
    matrix = [0.3, 0.4, 0.0, 7.0, 0.4, -0.3, 0.0, 9.0, *[0.0] * 8]
    assert of(tag_34264=("d", matrix)).transform == (0.3, 0.4, 7.0, 0.4, -0.3, 9.0)
    # A system of the file's own has its name.
    name = b"Site grid|"
    keys = [1, 1, 0, 3, 1024, 0, 1, 1, 3072, 0, 1, 32767, 3073, 34737, len(name), 0]
    assert of(tag_34735=("H", keys), tag_34737=("B", name)).crs == "Site grid"
    assert of(tag_33550=("d", [float("nan"), 1.0, 0.0]), tag_34735=("H", [1, 1, 0])) == (None, None)
    assert opened(write_tiled(tmp_path / "p.tif", SIZE_HW, block_of(smooth()))).georeference == (None, None)
    # Upright pixels of a picture that is turned lead to the same places.
    plain = np.array(of().transform).reshape(2, 3)
    height, width = SIZE_HW
    stored_of: dict[int, Callable[[float, float], tuple[float, float]]] = {
        3: lambda x, y: (width - x, height - y),
        6: lambda x, y: (y, height - x),
        8: lambda x, y: (width - y, x),
    }
    for turn, stored in stored_of.items():
        turned = np.array(of(tag_274=("H", [turn])).transform).reshape(2, 3)
        for corner in ((0.0, 0.0), (10.0, 3.0), (40.5, 70.0)):
            np.testing.assert_allclose(turned @ [*corner, 1], plain @ [*stored(*corner), 1])


def changed(tag: int, value: int, kind: str = "H") -> Callable[[Path], Path]:
    return tiled(tags={tag: (kind, [value])})


HOSTILE = {
    "a picture that claims to be huge": (
        tiled(tags={256: ("I", [2**31 - 1]), 257: ("I", [2**31 - 1])}),
        r"places of 12 of 1,125,\d{3},\d{3},\d{3},\d{3} tiles",
    ),
    "no width": (changed(256, 0, "I"), "0 × 150 pixels"),
    "no tile width": (changed(322, 0, "I"), "tiles of 0 × 64"),
    "many channels": (changed(277, 60_000), "60,000 channels"),
    "float": (tiled(1, tags={339: ("H", [3]), 258: ("H", [32])}), "float or 32-bit"),
    "no such compression": (changed(259, 9999), "broken TIFF"),
    "no such meaning of channels": (changed(262, 77), "unknown pixel mode"),
    "a tile of many bytes": (tiled(tags={325: ("I", [2**31] * 12)}), "2,147,483,648 bytes for a segment"),
    "places beyond the end": (tiled(tags={324: ("I", [2**31] * 12)}), "truncated"),
    "damage": (tiled(tags={324: ("I", [9] * 12)}), "broken TIFF"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    write, reason = HOSTILE[name]
    with pytest.raises(WindowError, match=reason):
        opened(write(tmp_path / "p.tif"), max_pixels=10**6).window(0, 0, 64, 64)


def test_a_large_tile_is_refused_with_the_remedy(tmp_path: Path) -> None:
    sides = {256: 30_000, 257: 20_000, 322: 30_000, 323: 30_000}
    write = tiled(tags={number: ("I", [side]) for number, side in sides.items()})
    picture = opened(write(tmp_path / "p.tif"))
    with pytest.raises(WindowError, match=r"900 Mpx is over .* of 30,000 × 30,000 pixels: write it with tiles"):
        picture.window(0, 0, 64, 64)
    with pytest.raises(UserError, match=r"can read none of the pictures, such as p\.tif: 900 Mpx"):
        open_collection(str(tmp_path / "p.tif"), index_uri=None, windows=WindowSize(64, LIMIT))


def test_pictures_may_be_wider_than_decoders_allow_if_their_tiles_are_not(tmp_path: Path) -> None:
    columns = np.arange(70_000, dtype=np.uint32).view(np.uint8).reshape(1, -1, 4)[..., :3]
    pixels = columns.repeat(40, axis=0)
    picture = opened(write_tiled(tmp_path / "p.tif", pixels.shape[:2], block_of(pixels), tile=512))
    np.testing.assert_array_equal(picture.window(69_000, 3, 1000, 30), pixels[3:33, 69_000:])
    tall = striped("L", rows=10**6, size_hw=(70_000, 3))(tmp_path / "tall.tif")
    assert opened(tall).window(0, 69_990, 3, 10).shape == (10, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "strips.tif")
    with pytest.raises(WindowError, match=r"in pieces of 70,000 × \d+ pixels, over the limit of 65,535 a side"):
        opened(tmp_path / "strips.tif")


@pytest.mark.parametrize("name", ["deflate", "RGB raw"])
def test_damaged_directories_are_refused(name: str, tmp_path: Path) -> None:
    """Beginnings of a file, and files with damaged bytes or types of values, are read or refused."""
    whole = FORMATS[name](tmp_path / "p.tif").read_bytes()
    start = struct.unpack("<I", whole[4:8])[0]
    rng = np.random.default_rng(0)
    entries = range(start + 2, start + 2 + 12 * int.from_bytes(whole[start : start + 2], "little"), 12)
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            data[int(rng.choice(entries)) + 2] = int(rng.integers(1, 19))
        if number < 100:
            data = data[: int(rng.integers(len(whole)))]
        for _ in range(3 if number >= 100 else 0):
            data[int(rng.choice([int(rng.integers(16)), int(rng.integers(start, len(whole)))]))] = int(
                rng.integers(256)
            )
        (tmp_path / "q.tif").write_bytes(data)
        try:
            picture = opened(tmp_path / "q.tif", max_pixels=10**6)
            picture.window(0, 0, *(min(64, side) for side in reversed(picture.size_hw)))
        except WindowError:
            pass


def test_pictures_are_listed_with_their_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_tiled(folder / "a.tif", SIZE_HW, block_of(smooth()), tags=UTM_32_N)
    Image.fromarray(smooth()).save(folder / "b.jpg")
    (folder / "c.tif").write_bytes(b"II*\0nothing")
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        tar.add(folder / "b.jpg", "b.jpg")
        tar.add(folder / "a.tif", "a.tif")
    (tmp_path / "list.txt").write_text("pictures/a.tif\npictures/gone.tif\n")
    windows = WindowSize(64, LIMIT)
    found = {}
    for data in ("pictures", "pictures.tar", "list.txt", "pictures/a.tif"):
        images = open_collection(str(tmp_path / data), index_uri=None, windows=windows)
        assert isinstance(images, WindowedCollection) and images.kind == "windowed"
        found[data] = {picture.path: picture for picture in images.pictures(0, images.num_rows)}
        assert found[data] and [row.path for row in images.read(0, images.num_rows)] == list(found[data])
    a, b, c = found["pictures"].values()
    assert (a.size_hw, a.crs, a.error) == (SIZE_HW, "EPSG:32632", None) and a.transform is not None
    assert (b.size_hw, b.error) == (None, "not a TIFF: other formats can only be decoded as a whole")
    assert c.error is not None and c.error.startswith("not a TIFF")
    assert found["pictures.tar"]["pictures.tar/a.tif"].size_hw == SIZE_HW
    assert found["list.txt"]["pictures/gone.tif"].error == "no such file"
    assert found["pictures/a.tif"]["a.tif"].size_hw == SIZE_HW


def test_the_first_pictures_listed_may_be_of_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydet.images.listing._BATCH_ROWS", 1)
    Image.fromarray(smooth()).save(tmp_path / "a.jpg")
    write_tiled(tmp_path / "b.tif", SIZE_HW, block_of(smooth()))
    images = open_collection(str(tmp_path), index_uri=None, windows=WindowSize(64, LIMIT))
    assert isinstance(images, WindowedCollection)
    assert [(own.path, own.size_hw) for own in images.pictures(0, 2)] == [("a.jpg", None), ("b.tif", SIZE_HW)]


def test_a_picture_of_a_million_windows_is_refused_with_the_remedy(tmp_path: Path) -> None:
    sides = {256: ("I", [70_000]), 257: ("I", [70_000]), 322: ("I", [70_000 // 3 + 1]), 323: ("I", [35_000])}
    tiled(tags=sides)(tmp_path / "p.tif")
    with pytest.raises(
        UserError, match=r"70,000 × 70,000 pixels are more than 1,048,576 windows: choose a larger --ti"
    ):
        open_collection(str(tmp_path / "p.tif"), index_uri=None, windows=WindowSize(68, 10**10))
    assert open_collection(str(tmp_path / "p.tif"), index_uri=None, windows=WindowSize(69, 10**10)).num_rows == 1


def test_a_damaged_strip_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiled(tags={324: ("I", [9] * 12)}, tile=256)(tmp_path / "p.tif")
    picture, calls = opened(path), []

    def counted(data: bytes, *, max_pixels: int) -> Any:
        calls.append(data)
        return decode(data, max_pixels=max_pixels)

    monkeypatch.setattr("raydet.images.windows.picture.decode", counted)
    for left in (0, 64, 128):
        with pytest.raises(WindowError, match="broken TIFF"):
            picture.window(left, 0, 64, 64)
    assert len(calls) == 1


def test_remote_pictures_are_read_by_ranges(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = smooth(size_hw=(600, 900))
    path = write_tiled(tmp_path / "p.tif", (600, 900), block_of(pixels), compression="raw", order=">")
    storage.write_bytes(f"{bucket}/pictures/p.tif", path.read_bytes())
    images = open_collection(f"{bucket}/pictures", index_uri=None, windows=WindowSize(128, LIMIT))
    assert isinstance(images, WindowedCollection)
    (listed,) = images.pictures(0, 1)
    assert (listed.size_hw, listed.uri) == ((600, 900), f"{bucket}/pictures/p.tif")
    monkeypatch.setattr("raydet.images.windows.picture._GAP_BYTES", 0)
    with open_picture(Reference(listed.uri), images.reader(), max_pixels=LIMIT) as picture:
        np.testing.assert_array_equal(picture.window(100, 50, 300, 200), pixels[50:250, 100:400])
    with (
        pytest.raises(WindowError, match="no longer exists"),
        open_picture(Reference(f"{bucket}/gone.tif"), images.reader(), max_pixels=LIMIT),
    ):
        pass


def test_data_without_a_tiff_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    Image.fromarray(smooth()).save(tmp_path / "f" / "b.jpg")
    with pytest.raises(UserError, match=r"--windowed can read none of the pictures, such as b\.jpg: not a TIFF"):
        open_collection(str(tmp_path / "f"), index_uri=str(tmp_path / "index"), windows=WindowSize(64, LIMIT))
    assert not (tmp_path / "index").exists()
