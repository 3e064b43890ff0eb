"""COCO's metrics are bit-identical to pycocotools, regardless of order and shards."""

import contextlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydet.common.boxes import as_boxes
from raydet.measuring.numbers.accumulator import CocoAccumulator, ImageDetections, ImageTruth
from raydet.measuring.numbers.matches import COCO as COCO_PROTOCOL
from raydet.measuring.numbers.matches import COCO_AREAS, COCO_IOU_THRESHOLDS, Matches, Protocol
from raydet.measuring.numbers.matching import match
from raydet.measuring.numbers.metrics import METRICS, CocoResult, accumulate, metrics_of
from raydet.measuring.numbers.values import metric_rows, values_in
from raydet.tables.columns import DetectionColumns, TruthColumns
from raydet.tables.schema import Category, build_schema


class Image(NamedTuple):
    image_id: int
    truth: ImageTruth
    detections: ImageDetections


Case = tuple[list[Image], list[Category]]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


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


def columns(images: list[Image]) -> tuple[TruthColumns, DetectionColumns]:
    """Return the images in the given order."""
    truth, detections = [image.truth for image in images], [image.detections for image in images]
    truth_columns = TruthColumns(
        image_ids=np.array([image.image_id for image in images], dtype=np.int64),
        starts=np.cumsum([0, *(len(item.category) for item in truth)]),
        boxes_xywh=as_boxes(np.concatenate([item.boxes_xywh for item in truth])),
        category=np.concatenate([item.category for item in truth]),
        area=np.concatenate([item.area for item in truth]),
        iscrowd=np.concatenate([item.iscrowd for item in truth]),
    )
    detection_columns = DetectionColumns(
        starts=np.cumsum([0, *(len(item.category) for item in detections)]),
        boxes_xywh=as_boxes(np.concatenate([item.boxes_xywh for item in detections])),
        scores=np.concatenate([item.scores for item in detections]),
        category=np.concatenate([item.category for item in detections]),
    )
    return truth_columns, detection_columns


def match_all(images: list[Image], categories: list[Category], protocol: Protocol = COCO_PROTOCOL) -> Matches:
    return match(*columns(images), len(categories), protocol)


def reference(images: list[Image], categories: list[Category], protocol: Protocol = COCO_PROTOCOL) -> COCOeval:
    """Run pycocotools on the same boxes, with annotations numbered from 1 and categories by the source's ids."""
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
            # loadRes does not accept an empty list.
            detections_coco = COCO()
            detections_coco.dataset = {**truth_coco.dataset, "annotations": []}
            detections_coco.createIndex()
        evaluator = COCOeval(truth_coco, detections_coco, "bbox")
        evaluator.params.iouThrs = np.array(protocol.iou_thresholds)
        evaluator.params.areaRngLbl = [name for name, _ in protocol.areas]
        evaluator.params.areaRng = [list(bounds) for _, bounds in protocol.areas]
        evaluator.params.maxDets = list(protocol.max_detections)
        evaluator.params.useCats = int(not protocol.class_agnostic)
        evaluator.evaluate()
        evaluator.accumulate()
        # Its summary supports only COCO's own protocol.
        if protocol == COCO_PROTOCOL:
            evaluator.summarize()
    return evaluator


def accumulator_of(images: list[Image], categories: list[Category]) -> CocoAccumulator:
    accumulator = CocoAccumulator(categories)
    for image in images:
        accumulator.add(image.image_id, image.truth, image.detections)
    return accumulator


def result_of_shards(images: list[Image], categories: list[Category], num_shards: int, seed: int) -> CocoResult:
    """Distribute images over shards at random and merge their states in random order."""
    shuffler = random.Random(seed)
    shards: list[list[Image]] = [[] for _ in range(num_shards)]
    for image in shuffler.sample(images, len(images)):
        shuffler.choice(shards).append(image)
    states = [accumulator_of(shard, categories).to_bytes() for shard in shards]
    shuffler.shuffle(states)
    whole = CocoAccumulator(categories)
    for state in states:
        whole.merge(state)
    return whole.result()


