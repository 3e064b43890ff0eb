"""Effects of the scoring options on the rows, each compared with an independent computation."""

import csv
import dataclasses
import io
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from raydet import PredictConfig, predict
from raydet.common.boxes import clip_xywh, has_area, xyxy_to_xywh
from raydet.config import DrawIf
from raydet.engines.tiling import merge
from raydet.engines.torch_engine import TorchEngine
from raydet.engines.views import views_of
from raydet.images.decode import decode
from raydet.models.detector import Detections, Detector
from raydet.models.loading import build_detector, load_detector
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import OutputFolder
from raydet.tables.table import open_table
from tests.zero_shot_models import write_zero_shot

pytestmark = pytest.mark.usefixtures("ray_cluster")

SIDE = 64
NUM_GOOD = 6
LABELS = ["cat", "remote control"]

Row = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> str:
    """A tiny untrained model that proposes 20 boxes per image."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    categories = open_table(str(shapes / "val"), "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=SIDE, seed=3).save(folder)
    return folder


@pytest.fixture(scope="module")
def squares(shapes: Path) -> list[Image.Image]:
    """Generated images of 64 × 64 pixels."""
    rows = open_table(str(shapes / "val"), "images").read(["image"])["image"].to_pylist()
    return [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows]


@pytest.fixture(scope="module")
def strip(squares: list[Image.Image]) -> Image.Image:
    """An image 128 pixels wide and 64 high, two tiles side by side."""
    return Image.fromarray(np.concatenate([np.asarray(square) for square in squares[-2:]], axis=1))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, squares: list[Image.Image], strip: Image.Image) -> Path:
    """A folder of squares, the strip, and each window and mirrored window of the strip as an image."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, square in enumerate(squares[:NUM_GOOD]):
        square.save(folder / f"good_{number}.png")
    ImageOps.mirror(squares[0]).save(folder / "good_0_mirrored.png")
    strip.save(folder / "strip.png")
    for left in (0, 32, 64):
        window = strip.crop((left, 0, left + SIDE, SIDE))
        window.save(folder / f"strip_{left}.png")
        ImageOps.mirror(window).save(folder / f"strip_{left}_mirrored.png")
    return folder


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, pictures: Path, checkpoint: str, ray_cluster: None
) -> tuple[PredictConfig, dict[str, Row]]:
    """The reference run, with three drawn pictures and no other option, and its rows by file name."""
    config = PredictConfig(
        checkpoint=checkpoint, data=str(pictures), out=str(tmp_path_factory.mktemp("plain") / "d"), batch_size=5, draw=3
    )
    result = predict(config)
    assert (result.num_images, result.num_errors) == (len(list(pictures.iterdir())), 0)
    return config, rows_of(config.out)


def rows_of(out: str) -> dict[str, Row]:
    """Return the rows of a detections table by file name of the image."""
    rows = open_table(out, "detections").read().to_pylist()
    by_name = {str(row["path"]).rpartition("/")[2]: row for row in rows}
    assert len(by_name) == len(rows)
    return by_name


def list_of(paths: Iterable[Path], file: Path) -> str:
    file.write_text("".join(f"{path}\n" for path in paths))
    return str(file)


def found_in(row: Row) -> Detections:
    found = row["detections"]
    boxes_xywh = np.array(found["bbox"], dtype=np.float64).reshape(-1, 4)
    return Detections(boxes_xywh, np.array(found["score"]), np.array(found["category"], dtype=np.int64))


def plan_of(out: str) -> dict[str, Any]:
    record = OutputFolder(out, "predict").record()
    assert record is not None
    return record.plan


def assert_same(found: Detections, expected: Detections, *, scores: float = 1e-5, boxes_px: float = 1e-2) -> None:
    """Compare two results in descending score order; scores within the tolerance may swap."""
    assert len(found.scores) == len(expected.scores)
    np.testing.assert_allclose(found.scores, expected.scores, atol=scores)
    off = np.abs(found.boxes_xywh[:, None] - expected.boxes_xywh[None]).max(axis=2) <= boxes_px
    off &= np.abs(found.scores[:, None] - expected.scores[None]) <= scores
    off &= found.categories[:, None] == expected.categories[None]
    assert off.any(axis=1).all() and off.any(axis=0).all()


def by_the_model(detector: Detector, pixels: np.ndarray) -> Detections:
    """Run the model on one image without raydet's pipeline; boxes are in pixels of the image."""
    engine = TorchEngine(detector, pad_batches=False)
    return engine.predict(engine.prepare([pixels]))[0]


