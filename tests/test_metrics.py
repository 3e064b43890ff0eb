"""COCO's numbers: equal to pycocotools' to the last bit, whatever the order and the shards."""

import contextlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydet.boxes import as_boxes
from raydet.metrics import (
    FALSE_POSITIVE,
    METRICS,
    NO_DETECTIONS,
    NOT_COUNTED,
    TRUE_POSITIVE,
    CocoAccumulator,
    CocoResult,
    ImageDetections,
    ImageTruth,
    match_image,
)
from raydet.schema import Category, build_schema


class Image(NamedTuple):
    image_id: int
    truth: ImageTruth
    detections: ImageDetections


def image_truth(rows: list[tuple[list[float], int, float, bool]]) -> ImageTruth:
    boxes, categories, areas, crowds = zip(*rows, strict=True) if rows else ((), (), (), ())
    return ImageTruth(
        as_boxes(boxes),
        np.array(categories, dtype=np.int64),
        np.array(areas, dtype=np.float64),
        np.array(crowds, dtype=bool),
    )


def image_detections(rows: list[tuple[list[float], float, int]]) -> ImageDetections:
    boxes, scores, categories = zip(*rows, strict=True) if rows else ((), (), ())
    return ImageDetections(as_boxes(boxes), np.array(scores, dtype=np.float64), np.array(categories, dtype=np.int64))


