"""Pascal VOC and LVIS metrics, compared with a textbook implementation and the `lvis` package."""

import logging
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.measuring.numbers.matches import Matches, concatenate
from raydet.measuring.numbers.protocols import lvis_blocks, match_lvis, match_voc, voc_blocks
from raydet.measuring.numbers.values import Block
from raydet.tables.schema import Category
from tests.measuring.numbers.test_metrics import (
    SLOW,
    Case,
    Image,
    cases,
    columns,
    image_detections,
    image_truth,
    real_images,
)

ONE_CLASS = [Category(7, "cell")]


def overlap(first: list[float], second: list[float]) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (first[2] * first[3] + second[2] * second[3] - width * height)


def textbook_voc(images: list[Image], category: int, eleven_points: bool) -> float | None:
    """Compute AP detection by detection in descending score order, and point by point along the curve."""
    found: list[tuple[float, int, list[float]]] = []
    boxes: dict[int, list[tuple[list[float], bool]]] = {}
    for image in sorted(images, key=lambda image: image.image_id):
        truth, detections = image.truth, image.detections
        of_class = np.flatnonzero(truth.category == category).tolist()
        boxes[image.image_id] = [(truth.boxes_xywh[row].tolist(), bool(truth.iscrowd[row])) for row in of_class]
        for row in np.flatnonzero(detections.category == category).tolist():
            found.append((float(detections.scores[row]), image.image_id, detections.boxes_xywh[row].tolist()))
    num_truth = sum(not difficult for own in boxes.values() for _, difficult in own)
    if num_truth == 0:
        return None
    taken: set[tuple[int, int]] = set()
    right, wrong, curve = 0, 0, []
    for _, image_id, box in sorted(found, key=lambda item: -item[0]):
        best, best_overlap = -1, 0.0
        for number, (other, _) in enumerate(boxes[image_id]):
            if overlap(box, other) > best_overlap:
                best, best_overlap = number, overlap(box, other)
        if best_overlap >= 0.5 and boxes[image_id][best][1]:
            continue
        if best_overlap >= 0.5 and (image_id, best) not in taken:
            taken.add((image_id, best))
            right += 1
        else:
            wrong += 1
        curve.append((right / num_truth, right / (right + wrong)))
    if eleven_points:
        points = np.arange(0.0, 1.1, 0.1)
        return float(sum(max([p for r, p in curve if r >= point], default=0.0) for point in points) / 11)
    area, last = 0.0, 0.0
    for recall, _ in curve:
        area += (recall - last) * max(p for r, p in curve if r >= recall)
        last = recall
    return area


def voc_matches(images: list[Image], categories: list[Category]) -> Matches:
    return match_voc(*columns(images), len(categories))


def assert_textbook(images: list[Image], categories: list[Category], matches: Matches) -> None:
    for eleven_points in (True, False):
        whole, *by_class = (block[0] for block in voc_blocks(matches, categories, eleven_points=eleven_points))
        expected = [textbook_voc(images, index, eleven_points) for index in range(len(categories))]
        assert [found.category for found in by_class] == [category.name for category in categories]
        for found, value in zip(by_class, expected, strict=True):
            assert found.value == (None if value is None else pytest.approx(value, abs=1e-12))
        defined = [value for value in expected if value is not None]
        assert (whole.metric, whole.category, whole.iou, whole.area) == ("AP50", None, 0.5, None)
        assert whole.value == (pytest.approx(np.mean(defined), abs=1e-12) if defined else None)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(case=cases())
def test_voc_is_the_textbooks_on_random_cases(case: Case) -> None:
    images, categories = case
    assert_textbook(images, categories, voc_matches(images, categories))


def test_voc_is_the_textbooks_on_real_truth_in_parts(test_data: Path) -> None:
    images, categories = real_images(test_data / "bccd/instances_val.json", seed=2)
    parts = [voc_matches(images[start::7], categories) for start in range(7)]
    assert_textbook(images, categories, concatenate(random.Random(0).sample(parts, 7)))


