"""`CocoAP` gives pycocotools' numbers in any loop: with any inputs that torchmetrics takes, on any ranks."""

import copy
import datetime
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.detection import MeanAveragePrecision

import raydet
from raydet.common.boxes import xywh_to_xyxy
from raydet.measuring.numbers.matches import COCO_IOU_THRESHOLDS
from raydet.measuring.numbers.precision import COCO_RECALLS
from raydet.tables.schema import Category
from tests.measuring.numbers.test_metrics import Image, image_detections, image_truth, real_images, reference
from tests.ranks import run_ranks

Item = dict[str, Tensor]
Measured = tuple[list[tuple[Item, Item]], dict[str, Tensor]]
OfRanks = list[dict[str, dict[str, dict[str, Tensor]]]]
TWELVE = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
TWELVE += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]
NAMES = [*TWELVE, "map_per_class", "mar_100_per_class", "classes"]


def as_items(images: list[Image], categories: list[Category], *, with_ids: bool = False) -> list[tuple[Item, Item]]:
    """Return predictions and target of each image; boxes are x, y, width, height."""
    ids = np.array([category.id for category in categories])
    items = []
    for image_id, truth, found in images:
        pred = {"boxes": found.boxes_xywh, "scores": found.scores, "labels": ids[found.category]}
        target = {"boxes": truth.boxes_xywh, "labels": ids[truth.category], "area": truth.area}
        target["iscrowd"] = truth.iscrowd.astype(np.int64)
        tensors = tuple({key: torch.from_numpy(value) for key, value in side.items()} for side in (pred, target))
        if with_ids:
            tensors[1]["image_id"] = torch.tensor([image_id])
        items.append((tensors[0], tensors[1]))
    return items


def add(metric: Any, items: list[tuple[Item, Item]], batch_size: int = 8) -> Any:
    for start in range(0, len(items), batch_size):
        preds, target = zip(*items[start : start + batch_size], strict=True)
        metric.update(list(preds), list(target))
    return metric


def twelve(numbers: dict[str, Tensor]) -> list[float]:
    return [float(numbers[name]) for name in TWELVE]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected) == NAMES
    for name in NAMES:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def small_case() -> tuple[list[Image], list[Category]]:
    """Return images whose boxes are whole numbers, which float32 and every box format hold exactly."""
    generator = np.random.default_rng(5)
    images = []
    for image_id in range(40):
        truth, found = [], []
        for _ in range(generator.integers(0, 5)):
            box = np.concatenate([generator.integers(0, 200, 2) * 2, generator.integers(1, 80, 2) * 2]).astype(float)
            label = int(generator.integers(3))
            truth.append((box.tolist(), label, float(box[2] * box[3]), bool(generator.random() < 0.1)))
            for _ in range(generator.integers(0, 3)):
                moved = box + generator.integers(-3, 4, 4) * 2
                moved[2:] = np.maximum(moved[2:], 2)
                found.append((moved.tolist(), float(generator.integers(0, 8)) / 8, label))
        found += [([0.0, 0.0, 20.0, 10.0], 0.25, 3)] * int(generator.integers(0, 2))
        images.append(Image(image_id, image_truth(truth), image_detections(found)))
    return images, [Category(number, str(number)) for number in (2, 3, 5, 7)]


@pytest.fixture(scope="module")
def small() -> Measured:
    """Inputs with image ids, and their numbers."""
    images, categories = small_case()
    items = as_items(images, categories, with_ids=True)
    return items, add(raydet.CocoAP("xywh", class_metrics=True), items).compute()