def assert_same(result: CocoResult, evaluator: COCOeval, categories: list[Category]) -> None:
    if result.protocol == COCO_PROTOCOL:
        assert list(result.values.values()) == [None if value == -1 else value for value in evaluator.stats.tolist()]
    order = sorted(range(len(result.categories)), key=lambda index: categories[index].id) or [0]
    assert np.array_equal(result.precision[..., 0][:, :, order], evaluator.eval["precision"][..., -1])
    assert np.array_equal(result.recall[:, order], evaluator.eval["recall"])


def real_images(path: Path, seed: int) -> tuple[list[Image], list[Category]]:
    """Return a COCO file's boxes and synthetic detections: jittered, false positives, ties, over 100 per image."""
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
    assert_same(accumulate(match_all(images, categories), categories), evaluator, categories)
    for num_shards in (1, 2, 7, 64):
        assert_same(result_of_shards(images, categories, num_shards, seed=num_shards), evaluator, categories)


def test_numbers_of_each_class_are_means_over_its_part_of_pycocotools_arrays(test_data: Path) -> None:
    images, categories = real_images(test_data / "bccd/instances_val.json", seed=5)
    evaluator = reference(images, categories)
    result = accumulator_of(images, categories).result()
    areas, limits = [name for name, _ in COCO_PROTOCOL.areas], COCO_PROTOCOL.max_detections
    thresholds = {None: slice(None), 0.5: slice(0, 1), 0.75: slice(5, 6)}
    for index, numbers in enumerate(result.per_class):
        for metric in METRICS:
            array = evaluator.eval[metric.kind][thresholds[metric.iou]]
            values = array[..., index, areas.index(metric.area), limits.index(metric.max_detections)]
            values = values[values > -1]
            assert numbers.values[metric.name] == (np.mean(values) if values.size else None)
    assert len({numbers.AP for numbers in result.per_class}) == len(categories)


def test_hotcoco_agrees(test_data: Path) -> None:
    images, categories = real_images(test_data / "coco_mini/instances_val.json", seed=8)
    evaluator = hotcoco.StreamingEval([{"id": i, "name": c.name} for i, c in enumerate(categories)], "bbox")
    for image in images:
        truth, found = image.truth, image.detections
        records = [
            {"id": number, "image_id": image.image_id, "category_id": kind, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (kind, box, area, crowd) in enumerate(
                zip(
                    truth.category.tolist(),
                    truth.boxes_xywh.tolist(),
                    truth.area.tolist(),
                    truth.iscrowd.astype(int).tolist(),
                    strict=True,
                ),
                start=1,
            )
        ]
        ids = np.full((len(found.scores), 1), float(image.image_id))
        rows = np.hstack([ids, found.boxes_xywh, found.scores[:, None], found.category[:, None]])
        evaluator.update([{"id": image.image_id, "width": 640, "height": 480}], records, rows)
    peer = evaluator.finalize()
    peer.accumulate()
    assert peer.eval is not None
    result = accumulate(match_all(images, categories), categories)
    assert np.array_equal(result.precision[..., 0], np.asarray(peer.eval["precision"])[..., -1])
    assert np.array_equal(result.recall, np.asarray(peer.eval["recall"]))


BOXES = st.tuples(
    st.integers(0, 40).map(float),
    st.integers(0, 40).map(float),
    st.sampled_from([0.0, 1.0, 5.5, 20.0, 33.3, 40.0, 120.0]),
    st.sampled_from([0.0, 1.0, 7.25, 20.0, 30.0, 110.0]),
).map(list)
SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5 + 2**-40, 0.9, 1.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Image], list[Category]]:
    """Draw small data sets full of corner cases: ties, crowds, no boxes, too many detections."""
    num_categories = draw(st.integers(1, 4))
    source_ids = draw(st.lists(st.integers(0, 99), min_size=num_categories, max_size=num_categories, unique=True))
    categories = [Category(source_id, f"c{source_id}") for source_id in source_ids]
    # The last category may have no truth.
    category = st.integers(0, num_categories - 1)
    truth_category = st.integers(0, max(0, num_categories - 2))
    only_crowds, no_detections = draw(st.booleans()) and draw(st.booleans()), draw(st.integers(0, 5)) == 0
    images = []
    for image_id in draw(st.lists(st.integers(0, 2**53 - 1), min_size=1, max_size=8, unique=True)):
        boxes = draw(st.lists(st.tuples(BOXES, truth_category, st.booleans()), max_size=6))
        truth = [(box, kind, box[2] * box[3], crowd or only_crowds) for box, kind, crowd in boxes]
        detections = draw(st.lists(st.tuples(BOXES, SCORES, category), max_size=8))
        # Copies of true boxes, so that some detections are correct and many overlaps tie.
        copies = [(box, draw(SCORES), kind) for box, kind, _ in boxes for _ in range(draw(st.integers(0, 2)))]
        detections = (detections + copies) * draw(st.sampled_from([1, 1, 1, 25]))
        images.append(Image(image_id, image_truth(truth), image_detections([] if no_detections else detections)))
    return images, categories


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(case=cases(), num_shards=st.sampled_from([1, 2, 7, 64]), seed=st.integers(0, 2**16))
def test_equal_to_pycocotools_on_random_cases(
    case: tuple[list[Image], list[Category]], num_shards: int, seed: int
) -> None:
    images, categories = case
    evaluator = reference(images, categories)
    assert_same(accumulate(match_all(images, categories), categories), evaluator, categories)
    assert_same(result_of_shards(images, categories, num_shards, seed), evaluator, categories)


