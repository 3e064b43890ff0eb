import numpy as np
import pytest

from raydet.images.decode import decode
from raydet.preparation.sources.shapes import CATEGORIES, DrawnImage, Split, draw, encode


def pictures(seed: int, split: Split, count: int = 60, max_shapes: int = 6) -> list[DrawnImage]:
    return [draw(seed, split, index, image_size=128, max_shapes=max_shapes) for index in range(count)]


def test_the_same_seed_gives_the_same_bytes_and_no_two_streams_meet() -> None:
    first, again = pictures(3, "train", 20), pictures(3, "train", 20)
    assert [encode(item.pixels) for item in first] == [encode(item.pixels) for item in again]
    assert [item.objects for item in first] == [item.objects for item in again]
    others = pictures(3, "val", 20) + pictures(4, "train", 20)
    assert len({item.pixels.tobytes() for item in first + others}) == 60


def test_numbers_sizes_and_classes_are_spread() -> None:
    drawn = pictures(0, "train", 200)
    counts = np.bincount([len(item.objects.ids) for item in drawn], minlength=7)
    assert (counts > 0).all() and counts.size == 7
    classes = np.bincount([category for item in drawn for category in item.objects.categories])
    assert classes.size == len(CATEGORIES) == 3 and classes.min() > 0.25 * classes.sum()
    boxes_xywh = np.array([xywh for item in drawn for xywh in item.objects.boxes_xywh])
    assert boxes_xywh[:, 2:].max() <= np.rint(0.46 * 128)
    assert (boxes_xywh[:, :2] >= 0).all() and (boxes_xywh[:, :2] + boxes_xywh[:, 2:] <= 128).all()


def test_boxes_are_tight_around_what_is_seen() -> None:
    num_shapes = 0
    for index in range(60):
        # The background is drawn first, so an image without shapes has the background of the one with a shape.
        with_shape, ground = (draw(1, "train", index, image_size=128, max_shapes=count) for count in (1, 0))
        assert ground.objects.ids == []
        changed = np.linalg.norm(with_shape.pixels.astype(float) - ground.pixels, axis=2) > 30
        assert changed.any() == bool(with_shape.objects.ids)
        for left, top, width, height in with_shape.objects.boxes_xywh:
            num_shapes += 1
            rows, columns = np.nonzero(changed)
            seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            # Pixels of smoothed edges that are less than half covered lie outside the box.
            assert np.abs(np.subtract(seen, (left, top, left + width, top + height))).max() <= 2
    assert num_shapes > 15


def test_shapes_hardly_cover_one_another() -> None:
    fill = {0: 1.0, 1: np.pi / 4, 2: 0.5}
    crowded = pictures(2, "val", 80, max_shapes=12)
    assert max(len(item.objects.ids) for item in crowded) >= 8
    for item in crowded:
        for (*_, width, height), category, area in zip(
            item.objects.boxes_xywh, item.objects.categories, item.objects.areas, strict=True
        ):
            # The visible box lies within the complete one, so this is an upper bound of the visible part.
            assert area >= 0.85 * fill[category] * width * height - 8


@pytest.mark.parametrize("image_size", [32, 100, 640])
def test_any_size_can_be_drawn_and_decoded(image_size: int) -> None:
    item = draw(0, "train", 3, image_size=image_size, max_shapes=4)
    decoded = decode(encode(item.pixels), max_pixels=10**6)
    assert decoded.shape == (image_size, image_size, 3)
    assert np.abs(decoded.astype(int) - item.pixels).mean() < 4