@pytest.mark.parametrize("file", ["bccd/instances_val.json", "coco_mini/instances_val.json"])
def test_equal_to_pycocotools_to_the_last_bit(test_data: Path, file: str) -> None:
    images, categories = real_images(test_data / file, seed=3)
    evaluator = reference(images, categories)
    numbers = add(raydet.CocoAP("xywh", class_metrics=True), as_items(images, categories)).compute()
    assert twelve(numbers) == evaluator.stats.tolist()
    assert 0.05 < numbers["map"] < 0.95
    assert {value.dtype for name, value in numbers.items() if name != "classes"} == {torch.float64}
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    by_id = sorted(category.id for category in categories)
    for label, value in zip(numbers["classes"].tolist(), numbers["map_per_class"].tolist(), strict=True):
        expected = np.ascontiguousarray(precision[:, :, by_id.index(label)])
        assert value == (expected.mean() if expected.min() > -1 else -1)
    # With ids, neither the order of the images nor the batches matter, although many scores are equal.
    shuffled = [
        as_items(images, categories, with_ids=True)[i] for i in np.random.default_rng(1).permutation(len(images))
    ]
    assert twelve(add(raydet.CocoAP("xywh"), shuffled, batch_size=1).compute()) == evaluator.stats.tolist()


@pytest.mark.parametrize("class_metrics", [False, True])
def test_keys_shapes_and_numbers_of_torchmetrics(class_metrics: bool) -> None:
    images, categories = small_case()
    items = [
        ({key: value.float() if value.is_floating_point() else value for key, value in pred.items()}, target)
        for pred, target in as_items(images, categories)
    ]
    # Its own thresholds are rounded to float32, which changes the numbers.
    thresholds = {"iou_thresholds": list(COCO_IOU_THRESHOLDS), "rec_thresholds": COCO_RECALLS.tolist()}
    ours = add(raydet.CocoAP("xywh", class_metrics=class_metrics), items).compute()
    theirs = add(MeanAveragePrecision("xywh", class_metrics=class_metrics, **thresholds), items).compute()
    assert twelve(ours) == reference(images, categories).stats.tolist()
    assert list(ours) == list(theirs) == NAMES
    for name in NAMES:
        assert ours[name].shape == theirs[name].shape, name
        assert torch.equal(ours[name].to(theirs[name].dtype), theirs[name]), name
    one_class = [
        ({**pred, "labels": pred["labels"] * 0}, {**target, "labels": target["labels"] * 0}) for pred, target in items
    ]
    for metric in (raydet.CocoAP("xywh", class_metrics=True), MeanAveragePrecision("xywh", class_metrics=True)):
        assert add(metric, one_class).compute()["map_per_class"].shape == ()


def test_box_formats_and_types_of_tensors(small: Measured) -> None:
    items, expected = small

    def converted(convert: Callable[[Tensor], Tensor], items: list[tuple[Item, Item]]) -> list[tuple[Item, Item]]:
        return [tuple({**side, "boxes": convert(side["boxes"])} for side in both) for both in items]  # type: ignore[misc]

    corners = converted(lambda boxes: torch.from_numpy(xywh_to_xyxy(boxes.numpy())).float(), items)
    centres = converted(lambda boxes: torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1).int(), items)
    for name, given in (("xyxy", corners), ("cxcywh", centres)):
        assert_equal(add(raydet.CocoAP(name, class_metrics=True), given).compute(), expected)  # type: ignore[arg-type]
    # Small types, lists, and empty tensors as torch.tensor([]) makes them.
    other = []
    for pred, target in items:
        scores, labels = pred["scores"].bfloat16().requires_grad_(), pred["labels"].to(torch.uint8)
        one: dict[str, Any] = {**pred, "scores": scores, "labels": labels}
        two: dict[str, Any] = {**target, "iscrowd": target["iscrowd"].bool(), "boxes": target["boxes"].tolist()}
        for side in (one, two):
            if not len(side["labels"]):
                side |= {key: torch.tensor([]) for key in side if key != "image_id"}
        other.append((one, two))
    assert_equal(add(raydet.CocoAP("xywh", class_metrics=True), other).compute(), expected)


def test_area_and_crowd_may_be_missing() -> None:
    box = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    pred = {"boxes": box, "scores": torch.tensor([0.5]), "labels": torch.tensor([0])}
    target = {"boxes": box, "labels": torch.tensor([0])}
    for area, size in (
        ({}, "small"),
        ({"area": torch.tensor([0.0])}, "small"),
        ({"area": torch.tensor([2e3])}, "medium"),
    ):
        metric = raydet.CocoAP("xywh")
        metric.update([pred], [{**target, **area}])
        numbers = metric.compute()
        assert {name for name in ("small", "medium", "large") if numbers[f"map_{name}"] > 0.99} == {size}
    metric = raydet.CocoAP("xywh")
    metric.update([pred], [{**target, "iscrowd": torch.tensor([1])}])
    assert set(twelve(metric.compute())) == {-1.0}


