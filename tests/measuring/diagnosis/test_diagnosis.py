"""Error analysis: each kind of error by hand, all of them against loops and hotcoco, suspects by simulation."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hotcoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.boxes import as_boxes
from raydet.measuring.diagnosis import tables
from raydet.measuring.diagnosis.errors import Evidence, error_shares, gather
from raydet.measuring.diagnosis.labels import confusion, suspects
from raydet.measuring.diagnosis.scores import (
    average_precision,
    best_threshold,
    calibration,
    outcomes_at,
    per_image,
    pr_curves,
    score_values,
    threshold_at_precision,
)
from raydet.measuring.numbers.matches import Matches, Protocol, concatenate
from raydet.measuring.numbers.matching import match
from raydet.measuring.numbers.metrics import CocoNumbers, accumulate
from raydet.tables.columns import DetectionColumns, TruthColumns
from raydet.tables.schema import Category, build_schema

CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(9, "owl"))
CAT, DOG, OWL = range(3)
BOX = (10.0, 10.0, 20.0, 20.0)
"""A copy moved by 5 overlaps it by 0.6, by 12 by 0.25, by 18 by 0.05."""

Labelled = tuple[int, Sequence[float]] | tuple[int, Sequence[float], bool]
Detected = tuple[int, Sequence[float], float]


def moved(by: float) -> tuple[float, ...]:
    return (BOX[0] + by, *BOX[1:])


def columns(
    truth: Sequence[Sequence[Labelled]], detections: Sequence[Sequence[Detected]]
) -> tuple[TruthColumns, DetectionColumns]:
    """Build columns with image ids descending from 5, so that the order of ids differs from that of rows."""
    labelled = [item for image in truth for item in image]
    boxes_xywh = as_boxes([item[1] for item in labelled])
    found = [item for image in detections for item in image]
    return (
        TruthColumns(
            image_ids=np.arange(len(truth), 0, -1) + 4,
            starts=np.cumsum([0, *map(len, truth)]),
            boxes_xywh=boxes_xywh,
            category=np.array([item[0] for item in labelled], dtype=np.int64),
            area=boxes_xywh[:, 2] * boxes_xywh[:, 3],
            iscrowd=np.array([len(item) > 2 for item in labelled], dtype=bool),
        ),
        DetectionColumns(
            starts=np.cumsum([0, *map(len, detections)]),
            boxes_xywh=as_boxes([item[1] for item in found]),
            scores=np.array([item[2] for item in found], dtype=np.float64),
            category=np.array([item[0] for item in found], dtype=np.int64),
        ),
    )


def made_up(seed: int, num_images: int = 12) -> tuple[TruthColumns, DetectionColumns]:
    """Return boxes on a coarse grid, and detections: shifted, of wrong classes, duplicated, spurious, with ties."""
    generator = np.random.default_rng(seed)
    truth: list[list[Labelled]] = []
    detections: list[list[Detected]] = []
    for _ in range(num_images):
        own: list[Labelled] = []
        found: list[Detected] = []
        for _ in range(generator.integers(0, 6)):
            box = (*generator.integers(0, 80, 2).tolist(), *generator.integers(10, 40, 2).tolist())
            own.append(
                (int(generator.integers(3)), box, True)
                if generator.random() < 0.06
                else (int(generator.integers(3)), box)
            )
            for _ in range(generator.integers(0, 4)):
                near = (np.array(box) + generator.integers(-6, 7, 4)).tolist()
                category = own[-1][0] if generator.random() < 0.7 else int(generator.integers(3))
                found.append((category, near, round(float(generator.random()), 2)))
        for _ in range(generator.integers(0, 3)):
            box = (*generator.integers(0, 80, 2).tolist(), *generator.integers(10, 40, 2).tolist())
            found.append((int(generator.integers(3)), box, round(float(generator.random()), 2)))
        truth.append(own)
        detections.append(found)
    return columns(truth, detections)


def matched(truth: TruthColumns, detections: DetectionColumns, **protocol: Any) -> Matches:
    return match(truth, detections, len(CATEGORIES), Protocol(**protocol))


def gathered(truth: TruthColumns, detections: DetectionColumns) -> Evidence:
    return gather(truth, detections, matched(truth, detections))


def reference(truth: TruthColumns, detections: DetectionColumns) -> hotcoco.COCOeval:
    image_ids = truth.image_ids.tolist()
    image_of = np.repeat(truth.image_ids, np.diff(truth.starts)).tolist()
    annotations = [
        {
            "id": row + 1,
            "image_id": image_id,
            "category_id": CATEGORIES[truth.category[row]].id,
            "bbox": truth.boxes_xywh[row].tolist(),
            "area": float(truth.area[row]),
            "iscrowd": int(truth.iscrowd[row]),
        }
        for row, image_id in enumerate(image_of)
    ]
    coco = hotcoco.COCO(
        {
            "images": [{"id": image_id, "width": 200, "height": 200} for image_id in image_ids],
            "annotations": annotations,
            "categories": [{"id": category.id, "name": category.name} for category in CATEGORIES],
        }
    )
    results = [
        {
            "image_id": image_id,
            "category_id": CATEGORIES[detections.category[row]].id,
            "bbox": detections.boxes_xywh[row].tolist(),
            "score": float(detections.scores[row]),
        }
        for row, image_id in enumerate(np.repeat(truth.image_ids, np.diff(detections.starts)).tolist())
    ]
    evaluator = hotcoco.COCOeval(coco, coco.load_res(results), "bbox")
    evaluator.evaluate()
    return evaluator


def iou_of(first: Sequence[float], second: Sequence[float]) -> float:
    sides = [
        max(0.0, min(first[i] + first[i + 2], second[i] + second[i + 2]) - max(first[i], second[i])) for i in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


def rows_of(table: Any, **where: Any) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in where.items())]


# Curves


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_the_mean_of_each_curve_is_the_ap_and_its_score_just_reaches_the_recall(seed: int) -> None:
    truth, detections = made_up(seed)
    matches = matched(truth, detections)
    result = accumulate(matches, CATEGORIES)
    table = pr_curves(matches, CATEGORIES, run="r")
    outcomes = outcomes_at(matches)
    numbers: dict[str | None, CocoNumbers] = {None: result}
    numbers |= {c.name: own for c, own in zip(CATEGORIES, result.per_class, strict=True)}
    for name, own in numbers.items():
        for iou, metric in ((None, "AP"), (0.5, "AP50"), (0.75, "AP75")):
            curve = rows_of(table, category=name, iou=iou)
            if getattr(own, metric) is None:
                assert not curve
                continue
            assert [row["recall"] for row in curve] == np.linspace(0, 1, 101).tolist()
            assert np.mean([row["precision"] for row in curve]) == pytest.approx(getattr(own, metric), abs=1e-12)
            assert all(row["score"] is None for row in curve) == (name is None or iou is None) or not own.AR100
    for index, category in enumerate(CATEGORIES):
        chosen = outcomes.category == index
        for row in rows_of(table, category=category.name, iou=0.5):
            recalls = [
                (outcomes.is_right & chosen & (outcomes.scores >= score)).sum() / outcomes.num_truth[index]
                for score in ([] if row["score"] is None else [row["score"], row["score"] + 1e-9])
            ]
            if row["score"] is None:
                assert row["precision"] == 0 or not chosen.any()
                assert (
                    not chosen.any() or (outcomes.is_right & chosen).sum() / outcomes.num_truth[index] < row["recall"]
                )
            else:
                assert recalls[0] >= row["recall"] and (recalls[1] < row["recall"] or row["recall"] == 0)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_average_precision_is_that_of_coco_to_the_last_bit(seed: int) -> None:
    truth, detections = made_up(seed)
    matches = matched(truth, detections)
    outcomes = outcomes_at(matches)
    own = average_precision(outcomes.category, outcomes.scores, outcomes.is_right, outcomes.num_truth)
    expected = [numbers.AP50 for numbers in accumulate(matches, CATEGORIES).per_class]
    assert [None if np.isnan(value) else value for value in own.tolist()] == expected


# Errors


KINDS: dict[str, tuple[list[Labelled], list[Detected], dict[str, int]]] = {
    "right": ([(CAT, BOX)], [(CAT, moved(5), 0.9)], {}),
    "location": ([(CAT, BOX)], [(CAT, moved(12), 0.9)], {"location": 1}),
    "class": ([(CAT, BOX)], [(DOG, moved(5), 0.9)], {"class": 1}),
    "both": ([(CAT, BOX)], [(DOG, moved(12), 0.9)], {"both": 1, "missed": 1}),
    "duplicate": ([(CAT, BOX)], [(CAT, BOX, 0.9), (CAT, moved(5), 0.8)], {"duplicate": 1}),
    "background": ([(CAT, BOX)], [(CAT, moved(18), 0.9)], {"background": 1, "missed": 1}),
    "no box at all": ([], [(CAT, BOX, 0.9)], {"background": 1}),
    "missed": ([(CAT, BOX), (DOG, (90, 90, 9, 9))], [(CAT, BOX, 0.9)], {"missed": 1}),
    "in a crowd": ([(CAT, BOX, True)], [(CAT, moved(5), 0.9)], {}),
    "location before class": ([(CAT, moved(12)), (DOG, BOX)], [(CAT, BOX, 0.9)], {"location": 1, "missed": 1}),
    "class before duplicate": (
        [(CAT, BOX), (DOG, moved(2))],
        [(CAT, BOX, 0.9), (DOG, moved(2), 0.9), (CAT, moved(1), 0.8)],
        {"class": 1},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_error(name: str) -> None:
    truth, detections, expected = KINDS[name]
    given_columns = columns([truth], [detections])
    table = error_shares(gathered(*given_columns), CATEGORIES, run="r")
    counts = {row["error"]: row["count"] for row in rows_of(table, category=None) if row["count"]}
    assert counts == expected
    by_class = Counter({row["error"]: 0 for row in table.to_pylist()})
    for row in table.to_pylist():
        by_class[row["error"]] += (row["count"] or 0) if row["category"] else 0
    assert {name: count for name, count in by_class.items() if count} == expected


def test_what_an_error_costs_by_hand() -> None:
    """Two cats, one found below a false positive: half of the recalls (51 of 101) have a precision of 1/2."""
    given_columns = columns([[(CAT, BOX), (CAT, (90, 90, 9, 9))]], [[(CAT, (50, 50, 9, 9), 0.95), (CAT, BOX, 0.9)]])
    table = error_shares(gathered(*given_columns), CATEGORIES)
    points = {row["error"]: row["ap_points"] for row in rows_of(table, category="cat")}
    base = 51 / 101 / 2
    expected = {
        "background": 51 / 101 - base,
        "missed": 1 / 2 - base,
        "false_positive": 51 / 101 - base,
        "false_negative": 1 / 2 - base,
    }
    assert points == pytest.approx({name: expected.get(name, 0.0) for name in points}, abs=1e-12)
    assert {row["error"]: row["ap_points"] for row in rows_of(table, category=None)} == points
    assert all(row["ap_points"] is None for row in rows_of(table, category="dog"))


def test_putting_a_class_right_helps_both_classes() -> None:
    """A cat detected as a dog scores above the real dog; fixed, it is the cat's only detection."""
    given_columns = columns([[(CAT, BOX), (DOG, (90, 90, 9, 9))]], [[(DOG, BOX, 0.95), (DOG, (90, 90, 9, 9), 0.9)]])
    table = error_shares(gathered(*given_columns), CATEGORIES)
    points = {row["category"]: row["ap_points"] for row in rows_of(table, error="class")}
    assert points == pytest.approx({None: 0.75, "cat": 1.0, "dog": 0.5, "owl": None})
    assert {row["category"]: row["count"] for row in rows_of(table, error="class")} == {
        None: 1, "cat": 0, "dog": 1, "owl": 0,
    }  # fmt: skip