def reference(images: list[Image], categories: list[Category]) -> COCOeval:
    """pycocotools on the same boxes, annotations numbered from 1, categories by the source's ids."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id, truth, detections in images:
        for box, category, area, iscrowd in zip(
            truth.boxes_xywh.tolist(), truth.category, truth.area.tolist(), truth.iscrowd, strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": categories[category].id,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(iscrowd),
                }
            )
        for box, score, category in zip(
            detections.boxes_xywh.tolist(), detections.scores.tolist(), detections.category, strict=True
        ):
            results.append({"image_id": image_id, "category_id": categories[category].id, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth_coco = COCO()
        truth_coco.dataset = {
            "info": {},
            "images": [{"id": image.image_id} for image in images],
            "annotations": annotations,
            "categories": [{"id": category.id, "name": category.name} for category in categories],
        }
        truth_coco.createIndex()
        if results:
            detections_coco = truth_coco.loadRes(results)
        else:
            # loadRes cannot take an empty list.
            detections_coco = COCO()
            detections_coco.dataset = {**truth_coco.dataset, "annotations": []}
            detections_coco.createIndex()
        evaluator = COCOeval(truth_coco, detections_coco, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def accumulate(images: list[Image], categories: list[Category]) -> CocoAccumulator:
    accumulator = CocoAccumulator(categories)
    for image in images:
        accumulator.add(image.image_id, (480, 640), image.truth, image.detections)
    return accumulator


def result_of_shards(images: list[Image], categories: list[Category], num_shards: int, seed: int) -> CocoResult:
    """Images dealt out to shards at random, whose states are merged at random."""
    shuffler = random.Random(seed)
    shards: list[list[Image]] = [[] for _ in range(num_shards)]
    for image in shuffler.sample(images, len(images)):
        shuffler.choice(shards).append(image)
    states = [accumulate(shard, categories).to_bytes() for shard in shards]
    shuffler.shuffle(states)
    whole = CocoAccumulator(categories)
    for state in states:
        whole.merge(state)
    return whole.result()


def assert_same(result: CocoResult, evaluator: COCOeval, categories: list[Category]) -> None:
    assert list(result.numbers().values()) == evaluator.stats.tolist()
    order = sorted(range(len(categories)), key=lambda index: categories[index].id)
    assert np.array_equal(result.precision[:, :, order], evaluator.eval["precision"])
    assert np.array_equal(result.recall[:, order], evaluator.eval["recall"])


def real_images(path: Path, seed: int) -> tuple[list[Image], list[Category]]:
    """The boxes of a COCO file with made-up detections: jittered truth, false alarms, ties, more than 100 an image."""
    content = json.loads(path.read_bytes())
    categories = [Category(item["id"], item["name"]) for item in content["categories"]]
    index_of = {category.id: index for index, category in enumerate(categories)}
    generator = np.random.default_rng(seed)
    images = []
    for number, record in enumerate(content["images"]):
        truth = [
            (item["bbox"], index_of[item["category_id"]], float(item["area"]), bool(item["iscrowd"]))
            for item in content["annotations"]
            if item["image_id"] == record["id"]
        ]
        detections = []
        for box, category, _, _ in truth:
            for _ in range(generator.integers(0, 4)):
                moved = np.array(box) + generator.normal(0, 0.08, 4) * np.array([box[2], box[3], box[2], box[3]])
                moved[2:] = np.maximum(moved[2:], 0.5)
                guess = category if generator.random() < 0.85 else int(generator.integers(len(categories)))
                detections.append((moved.tolist(), float(generator.integers(0, 21)) / 20, guess))
        for _ in range(250 if number % 10 == 0 else generator.integers(0, 20)):
            corner, size = generator.uniform(0, 400, 2), generator.uniform(1, 200, 2)
            category = 0 if number % 10 == 0 else int(generator.integers(len(categories)))
            detections.append(([*corner, *size], float(generator.integers(0, 21)) / 20, category))
        order = generator.permutation(len(detections))
        images.append(Image(record["id"], image_truth(truth), image_detections([detections[i] for i in order])))
    return images, categories


@pytest.mark.parametrize("file", ["bccd/instances_val.json", "coco_mini/instances_val.json"])
def test_equal_to_pycocotools_on_real_truth(test_data: Path, file: str) -> None:
    images, categories = real_images(test_data / file, seed=3)
    evaluator = reference(images, categories)
    assert 0.05 < evaluator.stats[0] < 0.95
    assert max(len(image.detections.scores) for image in images) > 200
    for num_shards in (1, 2, 7):
        assert_same(result_of_shards(images, categories, num_shards, seed=num_shards), evaluator, categories)


def test_numbers_of_each_class_are_means_over_its_part_of_pycocotools_arrays(test_data: Path) -> None:
    images, categories = real_images(test_data / "bccd/instances_val.json", seed=5)
    evaluator = reference(images, categories)
    result = accumulate(images, categories).result()
    for index, numbers in enumerate(result.per_class):
        precision, recall = evaluator.eval["precision"][:, :, index], evaluator.eval["recall"][:, index]
        expected = [precision[:, :, 0, 2], precision[0, :, 0, 2], precision[5, :, 0, 2], recall[:, 0, 1]]
        found = [numbers.AP, numbers.AP50, numbers.AP75, numbers.AR10]
        assert found == [np.mean(values) for values in expected]
    assert len({numbers.AP for numbers in result.per_class}) == len(categories)


BOXES = st.tuples(
    st.integers(0, 40).map(float),
    st.integers(0, 40).map(float),
    st.sampled_from([0.0, 1.0, 5.5, 20.0, 33.3, 40.0, 120.0]),
    st.sampled_from([0.0, 1.0, 7.25, 20.0, 30.0, 110.0]),
).map(list)
SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5 + 2**-40, 0.9, 1.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Image], list[Category]]:
    """Small data sets full of corner cases: ties, crowds, nothing, too much."""
    num_categories = draw(st.integers(1, 4))
    source_ids = draw(st.lists(st.integers(0, 99), min_size=num_categories, max_size=num_categories, unique=True))
    categories = [Category(source_id, f"c{source_id}") for source_id in source_ids]
    # The last category may go without truth.
    category = st.integers(0, num_categories - 1)
    truth_category = st.integers(0, max(0, num_categories - 2))
    only_crowds, no_detections = draw(st.booleans()) and draw(st.booleans()), draw(st.integers(0, 5)) == 0
    images = []
    for image_id in draw(st.lists(st.integers(0, 2**53 - 1), min_size=1, max_size=8, unique=True)):
        boxes = draw(st.lists(st.tuples(BOXES, truth_category, st.booleans()), max_size=6))
        truth = [(box, kind, box[2] * box[3], crowd or only_crowds) for box, kind, crowd in boxes]
        detections = draw(st.lists(st.tuples(BOXES, SCORES, category), max_size=8))
        # Copies of true boxes, so that something is right and many overlaps tie.
        copies = [(box, draw(SCORES), kind) for box, kind, _ in boxes for _ in range(draw(st.integers(0, 2)))]
        detections = (detections + copies) * draw(st.sampled_from([1, 1, 1, 25]))
        images.append(Image(image_id, image_truth(truth), image_detections([] if no_detections else detections)))
    return images, categories


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases(), seed=st.integers(0, 2**16))
def test_equal_to_pycocotools_on_random_cases(case: tuple[list[Image], list[Category]], seed: int) -> None:
    images, categories = case
    evaluator = reference(images, categories)
    for num_shards in (1, 2, 7):
        assert_same(result_of_shards(images, categories, num_shards, seed), evaluator, categories)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases())
def test_matching_of_an_image_is_pycocotools_own(case: tuple[list[Image], list[Category]]) -> None:
    images, categories = case
    evaluator = reference(images, categories)
    expected: dict[int, list[int]] = {image.image_id: [0, 0] for image in images}
    for cell in evaluator.evalImgs:
        if cell is not None and cell["aRng"] == [0, 1e10]:
            is_right, is_ignored = cell["dtMatches"][0] > 0, cell["dtIgnore"][0].astype(bool)
            expected[cell["image_id"]][0] += int((is_right & ~is_ignored).sum())
            expected[cell["image_id"]][1] += int((~is_right & ~is_ignored).sum())
    for image in images:
        outcome = match_image(image.truth, image.detections)
        found = [int((outcome == TRUE_POSITIVE).sum()), int((outcome == FALSE_POSITIVE).sum())]
        assert found == expected[image.image_id]


def test_matching_says_which_detection_is_right() -> None:
    truth = image_truth(
        [([0, 0, 10, 10], 0, 100.0, False), ([50, 0, 10, 10], 0, 100.0, False), ([0, 60, 90, 90], 0, 8100.0, True)]
    )
    detections = image_detections(
        [
            ([0, 0, 10, 9], 0.4, 0),  # right, were the next not surer
            ([0, 0, 10, 8], 0.5, 0),
            ([50, 0, 10, 10], 0.9, 1),  # another class
            ([5, 65, 20, 20], 0.3, 0),  # in the crowd
            ([50, 0, 10, 4.9], 0.8, 0),  # overlaps too little
        ]
    )
    assert match_image(truth, detections).tolist() == [
        FALSE_POSITIVE,
        TRUE_POSITIVE,
        FALSE_POSITIVE,
        NOT_COUNTED,
        FALSE_POSITIVE,
    ]


ONE_CLASS = [Category(7, "cell")]
ONE_BOX = image_truth([([10, 10, 20, 20], 0, 400.0, False)])
ONE_HIT = image_detections([([10, 10, 20, 20], 0.9, 0)])


def test_an_unreadable_image_counts_as_missed() -> None:
    accumulator = CocoAccumulator(ONE_CLASS)
    accumulator.add(1, (40, 40), ONE_BOX, ONE_HIT)
    assert accumulator.result().AR100 == 1.0
    accumulator.add(2, (0, 0), ONE_BOX, NO_DETECTIONS, unreadable=True)
    result = accumulator.result()
    assert (result.num_images, result.num_truth, result.num_detections, result.num_unreadable) == (2, 2, 1, 1)
    assert result.AR100 == 0.5


def test_counts_survive_a_merge_and_a_state_can_be_sent_on() -> None:
    first, second, third = (CocoAccumulator(ONE_CLASS) for _ in range(3))
    first.add(1, (40, 40), ONE_BOX, ONE_HIT)
    second.add(2, (40, 40), ONE_BOX, NO_DETECTIONS, unreadable=True)
    second.merge(first.to_bytes())
    third.merge(second.to_bytes())
    third.add(3, (40, 40), ONE_BOX, ONE_HIT)
    result = third.result()
    assert (result.num_images, result.num_truth, result.num_detections, result.num_unreadable) == (3, 3, 2, 1)
    recalls = [result.AR1, second.result().AR1]
    assert recalls == pytest.approx([2 / 3, 1 / 2])


def test_no_image_at_all_measures_nothing() -> None:
    result = CocoAccumulator(ONE_CLASS).result()
    assert set(result.numbers().values()) == {-1.0}
    assert result.num_images == 0


def test_what_cannot_be_measured_is_minus_one_and_null_in_the_table() -> None:
    categories = [*ONE_CLASS, Category(9, "absent")]
    accumulator = CocoAccumulator(categories)
    accumulator.add(1, (40, 40), ONE_BOX, ONE_HIT)
    result = accumulator.result()
    assert (result.AP, result.APs, result.APl, result.per_class[1].AP) == pytest.approx((1, 1, -1, -1))
    rows = result.table_rows("run", None, "val")
    values = {(row["metric"], row["category"]): row["value"] for row in rows}
    assert values["AP", None] == result.AP
    assert values["APl", None] is None
    assert values["AP", "cell"] == result.AP
    assert values["AP", "absent"] is None
    assert len(rows) == len(values) == 3 * 12


def test_table_rows_fit_the_schema_and_say_what_each_number_is() -> None:
    import pyarrow as pa

    accumulator = CocoAccumulator(ONE_CLASS)
    accumulator.add(1, (40, 40), ONE_BOX, ONE_HIT)
    schema = build_schema("metrics", ONE_CLASS)
    rows = pa.RecordBatch.from_pylist(accumulator.result().table_rows("r", "m", "val"), schema=schema).to_pylist()
    whole = {row["metric"]: row for row in rows if row["category"] is None}
    assert list(whole) == [metric.name for metric in METRICS]
    assert {name: whole[name]["iou"] for name in ("AP", "AP50", "AP75", "AR1")} == {
        "AP": None,
        "AP50": 0.5,
        "AP75": 0.75,
        "AR1": None,
    }
    assert [whole[name]["area"] for name in ("AP", "APs", "ARm", "ARl")] == ["all", "small", "medium", "large"]
    assert [whole[name]["max_detections"] for name in ("AP", "AR1", "AR10", "ARs")] == [100, 1, 10, 100]
    assert {(row["run"], row["model"], row["split"], row["slice"], row["low"]) for row in rows} == {
        ("r", "m", "val", None, None)
    }


def test_an_image_counts_once() -> None:
    accumulator, other = CocoAccumulator(ONE_CLASS), CocoAccumulator(ONE_CLASS)
    accumulator.add(4, (40, 40), ONE_BOX, ONE_HIT)
    other.add(4, (40, 40), ONE_BOX, NO_DETECTIONS)
    with pytest.raises(ValueError, match="image 4 was added before"):
        accumulator.add(4, (40, 40), ONE_BOX, ONE_HIT)
    with pytest.raises(ValueError, match=r"in both of the states.*4"):
        accumulator.merge(other.to_bytes())
    assert accumulator.result().num_images == 1


@pytest.mark.parametrize(
    ("image_id", "truth", "detections", "message"),
    [
        (-1, ONE_BOX, ONE_HIT, "at least 0"),
        (2**53, ONE_BOX, ONE_HIT, r"below 2\*\*53"),
        (1, ONE_BOX, image_detections([([0, 0, 1, 1], float("nan"), 0)]), "not a finite number"),
        (1, ONE_BOX, image_detections([([0, 0, float("inf"), 1], 0.5, 0)]), "not a finite number"),
        (1, image_truth([([0, 0, 1, 1], 0, float("nan"), False)]), ONE_HIT, "not a finite number"),
        (1, ONE_BOX, image_detections([([0, 0, 1, 1], 0.5, 1)]), "category"),
        (1, image_truth([([0, 0, 1, 1], -1, 1.0, False)]), ONE_HIT, "category"),
        (1, ONE_BOX, ImageDetections(as_boxes([]), np.zeros(1), np.zeros(1, np.int64)), "differ in length"),
        (
            1,
            ImageTruth(as_boxes([]), np.zeros(1, np.int64), np.zeros(1), np.zeros(1, bool)),
            ONE_HIT,
            "differ in length",
        ),
    ],
)
def test_wrong_input_is_refused(image_id: int, truth: ImageTruth, detections: ImageDetections, message: str) -> None:
    accumulator = CocoAccumulator(ONE_CLASS)
    with pytest.raises(ValueError, match=message):
        accumulator.add(image_id, (40, 40), truth, detections)
    assert accumulator.result().num_images == 0


def test_an_unreadable_image_with_detections_is_refused() -> None:
    with pytest.raises(ValueError, match="could not be read"):
        CocoAccumulator(ONE_CLASS).add(1, (40, 40), ONE_BOX, ONE_HIT, unreadable=True)


def test_states_that_do_not_belong_together_are_refused() -> None:
    accumulator = CocoAccumulator(ONE_CLASS)
    with pytest.raises(ValueError, match="different categories"):
        accumulator.merge(CocoAccumulator([Category(7, "other")]).to_bytes())
    with pytest.raises(ValueError, match="not the state"):
        accumulator.merge(b"something else")
    with pytest.raises(ValueError, match="at least one category"):
        CocoAccumulator([])


def test_importing_it_brings_in_neither_ray_nor_torch() -> None:
    code = "import sys, raydet.metrics; print(sorted({'ray', 'torch', 'pandas', 'matplotlib'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip() == "[]"