PROTOCOLS = [
    Protocol(class_agnostic=True),
    Protocol(iou_thresholds=(0.3,), max_detections=(2,)),
    Protocol(iou_thresholds=(0.1, 0.5, 0.75, 1.0), max_detections=(1, 3, 300), class_agnostic=True),
    Protocol(areas=(("all", (0.0, 400.0)), ("tiny", (0.0, 5.5)), ("rest", (5.5, 1e10))), max_detections=(5, 100)),
    Protocol(iou_thresholds=tuple(np.linspace(0.2, 1, 64).tolist())),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=range(len(PROTOCOLS)))
@settings(max_examples=15, deadline=None, suppress_health_check=SLOW)
@given(case=cases())
def test_equal_to_pycocotools_by_other_rules(protocol: Protocol, case: tuple[list[Image], list[Category]]) -> None:
    images, categories = case
    # If classes count as one, pycocotools orders equal scores by the source's category ids.
    categories = sorted(categories, key=lambda category: category.id)
    result = accumulate(match_all(images, categories, protocol), categories)
    assert_same(result, reference(images, categories, protocol), categories)


def test_numbers_by_other_rules_have_names_of_their_own() -> None:
    protocol = Protocol(iou_thresholds=(0.3, 0.75), areas=tuple(COCO_AREAS.items())[:2], max_detections=(2, 300))
    assert [metric.name for metric in metrics_of(protocol)] == ["AP", "AP75", "APs", "AR2", "AR300", "ARs"]
    coco = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
    assert " ".join(metric.name for metric in METRICS) == coco
    images = [Image(1, ONE_BOX, ONE_HIT)]
    result = accumulate(match_all(images, ONE_CLASS, protocol), ONE_CLASS)
    assert result.values == pytest.approx({"AP": 1, "AP75": 1, "APs": 1, "AR2": 1, "AR300": 1, "ARs": 1})
    fields = [result.AP75, result.AP50]
    assert fields == [pytest.approx(1), None]
    assert [value.max_detections for value in result.blocks()[0]][3:5] == [2, 300]


