"""`fit` on simulated detectors of known truth, and `predict --operating-point` against the same steps by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

import raydet
from raydet import FitConfig, PredictConfig, UserError
from raydet.engines.selection import non_maximum_suppression
from raydet.measuring.diagnosis.scores import Outcomes, average_precision, calibration_errors
from raydet.measuring.fitting.calibrating import METHODS, calibrate, fit_maps
from raydet.measuring.fitting.operating_point import FittedPoint, read_point
from raydet.measuring.fitting.scores import map_scores
from raydet.measuring.fitting.suppression import choose_nms, kept_by_nms, overlapping_detections
from raydet.measuring.fitting.thresholds import ratio, threshold_with_precision
from raydet.models.checkpoints import OWN_FILE, fingerprint
from raydet.tables.columns import DetectionColumns, Flags, Floats, Integers, TruthColumns, starts_of
from raydet.tables.table import open_table
from tests.engines.test_engines import tiny
from tests.small_sets import rows_of

Simulated = tuple[Floats, Flags, Integers]


def simulate(seed: int, *, num_images: int, slope: float, offset: float, spread: float = 0.0) -> Simulated:
    """Draw scores, outcomes and images of detections; with `spread`, those of an image are right or wrong together."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(num_images), rng.poisson(5, num_images))
    scores = rng.beta(0.6, 0.6, len(image))
    probability = expit(slope * scores + offset + rng.normal(0, spread, num_images)[image])
    return scores, rng.random(len(image)) < probability, image


def outcomes(simulated: Simulated, num_classes: int = 1) -> Outcomes:
    scores, is_right, image = simulated
    category = (np.arange(len(scores)) % num_classes).astype(np.int32)
    nothing = np.zeros(0, np.int32)
    return Outcomes(
        num_categories=num_classes,
        class_agnostic=False,
        image_ids=np.arange(int(image.max()) + 1),
        image=image.astype(np.int32),
        category=category,
        scores=scores,
        is_right=is_right,
        detection_row=np.arange(len(scores)),
        truth_image=nothing,
        truth_category=nothing,
        truth_row=nothing.astype(np.int64),
        is_found=nothing.astype(np.bool_),
    )


@pytest.mark.parametrize(
    ("num_images", "slope", "offset", "spread"),
    [(200, 6, -2, 0), (200, 6, -1, 1.5), (60, 2, 1, 0), (400, 1, 1.6, 0)],
    ids=["separable", "images that differ", "few images", "flat near the target"],
)
def test_the_target_precision_holds_on_other_images(
    num_images: int, slope: float, offset: float, spread: float
) -> None:
    target, num_sets = 0.9, 200
    shape: dict[str, Any] = {"slope": slope, "offset": offset, "spread": spread}
    scores, is_right, _ = simulate(10_000, num_images=100_000, **shape)
    order = np.argsort(-scores)
    precision = np.cumsum(is_right[order]) / np.arange(1, len(order) + 1)
    held, reached = 0, 0
    for seed in range(num_sets):
        threshold = threshold_with_precision(*simulate(seed, num_images=num_images, **shape), target)
        place = 0 if threshold is None else int(np.searchsorted(-scores[order], -threshold, side="right")) - 1
        held += threshold is None or bool(precision[place] >= target)
        reached += threshold is not None
    assert held >= 0.93 * num_sets
    assert reached > 0


def test_no_threshold_without_proof() -> None:
    assert threshold_with_precision(np.zeros(0), np.zeros(0, np.bool_), np.zeros(0, np.int64), 0.9) is None
    few = np.arange(20)
    assert threshold_with_precision(np.linspace(0.5, 0.9, 20), np.ones(20, np.bool_), few, 0.9) is None
    many = np.arange(400)
    assert threshold_with_precision(np.linspace(0.5, 0.9, 400), np.ones(400, np.bool_), many, 0.9) == 0.5
    assert threshold_with_precision(np.linspace(0.5, 0.9, 400), np.zeros(400, np.bool_), many, 0.9) is None


