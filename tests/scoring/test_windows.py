"""Pictures read by windows have the rows that whole pictures cut into tiles have, whatever dies, at any size."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from scipy import ndimage

from raydet import BrowseConfig, ExportCocoConfig, PredictConfig, UserError, export_coco, predict
from raydet.browsing.pictures import Pictures
from raydet.browsing.sources import open_sources
from raydet.cli.main import main
from raydet.engines.views import num_tiles, tiles_of, views_of
from raydet.images.collection import WindowedCollection
from raydet.models.detector import Detections
from raydet.models.geometry import Image, ResizeRule, SizeHW
from raydet.models.loading import build_detector
from raydet.scoring import predict as scoring
from raydet.scoring.predict import predict_with
from raydet.scoring.windows.merging import WINDOWS_FOLDER
from raydet.tables.schema import Category
from raydet.tables.table import open_table
from tests.drivers import command_of, started, wait_for_progress
from tests.outcomes import RecordingConsole, assert_same_rows
from tests.small_sets import rows_of
from tests.tiffs import UTM_32_N, Pixels, block_of, write_tiled

TILE = 512
CATEGORIES = [Category(1, "square"), Category(2, "circle")]


def blocks(size_hw: SizeHW, seed: int) -> Pixels:
    """Coloured squares, uint8 [H, W, 3]."""
    height, width = size_hw
    colours = np.random.default_rng(seed).integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), np.uint8)
    return colours.repeat(20, 0).repeat(20, 1)[:height, :width]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PredictConfig:
    """A run over three pictures, one of which fits into a tile."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "pictures").mkdir()
    sizes_hw = {"a": (1000, 1500), "b": (200, 300), "c": (700, 500)}
    for seed, (name, size_hw) in enumerate(sizes_hw.items()):
        tags = UTM_32_N if name == "a" else None
        path = folder / "pictures" / f"{name}.tif"
        write_tiled(path, size_hw, block_of(blocks(size_hw, seed)), tile=128, compression="jpeg", tags=tags)
    build_detector("rt_detr_v2_tiny", CATEGORIES, image_size=64, seed=3).save(str(folder / "checkpoint"))
    return PredictConfig(
        checkpoint=str(folder / "checkpoint"),
        data=str(folder / "pictures"),
        out=str(folder / "d"),
        tile=TILE,
        windowed=True,
        top_k=400,
        batch_size=4,
        rows_per_file=4,
        threads_per_worker=1,
    )


@pytest.fixture(scope="module")
def rows(config: PredictConfig) -> list[dict[str, Any]]:
    predict_with(config, in_process=True)
    return rows_of(config.out, "detections")


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": True, "merge": "wbf"}, {"score_threshold": 0.05, "classes": ["square"], "class_agnostic_nms": 0.6}],
    ids=["plain", "fused", "selected"],
)
def test_the_rows_are_those_of_whole_pictures_cut_into_tiles(
    config: PredictConfig, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, **options)
    found = []
    for windowed in (True, False):
        own = dataclasses.replace(config, windowed=windowed, whole_image=windowed, out=str(tmp_path / f"{windowed}"))
        assert predict_with(own, in_process=True).num_errors == 0
        found.append(rows_of(own.out, "detections"))
    for mine, theirs in zip(*found, strict=True):
        assert 0 < len(theirs["detections"]["score"]) < 400
        assert {name: mine[name] for name in ("image_id", "path", "width", "height", "error")} == {
            name: theirs[name] for name in ("image_id", "path", "width", "height", "error")
        }
        assert mine["detections"]["category"] == theirs["detections"]["category"]
        # Batches hold other tiles, which changes the last bits.
        np.testing.assert_allclose(mine["detections"]["score"], theirs["detections"]["score"], atol=1e-6)
        np.testing.assert_allclose(mine["detections"]["bbox"], theirs["detections"]["bbox"], atol=1e-3)