def test_voc_gives_a_detection_the_box_it_overlaps_most_even_if_that_is_taken() -> None:
    truth = image_truth([([0, 0, 10, 10], 0, 100.0, False), ([3, 0, 10, 10], 0, 100.0, False)])
    detections = image_detections([([0.0, 0, 10, 10], 0.9, 0), ([1.0, 0, 10, 10], 0.8, 0)])
    matches = voc_matches([Image(1, truth, detections)], ONE_CLASS)
    assert matches.true_positive.tolist() == [[1, 0]]
    assert matches.truth_found.tolist() == [1, 0]
    assert voc_blocks(matches, ONE_CLASS, eleven_points=False)[0][0].value == 0.5
    assert voc_blocks(matches, ONE_CLASS, eleven_points=True)[0][0].value == pytest.approx(6 / 11)


def test_voc_counts_what_lies_in_a_difficult_box_neither_way() -> None:
    truth = image_truth([([0, 0, 10, 10], 0, 100.0, True), ([50, 0, 10, 10], 0, 100.0, False)])
    hit = ([50.0, 0.0, 10.0, 10.0], 0.5, 0)
    in_difficult = [([0.0, 0.0, 10.0, 9.0], 0.9, 0), ([0.0, 0.0, 10.0, 10.0], 0.8, 0)]
    small_part = ([0.0, 0.0, 5.0, 5.0], 0.7, 0)  # would count as inside a crowd; here it overlaps too little
    for rows, expected in (([*in_difficult, hit], 1.0), ([small_part, hit], 0.5)):
        matches = voc_matches([Image(1, truth, image_detections(rows))], ONE_CLASS)
        assert voc_blocks(matches, ONE_CLASS, eleven_points=False)[0][0].value == expected


@pytest.fixture(scope="module")
def lvis_package() -> types.ModuleType:
    """Load the package without its drawing, which needs matplotlib, and with a name that numpy dropped."""
    with pytest.MonkeyPatch.context() as patch:
        drawing = types.ModuleType("lvis.vis")
        drawing.__dict__["LVISVis"] = None
        patch.setitem(sys.modules, "lvis.vis", drawing)
        package: types.ModuleType = pytest.importorskip("lvis", reason="needs the package lvis")
        return package


Lists = list[list[int]]


def reference_lvis(
    package: types.ModuleType,
    images: list[Image],
    categories: list[Category],
    negatives: Lists,
    not_exhaustive: Lists,
    frequency: list[str],
) -> dict[str, float]:
    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    ids = [category.id for category in categories]
    for image in images:
        own = image.truth
        for box, kind, area in zip(own.boxes_xywh.tolist(), own.category, own.area.tolist(), strict=True):
            item = {"image_id": image.image_id, "category_id": ids[kind], "bbox": box, "area": area}
            truth.append({"id": len(truth) + 1, **item})
        found = image.detections
        for box, kind, score in zip(found.boxes_xywh.tolist(), found.category, found.scores.tolist(), strict=True):
            results.append({"image_id": image.image_id, "category_id": ids[kind], "bbox": box, "score": score})
    # As in its constructor, which reads a file.
    peer = package.LVIS.__new__(package.LVIS)
    peer.logger = logging.getLogger("lvis")
    peer.dataset = {
        "images": [
            {
                "id": image.image_id,
                "neg_category_ids": [ids[index] for index in absent],
                "not_exhaustive_category_ids": [ids[index] for index in some],
            }
            for image, absent, some in zip(images, negatives, not_exhaustive, strict=True)
        ],
        "annotations": truth,
        "categories": [
            {"id": category.id, "name": category.name, "frequency": letter}
            for category, letter in zip(categories, frequency, strict=True)
        ],
    }
    peer._create_index()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)
        evaluator = package.LVISEval(peer, package.LVISResults(peer, results), "bbox")
        evaluator.run()
    return dict(evaluator.results)


def assert_as_lvis(blocks: tuple[Block, ...], expected: dict[str, float]) -> None:
    whole = {value.metric: -1.0 if value.value is None else value.value for value in blocks[0]}
    names = {"AR@300": "AR300", "ARs@300": "ARs", "ARm@300": "ARm", "ARl@300": "ARl"}
    assert whole == {names.get(name, name): value for name, value in expected.items()}


