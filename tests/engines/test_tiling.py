"""Views of an image cover it, and their detections are merged without duplicates or parts."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.boxes import Boxes, xywh_to_xyxy
from raydet.config import Merge
from raydet.engines.tiling import BEST_OF_VIEW, merge
from raydet.engines.views import TileView, crop, views_of
from raydet.models.detector import Detections

Row = tuple[float, float, float, float, float, int]
BOTH: list[Merge] = ["nms", "wbf"]


def detections(*rows: Row) -> Detections:
    values = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return Detections(values[:, :4], values[:, 4], values[:, 5].astype(np.int64))


def merged_rows(
    views: list[TileView], found: list[Detections], size_hw: tuple[int, int], how: Merge = "nms", most: int = 100
) -> list[Row]:
    merged = merge(views, found, size_hw, how=how, iou=0.5, max_detections=most)
    columns = merged.boxes_xywh.round(6).tolist(), merged.scores.round(6).tolist(), merged.categories.tolist()
    return [(*box, score, category) for box, score, category in zip(*columns, strict=True)]


# Views


def test_tiles_are_laid_out_row_by_row_with_the_whole_picture_last() -> None:
    views = views_of((100, 250), tile=100, overlap=0.2, whole_image=True, flip=False)
    assert views == [
        TileView(0, 0, 100, 100),
        TileView(75, 0, 100, 100),
        TileView(150, 0, 100, 100),
        TileView(0, 0, 250, 100, is_whole=True),
    ]
    views = views_of((3000, 4000), tile=640, overlap=0.2, whole_image=False, flip=False)
    assert len(views) == 8 * 6
    assert [view.left for view in views[:8]] == [0, 480, 960, 1440, 1920, 2400, 2880, 3360]
    assert [view.top for view in views[::8]] == [0, 472, 944, 1416, 1888, 2360]


@pytest.mark.parametrize("whole_image", [False, True])
def test_a_picture_that_fits_into_a_tile_is_looked_at_once(whole_image: bool) -> None:
    whole = TileView(0, 0, 640, 400, is_whole=True)
    assert views_of((400, 640), tile=640, overlap=0.2, whole_image=whole_image, flip=False) == [whole]
    assert views_of((400, 640), tile=None, overlap=0.2, whole_image=whole_image, flip=False) == [whole]
    mirrored = TileView(0, 0, 640, 400, is_mirrored=True, is_whole=True)
    assert views_of((400, 640), tile=640, overlap=0.2, whole_image=whole_image, flip=True) == [whole, mirrored]


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    tile=st.integers(64, 1500),
    overlap=st.floats(0, 0.75),
    whole_image=st.booleans(),
    flip=st.booleans(),
)
def test_views_cover_the_picture_and_overlap_as_asked(
    height: int, width: int, tile: int, overlap: float, whole_image: bool, flip: bool
) -> None:
    views = views_of((height, width), tile=tile, overlap=overlap, whole_image=whole_image, flip=flip)
    assert len(set(views)) == len(views)
    plain = [view for view in views if not view.is_mirrored]
    mirrored = [view.window_xyxy for view in views if view.is_mirrored]
    assert mirrored == ([view.window_xyxy for view in plain] if flip else [])
    is_cut = max(height, width) > tile
    assert [view.is_whole for view in plain].count(True) == (whole_image if is_cut else 1)
    tiles = [view for view in plain if not view.is_whole] or plain
    assert all(view.width == min(tile, width) and view.height == min(tile, height) for view in tiles)
    lefts, tops = sorted({view.left for view in tiles}), sorted({view.top for view in tiles})
    assert {(view.left, view.top) for view in tiles} == {(left, top) for left in lefts for top in tops}
    for starts, length in ((lefts, width), (tops, height)):
        assert starts[0] == 0 and starts[-1] + min(tile, length) == length
        steps = np.diff(starts)
        assert (tile - steps >= overlap * tile).all(), "at least the requested overlap, and so no gap"
        assert len(steps) == 0 or steps.max() - steps.min() <= 1, "evenly spread"
        # With one tile fewer the overlap would be too small.
        assert len(steps) < 2 or (length - tile) / (len(steps) - 1) > tile - overlap * tile - 1


def test_a_crop_is_the_window_and_the_whole_picture_is_not_copied() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    window = crop(image, TileView(10, 5, 20, 8))
    np.testing.assert_array_equal(window, image[5:13, 10:30])
    mirrored = crop(image, TileView(10, 5, 20, 8, is_mirrored=True))
    np.testing.assert_array_equal(mirrored, image[5:13, 10:30][:, ::-1])
    assert window.flags.c_contiguous and mirrored.flags.c_contiguous
    assert np.shares_memory(crop(image, TileView(0, 0, 50, 30, is_whole=True)), image)


# Merging

LEFT, RIGHT, WHOLE = TileView(0, 0, 100, 100), TileView(80, 0, 100, 100), TileView(0, 0, 180, 100, is_whole=True)
SIZE_HW = (100, 180)


def test_a_single_view_comes_back_as_it_is_even_beyond_the_picture() -> None:
    found = detections((-3, 0, 200, 10, 0.5, 1), (-3, 0, 200, 10, 0.4, 1))
    for how in BOTH:
        assert merge([WHOLE], [found], SIZE_HW, how=how, iou=0.5, max_detections=1) is found


@pytest.mark.parametrize("how", BOTH)
def test_boxes_move_to_the_picture_and_mirrored_ones_turn_back(how: Merge) -> None:
    mirrored = TileView(80, 0, 100, 100, is_mirrored=True)
    found = [detections((10, 20, 30, 40, 0.5, 0)), detections((50, 20, 15, 10, 0.75, 1)), detections()]
    found[2] = detections((100 - 50 - 15, 20, 15, 10, 0.75, 1))
    assert merged_rows([LEFT, RIGHT, mirrored], found, SIZE_HW, how) == [
        (130, 20, 15, 10, 0.75, 1),
        (10, 20, 30, 40, 0.5, 0),
    ]


@pytest.mark.parametrize("how", BOTH)
def test_an_object_that_two_tiles_show_whole_is_one(how: Merge) -> None:
    found = [detections((84, 20, 10, 10, 0.8, 0)), detections((4, 20, 10, 10, 0.6, 0))]
    score = 0.8 if how == "nms" else 0.7
    assert merged_rows([LEFT, RIGHT], found, SIZE_HW, how) == [(84, 20, 10, 10, score, 0)]
    other_class = [found[0], detections((4, 20, 10, 10, 0.6, 1))]
    assert len(merged_rows([LEFT, RIGHT], other_class, SIZE_HW, how)) == 2


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("part_score", [0.9, 0.75, 0.1])
@pytest.mark.parametrize("part_width", [2, 3, 8, 15, 19])
def test_a_part_of_an_object_gives_way_to_the_whole_however_well_it_scores(
    how: Merge, part_score: float, part_width: int
) -> None:
    # The object starts this far left of the first tile's right edge, which cuts it; the second tile contains it.
    left = 100 - part_width
    part = detections((left, 20, part_width - 0.5, 25, part_score, 0))
    whole = detections((left - 80, 20, 22, 25, 0.5, 0))
    assert merged_rows([LEFT, RIGHT], [part, whole], SIZE_HW, how) == [(left, 20, 22, 25, 0.5, 0)]


@pytest.mark.parametrize("how", BOTH)
def test_parts_of_an_object_larger_than_a_tile_give_way_to_the_whole_picture(how: Merge) -> None:
    found = [
        detections((30, 10, 70, 80, 0.9, 0)),
        detections((0, 10, 90, 80, 0.85, 0)),
        detections((29, 11, 142, 78, 0.5, 0)),
    ]
    assert merged_rows([LEFT, RIGHT, WHOLE], found, SIZE_HW, how) == [(29, 11, 142, 78, 0.5, 0)]


def test_a_thin_part_off_by_a_pixel_still_belongs_to_its_object() -> None:
    # The tile contains three pixels of the object, but its box is four pixels wide: a quarter lies outside the object.
    part, whole = detections((96, 20, 4, 12, 0.9, 0)), detections((97 - 80, 20, 12, 12, 0.6, 0))
    assert merged_rows([LEFT, RIGHT], [part, whole], SIZE_HW) == [(97, 20, 12, 12, 0.6, 0)]


@pytest.mark.parametrize("how", BOTH)
def test_what_is_no_part_stays(how: Merge) -> None:
    part = (96, 20, 4, 12, 0.9, 0)
    whole = (17, 20, 40, 12, 0.6, 0)
    cases: dict[str, tuple[Row, Row]] = {
        "of another class": (part, (*whole[:5], 1)),
        "the other one is faint": (part, (*whole[:4], 0.1, 0)),
        "the other one is elsewhere": (part, (17, 40, 40, 12, 0.6, 0)),
        "no edge cuts it": ((85, 20, 4, 12, 0.9, 0), (3, 18, 40, 30, 0.6, 0)),
        "the edge is the image's border": ((82, 0, 10, 5, 0.9, 0), (1, 0, 40, 30, 0.6, 0)),
    }
    for name, (first, second) in cases.items():
        rows = merged_rows([LEFT, RIGHT], [detections(first), detections(second)], SIZE_HW, how)
        assert sorted(row[4] for row in rows) == sorted([first[4], second[4]]), name
    both_in_one = detections(part, (70, 18, 30, 16, 0.8, 0))
    assert len(merged_rows([LEFT, RIGHT], [both_in_one, detections()], SIZE_HW, how)) == 2


@pytest.mark.parametrize("how", BOTH)
def test_the_answer_is_inside_the_picture_by_falling_score_and_not_too_long(how: Merge) -> None:
    rng = np.random.default_rng(0)
    views = views_of((200, 330), tile=100, overlap=0.3, whole_image=True, flip=True)
    found = [random_detections(rng, view, 60, num_categories=3) for view in views]
    merged = merge(views, found, (200, 330), how=how, iou=0.6, max_detections=90)
    corners = xywh_to_xyxy(merged.boxes_xywh)
    assert len(merged.scores) == 90
    assert (np.diff(merged.scores) <= 0).all() and merged.scores.min() > 0 and merged.scores.max() <= 1
    assert corners.min() >= 0 and (corners[:, 2] <= 330 + 1e-9).all() and (corners[:, 3] <= 200 + 1e-9).all()
    assert (merged.boxes_xywh[:, 2:] > 0).all()
    again = merge(views, found, (200, 330), how=how, iou=0.6, max_detections=90)
    np.testing.assert_array_equal(again.boxes_xywh, merged.boxes_xywh)
    empty = merge(views, [detections()] * len(views), (200, 330), how=how, iou=0.6, max_detections=90)
    assert empty.boxes_xywh.shape == (0, 4) and empty.categories.dtype == np.int64


def random_detections(rng: np.random.Generator, view: TileView, number: int, *, num_categories: int) -> Detections:
    """Check boxes that extend beyond their view, as those of real models do."""
    sides = rng.uniform(4, 60, (number, 2))
    corners = rng.uniform(-5, 1, (number, 2)) + rng.uniform(0, 1, (number, 2)) * (view.width, view.height) - sides / 2
    scores = np.sort(rng.uniform(0.01, 0.99, number))[::-1]
    return Detections(np.concatenate([corners, sides], axis=1), scores, rng.integers(0, num_categories, number))


def test_of_a_view_the_best_take_part() -> None:
    rows = [
        (float(15 * (number % 60)), float(15 * (number // 60)), 8.0, 8.0, 0.9 - number / 1000, 0)
        for number in range(150)
    ]
    views = views_of((100, 900), tile=None, overlap=0, whole_image=True, flip=True)
    assert len(merged_rows(views, [detections(*rows), detections()], (100, 900), most=300)) == BEST_OF_VIEW


# Weighted box fusion


def test_a_box_that_one_of_two_twins_shows_loses_half_and_tiles_take_nothing_away() -> None:
    mirrored = TileView(0, 0, 180, 100, is_mirrored=True, is_whole=True)
    found = [detections((20, 10, 40, 40, 0.8, 0), (100, 10, 30, 30, 0.6, 1)), detections((120, 10, 40, 40, 0.4, 0))]
    assert merged_rows([WHOLE, mirrored], found, SIZE_HW, "wbf") == [
        (20, 10, 40, 40, 0.6, 0),
        (100, 10, 30, 30, 0.3, 1),
    ]
    only_left = [detections((20, 10, 40, 40, 0.8, 0)), detections()]
    assert merged_rows([LEFT, RIGHT], only_left, SIZE_HW, "wbf") == [(20, 10, 40, 40, 0.8, 0)]


def test_fused_boxes_are_weighted_by_their_scores() -> None:
    mirrored = TileView(0, 0, 180, 100, is_mirrored=True, is_whole=True)
    found = [detections((20, 10, 40, 40, 0.9, 0)), detections((180 - 60 - 4, 10, 40, 40, 0.3, 0))]
    # The second box, mirrored back, starts at 24: (0.9 · 20 + 0.3 · 24) / 1.2.
    assert merged_rows([WHOLE, mirrored], found, SIZE_HW, "wbf") == [(21, 10, 40, 40, 0.6, 0)]


def test_a_faint_second_box_of_the_same_view_does_not_weaken_the_first() -> None:
    mirrored = TileView(0, 0, 180, 100, is_mirrored=True, is_whole=True)
    found = [detections((20, 10, 40, 40, 0.8, 0), (21, 10, 40, 40, 0.02, 0)), detections((120, 10, 40, 40, 0.8, 0))]
    assert merged_rows([WHOLE, mirrored], found, SIZE_HW, "wbf") == [(20, 10, 40, 40, 0.8, 0)]


@pytest.mark.parametrize("seed", range(3))
def test_fusion_equals_the_paper_s_algorithm_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = views_of((300, 400), tile=None, overlap=0, whole_image=True, flip=True)
    boxes = [separate_boxes(rng, 25), separate_boxes(rng, 25)]
    scores = [np.sort(rng.uniform(0.05, 0.95, len(part)))[::-1] for part in boxes]
    found = [Detections(b, s, np.zeros(len(s), np.int64)) for b, s in zip(boxes, scores, strict=True)]
    merged = merge(views, found, (300, 400), how="wbf", iou=0.4, max_detections=100)
    turned = boxes[1].copy()
    turned[:, 0] = 400 - boxes[1][:, 0] - boxes[1][:, 2]
    expected = fused_as_in_the_paper([xywh_to_xyxy(boxes[0]), xywh_to_xyxy(turned)], scores, iou=0.4)
    assert len(merged.scores) == len(expected) < 50
    for box, score in zip(xywh_to_xyxy(merged.boxes_xywh), merged.scores, strict=True):
        distances = [max(abs(score - other[4]), *np.abs(box - other[:4])) for other in expected]
        assert min(distances) < 1e-9


def separate_boxes(rng: np.random.Generator, number: int) -> Boxes:
    """Make boxes on a jittered grid, which overlap those of another set but never suppress each other."""
    places = rng.permutation(30)[:number]
    corners = np.stack([places % 6 * 60 + 20, places // 6 * 55 + 12], axis=1) + rng.uniform(-8, 8, (number, 2))
    return np.concatenate([corners, rng.uniform(30, 48, (number, 2))], axis=1)


def fused_as_in_the_paper(boxes_xyxy: list[Boxes], scores: list[np.ndarray], *, iou: float) -> list[list[float]]:
    """Follow section 3 of the paper step by step; the number of boxes in a cluster stands for the number of models."""
    rows = sorted(
        ((s, *b) for part, values in zip(boxes_xyxy, scores, strict=True) for b, s in zip(part, values, strict=True)),
        reverse=True,
    )
    clusters: list[list[tuple[float, ...]]] = []

    def fused(cluster: list[tuple[float, ...]]) -> list[float]:
        total = sum(row[0] for row in cluster)
        return [sum(row[0] * row[side] for row in cluster) / total for side in (1, 2, 3, 4)]

    for row in rows:
        overlaps = [overlap(fused(cluster), list(row[1:])) for cluster in clusters]
        if overlaps and max(overlaps) > iou:
            clusters[overlaps.index(max(overlaps))].append(row)
        else:
            clusters.append([row])
    num_models = len(boxes_xyxy)
    return [[*fused(c), sum(row[0] for row in c) / len(c) * min(len(c), num_models) / num_models] for c in clusters]


def overlap(first: list[float], second: list[float]) -> float:
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


# Cost


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("num_categories", [1, 80])
def test_fifteen_thousand_boxes_merge_in_well_under_a_second(how: Merge, num_categories: int) -> None:
    rng = np.random.default_rng(1)
    views = views_of((6200, 6200), tile=640, overlap=0.2, whole_image=True, flip=False)[:150]
    found = [random_detections(rng, view, 100, num_categories=num_categories) for view in views]
    assert sum(len(part.scores) for part in found) >= 14_000
    merge(views[:2], found[:2], (6200, 6200), how=how, iou=0.5, max_detections=100)
    started = time.process_time()
    merged = merge(views, found, (6200, 6200), how=how, iou=0.5, max_detections=10**6)
    seconds = time.process_time() - started
    print(f"{how}, {num_categories} classes: {len(merged.scores)} boxes left after {seconds:.2f} s")
    assert len(merged.scores) > 1000
    assert seconds < 1.0