def test_only_the_surest_of_several_detections_is_moved_onto_a_box() -> None:
    given_columns = columns([[(CAT, BOX)]], [[(CAT, moved(12), 0.9), (CAT, moved(11), 0.95)]])
    table = error_shares(gathered(*given_columns), CATEGORIES)
    (row,) = rows_of(table, category="cat", error="location")
    assert row["count"] == 2
    assert row["ap_points"] == pytest.approx(1.0)


HOTCOCO_NAMES = {
    "Cls": "class", "Loc": "location", "Both": "both", "Dupe": "duplicate", "Bkg": "background", "Miss": "missed",
    "FP": "false_positive", "FN": "false_negative",
}  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_errors_are_those_of_hotcoco(seed: int) -> None:
    """Excludes crowds, which hotcoco treats as possible targets, ties, and overlaps of exactly 0.1 or 0.5."""
    truth, detections = made_up(seed)
    shift = np.random.default_rng(seed).random(detections.boxes_xywh.shape) / 10
    detections = dataclasses.replace(
        detections,
        boxes_xywh=detections.boxes_xywh + shift,
        scores=detections.scores + np.arange(len(detections.scores)) * 1e-6,
    )
    truth = dataclasses.replace(truth, iscrowd=np.zeros_like(truth.iscrowd))
    table = error_shares(gathered(truth, detections), CATEGORIES)
    expected = reference(truth, detections).tide_errors()
    over_all = {row["error"]: row for row in rows_of(table, category=None)}
    for theirs, ours in HOTCOCO_NAMES.items():
        if theirs in expected["counts"]:
            assert over_all[ours]["count"] == expected["counts"][theirs], ours
        assert (over_all[ours]["ap_points"] or 0.0) == pytest.approx(expected["delta_ap"][theirs], abs=1e-9), ours