@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
@given(case=cases(), data=st.data())
def test_lvis_is_the_packages_on_random_cases(lvis_package: types.ModuleType, case: Case, data: st.DataObject) -> None:
    images, categories = case
    if not any(len(image.detections.scores) for image in images):
        # The package fails without any.
        images = [*images, Image(2**53 - 1, image_truth([]), image_detections([([0, 0, 1, 1], 0.5, 0)]))]
        images = list({image.image_id: image for image in images}.values())
    some = st.lists(st.integers(0, len(categories) - 1), max_size=3, unique=True)
    negatives, not_exhaustive = ([data.draw(some) for _ in images] for _ in range(2))
    frequency = data.draw(st.lists(st.sampled_from("rcf"), min_size=len(categories), max_size=len(categories)))
    matches = match_lvis(*columns(images), len(categories), negatives, not_exhaustive)
    expected = reference_lvis(lvis_package, images, categories, negatives, not_exhaustive, frequency)
    assert_as_lvis(lvis_blocks(matches, categories, frequency), expected)


def test_lvis_is_the_packages_on_real_truth_in_parts(lvis_package: types.ModuleType, test_data: Path) -> None:
    images, categories = real_images(test_data / "coco_mini/instances_val.json", seed=4)
    crowded = []
    for image_id, truth, found in images:
        rows = list(zip(found.boxes_xywh.tolist(), found.scores.tolist(), found.category.tolist(), strict=True))
        crowded.append(Image(image_id, truth, image_detections(rows * 2)))
    assert max(len(image.detections.scores) for image in crowded) > 300
    generator = np.random.default_rng(0)
    negatives, not_exhaustive = (
        [generator.choice(len(categories), size=10, replace=False).tolist() for _ in crowded] for _ in range(2)
    )
    frequency = ["rcf"[index % 3] for index in range(len(categories))]
    parts = [
        match_lvis(*columns(crowded[start::7]), len(categories), negatives[start::7], not_exhaustive[start::7])
        for start in range(7)
    ]
    expected = reference_lvis(lvis_package, crowded, categories, negatives, not_exhaustive, frequency)
    assert 0 < expected["AP"] < 1
    assert_as_lvis(lvis_blocks(concatenate(parts), categories, frequency), expected)


def test_lvis_judges_only_what_is_known() -> None:
    box = [0.0, 0.0, 50.0, 50.0]
    truth = image_truth([(box, 0, 2500.0, False)])
    elsewhere = [200.0, 200.0, 50.0, 50.0]
    detections = image_detections([(elsewhere, 0.9, 0), (box, 0.8, 0), (box, 0.7, 1), (box, 0.6, 2)])
    images = [Image(1, truth, detections)]
    matches = match_lvis(*columns(images), 3, [[1]], [[0]])
    assert matches.detection_row.tolist() == [0, 1, 2]
    assert (matches.true_positive[0] > 0).tolist() == [False, True, False]
    assert (matches.ignored[0] > 0).tolist() == [True, False, False]
    assert match_lvis(*columns(images), 3, [[]], [[]]).ignored[0].tolist() == [0, 0]


def test_lvis_frequency_goes_by_the_number_of_images() -> None:
    categories = [Category(index, f"c{index}") for index in range(3)]
    images = []
    for number in range(101):
        kinds = [kind for kind, most in enumerate((10, 100, 101)) if number < most]
        boxes = [([0.0, 0.0, 50.0, 50.0], kind, 2500.0, False) for kind in kinds] * 2
        hits = [([0.0, 0.0, 50.0, 50.0], 0.9, kind) for kind in kinds if kind != 1] * 2
        images.append(Image(number, image_truth(boxes), image_detections(hits)))
    matches = match_lvis(*columns(images), 3, [[]] * 101, [[]] * 101)
    blocks = lvis_blocks(matches, categories)
    values = {(value.metric, value.category): value.value for block in blocks for value in block}
    assert [values[name, None] for name in ("APr", "APc", "APf")] == pytest.approx([1, 0, 1])
    assert values["AP", "c1"] == 0
    assert values["AR300", None] == pytest.approx(2 / 3)
