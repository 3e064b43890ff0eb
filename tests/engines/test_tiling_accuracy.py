"""Benefit of tiles: shapes of 12 px in images of 4000 × 3000, detected by a model trained on crops."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from raydet import EvaluateConfig, PredictConfig, TrainConfig, evaluate, predict, train
from raydet.preparation.sources.shapes import CATEGORIES
from raydet.tables.table import open_table
from tests.small_sets import QUICK_RECIPE, write_drawn

CROP_PX = 192
SHAPE_PX = 12
GAP_PX = 4


def satellite_picture(
    rng: np.random.Generator, size_hw: tuple[int, int], num_shapes: int
) -> tuple[np.ndarray, list[list[float]], list[int]]:
    """Draw separate bright or dark shapes of 11 to 13 px on a smooth background.

    Returns:
        Pixels, uint8 [H, W, 3]; boxes (x, y, width, height), [N, 4]; indices into `CATEGORIES`, [N].
    """
    height, width = size_hw
    patches = rng.normal(120, 12, (max(2, height // 48), max(2, width // 48), 3)).clip(0, 255).astype(np.uint8)
    ground = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
    picture = Image.fromarray((np.asarray(ground, dtype=np.int16) + grain).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    boxes: list[list[float]] = []
    categories: list[int] = []
    corners = np.zeros((0, 2))
    while len(boxes) < num_shapes:
        shape_width, shape_height = (int(side) for side in rng.integers(SHAPE_PX - 1, SHAPE_PX + 2, 2))
        left, top = int(rng.integers(0, width - shape_width + 1)), int(rng.integers(0, height - shape_height + 1))
        if len(corners) and (np.abs(corners - (left, top)).max(axis=1) < SHAPE_PX + 1 + GAP_PX).any():
            continue
        corners = np.concatenate([corners, [[left, top]]])
        category, right, bottom = int(rng.integers(3)), left + shape_width - 1, top + shape_height - 1
        low, high = (0, 50) if rng.random() < 0.5 else (200, 256)
        colour = tuple(int(value) for value in rng.integers(low, high, 3))
        if CATEGORIES[category].name == "rectangle":
            pen.rectangle((left, top, right, bottom), fill=colour)
        elif CATEGORIES[category].name == "ellipse":
            pen.ellipse((left, top, right, bottom), fill=colour)
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
        boxes.append([float(left), float(top), float(shape_width), float(shape_height)])
        categories.append(category)
    return np.asarray(picture), boxes, categories


def write_pictures(uri: Path, size_hw: tuple[int, int], num_images: int, shapes: tuple[int, int], seed: int) -> str:
    """Write an images table; the number of shapes per image lies between the two limits."""

    def picture(number: int) -> tuple[np.ndarray, list[list[float]], list[int]]:
        rng = np.random.default_rng((seed, number))
        return satellite_picture(rng, size_hw, int(rng.integers(*shapes, endpoint=True)))

    return write_drawn(uri, map(picture, range(num_images)))


def recipe(folder: Path, *, num_train: int, epochs: int) -> TrainConfig:
    """A small model trained on crops of the size of the tiles, without a resize."""
    crop_hw = (CROP_PX, CROP_PX)
    return TrainConfig(
        train_data=write_pictures(folder / "train", crop_hw, num_train, (0, 8), seed=1),
        val_data=write_pictures(folder / "val", crop_hw, max(4, num_train // 16), (0, 8), seed=2),
        out=str(folder / "run"),
        model="rt_detr_v2_small",
        image_size=CROP_PX,
        epochs=epochs,
        validate_every=epochs,
        **QUICK_RECIPE,
    )


def test_pictures_have_the_shapes_that_their_boxes_say(tmp_path: Path) -> None:
    pixels, boxes, categories = satellite_picture(np.random.default_rng(0), (300, 400), 40)
    assert pixels.shape == (300, 400, 3) and len(boxes) == len(categories) == 40 and set(categories) == {0, 1, 2}
    is_shape = (np.abs(pixels.astype(int) - 128) > 70).all(axis=2)
    covered = np.zeros((300, 400), dtype=np.bool_)
    for left, top, width, height in np.array(boxes, dtype=int):
        rows, columns = np.nonzero(is_shape[top : top + height, left : left + width])
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (0, 0, width, height)
        covered[top : top + height, left : left + width] = True
    assert not (is_shape & ~covered).any()
    config = recipe(tmp_path, num_train=6, epochs=2)
    table = open_table(str(config.train_data), "images")
    assert (table.num_rows, [category.name for category in table.categories]) == (
        6,
        ["rectangle", "ellipse", "triangle"],
    )
    assert sum(len(objects["bbox"]) for objects in table.read(["objects"])["objects"].to_pylist()) > 6


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("ray_cluster")
def test_small_objects_are_found_with_tiles_and_not_without(tmp_path: Path) -> None:
    trained = train(recipe(tmp_path, num_train=1600, epochs=8))
    ap_on_crops = float(trained.history[-1].value("AP") or 0.0)
    # At most 80 shapes per image, because COCO counts the best hundred detections of an image.
    truth = write_pictures(tmp_path / "satellite", (3000, 4000), 4, (60, 80), seed=3)
    ap: dict[int | None, float] = {}
    for tile in (None, CROP_PX):
        config = PredictConfig(
            checkpoint=trained.checkpoint, data=truth, out=str(tmp_path / f"detections-{tile}"), tile=tile
        )
        found = predict(config)
        ap[tile] = evaluate(EvaluateConfig(truth=truth, detections=found.out)).result.AP or 0.0
    print(f"AP on crops {ap_on_crops:.3f}, on the pictures with tiles {ap[CROP_PX]:.3f}, without {ap[None]:.3f}")
    assert ap_on_crops > 0.3
    assert ap[CROP_PX] > 0.15
    assert ap[CROP_PX] >= 2 * ap[None]