# Confusion


def test_confusion_by_hand() -> None:
    far, crowd = (90, 90, 9, 9), (50, 50, 30, 30)
    given_columns = columns(
        [[(CAT, BOX), (DOG, moved(4)), (OWL, far), (OWL, crowd, True)], [(OWL, BOX)]],
        [
            # The cat overlaps both boxes by at least 0.5, the dog's more, but takes its own; the owl takes the dog.
            [(CAT, moved(3), 0.9), (OWL, moved(1), 0.8), (CAT, far, 0.2), (DOG, (55, 55, 9, 9), 0.9)],
            [(OWL, moved(12), 0.7)],
        ],
    )
    table = confusion(gathered(*given_columns), CATEGORIES, threshold=0.5, run="r")
    cells = {(row["truth"], row["detected"]): row["count"] for row in table.to_pylist()}
    assert cells == {("cat", "cat"): 1, ("dog", "owl"): 1, ("owl", None): 2, (None, "owl"): 1}


def confusion_one_by_one(truth: TruthColumns, detections: DetectionColumns, threshold: float) -> Counter[Any]:
    names = [category.name for category in CATEGORIES]
    cells: Counter[Any] = Counter()
    for image in range(len(truth.image_ids)):
        boxes = list(range(truth.starts[image], truth.starts[image + 1]))
        free = [box for box in boxes if not truth.iscrowd[box]]
        own = list(range(detections.starts[image], detections.starts[image + 1]))
        # Ties follow COCO's order, by class.
        own.sort(key=lambda row: (-detections.scores[row], detections.category[row]))
        for row in own:
            if detections.scores[row] < threshold:
                continue
            box_xywh, category = detections.boxes_xywh[row].tolist(), detections.category[row]
            near = [box for box in free if iou_of(box_xywh, truth.boxes_xywh[box].tolist()) >= 0.5]
            if near:
                best = max(
                    near,
                    key=lambda box: (truth.category[box] == category, iou_of(box_xywh, truth.boxes_xywh[box].tolist())),
                )
                free.remove(best)
                cells[names[truth.category[best]], names[category]] += 1
                continue
            crowds = [truth.boxes_xywh[box].tolist() for box in boxes if truth.iscrowd[box]]
            parts = [iou_of(box_xywh, crowd) for crowd in crowds]
            shared = [
                part / (1 + part) * (box_xywh[2] * box_xywh[3] + crowd[2] * crowd[3])
                for part, crowd in zip(parts, crowds, strict=True)
            ]
            if not any(part >= 0.5 * box_xywh[2] * box_xywh[3] for part in shared):
                cells[None, names[category]] += 1
        for box in free:
            cells[names[truth.category[box]], None] += 1
    return cells


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.0, 0.3, 0.6]))
def test_confusion_is_that_of_a_loop_over_detections(seed: int, threshold: float) -> None:
    truth, detections = made_up(seed)
    # Equal overlaps may be resolved either way; individual shifts avoid them.
    shift = np.random.default_rng(seed).random(detections.boxes_xywh.shape) / 10
    detections = dataclasses.replace(detections, boxes_xywh=detections.boxes_xywh + shift)
    table = confusion(gathered(truth, detections), CATEGORIES, threshold=threshold)
    cells = {(row["truth"], row["detected"]): row["count"] for row in table.to_pylist()}
    assert cells == dict(confusion_one_by_one(truth, detections, threshold))


