"""Small objects in large images: tiles detect each one once; batching, preparation and merging of views."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from raydet.common.errors import UserError
from raydet.config import Merge, PredictConfig
from raydet.engines.scorer import Scorer
from raydet.models.detector import Detections
from raydet.models.geometry import Image, ResizeRule, SizeHW, resize
from raydet.tables.schema import Category

CATEGORIES = tuple(Category(number, name) for number, name in enumerate(["red", "green", "blue"], start=1))
BLOB_PX = 12
GAP_PX = 12
Truth = set[tuple[float, float, float, float, int]]


class BlobEngine:
    """An engine that detects blobs of pure colour, like a detector with a limited input size.

    It shrinks images that are larger than its input, and misses blobs narrower than `least_px` there. A blob cut by the
    edge of the image is detected in part, with a higher score than a complete blob. Each blob has a faint second box.
    """

    categories = CATEGORIES
    max_detections = 300

    def __init__(self, *, input_px: int = 640, least_px: int = 8) -> None:
        self.input_px, self.least_px = input_px, least_px
        self.resize_rule = ResizeRule(mode="keep_aspect", limit_hw=(input_px, input_px))
        self.sizes_of_batches: list[list[SizeHW]] = []
        self.prepare_threads: set[str] = set()
        self.num_predicted = 0

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        scale = min(1.0, self.input_px / max(size_hw))
        return round(size_hw[0] * scale), round(size_hw[1] * scale)

    def prepare(self, images: Sequence[Image]) -> Any:
        self.prepare_threads.add(threading.current_thread().name)
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        self.sizes_of_batches.append(sizes_hw)
        assert all(image.flags.c_contiguous for image in images)
        resized = [resize(image, self.input_size_hw(size), 2) for image, size in zip(images, sizes_hw, strict=True)]
        return list(zip(resized, sizes_hw, strict=True))

    def prepare_planes(self, planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]) -> Any:
        return [(image.transpose(1, 2, 0), size) for image, size in zip(planes, original_sizes_hw, strict=True)]

    def predict(self, prepared: Any) -> list[Detections]:
        return self.start(prepared)()

    def start(self, prepared: Any) -> Callable[[], list[Detections]]:
        self.num_predicted += 1
        found = [self._find(image, size_hw) for image, size_hw in prepared]
        return lambda: found

    def _find(self, image: Image, size_hw: SizeHW) -> Detections:
        scale = np.array([size_hw[1] / image.shape[1], size_hw[0] / image.shape[0]])
        rows: list[tuple[float, ...]] = []
        for category in range(3):
            labels, _ = ndimage.label(image[..., category] > 160)
            for down, across in ndimage.find_objects(labels):
                corner = np.array([across.start, down.start])
                sides = np.array([across.stop, down.stop]) - corner
                if sides.min() < self.least_px:
                    continue
                score = 0.9 - 0.4 * float(sides.prod()) / 200
                rows.append((*(corner * scale), *(sides * scale), score, category))
                rows.append((*((corner + 1) * scale), *(sides * scale), score / 10, category))
        rows.sort(key=lambda row: -row[4])
        values = np.array(rows, dtype=np.float64).reshape(-1, 6)
        return Detections(values[:, :4], values[:, 4], values[:, 5].astype(np.int64))


def picture(
    size_hw: SizeHW, num_blobs: int, *, at: Sequence[tuple[int, int]] = (), seed: int = 0
) -> tuple[Image, Truth]:
    """Draw separate blobs of 12 px, the first ones at the given (left, top); return the image and the blobs' rows."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    image = rng.integers(90, 110, (height, width, 3), dtype=np.uint8)
    taken = np.zeros(size_hw, dtype=np.bool_)
    truth: Truth = set()
    places = iter(at)
    while len(truth) < num_blobs:
        drawn = (int(rng.integers(0, width - BLOB_PX + 1)), int(rng.integers(0, height - BLOB_PX + 1)))
        left, top = next(places, drawn)
        if taken[max(0, top - GAP_PX) : top + BLOB_PX + GAP_PX, max(0, left - GAP_PX) : left + BLOB_PX + GAP_PX].any():
            continue
        category = int(rng.integers(3))
        taken[top : top + BLOB_PX, left : left + BLOB_PX] = True
        image[top : top + BLOB_PX, left : left + BLOB_PX] = np.eye(3, dtype=np.uint8)[category] * 255
        truth.add((left, top, BLOB_PX, BLOB_PX, category))
    return image, truth


def config_of(**options: Any) -> PredictConfig:
    return PredictConfig(**{"checkpoint": "c", "data": "d", "out": "o", "score_threshold": 0.2, **options})


def score(engine: Any, images: Sequence[Image], batch_size: int = 8, **options: Any) -> list[Detections]:
    scorer = Scorer(engine, config_of(**options), batch_size=batch_size)
    return scorer.predict(scorer.prepare(images))