def test_every_file_of_a_folder_has_one_row_whatever_it_is_and_auto_finds_a_batch_size(
    test_data: Path, pictures: Path, plain: tuple[PredictConfig, dict[str, Row]], tmp_path: Path
) -> None:
    with (test_data / "awkward" / "MANIFEST.csv").open() as manifest:
        is_readable = {row["file"]: row["pillow_13_load"] == "ok" for row in csv.DictReader(manifest)}
    assert len(is_readable) == 29
    good = [f"good_{number}.png" for number in range(NUM_GOOD)]
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in [*(test_data / "awkward" / name for name in is_readable), *(pictures / name for name in good)]:
        shutil.copyfile(path, folder / path.name)
    config = dataclasses.replace(plain[0], data=str(folder), out=str(tmp_path / "d"), batch_size="auto", draw=0)

    result = predict(config)
    rows = rows_of(config.out)
    assert sorted(rows) == sorted([*is_readable, *good]) and result.num_images == 29 + NUM_GOOD
    assert result.num_errors == sum(not readable for readable in is_readable.values()) > 0
    for name, row in rows.items():
        if is_readable.get(name, True):
            with Image.open(folder / name) as image:
                assert (row["width"], row["height"]) == ImageOps.exif_transpose(image).size, name
            assert row["error"] is None and len(row["detections"]["score"]) == 20, name
        else:
            assert row["error"] and "\n" not in row["error"] and row["detections"]["score"] == [], name
    for name in good:
        assert_same(found_in(rows[name]), found_in(plain[1][name]))

    plan = plan_of(config.out)
    assert plan["num_rows"] == 29 + NUM_GOOD
    assert isinstance(plan["batch_size"], int) and plan["batch_size"] in (1, 2, 4, 8, 16, 32, 64, 128)
    # The state after a kill just before the end: the resumed run keeps the plan and its batch size.
    (Path(config.out) / MANIFEST_NAME).unlink()
    again = predict(config)
    assert (again.num_images, again.num_detections) == (result.num_images, result.num_detections)
    assert plan_of(config.out) == plan
    assert predict(config).already_done