# Calibration and thresholds


def test_calibration_by_hand() -> None:
    far = (90, 90, 9, 9)
    given_columns = columns(
        [[(CAT, BOX), (DOG, far), (OWL, (50, 50, 30, 30), True)]],
        [[(CAT, BOX, 0.95), (CAT, far, 0.91), (DOG, far, 0.2), (OWL, (55, 55, 9, 9), 1.0), (DOG, BOX, 1.0)]],
    )
    outcomes = outcomes_at(matched(*given_columns))
    table = calibration(outcomes, CATEGORIES, run="r")
    assert table.num_rows == 40
    full = {(row["category"], row["low"]): row for row in table.to_pylist() if row["count"]}
    assert set(full) == {(None, 0.2), (None, 0.9), ("cat", 0.9), ("dog", 0.2), ("dog", 0.9)}
    assert full[None, 0.9]["count"] == 3
    assert full[None, 0.9]["mean_score"] == pytest.approx((0.95 + 0.91 + 1.0) / 3)
    assert full[None, 0.9]["precision"] == pytest.approx(1 / 3)
    (empty,) = rows_of(table, category="owl", low=0.9)
    assert (empty["count"], empty["mean_score"], empty["precision"]) == (0, None, None)
    values = score_values(outcomes, CATEGORIES, max_detections=100)
    errors = {value.category: value.value for value in values if value.metric == "ECE"}
    assert errors == {
        None: pytest.approx((0.95 + 0.91 + 1.0 - 1 + 0.8) / 4),
        "cat": pytest.approx(0.93 - 0.5),
        "dog": pytest.approx((0.8 + 1.0) / 2),
        "owl": None,
    }