def rows_of(found: Detections) -> list[tuple[float, float, float, float, int]]:
    boxes = found.boxes_xywh.round(6).tolist()
    return [(*box, category) for box, category in zip(boxes, found.categories.tolist(), strict=True)]


def seams(starts: Sequence[int], length: int, tile: int) -> list[int]:
    """Return start positions along one side of blobs that a tile's edge cuts, by different amounts."""
    edges = [start for start in starts if start > 0] + [start + tile for start in starts if start + tile < length]
    return [edge - part for number, edge in enumerate(edges) for part in ((3, 6, 9), (1, 4, 11))[number % 2]]


# 4000 × 3000


@pytest.fixture(scope="module")
def large() -> tuple[Image, Truth]:
    """An image of 4000 × 3000 with 280 blobs, many of them across the seams and corners of tiles of 640."""
    across = seams([0, 480, 960, 1440, 1920, 2400, 2880, 3360], 4000, 640)
    down = seams([0, 472, 944, 1416, 1888, 2360], 3000, 640)
    at = [(left, 30 + 60 * number % 2900) for number, left in enumerate(across)]
    at += [(40 + 70 * number % 3900, top) for number, top in enumerate(down)]
    at += [(left, top) for left in across[::5] for top in down[::4]]
    at += [(0, 0), (4000 - BLOB_PX, 3000 - BLOB_PX), (4000 - BLOB_PX, 0), (0, 3000 - BLOB_PX)]
    return picture((3000, 4000), 280, at=at)