def test_intervals_widen_if_images_agree() -> None:
    hits, totals = np.array([5.0, 0, 5, 0, 5, 0, 5, 0]), np.full(8, 5.0)
    together = ratio(hits, totals)
    apart = ratio(np.tile([1.0, 0], 20), np.ones(40))
    assert together.value == apart.value == 0.5
    assert together.low is not None and apart.low is not None and together.low < apart.low - 0.1
    assert ratio(np.zeros(3), np.zeros(3)) == (None, None, None)


@pytest.mark.parametrize(("slope", "offset"), [(8, -6), (3, -1)])
def test_calibration_errors_fall_and_the_order_stays(slope: float, offset: float) -> None:
    before = outcomes(simulate(1, num_images=600, slope=slope, offset=offset), num_classes=3)
    chosen = calibrate(before, seed=0)
    assert chosen.method is not None
    own_error, other_error = (
        calibration_errors(before),
        calibration_errors(dataclasses.replace(before, scores=chosen.held_out)),
    )
    assert all(new < old / 2 for new, old in zip(other_error, own_error, strict=True) if new is not None and old)
    num_truth = np.full(3, 1_000)
    category = before.category.astype(np.int64)
    for method in METHODS:
        maps = fit_maps(method, before.scores, before.is_right, category, 3)
        scores = map_scores(maps, before.scores, category)
        assert ((scores > 0) & (scores <= 1)).all()
        for index in range(3):
            own = category == index
            assert (np.argsort(scores[own], kind="stable") == np.argsort(before.scores[own], kind="stable")).all()
        new, old = (average_precision(category, own, before.is_right, num_truth) for own in (scores, before.scores))
        np.testing.assert_array_equal(new, old)


def test_calibrated_scores_are_left_alone() -> None:
    rng = np.random.default_rng(5)
    scores = rng.random(200)
    simulated = scores, rng.random(200) < scores, np.arange(200)
    assert calibrate(outcomes(simulated), seed=0).method in (None, "temperature")
    few = scores[:60], np.zeros(60, np.bool_), np.arange(60)
    assert calibrate(outcomes(few), seed=0).method is None
    known = rng.normal(0, 2, 20_000)
    tempered = fit_maps("temperature", expit(known * 3), rng.random(20_000) < expit(known), np.zeros(20_000, int), 1)
    assert tempered[0].temperature == pytest.approx(3, rel=0.1) and logit(tempered[0](np.array([0.5])))[0] < 0.1


def twins(rng: np.random.Generator, *, num_images: int, num_wrong: int) -> tuple[TruthColumns, DetectionColumns]:
    """Boxes in a row, each detected; `num_wrong` of them also as another class, with a lower score."""
    boxes = np.array([[10.0 + 60 * number, 10, 40, 40] for number in range(6)])
    found = np.concatenate([boxes, boxes[:num_wrong] + 2])
    scores = np.concatenate([rng.uniform(0.6, 0.9, (num_images, 6)), rng.uniform(0.3, 0.5, (num_images, num_wrong))], 1)
    category = np.tile(np.append(np.zeros(6, int), np.ones(num_wrong, int)), num_images)
    truth = TruthColumns(
        image_ids=np.arange(num_images),
        starts=np.arange(num_images + 1) * 6,
        boxes_xywh=np.tile(boxes, (num_images, 1)),
        category=np.zeros(num_images * 6, np.int64),
        area=np.full(num_images * 6, 1600.0),
        iscrowd=np.zeros(num_images * 6, np.bool_),
    )
    return truth, DetectionColumns(
        starts=np.arange(num_images + 1) * len(found),
        boxes_xywh=np.tile(found, (num_images, 1)),
        scores=scores.ravel(),
        category=category,
    )


def test_suppression_is_chosen_if_it_raises_f1() -> None:
    rng = np.random.default_rng(0)
    truth, found = twins(rng, num_images=20, num_wrong=3)
    iou, after = choose_nms(truth, found, found.scores, 2, seed=0, keeps_precision=True)
    assert iou is not None and after.is_right.all() and len(after.scores) == 120
    truth, found = twins(rng, num_images=20, num_wrong=0)
    iou, after = choose_nms(truth, found, found.scores, 2, seed=0, keeps_precision=False)
    assert iou is None and len(after.scores) == 120