def test_the_calibration_error_is_that_of_hotcoco() -> None:
    # Scores inside the bins, because hotcoco computes the bin by multiplication and differs at the edges.
    truth, detections = made_up(5, num_images=60)
    detections = DetectionColumns(
        starts=detections.starts,
        boxes_xywh=detections.boxes_xywh,
        scores=detections.scores * 0.99 + 0.0041,
        category=detections.category,
    )
    evaluator = reference(truth, detections)
    expected = evaluator.calibration()
    outcomes = outcomes_at(matched(truth, detections))
    values = score_values(outcomes, CATEGORIES, max_detections=100)
    errors = {value.category: value.value for value in values if value.metric == "ECE"}
    assert errors.pop(None) == pytest.approx(expected["ece"])
    assert errors == pytest.approx(expected["per_category"])


@given(
    detections=st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12),
    num_missed=st.integers(0, 3),
    target=st.floats(0.05, 1.0),
)
def test_thresholds_are_the_best_of_all(detections: list[tuple[int, bool]], num_missed: int, target: float) -> None:
    scores = np.array([score / 10 for score, _ in detections], dtype=np.float64)
    is_right = np.array([right for _, right in detections], dtype=bool)
    num_truth = int(is_right.sum()) + num_missed
    best = best_threshold(scores, is_right, num_truth)

    def at(threshold: float) -> tuple[float, float, float]:
        kept = scores >= threshold
        right = (kept & is_right).sum()
        return right / kept.sum(), right / max(num_truth, 1), 2 * right / (kept.sum() + num_truth)

    tried = {threshold: at(threshold) for threshold in sorted(set(scores.tolist()), reverse=True)}
    if is_right.any():
        highest = max(f1 for _, _, f1 in tried.values())
        first = next(threshold for threshold, (_, _, f1) in tried.items() if f1 == pytest.approx(highest))
        assert best.threshold == first
        assert [best.precision, best.recall, best.f1] == pytest.approx([*tried[first]])
    else:
        assert best.threshold == 0.0
        assert best.recall == (0.0 if num_truth else None)
        assert best.precision == (0.0 if detections else None)
    good = [threshold for threshold, (precision, _, _) in tried.items() if precision >= target]
    assert threshold_at_precision(scores, is_right, target) == (good[-1] if good else None)