@pytest.mark.parametrize(("merge", "whole_image"), [("nms", True), ("wbf", False)])
def test_with_tiles_every_small_object_of_a_large_picture_is_found_once(
    large: tuple[Image, Truth], merge: Merge, whole_image: bool
) -> None:
    image, truth = large
    # With such a small limit, the engine detects parts of blobs at the seams, 3 pixels wide.
    engine = BlobEngine(least_px=3)
    found = score(engine, [image], tile=640, merge=merge, whole_image=whole_image)[0]
    assert len(engine.sizes_of_batches) == -(-(48 + whole_image) // 8)
    assert len(found.scores) == len(truth) == 280
    assert set(rows_of(found)) == truth


def test_without_tiles_nearly_none_is_found(large: tuple[Image, Truth]) -> None:
    image, truth = large
    found = score(BlobEngine(), [image])[0]
    assert len(found.scores) < len(truth) / 50
    whole_only = score(BlobEngine(least_px=3), [image])[0]
    assert len(whole_only.scores) < len(truth) / 10


# Mirrored


@pytest.mark.parametrize("merge", ["nms", "wbf"])
@pytest.mark.parametrize("tile", [None, 320])
def test_mirrored_views_add_nothing_where_both_agree(merge: Merge, tile: int | None) -> None:
    image, truth = picture((500, 620), 60, at=[(320 - 6, 100), (300 + 2, 200), (0, 300), (620 - BLOB_PX, 320 - 5)])
    engine = BlobEngine(least_px=3)
    found = score(engine, [image], tile=tile, flip=True, merge=merge)[0]
    assert len(found.scores) == 60 and set(rows_of(found)) == truth
    assert sum(map(len, engine.sizes_of_batches)) == (2 if tile is None else 2 * (3 * 2 + 1))


def test_a_mirrored_view_finds_what_the_plain_one_misses() -> None:
    class LeftHalf(BlobEngine):
        """Ignore the right half."""

        def _find(self, image: Image, size_hw: SizeHW) -> Detections:
            blind = image.copy()
            blind[:, image.shape[1] // 2 :] = 0
            return super()._find(blind, size_hw)

    image, truth = picture((300, 400), 20, at=[(20, 20), (350, 40)])
    assert 0 < len(score(LeftHalf(), [image])[0].scores) < 20
    assert {row for row in truth if not 188 < row[0] < 200} <= set(rows_of(score(LeftHalf(), [image], flip=True)[0]))
    # Each blob is detected in only one of the two views, which halves its score.
    plain, fused = (score(LeftHalf(), [image], flip=True, merge=how)[0] for how in ("nms", "wbf"))
    scores = dict(zip(rows_of(plain), plain.scores.tolist(), strict=True))
    assert dict(zip(rows_of(fused), (2 * fused.scores).tolist(), strict=True)) == pytest.approx(scores)


# Batches


def small_pictures() -> list[Image]:
    return [picture((60 + 30 * (n % 2), 90 - 30 * (n % 2)), n % 4, seed=n)[0] for n in range(11)]


@pytest.mark.parametrize("pad_batches", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_without_tiles_the_answers_are_the_engine_s_own(batch_size: int, pad_batches: bool) -> None:
    images, engine = small_pictures(), BlobEngine()
    found = score(engine, images, batch_size, score_threshold=0.0, pad_batches=pad_batches)
    expected = BlobEngine().predict(BlobEngine().prepare(images))
    assert len(found) == len(images) and sum(len(item.scores) for item in expected) == 2 * sum(n % 4 for n in range(11))
    for own, other in zip(found, expected, strict=True):
        for name in ("boxes_xywh", "scores", "categories"):
            np.testing.assert_array_equal(getattr(own, name), getattr(other, name))
    lengths = [len(sizes) for sizes in engine.sizes_of_batches]
    assert sum(lengths) == 11 and all(length == batch_size for length in lengths[:-1])


def test_views_of_like_size_share_a_batch_where_they_are_padded_together() -> None:
    images = small_pictures()
    sorted_engine, plain_engine = BlobEngine(), BlobEngine()
    score(sorted_engine, images, 3, pad_batches=True)
    score(plain_engine, images, 3, pad_batches=False)
    given = [image.shape[:2] for image in images]
    assert [size for sizes in plain_engine.sizes_of_batches for size in sizes] == given
    assert [size for sizes in sorted_engine.sizes_of_batches for size in sizes] == sorted(given)
    assert [len(set(sizes)) for sizes in plain_engine.sizes_of_batches] == [2, 2, 2, 2]
    assert [len(set(sizes)) for sizes in sorted_engine.sizes_of_batches] == [1, 1, 1, 1]


def test_tiles_of_all_pictures_share_batches_and_few_are_ready_at_a_time() -> None:
    images = [picture((300, 500 + 100 * n), 10, seed=n)[0] for n in range(3)]
    engine = BlobEngine()
    scorer = Scorer(engine, config_of(tile=200), batch_size=7)
    prepared = scorer.prepare(images)
    num_views = sum(len(views) for views in prepared.views)
    assert [len(sizes) for sizes in engine.sizes_of_batches] == [7, 7] and num_views > 21
    assert engine.prepare_threads == {threading.current_thread().name}
    found = scorer.predict(prepared)
    assert engine.num_predicted == len(engine.sizes_of_batches) == -(-num_views // 7)
    assert {len(sizes) for sizes in engine.sizes_of_batches[:-1]} == {7}
    assert len(engine.prepare_threads) == 2, "later batches must be prepared while the model runs"
    for item, image in zip(found, images, strict=True):
        alone = score(BlobEngine(), [image], 64, tile=200)[0]
        np.testing.assert_array_equal(item.boxes_xywh, alone.boxes_xywh)
        assert len(item.scores) == 10


def test_prepare_and_predict_run_in_two_threads() -> None:
    engine = BlobEngine()
    scorer = Scorer(engine, config_of(tile=200), batch_size=4)
    groups = [[picture((300, 400), 10, seed=10 * n + k)[0] for k in range(2)] for n in range(4)]
    answers: list[list[Detections]] = []
    with ThreadPoolExecutor(max_workers=1) as thread:
        prepared = scorer.prepare(groups[0])
        for group in [*groups[1:], []]:
            upcoming = thread.submit(scorer.prepare, group)
            answers.append(scorer.predict(prepared))
            prepared = upcoming.result()
    assert scorer.predict(prepared) == []
    for group, found in zip(groups, answers, strict=True):
        for item, alone in zip(found, score(BlobEngine(), group, 64, tile=200), strict=True):
            np.testing.assert_array_equal(item.boxes_xywh, alone.boxes_xywh)


def test_an_error_in_a_later_batch_is_raised() -> None:
    class Failing(BlobEngine):
        def prepare(self, images: Sequence[Image]) -> Any:
            if len(self.sizes_of_batches) == 3:
                raise MemoryError("no room")
            return super().prepare(images)

    with pytest.raises(MemoryError, match="no room"):
        score(Failing(), small_pictures(), 2)


# Selection


def test_what_was_not_asked_for_is_left_out() -> None:
    image, truth = picture((300, 400), 30, seed=5)
    for tile in (None, 200):
        green = score(BlobEngine(), [image], tile=tile, classes=["green"])[0]
        assert set(rows_of(green)) == {row for row in truth if row[4] == 1} != set()
        assert len(score(BlobEngine(), [image], tile=tile, top_k=4)[0].scores) == 4
        assert len(score(BlobEngine(), [image], tile=tile, score_threshold=0.95)[0].scores) == 0
    # Without the threshold, the faint second boxes remain until another option removes them.
    assert len(score(BlobEngine(), [image], score_threshold=0.0)[0].scores) == 60
    assert len(score(BlobEngine(), [image], score_threshold=0.0, class_agnostic_nms=0.5)[0].scores) == 30
    with pytest.raises(UserError, match=r"pink.*red, green, blue"):
        Scorer(BlobEngine(), config_of(classes=["pink"]), batch_size=1)


def test_a_tiled_picture_has_as_many_detections_as_an_image_can_have_or_as_were_asked_for() -> None:
    class Few(BlobEngine):
        max_detections = 25

    image, _ = picture((600, 800), 60, seed=6)
    assert len(score(Few(), [image], tile=300)[0].scores) == 25
    assert len(score(Few(), [image], tile=300, top_k=50)[0].scores) == 50
    assert len(score(Few(), [image], tile=300, top_k=10)[0].scores) == 10