@pytest.mark.slow
def test_large_jpegs_are_decoded_smaller_and_their_boxes_are_in_pixels_of_the_whole_picture(
    squares: list[Image.Image], checkpoint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    landscape, portrait = (square.resize((960, 720), Image.Resampling.BICUBIC) for square in squares[:2])
    landscape.save(folder / "landscape.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: upright after a clockwise quarter turn
    portrait.save(folder / "portrait.jpg", quality=95, exif=exif)
    landscape.save(folder / "landscape.png")
    config = PredictConfig(checkpoint=checkpoint, data=str(folder), out=str(tmp_path / "d"), reduced_decode=True)
    assert predict(config).num_errors == 0
    rows = rows_of(config.out)
    assert {name: (row["width"], row["height"]) for name, row in rows.items()} == {
        "landscape.jpg": (960, 720),
        "landscape.png": (960, 720),
        "portrait.jpg": (720, 960),
    }
    detector = load_detector(checkpoint)
    for name, row in rows.items():
        data = (folder / name).read_bytes()
        whole = by_the_model(detector, decode(data, max_pixels=10**8))
        if name.endswith(".png"):
            assert_same(found_in(row), whole, boxes_px=0.1)
            continue
        # JPEG decodes at one eighth or more, which is no smaller than the model's input here.
        reduced = decode(data, max_pixels=10**8, at_least_hw=(SIDE, SIDE))
        assert sorted(reduced.shape) == [3, 90, 120]
        expected = by_the_model(detector, reduced)
        expected = dataclasses.replace(expected, boxes_xywh=expected.boxes_xywh * 8)
        assert_same(found_in(row), expected, boxes_px=0.1)
        # The input differs slightly: the best box stays in place, and its score changes a little.
        assert not np.array_equal(found_in(row).scores, whole.scores)
        np.testing.assert_allclose(found_in(row).scores[0], whole.scores[0], atol=0.06)
        np.testing.assert_allclose(found_in(row).boxes_xywh[0], whole.boxes_xywh[0], atol=1.0)


@pytest.mark.slow
def test_mirrored_views_add_the_boxes_of_the_mirrored_picture(
    plain: tuple[PredictConfig, dict[str, Row]], pictures: Path, strip: Image.Image, tmp_path: Path
) -> None:
    """A run with tiles and flip has two views of an image within one tile, and four of a strip of two tiles."""
    reference = {name: found_in(row) for name, row in plain[1].items()}
    data = list_of([pictures / "good_0.png", pictures / "strip.png"], tmp_path / "two.txt")
    config = dataclasses.replace(
        plain[0], data=data, out=str(tmp_path / "d"), draw=0, tile=SIDE, tile_overlap=0.0, whole_image=False, flip=True
    )
    # At an IoU of 1 no boxes are merged, so that every input box is in the result.
    config = dataclasses.replace(config, merge="nms", merge_iou=1.0, top_k=1000)
    predict(config)
    rows = rows_of(config.out)
    twins = united([reference["good_0.png"], mirrored(reference["good_0_mirrored.png"], SIDE)], (SIDE, SIDE))
    assert len(twins.scores) > 30
    assert_same(found_in(rows["good_0.png"]), twins)

    views = views_of((SIDE, 2 * SIDE), tile=SIDE, overlap=0.0, whole_image=False, flip=True)
    assert [(view.left, view.is_mirrored) for view in views] == [(0, False), (0, True), (SIDE, False), (SIDE, True)]
    of_views = [reference[f"strip_{view.left}{'_mirrored' if view.is_mirrored else ''}.png"] for view in views]
    expected = merge(views, of_views, (SIDE, 2 * SIDE), how="nms", iou=1.0, max_detections=1000)
    assert len(expected.scores) > 40
    assert_same(found_in(rows["strip.png"]), expected)
    assert (rows["strip.png"]["width"], rows["strip.png"]["height"]) == strip.size


@pytest.mark.slow
def test_tiles_that_overlap_are_scored_as_pictures_of_their_own_and_fused(
    plain: tuple[PredictConfig, dict[str, Row]], pictures: Path, tmp_path: Path
) -> None:
    reference = {name: found_in(row) for name, row in plain[1].items()}
    data = list_of([pictures / "good_0.png", pictures / "strip.png"], tmp_path / "two.txt")
    config = dataclasses.replace(plain[0], data=data, out=str(tmp_path / "d"), draw=0, tile=SIDE, tile_overlap=0.5)
    config = dataclasses.replace(config, merge="wbf", merge_iou=0.4)
    predict(config)
    rows = rows_of(config.out)
    views = views_of((SIDE, 2 * SIDE), tile=SIDE, overlap=0.5, whole_image=True, flip=False)
    assert [(view.left, view.is_whole) for view in views] == [(0, False), (32, False), (64, False), (0, True)]
    of_views = [reference["strip.png" if view.is_whole else f"strip_{view.left}.png"] for view in views]
    fused = found_in(rows["strip.png"])
    assert_same(fused, merge(views, of_views, (SIDE, 2 * SIDE), how="wbf", iou=0.4, max_detections=20))
    suppressed = merge(views, of_views, (SIDE, 2 * SIDE), how="nms", iou=0.4, max_detections=20)
    assert len(fused.scores) != len(suppressed.scores) or not np.allclose(fused.scores, suppressed.scores)
    # Boxes in the right half show that the tiles' offsets are applied.
    assert (fused.boxes_xywh[:, 0] > SIDE).any() and (fused.boxes_xywh[:, :2] + fused.boxes_xywh[:, 2:]).max() <= 128
    # An image that fits into a tile has one view, whose result is unchanged.
    assert_same(found_in(rows["good_0.png"]), reference["good_0.png"])


def mirrored(found: Detections, width: int) -> Detections:
    boxes_xywh = found.boxes_xywh.copy()
    boxes_xywh[:, 0] = width - boxes_xywh[:, 0] - boxes_xywh[:, 2]
    return dataclasses.replace(found, boxes_xywh=boxes_xywh)


def united(parts: list[Detections], size_hw: tuple[int, int]) -> Detections:
    """Return the boxes of all parts, clipped to the image, in descending score order."""
    boxes_xywh = clip_xywh(np.concatenate([part.boxes_xywh for part in parts]), size_hw)
    scores = np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores, kind="stable")
    order = order[has_area(boxes_xywh)[order]]
    return Detections(boxes_xywh[order], scores[order], np.concatenate([part.categories for part in parts])[order])


@pytest.mark.parametrize("draw_if", ["any", "low_score", "many_boxes"])
def test_pictures_are_drawn_with_their_boxes(
    plain: tuple[PredictConfig, dict[str, Row]], pictures: Path, draw_if: DrawIf
) -> None:
    """Pictures are drawn with the run or after it; a finished run scores nothing again."""
    config, rows = plain
    best = {name: row["detections"]["score"][0] for name, row in rows.items()}
    threshold = float(np.quantile(list(best.values()), 0.37))  # between two scores, off the middle
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).glob("part-*.parquet")}
    if draw_if != "any":
        result = predict(dataclasses.replace(config, draw=4, draw_if=draw_if, draw_threshold=threshold))
        assert result.already_done and "4 images" in "\n".join(result.report)
    folder = Path(config.out) / "__drawn"
    with (folder / "index.csv").open() as file:
        index = list(csv.DictReader(file))
    names = [str(entry["path"]).rpartition("/")[2] for entry in index]
    assert len(set(names)) == (3 if draw_if == "any" else 4)
    assert sorted(path.name for path in folder.iterdir()) == [*(entry["file"] for entry in index), "index.csv"]
    drawn_above = {name: sum(score > threshold for score in row["detections"]["score"]) for name, row in rows.items()}
    if draw_if == "low_score":
        assert names == sorted(best, key=lambda name: abs(best[name] - threshold))[:4]
    elif draw_if == "many_boxes":
        assert [drawn_above[name] for name in names] == sorted(drawn_above.values(), reverse=True)[:4]
        assert [int(entry["num_boxes"]) for entry in index] == [drawn_above[name] for name in names]
    for rank, (entry, name) in enumerate(zip(index, names, strict=True), start=1):
        assert entry["file"] == f"{rank:04d}-{Path(name).stem}.jpg"
        assert float(entry["best_score"]) == pytest.approx(best[name])
        with Image.open(pictures / name) as image, Image.open(folder / entry["file"]) as drawn:
            scale = 640 / max(image.size)
            assert (drawn.format, drawn.size) == ("JPEG", (round(image.width * scale), round(image.height * scale)))
            enlarged = image.convert("RGB").resize(drawn.size, Image.Resampling.NEAREST)
            changed = np.abs(np.asarray(drawn, int) - np.asarray(enlarged, int)).max(axis=2) > 60
        assert (changed.mean() > 0.002) == (int(entry["num_boxes"]) > 0)
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).glob("part-*.parquet")} == before