def test_score_values_say_the_best_threshold_of_each_class() -> None:
    given_columns = columns(
        [[(CAT, BOX), (DOG, (90, 90, 9, 9))]], [[(CAT, BOX, 0.9), (DOG, (90, 90, 9, 9), 0.3), (DOG, BOX, 0.6)]]
    )
    found = score_values(
        outcomes_at(matched(*given_columns)),
        CATEGORIES,
        max_detections=100,
        target_precision=0.75,
    )
    values = {(value.metric, value.category): value.value for value in found}
    assert values["best_f1_threshold", None] == 0.3
    assert values["best_f1", None] == pytest.approx(0.8)
    assert (values["best_f1_precision", "dog"], values["best_f1_recall", "dog"]) == (0.5, 1.0)
    assert (values["best_f1_threshold", "dog"], values["best_f1_threshold", "cat"]) == (0.3, 0.9)
    assert values["best_f1_threshold", "owl"] is None
    assert values["threshold_at_precision", "cat"] == 0.9
    assert values["threshold_at_precision", "dog"] is None
    assert {value.iou for value in found} == {0.5}


# Images


def test_each_image_is_counted_at_the_threshold_and_classes_are_kept_apart() -> None:
    given_columns = columns(
        [[(CAT, BOX), (DOG, (90, 90, 9, 9))], [], [(OWL, BOX)], [(OWL, BOX, True)]],
        [[(CAT, BOX, 0.9), (CAT, (90, 90, 9, 9), 0.7), (DOG, BOX, 0.1)], [], [], [(OWL, moved(2), 0.8)]],
    )
    matches = matched(*given_columns)
    outcomes = outcomes_at(matches)
    table = per_image(matches, outcomes, threshold=0.5, run="r", errors={6: "it is broken"})
    assert table.schema.equals(build_schema("per_image"))
    assert b'"score_threshold": 0.5' in table.schema.metadata[b"raydet"]
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("r", 5, 0, 1, 0, 0, 0, None, None),
        ("r", 6, 1, 0, 0, 0, 1, 0.0, "it is broken"),
        ("r", 7, 0, 0, 0, 0, 0, None, None),
        ("r", 8, 2, 2, 1, 1, 1, 0.5, None),
    ]


# Labels


