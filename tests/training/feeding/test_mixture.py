"""Mixed tables: merged classes, weights and repeated rare classes, the same for any number of workers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.errors import UserError
from raydet.config import TrainConfig
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import Table, TableWriter, open_table
from raydet.training.feeding.counts import shown_of
from raydet.training.feeding.mixture import Mixture, read_images
from raydet.training.feeding.ordering import RunPlan
from raydet.training.feeding.repeats import Repeats
from raydet.training.feeding.sources import merged, open_sources
from tests.training.feeding.test_ordering import plan_of
from tests.training.feeding.test_stream import read_ranks, steps_of


def _plan(groups: Sequence[tuple[int, int]], **changes: Any) -> RunPlan:
    return plan_of(train_groups=tuple(groups), **{"num_val": 3, **changes})


@settings(max_examples=60, deadline=None)
@given(factors=st.lists(st.floats(0.01, 6), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_epochs_are_of_one_size_and_images_come_as_often_as_their_factors_say(factors: list[float], seed: int) -> None:
    repeats = Repeats(np.array(factors))
    num_epochs = 40
    counts = [repeats.counts(seed, epoch) for epoch in range(num_epochs)]
    assert {int(one.sum()) for one in counts} == {repeats.num_shown}
    assert repeats.num_shown == max(1, round(sum(factors)))
    for one in counts:
        assert (one >= np.floor(factors)).all()
    if (np.array(factors) % 1).sum() > 5:  # the sum is rounded, which matters less the more there is to deal out
        assert np.abs(np.mean(counts, axis=0) - factors).max() < 0.15
    np.testing.assert_array_equal(counts[3], Repeats(np.array(factors)).counts(seed, 3))


def test_whole_factors_are_exact() -> None:
    repeats = Repeats(np.array([1.0, 3.0, 1.0, 2.0]))
    assert all(repeats.counts(0, epoch).tolist() == [1, 3, 1, 2] for epoch in range(5))
    plan, once = _plan([(2, 100), (2, 100)], repeats=Repeats(np.ones(4))), _plan([(2, 100), (2, 100)])
    assert [plan.step_rows(1, 0).tolist()] == [once.step_rows(1, 0).tolist()]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=6),
    world_size=st.integers(1, 4),
    data=st.data(),
)
def test_repeated_rows_come_at_the_same_steps_for_any_number_of_workers(
    groups: list[tuple[int, int]], world_size: int, data: st.DataObject
) -> None:
    num_rows = sum(rows for rows, _ in groups)
    factors = np.array(data.draw(st.lists(st.floats(0.1, 3), min_size=num_rows, max_size=num_rows)))
    plan = _plan(groups, repeats=Repeats(factors), epochs=2)
    for epoch in range(2):
        steps: dict[int, list[int]] = {}
        for segment in plan.segments():
            if segment.kind == "train" and segment.epoch == epoch:
                for micro_batch in plan.micro_batches(segment, world_size):
                    steps.setdefault(micro_batch.step, []).extend(micro_batch.rows)
        assert sorted(steps) == list(range(plan.steps_per_epoch))
        numbers = np.array([row for rows in steps.values() for row in rows])
        assert len(np.unique(numbers)) == len(numbers) == plan.num_train
        counts = Repeats(factors).counts(5, epoch)
        np.testing.assert_array_equal(np.bincount(numbers % num_rows, minlength=num_rows), counts)
        assert ((numbers // num_rows) < counts[numbers % num_rows]).all()
        first = plan.steps_of_rows(epoch)
        assert all(row in plan.step_rows(epoch, step) for row, step in enumerate(first.tolist()) if step >= 0)
        assert ((first >= 0) == (counts > 0)).all()
        for step, rows in steps.items():
            for number in rows:
                partners = plan.partner_rows(epoch, step, number)
                assert all((other - number) % num_rows for other in (*partners.mosaic, *partners.mixup))


def _write(
    folder: Path, names: Sequence[str], images: Sequence[Mapping[str, Any]], shapes: Path, *, first_id: int = 0
) -> Table:
    """Write a table of images of the shapes, with these classes; an image has `category` and perhaps `labelled`."""
    rows = open_table(str(shapes / "train"), "images").read().to_pylist()
    categories = tuple(Category(7 * number, name) for number, name in enumerate(names))
    has_labelled = any("labelled" in image for image in images)
    schema = build_schema("images", categories)
    if has_labelled:
        schema = schema.append(pa.field("labelled_categories", pa.list_(pa.int64())))
    with TableWriter(str(folder), schema, config_hash="x" * 12) as writer:
        for number, image in enumerate(images, first_id):
            row = {name: rows[number % len(rows)][name] for name in ("image", "width", "height")}
            num_boxes = len(image["category"])
            row["objects"] = {
                "id": list(range(num_boxes)),
                "bbox": [[4.0 + box, 4, 20, 20] for box in range(num_boxes)],
                "category": list(image["category"]),
                "area": [400.0] * num_boxes,
                "iscrowd": [False] * num_boxes,
            }
            if has_labelled:
                row["labelled_categories"] = image.get("labelled")
            writer.write_rows([{"image_id": number, **row}])
    return open_table(str(folder), "images")


@pytest.fixture(scope="module")
def two_tables(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Table]:
    """A table of cars and dogs, and one of buses, Cars and vans, in which some images state what is labelled."""
    folder = tmp_path_factory.mktemp("mixed")
    a = _write(folder / "a", ["car", "dog"], [{"category": [0, 1]}, {"category": [1]}, {"category": []}], shapes)
    images: list[dict[str, Any]] = [{"category": [0, 1, 2], "labelled": None}, {"category": [2], "labelled": [1, 2]}]
    images += [{"category": [1], "labelled": [1]}, {"category": [0]}]
    return a, _write(folder / "b", ["bus", "Car", "van"], images, shapes, first_id=10)


def _read(mixture: Mixture) -> list[tuple[list[int], list[int] | None]]:
    return [
        (row["objects"]["category"], row["labelled_categories"])
        for group in mixture.row_groups()
        for row in read_images(mixture, group).to_pylist()
    ]


def test_classes_are_merged_by_name_and_images_are_labelled_for_those_of_their_table(
    two_tables: tuple[Table, Table],
) -> None:
    mixture = merged(two_tables, [1.0, 1.0], {})
    assert [category.name for category in mixture.categories] == ["car", "dog", "bus", "van"]
    assert [source.class_map for source in mixture.sources] == [(0, 1), (2, 0, 3)]
    own = [([0, 1], [0, 1]), ([1], [0, 1]), ([], [0, 1])]
    others = [([2, 0, 3], [0, 2, 3]), ([3], [0, 3]), ([0], [0]), ([2], [0, 2, 3])]
    assert _read(mixture) == own + others
    assert [group.first_row for group in mixture.row_groups()] == [0, 3]


def test_a_class_that_absorbs_another_is_labelled_only_where_both_are(two_tables: tuple[Table, Table]) -> None:
    mixture = merged(two_tables, [1.0, 1.0], {"van": "Car", "dog": "bus"})
    assert [category.name for category in mixture.categories] == ["car", "bus"]
    assert _read(mixture)[:3] == [([0, 1], None), ([1], None), ([], None)]
    # Car and van are one class now: where only Car is labelled, a van may be missing.
    assert _read(mixture)[3:] == [([1, 0, 0], None), ([0], [0]), ([0], []), ([1], None)]


def test_names_that_differ_in_case_only_stay_apart_within_a_table(shapes: Path, tmp_path: Path) -> None:
    one = _write(tmp_path / "one", ["Car", "car"], [{"category": [0, 1]}], shapes)
    two = _write(tmp_path / "two", ["CAR", "car"], [{"category": [0, 1]}], shapes)
    mixture = merged([one, two], [1.0, 1.0], {})
    assert [category.name for category in mixture.categories] == ["Car", "car", "CAR"]
    assert [category.id for category in merged([one], [1.0], {"car": "van"}).categories] == [0, 7]


def test_new_names_without_a_blank_are_not_taken_for_a_file(two_tables: tuple[Table, Table], tmp_path: Path) -> None:
    uri = two_tables[0].uri
    config = TrainConfig(train_data=uri, val_data=uri, out=str(tmp_path / "run"), rename_classes="{car:van}")
    with pytest.raises(UserError, match=r"with a blank after the colon; got \{car:van\}"):
        open_sources(config)


def test_repeat_factors_are_those_of_lvis(two_tables: tuple[Table, Table], tmp_path: Path) -> None:
    """Compare with the definition, image by image: r = max(1, √(t / f)) of the rarest class, times the weight."""
    a, b = two_tables
    config = TrainConfig(train_data=[a.uri, f"{b.uri}:0.5"], val_data=a.uri, out=str(tmp_path / "run"), repeat_rare=0.9)
    mixture = open_sources(config)
    assert isinstance(mixture, Mixture) and mixture.repeats is not None
    weights = [1.0] * 3 + [0.5] * 4
    classes = [set(row[0]) for row in _read(mixture)]
    of_class = {}
    for one in range(4):
        fraction = sum(weight for weight, own in zip(weights, classes, strict=True) if one in own) / sum(weights)
        of_class[one] = max(1.0, (0.9 / fraction) ** 0.5)
    expected = [
        weight * max([1.0, *(of_class[one] for one in own)]) for weight, own in zip(weights, classes, strict=True)
    ]
    np.testing.assert_allclose(mixture.repeats.factors, expected)
    shown = shown_of(mixture)
    assert sum(one.images_per_epoch for one in shown) == pytest.approx(sum(expected))
    assert sum(one.boxes_per_epoch[3] for one in shown) == pytest.approx(expected[3] + expected[4])


def test_mixed_steps_do_not_depend_on_the_workers(
    two_tables: tuple[Table, Table], shapes: Path, ray_cluster: None
) -> None:
    """Check pixels and labels: one worker, two, and two from the middle on; a repeated image is augmented anew."""
    a, b = two_tables
    mixture = Mixture(*_fields(merged([a, b], [1.0, 1.0], {})), Repeats(np.array([1, 3, 0.5, 2, 1, 0.5, 2])))
    val = merged([b], [1.0], {"bus": "coach"})
    groups = [(group.num_rows, group.num_bytes) for group in mixture.row_groups()]
    plan = _plan(groups, repeats=mixture.repeats, num_val=val.num_rows, window_bytes=2**20)
    one = steps_of(read_ranks(mixture, val, plan, 1))
    assert steps_of(read_ranks(mixture, val, plan, 2)) == one
    rest = steps_of(read_ranks(mixture, val, plan, 2, start_epoch=1, start_step=1))
    assert rest == {key: one[key] for key in rest} and ("train", 1, 1) in rest and ("train", 1, 0) not in rest
    for epoch in range(3):
        images = [digest for key, digests in one.items() if key[:2] == ("train", epoch) for digest in digests]
        assert len(images) == plan.num_train == 10
    # Image 1 of the first table is shown three times in an epoch, flipped or not.
    shown = [
        {
            digest
            for key, digests in one.items()
            if key[:2] == ("train", epoch)
            for digest in digests
            if digest[:2] == "1:"
        }
        for epoch in range(3)
    ]
    assert max(sum(digest.startswith("1:") for digest in epoch) for epoch in shown) == 2


def _fields(mixture: Mixture) -> tuple[Any, Any]:
    return mixture.sources, mixture.categories


def write_teacher(folder: Path, images: Table, names: Sequence[str], *, seed: int = 0, unread: int = -1) -> Table:
    """Write detections in the images of a table, with two queries each; the image in row `unread` has none."""
    rng = np.random.default_rng(seed)
    categories = tuple(Category(number, name) for number, name in enumerate(names))
    schema = KeptVectors(class_scores="sigmoid", num_classes=len(names)).schema(categories, {})
    with TableWriter(str(folder), schema, config_hash="y" * 12) as writer:
        for number, row in enumerate(images.read().to_pylist()):
            is_read = number != unread
            boxes = [[8.0, 6, 20, 20], [30, 10, 16, 24]] if is_read else []
            scores = [rng.uniform(0, 1, len(names)).astype(np.float16) for _ in boxes]
            found = {
                "image_id": row["image_id"],
                "path": row["image"]["path"],
                "width": row["width"],
                "height": row["height"],
                "detections": {
                    "bbox": boxes,
                    "score": [0.5] * len(boxes),
                    "category": [0] * len(boxes),
                    "query": [*range(len(boxes))],
                },
                "queries": {"bbox": boxes, "class_scores": scores},
                "error": None if is_read else "broken",
            }
            writer.write_rows([{name: found.get(name) for name in schema.names}])
    return open_table(str(folder), "detections")


def _of_first_class(num_boxes: int) -> dict[str, list[int]]:
    return {"category": [0] * num_boxes, "query": [*range(num_boxes)]}


def test_teachers_travel_with_their_images_for_any_number_of_workers(
    two_tables: tuple[Table, Table], shapes: Path, tmp_path: Path, ray_cluster: None
) -> None:
    """Let one teacher know both tables' classes and images of the second, and another those of the first."""
    a, b = two_tables
    first = write_teacher(tmp_path / "first", a, ["dog", "cow", "CAR"], seed=1)
    second = write_teacher(tmp_path / "second", b, ["van", "bus"], seed=2, unread=2)
    data: Any = {"train_data": [a.uri, b.uri], "teacher": [first.uri, f"{second.uri}:0.5"]}
    mixture = open_sources(TrainConfig(val_data=b.uri, out=str(tmp_path / "run"), **data))
    assert isinstance(mixture, Mixture)
    rows = [row["teacher"] for group in mixture.row_groups() for row in read_images(mixture, group).to_pylist()]
    assert [row["weights"] for row in rows] == [[1.0, 0.0]] * 3 + [[0.0, 0.5]] * 2 + [[0.0, 0.0], [0.0, 0.5]]
    assert [row["owner"] for row in rows] == [[0, 0]] * 3 + [[1, 1]] * 2 + [[], [1, 1]]
    known = first.read(["queries"]).to_pylist()[1]["queries"]["class_scores"]
    # car, dog, bus, van: the last two are unknown to the first teacher.
    assert rows[1]["known"] == [True, True, False, False, False, False, True, True]
    expected = [*(value for vector in known for value in (vector[2], vector[0], 0, 0))]
    np.testing.assert_array_equal(rows[1]["class_scores"], np.array(expected))
    groups = [(group.num_rows, group.num_bytes) for group in mixture.row_groups()]
    plan = _plan(groups, num_val=b.num_rows, window_bytes=2**20, batch_size=3)
    val = merged([b], [1.0], {})

    def seen(world_size: int) -> dict[Any, list[Any]]:
        return {
            (batch.micro_batch.epoch, image_id, at): [values.tolist() for values in label.values()]
            for rank in read_ranks(mixture, val, plan, world_size)
            for batch in rank
            if batch.micro_batch.kind == "train"
            for at, (image_id, label) in enumerate(zip(batch.batch.image_ids, batch.batch.labels, strict=True))
        }

    one = seen(1)
    assert any(len(values) > 4 for values in one.values())
    two = seen(2)
    digest = {name: sorted(repr(values) for (epoch, *_), values in run.items() if epoch == 1) for name, run in (
        ("one", one), ("two", two))}  # fmt: skip
    assert digest["one"] == digest["two"]


def test_wrong_teachers_are_refused(two_tables: tuple[Table, Table], shapes: Path, tmp_path: Path) -> None:
    a, b = two_tables
    others = _write(tmp_path / "others", ["car"], [{"category": [0]}], shapes, first_id=15)
    plain = write_teacher(tmp_path / "other", others, ["car"])
    unknown = write_teacher(tmp_path / "unknown", a, ["cow"])

    def message(teacher: str) -> str:
        config = TrainConfig(train_data=a.uri, val_data=b.uri, out=str(tmp_path / "run"), teacher=teacher)
        with pytest.raises(UserError) as error:
            open_sources(config)
        return str(error.value)

    assert "has no row for 3 of the 3 images" in message(plain.uri)
    assert "knows none of the classes car, dog; its classes are cow" in message(unknown.uri)
    assert "expected a table of detections" in message(a.uri)