@pytest.mark.parametrize("iou", [0.5, 0.8])
def test_suppression_is_that_of_predict(iou: float) -> None:
    rng = np.random.default_rng(2)
    boxes, scores = np.concatenate([rng.uniform(0, 40, (80, 2)), rng.uniform(20, 60, (80, 2))], 1), rng.random(80)
    order = np.argsort(-scores)
    boxes, scores = boxes[order], scores[order]
    one = DetectionColumns(
        starts=starts_of(np.array([80])), boxes_xywh=boxes, scores=scores, category=np.zeros(80, int)
    )
    pairs = overlapping_detections(np.zeros(1, np.int64), one, scores)
    np.testing.assert_array_equal(
        np.flatnonzero(kept_by_nms(pairs, 80, iou)), non_maximum_suppression(boxes, scores, iou)
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[str, Any]:
    """A checkpoint with its detections and a truth that some of them find."""
    folder = tmp_path_factory.mktemp("fit")
    checkpoint, found = str(tiny("rt_detr_v2_tiny", folder / "model")), str(folder / "found")
    raydet.predict(checkpoint=checkpoint, data=str(shapes / "val"), out=found)
    table = open_table(found, "detections")
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for row in table.read().to_pylist():
        size = {"width": row["width"], "height": row["height"]}
        images.append({"id": row["image_id"], "file_name": row["path"] or "", **size})
        own = row["detections"]
        for place in range(0, 12, 3):
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": row["image_id"],
                    "iscrowd": 0,
                    "bbox": own["bbox"][place],
                    "area": float(np.prod(own["bbox"][place][2:])),
                    "category_id": own["category"][place] + 1,
                }
            )
    truth = folder / "truth.json"
    categories = [{"id": number + 1, "name": item.name} for number, item in enumerate(table.categories)]
    truth.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return {"checkpoint": checkpoint, "detections": found, "truth": str(truth)}