def detector_and_labels(seed: int, share: float) -> tuple[TruthColumns, DetectionColumns, dict[str, set[Any]]]:
    """Simulate a decent detector on 400 images, and labels that are partly dropped, misclassified or invented.

    Returns:
        The labels, the detections, and for each kind of error the (image id, box) pairs where it occurs.
    """
    generator = np.random.default_rng(seed)
    truth: list[list[Labelled]] = []
    detections: list[list[Detected]] = []
    wrong: dict[str, set[Any]] = {"no_truth": set(), "other_class": set(), "not_found": set()}
    num_images = 400
    for image in range(num_images):
        image_id = num_images - image + 4
        own: list[Labelled] = []
        found: list[Detected] = []
        cells = generator.permutation(36)
        for cell in cells[: generator.integers(1, 10)].tolist():
            box = np.array([cell % 6 * 60.0, cell // 6 * 60.0, *generator.uniform(20, 55, 2)])
            category = int(generator.integers(3))
            detected = category if generator.random() < 0.96 else (category + 1) % 3
            near = (box + generator.normal(0, 2, 4)).tolist()
            # It often misses small objects, rarely others, and is less confident when it confuses classes.
            is_found = generator.random() < (0.995 if box[2] * box[3] > 32**2 else 0.85)
            if is_found:
                found.append(
                    (detected, near, float(generator.beta(6, 2) if detected == category else generator.beta(3, 3)))
                )
            chance = generator.random()
            if chance < share and is_found:
                wrong["no_truth"].add((image_id, tuple(near)))
            elif chance < 2 * share:
                own.append(((category + 1) % 3, box.tolist()))
                wrong["other_class"].add((image_id, tuple(box.tolist())))
            else:
                own.append((category, box.tolist()))
        for cell in cells[10:13].tolist():
            box = np.array([cell % 6 * 60.0, cell // 6 * 60.0, *generator.uniform(20, 55, 2)])
            found.append((int(generator.integers(3)), box.tolist(), float(generator.beta(1, 6))))
        if generator.random() < 6 * share:
            box = np.array([cells[20] % 6 * 60.0, cells[20] // 6 * 60.0, *generator.uniform(20, 55, 2)])
            own.append((int(generator.integers(3)), box.tolist()))
            wrong["not_found"].add((image_id, tuple(box.tolist())))
        truth.append(own)
        detections.append(found)
    return *columns(truth, detections), wrong


@pytest.mark.parametrize(("share", "least"), [(0.01, 0.4), (0.05, 0.8)])
def test_suspects_put_wrong_labels_on_top(share: float, least: float) -> None:
    truth, detections, wrong = detector_and_labels(1, share)
    table = suspects(gathered(truth, detections), CATEGORIES, run="r")
    rows = table.to_pylist()
    assert {row["kind"] for row in rows} == set(wrong)
    num_wrong = sum(map(len, wrong.values()))

    def is_wrong(row: dict[str, Any]) -> bool:
        return (row["image_id"], tuple(row["bbox"])) in wrong[row["kind"]]

    # By chance it would be one label in thirty, or one in six.
    assert np.mean([is_wrong(row) for row in rows[: num_wrong // 2]]) >= least
    assert np.mean([is_wrong(row) for row in rows[:num_wrong]]) >= least - 0.1
    for kind, places in wrong.items():
        own = [row for row in rows if row["kind"] == kind]
        assert sum(map(is_wrong, own)) >= 0.7 * len(places), kind


def test_suspects_say_where_and_what() -> None:
    """Twenty found cats make scores confident; then one is unlabelled (found twice), one labelled dog, one missed."""
    far, farther = (90.0, 90.0, 9.0, 9.0), (150.0, 90.0, 9.0, 9.0)
    images: list[list[Labelled]] = [[(CAT, BOX)] for _ in range(20)]
    found: list[list[Detected]] = [[(CAT, BOX, 0.9)] for _ in range(20)]
    images += [[(DOG, BOX), (CAT, far)], [(OWL, (200, 200, 9, 9), True)]]
    found += [
        [(CAT, moved(1), 0.9), (CAT, farther, 0.95), (CAT, (151, 90, 9, 9), 0.9)],
        [(CAT, (202, 202, 5, 5), 0.95), (DOG, farther, 0.95)],
    ]
    given_columns = columns(images, found)
    table = suspects(gathered(*given_columns), CATEGORIES, run="r")
    assert table.schema.equals(build_schema("suspects"))
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("r", 6, "other_class", "dog", "cat", list(BOX), 0.9, pytest.approx(19 / 21)),
        ("r", 6, "not_found", "cat", None, list(far), None, 0.0),
        ("r", 6, "no_truth", "cat", "cat", list(farther), 0.95, 0.0),
    ]
    two = suspects(gathered(*given_columns), CATEGORIES, run="r", max_rows=2)
    assert two.to_pylist() == table.to_pylist()[:2]


def test_a_class_that_is_rarely_found_accuses_no_label() -> None:
    """Cats are found, dogs rarely: the missed cat may be a wrong label, the missed dogs are the detector's errors."""
    far = (90.0, 90.0, 9.0, 9.0)
    images: list[list[Labelled]] = [[(CAT, BOX), (DOG, far)] for _ in range(20)]
    found: list[list[Detected]] = [[(CAT, BOX, 0.9), *([(DOG, far, 0.9)] if image < 8 else [])] for image in range(19)]
    rows = suspects(gathered(*columns(images, [*found, []])), CATEGORIES).to_pylist()
    assert [(row["kind"], row["category"]) for row in rows] == [("not_found", "cat")]


# Complete diagnosis


def test_the_diagnosis_has_every_table_in_its_schema() -> None:
    truth, detections = made_up(3, num_images=40)
    matches = matched(truth, detections)
    found = tables.diagnose(truth, detections, matches, CATEGORIES, run="r")
    assert set(found.tables) == {"pr_curves", "errors", "confusion", "calibration", "suspects", "per_image"}
    for kind, table in found.tables.items():
        assert table.schema.equals(build_schema(kind)), kind
        # The detections are random, so they cast no doubt on any label.
        assert set(table["run"].to_pylist()) == (set() if kind == "suspects" else {"r"}), kind
    per_image = found.tables["per_image"].to_pydict()
    cells = {(row["truth"], row["detected"]): row["count"] for row in found.tables["confusion"].to_pylist()}
    assert sum(per_image["num_truth"]) == sum(count for (name, _), count in cells.items() if name)
    # Confusion ignores classes while matching, so it finds at least as many.
    assert sum(per_image["true_positives"]) <= sum(count for (one, other), count in cells.items() if one and other)
    (best,) = (value for value in found.values if value.metric == "best_f1" and value.category is None)
    right, wrong = sum(per_image["true_positives"]), sum(per_image["false_positives"])
    assert best.value == pytest.approx(2 * right / (right + wrong + sum(per_image["num_truth"])))


def test_parts_put_together_and_other_thresholds_are_diagnosed_the_same() -> None:
    truth, detections = made_up(3, num_images=40)
    whole = tables.diagnose(truth, detections, matched(truth, detections), CATEGORIES)
    put_together = concatenate([matched(truth, detections)])
    again = tables.diagnose(truth, detections, put_together, CATEGORIES)
    strict = matched(truth, detections, iou_thresholds=(0.6, 0.75))
    other = tables.diagnose(truth, detections, strict, CATEGORIES)
    for kind, table in whole.tables.items():
        assert again.tables[kind].equals(table), kind
        assert other.tables[kind].equals(table) == (kind != "pr_curves"), kind
    assert set(other.tables["pr_curves"]["iou"].to_pylist()) == {0.75, None}
    with pytest.raises(ValueError, match=r"0\.6, 0\.75.*0\.5"):
        gather(truth, detections, strict)
    with pytest.raises(ValueError, match="column rows"):
        gather(truth, detections, put_together)


def test_classes_may_count_as_one() -> None:
    """There are then no values by class, except in the confusion table."""
    given_columns = columns([[(CAT, BOX), (DOG, (90, 90, 9, 9))]], [[(DOG, BOX, 0.9), (OWL, moved(60), 0.8)]])
    found = tables.diagnose(*given_columns, matched(*given_columns, class_agnostic=True), CATEGORIES)
    for kind in ("errors", "pr_curves", "calibration"):
        assert set(found.tables[kind]["category"].to_pylist()) == {None}, kind
    assert {value.category for value in found.values} == {None}
    counts = {row["error"]: row["count"] for row in found.tables["errors"].to_pylist()}
    assert (counts["class"], counts["background"], counts["missed"]) == (0, 1, 1)
    assert rows_of(found.tables["confusion"], truth="cat", detected="dog")[0]["count"] == 1
    assert rows_of(found.tables["pr_curves"], iou=0.5, recall=0.5) == [
        {"run": None, "category": None, "iou": 0.5, "recall": 0.5, "precision": pytest.approx(1.0), "score": 0.9}
    ]


@pytest.mark.parametrize(("num_images", "with_truth"), [(3, False), (3, True)])
def test_nothing_found_is_diagnosed_too(num_images: int, with_truth: bool) -> None:
    given_columns = columns([[(CAT, BOX)] if with_truth else []] * num_images, [[]] * num_images)
    found = tables.diagnose(*given_columns, matched(*given_columns), CATEGORIES)
    assert found.best.threshold == 0.0
    assert found.tables["per_image"]["f1"].to_pylist() == [0.0 if with_truth else None] * num_images
    missed = rows_of(found.tables["errors"], category="cat", error="missed")[0]
    assert (missed["count"], missed["ap_points"]) == ((3, 0.0) if with_truth else (0, None))
    assert found.tables["suspects"].num_rows == 0  # nothing is found, so no label is doubted