def test_a_metric_without_boxes_or_images_is_undefined() -> None:
    nothing: Item = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    for images in ([], [nothing]):
        metric = raydet.CocoAP(class_metrics=True)
        metric.update(images, images)
        numbers = metric.compute()
        assert list(numbers) == NAMES and set(twelve(numbers)) == {-1.0}
        assert numbers["classes"].shape == numbers["map_per_class"].shape == (0,)


PRED = {"boxes": torch.ones(2, 4), "scores": torch.ones(2), "labels": torch.tensor([1, 2])}
TARGET = {"boxes": torch.ones(2, 4), "labels": torch.tensor([1, 2])}
NAN = torch.tensor([0.0, float("nan")])


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        ({**PRED, "scores": NAN}, TARGET, r"preds\[1\].*scores.*finite"),
        ({**PRED, "boxes": PRED["boxes"] / 0}, TARGET, r"preds\[1\].*boxes.*finite"),
        (PRED, {**TARGET, "area": NAN}, r"target\[1\].*area.*finite"),
        ({**PRED, "scores": torch.ones(3)}, TARGET, r"preds\[1\].*scores.*\(2,\).*\(3,\)"),
        ({**PRED, "boxes": torch.ones(4, 2)}, TARGET, r"preds\[1\].*boxes.*\(2, 4\).*\(4, 2\)"),
        (PRED, {**TARGET, "iscrowd": torch.ones(1)}, r"target\[1\].*iscrowd.*shape"),
        (PRED, {**TARGET, "labels": torch.ones(2)}, r"target\[1\].*labels.*integers"),
        ({"boxes": PRED["boxes"], "labels": PRED["labels"]}, TARGET, r"preds\[1\].*'scores'"),
        (PRED, {"labels": TARGET["labels"]}, r"target\[1\].*'boxes'"),
        *((PRED, {**TARGET, "image_id": wrong}, r"target\[1\].*image_id") for wrong in ("a", -1, 2**53, 0.5, [1, 2])),
    ],
)
def test_wrong_input_is_refused_and_adds_nothing(pred: Item, target: Item, message: str) -> None:
    metric = raydet.CocoAP()
    with pytest.raises(ValueError, match=message):
        metric.update([PRED, pred], [TARGET, target])
    metric.update([PRED], [TARGET])
    assert metric.compute()["mar_100"] == 0  # these boxes have no area


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="xyxy, xywh, cxcywh"):
        raydet.CocoAP("coco")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 images, target has 0"):
        raydet.CocoAP().update([PRED], [])
    metric = raydet.CocoAP()
    metric.update([PRED, PRED], [{**TARGET, "image_id": torch.tensor(4)}, TARGET])
    with pytest.raises(ValueError, match="1 of 2 images have no image_id"):
        metric.compute()
    metric = raydet.CocoAP()
    metric.update([PRED, PRED], [{**TARGET, "image_id": 4}, {**TARGET, "boxes": torch.zeros(2, 4), "image_id": 4}])
    with pytest.raises(ValueError, match="different labelled boxes"):
        metric.compute()


def test_an_image_that_was_added_again_counts_once(small: Measured) -> None:
    items, expected = small
    metric = add(raydet.CocoAP("xywh", class_metrics=True), [*items[:7], *items])
    with pytest.warns(UserWarning, match=r"7 images.*reset\(\)"):
        numbers = metric.compute()
    assert_equal(numbers, expected)