def test_predict_applies_the_point(fitted: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    checkpoint = fitted["checkpoint"]
    before = fingerprint(checkpoint)
    result = raydet.fit(**fitted)
    assert Path(result.out) == Path(checkpoint, OWN_FILE) and fingerprint(checkpoint) == before
    assert result.calibration in (None, *METHODS) and result.num_images == 10
    text = "\n".join(result.lines())
    assert "best F1" in text and result.out in text
    names = [category.name for category in open_table(fitted["detections"], "detections").categories]
    point = read_point(checkpoint, names)
    assert [item.threshold for item in result.classes] == list(point.thresholds)
    assert any(limit is not None for limit in point.thresholds)

    maps = fit_maps("temperature", np.linspace(0.01, 0.9, 40), np.arange(40) > 20, np.zeros(40, int), 1)
    point = dataclasses.replace(point, maps=(maps[0], *point.maps[1:]), class_agnostic_nms=0.5)
    point.write(checkpoint)
    out = str(tmp_path / "at-point")
    raydet.predict(checkpoint=checkpoint, data=str(shapes / "val"), out=out, operating_point=True)
    num_dropped = 0
    for row, given in zip(rows_of(out, "detections"), rows_of(fitted["detections"], "detections"), strict=True):
        own, found = given["detections"], []
        for box, score, category in zip(own["bbox"], own["score"], own["category"], strict=True):
            limit = point.thresholds[category]
            if limit is not None and score >= limit:
                new = point.maps[category]
                found.append((score if new is None else float(new(np.array([score]))[0]), box, category))
        found.sort(key=lambda item: -item[0])
        boxes, scores = np.array([box for _, box, _ in found]).reshape(-1, 4), np.array([item[0] for item in found])
        kept = non_maximum_suppression(boxes, scores, 0.5).tolist() if found else []
        num_dropped += len(own["score"]) - len(kept)
        assert row["detections"]["bbox"] == [found[place][1] for place in kept]
        assert row["detections"]["category"] == [found[place][2] for place in kept]
        np.testing.assert_allclose(row["detections"]["score"], scores[kept], rtol=1e-12)
    assert num_dropped > 0
    assert raydet.predict(checkpoint=checkpoint, data=str(shapes / "val"), out=fitted["detections"]).already_done, (
        "the point is no part of the model"
    )

    image = open_table(str(shapes / "val"), "images").read(["image"]).to_pylist()[0]["image"]["bytes"]
    one = raydet.load(checkpoint, operating_point=True)(image)
    np.testing.assert_allclose(one.scores, rows_of(out, "detections")[0]["detections"]["score"], atol=1e-5)

    metrics = str(tmp_path / "metrics")
    raydet.evaluate(truth=fitted["truth"], detections=out, out=metrics, bootstrap=0)
    values = {(row["metric"], row["category"]): row for row in rows_of(f"{metrics}/metrics", "metrics")}
    precision = values["precision", None]
    assert precision["low"] < precision["value"] <= precision["high"]
    page = Path(raydet.report(metrics=metrics).out).read_text()
    assert "At the operating point" in page

    raydet.fit(**fitted, target_precision=0.95)
    second = read_point(checkpoint, names)
    assert second.thresholds == (None,) * len(names) and second.target_precision == 0.95, "ten images prove nothing"
    with pytest.raises(UserError, match="operating point has changed"):
        raydet.predict(checkpoint=checkpoint, data=str(shapes / "val"), out=out, operating_point=True)
    with pytest.raises(UserError, match="without it"):
        raydet.fit(**{**fitted, "detections": out})


def test_refusals(fitted: dict[str, Any], tmp_path: Path) -> None:
    other = str(tiny("rt_detr_v2_tiny", tmp_path / "other"))
    config = json.loads(Path(other, "config.json").read_text())
    Path(other, "config.json").write_text(json.dumps({**config, "note": 1}))
    with pytest.raises(UserError, match="made by another model"):
        raydet.fit(**{**fitted, "checkpoint": other})
    with pytest.raises(UserError, match="into a folder first"):
        raydet.fit(**{**fitted, "checkpoint": "owner/model"})
    results = tmp_path / "results.json"
    results.write_text("[]")
    with pytest.raises(UserError, match="does not say which model"):
        raydet.fit(**{**fitted, "detections": str(results)})
    content = json.loads(Path(fitted["truth"]).read_text())
    few = tmp_path / "few.json"
    first, *others = content["images"]
    boxes = [box for box in content["annotations"] if box["image_id"] != first["id"]]
    few.write_text(json.dumps({**content, "images": others, "annotations": boxes}))
    with pytest.raises(UserError, match=r"run predict on the images of this truth$"):
        raydet.fit(**{**fitted, "truth": str(few)})
    few.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UserError, match=r"finds a labelled box of .* at IoU 0\.5"):
        raydet.fit(**{**fitted, "truth": str(few)})
    wrong: list[dict[str, Any]] = [{"target_precision": 1.0}, {"target_precision": 0.0}, {"seed": -1}]
    for options in wrong:
        with pytest.raises(UserError):
            FitConfig(**fitted, **options)
    data = str(tmp_path)
    with pytest.raises(UserError, match="has no operating point"):
        raydet.predict(checkpoint=other, data=data, out=str(tmp_path / "out"), operating_point=True)
    with pytest.raises(UserError, match="omit --score-threshold"):
        PredictConfig(data=data, checkpoint=other, operating_point=True, score_threshold=0.2)
    with pytest.raises(UserError, match="needs --checkpoint"):
        PredictConfig(data=data, model="m", labels=["a"], operating_point=True)
    file = Path(other, OWN_FILE)
    for content in ("{", "[]", '{"operating_point": {"version": 2}}', '{"operating_point": {"version": 1}}'):
        file.write_text(content)
        with pytest.raises(UserError, match="damaged"):
            read_point(other, ["a"])


def test_a_point_of_another_model_is_refused(fitted: dict[str, Any], tmp_path: Path) -> None:
    point = FittedPoint(
        classes=("a",),
        thresholds=(0.5,),
        maps=(None,),
        class_agnostic_nms=None,
        target_precision=None,
        model_fingerprint="0" * 16,
    )
    other = str(tiny("rt_detr_v2_tiny", tmp_path / "other"))
    point.write(other)
    with pytest.raises(UserError, match="fitted for another model"):
        read_point(other, ["a"])