def test_the_table_is_an_ordinary_one_with_the_georeference(
    config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert [(row["path"], row["height"], row["width"]) for row in rows] == [
        ("a.tif", 1000, 1500),
        ("b.tif", 200, 300),
        ("c.tif", 700, 500),
    ]
    assert [row["crs"] for row in rows] == ["EPSG:32632", None, None]
    assert rows[0]["transform"] == [0.5, 0.0, 500_000.0, 0.0, -0.5, 5_400_000.0] and rows[1]["transform"] is None
    schema = open_table(config.out, "detections").schema
    assert [str(schema.field(name).type) for name in ("crs", "transform")] == ["string", "list<element: double>"]
    assert {path.name for path in Path(config.out).iterdir() if not path.name.startswith(".")} == {
        "part-0000000.parquet"
    }
    sources = open_sources(BrowseConfig(data=config.out))
    assert isinstance(sources.collection, WindowedCollection) and not sources.notes
    assert Pictures(sources).thumbnail(1).startswith(b"\xff\xd8")  # small enough to be decoded whole
    exported = export_coco(ExportCocoConfig(data=config.out, out=str(tmp_path / "d.json")))
    assert len(json.loads(Path(exported.out).read_text())) == sum(len(row["detections"]["score"]) for row in rows)


def test_a_picture_with_a_damaged_window_has_a_row_with_the_reason(config: PredictConfig, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = block_of(blocks((600, 900), 0))
    write_tiled(folder / "good.tif", (600, 900), pixels, tile=128)
    data = bytearray(write_tiled(folder / "damaged.tif", (600, 900), pixels, tile=128).read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = b"\xff" * 200
    (folder / "damaged.tif").write_bytes(data)
    PillowImage.fromarray(blocks((600, 900), 0)).save(folder / "photo.png")
    config = dataclasses.replace(config, data=str(folder), out=str(tmp_path / "d"), tile=256)
    result = predict_with(config, in_process=True)
    assert (result.num_images, result.num_errors) == (3, 2)
    damaged, good, photo = rows_of(config.out, "detections")
    assert re.fullmatch(r"window \[\d+, \d+, 256 × 256\]: broken TIFF: .* \(and 3 more windows\)", damaged["error"])
    assert (damaged["width"], damaged["detections"]["score"]) == (900, [])
    assert good["error"] is None and good["detections"]["score"]
    # Of one picture that cannot be read, no window is scored.
    (folder / "a.tif").write_bytes(b"")
    config = dataclasses.replace(config, limit=1, out=str(tmp_path / "first"))
    assert (predict_with(config, in_process=True).num_errors, rows_of(config.out, "detections")[0]["error"]) == (
        1,
        "empty file",
    )
    assert photo["error"] == "not a TIFF: other formats can only be decoded as a whole" and photo["width"] is None


def test_a_finished_run_and_one_that_ended_while_merging_need_no_model(
    config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: PredictConfig, *, device: str, num_threads: int) -> Any:
        raise AssertionError("the model is not needed")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    config = dataclasses.replace(config, out=str(tmp_path / "d"))
    windows = Path(config.out) / WINDOWS_FOLDER
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            predict_with(config, in_process=True)
    assert len(list(windows.glob("part-*.parquet"))) == 4
    predict_with(config, in_process=True, load=broken)
    assert_same_rows(rows_of(config.out, "detections"), rows)
    # Killed before the last deletion.
    windows.mkdir()
    (windows / "part-0000000.parquet").touch()
    assert predict_with(config, in_process=True).already_done and not windows.exists()


def test_tiles_are_counted_without_being_built() -> None:
    for height, width, tile, overlap, flip in [
        (1000, 1500, 512, 0.2, False),
        (100, 900, 300, 0.5, True),
        (64, 64, 64, 0, False),
        (700, 50, 64, 0.75, False),
    ]:
        config = PredictConfig(
            checkpoint="c", data="d", out="o", tile=tile, tile_overlap=overlap, flip=flip, windowed=True
        )
        tiles = tiles_of((height, width), config)
        assert len(tiles) == num_tiles((height, width), config)
        assert tiles == views_of((height, width), tile=tile, overlap=overlap, whole_image=False, flip=flip)


def test_wrong_options_are_refused(config: PredictConfig, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, reason in [
        ({"tile": None}, "--windowed needs --tile"),
        ({"fps": 2.0}, "--fps cannot be combined with --windowed"),
        ({"draw": 2}, "--draw cannot be combined with --windowed"),
        ({"data": ["a.tif", "b.tif"]}, "--windowed takes one place"),
        ({"keep": ["class_scores"]}, "--keep cannot be combined with --windowed"),
        ({"keep": ["thumbnail"]}, "--keep cannot be combined with --windowed"),
    ]:
        with pytest.raises(UserError, match=reason):
            dataclasses.replace(config, **options)  # type: ignore[arg-type]
    command = ["predict", f"--checkpoint={config.checkpoint}", "--tile=256", "--windowed", f"--out={config.out}-2"]
    assert main([*command, f"--data={shapes / 'train'}"]) == 2
    assert "--windowed needs TIFF files as --data" in capsys.readouterr().err
    assert not Path(f"{config.out}-2").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_finds_the_same(config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    config = dataclasses.replace(config, out=str(tmp_path / "d"))
    predict_with(config, in_process=False)
    assert_same_rows(rows_of(config.out, "detections"), rows)


@pytest.mark.slow
def test_a_killed_run_repeats_only_the_windows_in_flight(config: PredictConfig, tmp_path: Path) -> None:
    size_hw = (2000, 3000)
    path = write_tiled(tmp_path / "p.tif", size_hw, block_of(blocks(size_hw, 0)), tile=256)
    config = dataclasses.replace(config, data=str(path), tile=256, tile_overlap=0.0, out=str(tmp_path / "whole"))
    predict_with(config, in_process=True)
    expected = rows_of(config.out, "detections")
    config = dataclasses.replace(config, out=str(tmp_path / "d"))
    output = tmp_path / "output"

    def parts() -> list[Path]:
        return sorted((Path(config.out) / WINDOWS_FOLDER).glob("part-*.parquet"))

    for least in (1, 6, 11):
        with started(command_of("predict", config), output) as driver:
            wait_for_progress(lambda least=least: len(parts()) >= least, driver, output)  # type: ignore[misc]
        assert len(parts()) < 96 / 4, "killed too late to tell"
    num_done = 4 * len(parts())
    console = RecordingConsole()
    predict(config, console=console)
    assert f"resuming at {num_done} of 96 windows" in console.lines
    assert_same_rows(rows_of(config.out, "detections"), expected)


# A picture of 600 megapixels

LARGE_HW = (20_000, 30_000)
LARGE_TILE = 1024
RED = 250


@dataclasses.dataclass
class RedEngine:
    """An engine that finds connected red regions; those at the border of an image are less certain."""

    categories: tuple[Category, ...] = (Category(1, "red"),)
    max_detections: int = 300
    resize_rule: ResizeRule = ResizeRule(mode="fixed", size_hw=(LARGE_TILE, LARGE_TILE))

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        return self.resize_rule.target_size_hw(size_hw)

    def prepare(self, images: Sequence[Image]) -> Any:
        raise AssertionError("decoders resize")

    def prepare_planes(self, planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]) -> Any:
        assert set(original_sizes_hw) == {(LARGE_TILE, LARGE_TILE)}, "nothing is resized"
        return list(planes)

    def start(self, prepared: Any) -> Callable[[], list[Detections]]:
        return lambda: [self._find(planes) for planes in prepared]

    def _find(self, planes: Image) -> Detections:
        labels, _ = ndimage.label((planes[0] == RED) & (planes[1] < 40))
        rows: list[tuple[float, ...]] = []
        for down, across in ndimage.find_objects(labels):
            box = (across.start, down.start, across.stop - across.start, down.stop - down.start)
            is_cut = min(box[:2]) == 0 or max(across.stop, down.stop) == LARGE_TILE
            rows.append((*box, 0.7 if is_cut else 0.9))
        values = np.array(sorted(rows, key=lambda row: -row[-1]), np.float64).reshape(-1, 5)
        return Detections(values[:, :4], values[:, 4], np.zeros(len(values), np.int64))


def planted(config: PredictConfig) -> np.ndarray:
    """Boxes of shapes on every fourth crossing of seams, on borders, and between them; int64 [N, 4], xywh."""
    tiles = tiles_of(LARGE_HW, config)
    rng = np.random.default_rng(0)
    lefts, tops = (sorted({getattr(tile, name) for tile in tiles}) for name in ("left", "top"))
    height, width = LARGE_HW
    boxes = []
    for number, (x, y) in enumerate((x, y) for x in lefts for y in tops):
        side = int(rng.integers(20, 120))
        centre_x, centre_y = [
            (x, y),  # the corner of a tile
            (x + LARGE_TILE, y),  # on its right edge
            (x + 400, y + LARGE_TILE),  # on its lower edge
            (x + 500, y + 500),  # inside
        ][number % 4]
        left, top = (
            min(max(centre - side // 2, 0), full - side) for centre, full in ((centre_x, width), (centre_y, height))
        )
        boxes.append((left, top, side, side - 7))
    return np.array(boxes)


def score_large(folder: str) -> None:
    """Score the picture in this process, and print the peak memory; runs in an interpreter of its own."""
    import resource

    result = predict_with(large_config(Path(folder)), in_process=True, load=lambda *_, **__: RedEngine())
    print(json.dumps({"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "errors": result.num_errors}))


def large_config(folder: Path) -> PredictConfig:
    return PredictConfig(
        checkpoint=str(folder / "checkpoint"),
        data=str(folder / "large.tif"),
        out=str(folder / "d"),
        tile=LARGE_TILE,
        windowed=True,
        batch_size=4,
        threads_per_worker=1,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_shapes_on_seams_of_600_megapixels_are_all_found_once_in_little_memory(tmp_path: Path) -> None:
    config = large_config(tmp_path)
    boxes = planted(config)

    def block(left: int, top: int, width: int, height: int) -> Pixels:
        y, x = np.ogrid[top : top + height, left : left + width]
        pixels = np.repeat(((x // 8 + y // 8) % 100 + 60).astype(np.uint8)[..., None], 3, axis=2)
        starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        near = (starts < (left + width, top + height)).all(axis=1) & (ends > (left, top)).all(axis=1)
        for own_left, own_top, own_width, own_height in boxes[near].tolist():
            rows = slice(max(own_top - top, 0), max(own_top + own_height - top, 0))
            columns = slice(max(own_left - left, 0), max(own_left + own_width - left, 0))
            pixels[rows, columns] = (RED, 20, 20)
        return pixels

    write_tiled(tmp_path / "large.tif", LARGE_HW, block, tile=512)
    build_detector("rt_detr_v2_tiny", [Category(1, "red")], image_size=LARGE_TILE, seed=0).save(
        str(tmp_path / "checkpoint")
    )
    script = f"from tests.scoring.test_windows import score_large; score_large({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{len(boxes)} shapes, peak memory {measured['mb']:,.0f} MB")
    (row,) = rows_of(config.out, "detections")
    found = np.array(row["detections"]["bbox"]).round().astype(int)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, boxes.tolist()))
    assert measured["mb"] < 2_000 and measured["errors"] == 0