@pytest.mark.slow
def test_a_zero_shot_model_looks_for_the_labels(pictures: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    folder = write_zero_shot("owlv2", tmp_path / "owlv2")
    paths = [pictures / f"good_{number}.png" for number in range(3)] + [pictures / "strip.png"]
    data, out = list_of(paths, tmp_path / "four.txt"), str(tmp_path / "d")
    result = predict(PredictConfig(model=folder, labels=LABELS, data=data, out=out, score_threshold=0.3))
    assert (result.num_images, result.num_errors) == (4, 0) and result.num_detections > 4
    table = open_table(out, "detections")
    assert [(category.id, category.name) for category in table.categories] == list(enumerate(LABELS))
    rows = rows_of(out)
    model, processor = (
        AutoModelForZeroShotObjectDetection.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    found_labels: set[int] = set()
    for path in paths:
        picture = Image.open(path).convert("RGB")
        size_hw = (picture.height, picture.width)
        inputs = processor(text=[LABELS], images=[picture], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        post_process = processor.post_process_grounded_object_detection
        (item,) = post_process(outputs, threshold=0.3, target_sizes=[size_hw])
        boxes_xywh = xyxy_to_xywh(item["boxes"].numpy().astype(np.float64))
        expected = united([Detections(boxes_xywh, item["scores"].numpy(), item["labels"].numpy())], size_hw)
        assert_same(found_in(rows[path.name]), expected, scores=1e-3, boxes_px=0.5)
        found_labels |= set(expected.categories.tolist())
    assert found_labels == {0, 1}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_model_finds_the_same(
    plain: tuple[PredictConfig, dict[str, Row]], pictures: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(plain[0], out=str(tmp_path / "d"), compile=True, draw=0)
    assert predict(config).num_errors == 0
    rows = rows_of(config.out)
    assert sorted(rows) == sorted(plain[1])
    for name, row in rows.items():
        assert_same(found_in(row), found_in(plain[1][name]), scores=1e-4, boxes_px=1e-2)