def test_classes_that_count_as_one_have_no_numbers_of_their_own() -> None:
    categories = [*ONE_CLASS, Category(9, "other")]
    other_class = image_detections([([10, 10, 20, 20], 0.9, 1)])
    matches = match_all([Image(1, ONE_BOX, other_class)], categories, Protocol(class_agnostic=True))
    result = accumulate(matches, categories)
    assert result.values["AP"] == pytest.approx(1)
    assert (result.categories, result.per_class) == ((), ())
    assert {value.category for block in result.blocks() for value in block} == {None}


def test_categories_must_be_those_that_were_matched() -> None:
    with pytest.raises(ValueError, match=r"2 categories .*\b1$"):
        accumulate(match_all([Image(1, ONE_BOX, ONE_HIT)], ONE_CLASS), [*ONE_CLASS, Category(9, "other")])


def test_recalls_are_read_where_pycocotools_reads_them() -> None:
    """For all numbers of boxes up to 1000, half of them found; n/N reaching a recall depends on the last bit."""
    for num_truth in (*range(1, 120), 333, 700, 999, 1000):
        boxes = [([30.0 * number, 0.0, 20.0, 20.0], 0, 400.0, False) for number in range(num_truth)]
        hits = [(box, 1 - number / 2000, 0) for number, (box, _, _, _) in enumerate(boxes[::2])]
        found = image_detections([*hits, ([0.0, 500.0, 5.0, 5.0], 0.95, 0)])
        protocol = Protocol(iou_thresholds=COCO_IOU_THRESHOLDS[:1], max_detections=(1000,))
        result = accumulate(match_all([Image(1, image_truth(boxes), found)], ONE_CLASS, protocol), ONE_CLASS)
        order = np.argsort(-found.scores, kind="stable")
        right = order < len(hits)
        num_right, num_wrong = np.cumsum(right).astype(float), np.cumsum(~right).astype(float)
        best = np.maximum.accumulate((num_right / (num_wrong + num_right + np.spacing(1)))[::-1])[::-1]
        at = np.searchsorted(num_right / num_truth, np.linspace(0, 1, 101), side="left")
        assert result.precision[0, :, 0, 0, 0].tolist() == np.append(best, 0.0)[at].tolist()


ONE_CLASS = [Category(7, "cell")]
ONE_BOX = image_truth([([10, 10, 20, 20], 0, 400.0, False)])
ONE_HIT = image_detections([([10, 10, 20, 20], 0.9, 0)])


def test_what_cannot_be_measured_is_none() -> None:
    categories = [*ONE_CLASS, Category(9, "absent")]
    accumulator = CocoAccumulator(categories)
    accumulator.add(1, ONE_BOX, ONE_HIT)
    result = accumulator.result()
    assert [result.AP, result.APs] == pytest.approx([1, 1])
    assert (result.APl, result.per_class[1].AP) == (None, None)
    rows = [value for block in result.blocks() for value in block]
    values = {(value.metric, value.category): value.value for value in rows}
    assert values["AP", None] == result.AP
    assert values["APl", None] is None
    assert values["AP", "cell"] == result.AP
    assert values["AP", "absent"] is None
    assert len(rows) == len(values) == 3 * 12


def test_table_rows_fit_the_schema_and_say_what_each_number_is() -> None:
    import pyarrow as pa

    accumulator = CocoAccumulator(ONE_CLASS)
    accumulator.add(1, ONE_BOX, ONE_HIT)
    schema = build_schema("metrics", ONE_CLASS)
    values = [value for block in accumulator.result().blocks() for value in block]
    table = pa.Table.from_pylist(metric_rows(values, run="r", model="m", split="val"), schema=schema)
    assert values_in(table) == values
    rows = table.to_pylist()
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


def test_importing_it_brings_in_neither_ray_nor_torch() -> None:
    heavy = {"ray", "torch", "pandas", "matplotlib"}
    code = f"import sys, raydet.measuring.numbers.metrics; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip() == "[]"