def test_life_of_a_metric(small: Measured) -> None:
    """Check everything that torchmetrics' loops and collections do with a metric besides `update` and `compute`."""
    items, expected = small
    half = len(items) // 2
    metric = add(raydet.CocoAP("xywh", class_metrics=True), items[:half])
    copies = [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone().half().set_dtype(torch.float16)]
    copies.append(raydet.CocoAP("xywh", class_metrics=True))
    copies[-1].persistent(True)
    metric.persistent(True)
    copies[-1].load_state_dict(metric.state_dict())
    first = metric.compute()
    assert not torch.equal(first["map"], expected["map"])
    for each in (metric, *copies):
        assert_equal(each.compute(), first)
        assert_equal(add(each, items[half:]).compute(), expected)
    merged, second = (add(raydet.CocoAP("xywh", class_metrics=True), part) for part in (items[:half], items[half:]))
    merged.merge_state(second)
    assert_equal(merged.compute(), expected)
    metric.reset()
    of_batches = [metric([pred], [target]) for pred, target in items]
    alone = add(raydet.CocoAP("xywh", class_metrics=True), items[-1:]).compute()
    assert_equal(of_batches[-1], alone)
    assert_equal(metric.compute(), expected)
    collection = MetricCollection({"one": raydet.CocoAP("xywh"), "other": raydet.CocoAP("xywh")})
    assert torch.equal(add(collection, items).compute()["other_map"], expected["map"])


# Several processes.

SPLITS: dict[str, Callable[[int], int]] = {
    "unequal": lambda number: 0 if number % 5 == 1 else 1,
    "rank 0 empty": lambda number: 1,
    "rank 1 empty": lambda number: 0,
    "all empty": lambda number: 2,
}


def numbers_of_rank(rank: int, items: list[tuple[Item, Item]]) -> dict[str, dict[str, Tensor]]:
    """Compute the numbers of all ranks for each split of the images. Collective."""
    numbers = {}
    for name, rank_of in SPLITS.items():
        own = [item for number, item in enumerate(items) if rank_of(number) == rank]
        metric = add(raydet.CocoAP("xywh", class_metrics=True), own)
        numbers[name] = metric.compute()
        assert len(metric.images) == -(-len(own) // 8), "the rank keeps its own images only"
    return numbers


def assert_numbers_of_ranks(found: list[dict[str, dict[str, Tensor]]], expected: dict[str, Tensor]) -> None:
    for of_rank in found:
        for name in SPLITS:
            if name == "all empty":
                assert set(twelve(of_rank[name])) == {-1.0}
            else:
                assert_equal(of_rank[name], expected)


BACKENDS = ("gloo", "cuda:gloo")
"""The second has no backend for tensors on the CPU, as NCCL."""


def run_rank(rank: int, folder: str) -> None:
    """Run one of two ranks in its own process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a rank without images computes before it updates
    images, categories = small_case()
    items = as_items(images, categories, with_ids=True)
    found = {}
    for number, backend in enumerate(BACKENDS):
        timeout, store = datetime.timedelta(seconds=60), f"file://{folder}/store-{number}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=2, timeout=timeout)
        groups = [dist.new_group([other]) for other in range(2)]
        alone = add(raydet.CocoAP("xywh", process_group=groups[rank]), items[rank : rank + 20])
        together = add(raydet.CocoAP("xywh"), items)
        together.compute()
        assert bool(together._cpu_groups) is (backend != "gloo")
        assert torch.equal(copy.deepcopy(together).compute()["map"], together.compute()["map"])
        found[backend] = {**numbers_of_rank(rank, items), "alone": alone.compute()}
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> OfRanks:
    """Numbers of two ranks, which start only once, because importing torchmetrics is slow."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")  # imports once for both
    context.set_forkserver_preload([__name__])
    run_ranks(context, run_rank, [(rank, str(folder)) for rank in range(2)], timeout_s=240)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_with_any_number_of_images(
    of_ranks: OfRanks,
    small: Measured,
    backend: str,
) -> None:
    items, expected = small
    assert_numbers_of_ranks([of_rank[backend] for of_rank in of_ranks], expected)
    for rank, of_rank in enumerate(of_ranks):
        own = add(raydet.CocoAP("xywh"), items[rank : rank + 20]).compute()
        assert_equal(of_rank[backend]["alone"], own)
