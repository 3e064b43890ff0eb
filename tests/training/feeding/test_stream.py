"""The stream of a run: the same micro-batches and the same pixels for any number of workers."""

import hashlib
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from raydet.augmentation.view import View, scale_choice
from raydet.models.collate import Example
from raydet.models.geometry import ResizeRule
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import Table, TableWriter, open_table
from raydet.training.feeding import stream
from raydet.training.feeding.batches import ReadyBatch, ready_batches
from raydet.training.feeding.chunks import ENCODED_TYPE, decode_chunk, encoded_chunk
from raydet.training.feeding.mixture import Mixture
from raydet.training.feeding.ordering import Kind, MicroBatch, RunPlan
from raydet.training.feeding.stream import read_stream, run_stream
from raydet.training.feeding.views import Views

RULE = ResizeRule(mode="fixed", size_hw=(32, 48), resample=2)


def _plan(train: Table, val: Table, **changes: float) -> RunPlan:
    values: dict[str, Any] = {
        "batch_size": 5,
        "accumulate": 1,
        "epochs": 2,
        "seed": 1,
        "window_bytes": 2**20,
        "validate_every": 1,
        "validate_batch_size": 4,
    }
    groups = tuple((group.num_rows, group.num_bytes) for group in train.row_groups())
    return RunPlan(train_groups=groups, num_val=val.num_rows, **{**values, **changes})


def _view(**changes: Any) -> View:
    values: dict[str, Any] = {"augmentation": "light", "resize_rule": RULE, "seed": 1}
    return View(**{**values, **changes})


def read_ranks(
    train: Table | Mixture,
    val: Table | Mixture,
    plan: RunPlan,
    world_size: int,
    **start: int,
) -> list[list[ReadyBatch]]:
    """Return the batches of each rank. All ranks read concurrently, as training workers do.

    The augmentation is `flip`: it differs between images, like any other, and needs no slow import.
    """
    iterators = run_stream(
        plan,
        train=train,
        val=val,
        views=Views(_view(augmentation="flip")),
        world_size=world_size,
        ranks=range(world_size),
        start_epoch=start.get("start_epoch", 0),
        start_step=start.get("start_step", 0),
        decoders=[ray.get_runtime_context().get_node_id()] * 2,
    )
    received: list[list[ReadyBatch]] = [[] for _ in iterators]

    def read(rank: int) -> None:
        received[rank].extend(read_stream(iterators[rank]))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=250)
        assert not thread.is_alive(), "the stream hangs"
    return received


def steps_of(received: list[list[ReadyBatch]]) -> dict[tuple[str, int, int], list[str]]:
    """Return digests of the images of each global step in the order of the plan; unreadable images come last."""
    steps: dict[tuple[str, int, int], list[tuple[tuple[int, int], ReadyBatch]]] = {}
    for rank, part in enumerate(received):
        for batch in part:
            key = batch.micro_batch
            assert key.rank == rank
            step = 0 if key.kind == "validate" else key.step
            place = (key.step, rank) if key.kind == "validate" else (rank, key.part)
            steps.setdefault((key.kind, key.epoch, step), []).append((place, batch))
    found: dict[tuple[str, int, int], list[str]] = {}
    for step_key, parts in steps.items():
        batches = [batch for _, batch in sorted(parts, key=lambda item: item[0])]
        found[step_key] = [_digest(batch, example) for batch in batches for example in batch.examples]
        found[step_key] += [f"{image_id}:{error}" for batch in batches for image_id, error in batch.unreadable.items()]
    return found


def _digest(batch: ReadyBatch, example: Example) -> str:
    truth = batch.truths.get(example.image_id)
    labelled = (
        None if truth is None else [values if values is None else values.tolist() for values in vars(truth).values()]
    )
    content = [example.image_id, example.boxes.tolist(), example.categories.tolist(), batch.resize_rule, labelled]
    return f"{example.image_id}:{hashlib.sha256(repr(content).encode() + example.image.tobytes()).hexdigest()}"


@pytest.fixture(scope="module")
def one_worker(shapes: Path, ray_cluster: None) -> dict[tuple[str, int, int], list[str]]:
    """The global steps of a run with one worker."""
    train, val = open_table(str(shapes / "train"), "images"), open_table(str(shapes / "val"), "images")
    return steps_of(read_ranks(train, val, _plan(train, val), 1))


@ray.remote(num_cpus=2)
class _Holder:
    """An actor that holds all CPUs of the session, as workers may."""

    def is_there(self) -> bool:
        return True


@pytest.mark.slow
def test_images_come_to_workers_that_hold_all_cpus(
    shapes: Path, one_worker: dict[tuple[str, int, int], list[str]]
) -> None:
    train, val = open_table(str(shapes / "train"), "images"), open_table(str(shapes / "val"), "images")
    holder = _Holder.remote()  # type: ignore[attr-defined]
    assert ray.get(holder.is_there.remote())
    try:
        received = read_ranks(train, val, _plan(train, val), 1)
    finally:
        ray.kill(holder)
    assert steps_of(received) == one_worker


def test_the_global_steps_do_not_depend_on_the_workers(
    shapes: Path, one_worker: dict[tuple[str, int, int], list[str]]
) -> None:
    train, val = open_table(str(shapes / "train"), "images"), open_table(str(shapes / "val"), "images")
    one, two = one_worker, steps_of(read_ranks(train, val, _plan(train, val), 2))
    assert one == two
    for epoch in range(2):
        ids = [digest.split(":")[0] for key, images in one.items() if key[:2] == ("train", epoch) for digest in images]
        assert sorted(ids, key=int) == [str(number) for number in range(24)]
        validated = one["validate", epoch, 0]
        assert [digest.split(":")[0] for digest in validated] == [str(number) for number in range(10)]
    assert one["validate", 0, 0] == one["validate", 1, 0]


def test_starting_in_the_middle_gives_the_rest_in_parts_too(
    shapes: Path, one_worker: dict[tuple[str, int, int], list[str]]
) -> None:
    train, val = open_table(str(shapes / "train"), "images"), open_table(str(shapes / "val"), "images")
    rest = steps_of(read_ranks(train, val, _plan(train, val, accumulate=2), 2, start_epoch=1, start_step=2))
    assert rest == {key: one_worker[key] for key in rest}
    assert min(key[2] for key in rest if key[0] == "train") == 2


def test_mixed_images_and_sizes_do_not_depend_on_the_workers(tmp_path: Path, shapes: Path) -> None:
    """Check an epoch with mosaics, mixups and several sizes and a plain one; a frequent partner image is broken."""
    val = open_table(str(shapes / "val"), "images")
    rows = open_table(str(shapes / "train"), "images").read().to_pylist()
    rows[7]["image"]["bytes"] = b"no image"
    categories = tuple(Category(number, str(number)) for number in range(3))
    with TableWriter(str(tmp_path / "t"), build_schema("images", categories), config_hash="x") as writer:
        writer.write_rows([{name: row[name] for name in writer_columns()} for row in rows])
    train = open_table(str(tmp_path / "t"), "images")
    plan = _plan(train, val, validate_fraction=0.5)
    rules = (RULE, ResizeRule(mode="fixed", size_hw=(40, 40)), ResizeRule(mode="fixed", size_hw=(64, 56)))
    view = _view(augmentation="strong", plain_from_epoch=1, step_resize_rules=rules)
    received = _prepared_run(train, val, plan, 3, view)
    mixed = steps_of(received)
    assert mixed == steps_of(_prepared_run(train, val, plan, 1, view))
    assert [digest.split(":")[0] for digest in mixed["validate", 0, 0]] == ["0", "2", "4", "6", "8"]
    found: dict[int, int] = {}
    sizes = set()
    for batch in (batch for rank in received for batch in rank):
        key = batch.micro_batch
        is_mixed = key.kind == "train" and key.epoch == 0
        rule = rules[scale_choice(1, 0, key.step, 3)] if is_mixed else RULE
        assert batch.resize_rule == rule
        assert all(example.image.shape[:2] == rule.size_hw for example in batch.examples)
        assert all(image_id == rows[7]["image_id"] for image_id in batch.unreadable)
        assert all("not an image" in error for error in batch.unreadable.values())
        sizes.add(rule.size_hw)
        if key.kind == "train":
            found[key.epoch] = found.get(key.epoch, 0) + sum(len(example.categories) for example in batch.examples)
    num_objects = sum(len(row["objects"]["id"]) for row in rows) - len(rows[7]["objects"]["id"])
    assert found[1] == num_objects and found[0] > num_objects * 1.3
    assert len(sizes) == 3


def _prepared_run(train: Table, val: Table, plan: RunPlan, world_size: int, view: View) -> list[list[ReadyBatch]]:
    """Return the batches of each rank, made by the functions of the stream's tasks in this process."""
    tables: dict[str, Table | Mixture] = {"train": train, "validate": val}
    groups = {kind: table.row_groups() for kind, table in tables.items()}
    source = stream.StreamSource(plan, tables, groups, world_size, tuple(range(world_size)), Views(view))
    received: list[list[ReadyBatch]] = [[] for _ in range(world_size)]
    for segment in plan.segments():
        for chunk in stream.read_segment(source, segment):
            for batch in ready_batches(decode_chunk(chunk, view)):
                received[batch.micro_batch.rank].append(batch)
    return received


def test_partners_that_cannot_be_read_are_left_out(shapes: Path) -> None:
    """Check that broken partners are ignored: all broken means no mosaic, one broken means a mosaic with two."""
    rows = open_table(str(shapes / "train"), "images").read(writer_columns()).to_pylist()[:4]
    broken = {**rows[1], "image": {"bytes": b"", "path": "x.jpg"}}
    alone, without, all_three, two = (
        _prepared({**rows[0], "mosaic": partners, "mixup": []})
        for partners in ([], [broken] * 3, rows[1:], [broken, *rows[2:]])
    )
    assert alone == without
    assert len({alone["pixels"], two["pixels"], all_three["pixels"]}) == 3
    assert two == _prepared({**rows[0], "mosaic": rows[2:], "mixup": []})


def test_crowds_are_augmented_along_but_not_learnt(shapes: Path) -> None:
    row = open_table(str(shapes / "train"), "images").read(writer_columns()).to_pylist()[0]
    row["objects"] = {
        "id": [3, 4, 5],
        "bbox": [[1.0, 2, 20, 30], [0, 0, 64, 64], [30, 30, 16, 16]],
        "category": [2, 1, 0],
        "area": [600.0, 4096.0, 100.0],
        "iscrowd": [False, True, False],
    }
    for augmentation in ("none", "flip", [{"VerticalFlip": {"p": 1.0}}]):
        assert list(_prepared(row, augmentation=augmentation)["categories"]) == [2, 0]
    flipped = np.array(_prepared(row, augmentation=[{"VerticalFlip": {"p": 1.0}}])["boxes"]).reshape(-1, 4)
    np.testing.assert_allclose(flipped[1], [38 / 64, 26 / 64, 16 / 64, 16 / 64], rtol=1e-5)


def _chunk(rows: list[dict[str, Any]], kind: Kind = "train") -> pa.Table:
    """Return a chunk of one micro-batch, as a reader makes it."""
    rows = [{"repetition": 0, "mosaic": [], "mixup": [], **row} for row in rows]
    images = pa.array(rows, ENCODED_TYPE)
    return encoded_chunk([MicroBatch(kind, 0, 0, 0, 0, tuple(range(len(rows))))], images)


def _prepared(row: dict[str, Any], *, augmentation: Any = "strong") -> dict[str, Any]:
    """Return one image as a decoder makes it."""
    (batch,) = ready_batches(decode_chunk(_chunk([row]), _view(augmentation=augmentation)))
    (example,) = batch.examples
    values = {name: value.tolist() for name, value in vars(example).items() if name in ("boxes", "categories")}
    return {**values, "pixels": example.image.tobytes()}


@pytest.mark.usefixtures("ray_cluster")
def test_unreadable_images_are_rows_with_a_reason_and_crowds_are_not_learnt(tmp_path: Path, shapes: Path) -> None:
    good = open_table(str(shapes / "train"), "images").read().to_pylist()[:3]
    good[0]["objects"] = {
        "id": [1, 2],
        "bbox": [[1.0, 2, 20, 30], [0, 0, 64, 64]],
        "category": [2, 1],
        "area": [600.0, 4096.0],
        "iscrowd": [False, True],
    }
    good[1]["image"]["bytes"] = b"no image"
    good[2]["image"] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    categories = tuple(Category(number, str(number)) for number in range(3))
    with TableWriter(str(tmp_path / "t"), build_schema("images", categories), config_hash="x") as writer:
        writer.write_rows([{name: row[name] for name in writer_columns()} for row in good])
    table = open_table(str(tmp_path / "t"), "images")
    received = read_ranks(table, table, _plan(table, table, epochs=1), 2)
    batches = [batch for rank in received for batch in rank]
    trained, validated = ([one for one in batches if one.micro_batch.kind == kind] for kind in ("train", "validate"))
    ids = [row["image_id"] for row in good]
    (example,) = [example for batch in trained for example in batch.examples]
    assert example.image_id == ids[0] and example.categories.tolist() == [2] and example.image.shape == (32, 48, 3)
    for part in (trained, validated):
        unreadable = {image_id: error for batch in part for image_id, error in batch.unreadable.items()}
        assert sorted(unreadable) == sorted(ids[1:]) and "not an image" in unreadable[ids[1]]
        assert unreadable[ids[2]]
    assert not any(batch.truths for batch in trained)
    truths = {image_id: truth for batch in validated for image_id, truth in batch.truths.items()}
    assert sorted(truths) == sorted(ids) and truths[ids[0]].iscrowd.tolist() == [False, True]
    np.testing.assert_array_equal(truths[ids[1]].boxes_xywh, np.array(good[1]["objects"]["bbox"]).reshape(-1, 4))


def test_labelled_classes_travel_with_their_images(shapes: Path) -> None:
    """Check that a mixed image knows the classes of all its parts, and has no boxes of others."""
    rows = open_table(str(shapes / "train"), "images").read(writer_columns()).to_pylist()[:5]
    for number, row in enumerate(rows):
        row["objects"] = {
            "id": [1, 2],
            "bbox": [[4.0, 4, 50, 50], [6, 6, 50, 50]],
            "category": [1, 2],
            "area": [2500.0, 2500.0],
            "iscrowd": [False, False],
        }
        row["labelled_categories"] = [None, [0, 1], [1, 2], None, None][number]
    rows[0] |= {"mosaic": rows[1:4], "mixup": []}

    def seen(kind: Kind) -> ReadyBatch:
        (batch,) = ready_batches(decode_chunk(_chunk([rows[0], rows[1], rows[4]], kind), _view(augmentation="strong")))
        return batch

    mixed, partial, plain = seen("train").batch.labels
    assert mixed["labelled"].tolist() == [1] and set(mixed["class_labels"].tolist()) <= {1}
    assert partial["labelled"].tolist() == [0, 1] and set(partial["class_labels"].tolist()) <= {0, 1}
    assert "labelled" not in plain
    truths = list(seen("validate").truths.values())
    assert truths[0].labelled is None and truths[1].labelled is not None
    assert truths[1].labelled.tolist() == [0, 1] and truths[1].category.tolist() == [1, 2]


def writer_columns() -> list[str]:
    """Return the columns that every images table has."""
    return ["image_id", "image", "width", "height", "objects"]


def test_what_decodes_imports_neither_torch_nor_albumentations_without_need(shapes: Path, tmp_path: Path) -> None:
    """Check the imports of a decoder: only a resize imports torch, and only `light` imports albumentations."""
    rows = open_table(str(shapes / "train"), "images").read(writer_columns()).to_pylist()[:2]
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(rows))
    program = f"""
import json, pickle, sys
from pathlib import Path
import pyarrow as pa
from raydet.augmentation.view import View
from raydet.models.geometry import ResizeRule
from raydet.training.feeding import stream
from raydet.training.feeding.chunks import ENCODED_TYPE, decode_chunk, encoded_chunk, images_of
from raydet.training.feeding.ordering import MicroBatch

rows = pickle.loads(Path({str(tmp_path / "rows.pkl")!r}).read_bytes())
heavy = ("torch", "torchvision", "transformers", "albumentations", "cv2")
for augmentation, side in (("", 64), ("none", 64), ("flip", 64), ("flip", 48), ("light", 64)):
    kind = "train" if augmentation else "validate"
    encoded = pa.array([{{**row, "repetition": 0, "mosaic": [], "mixup": []}} for row in rows], ENCODED_TYPE)
    chunk = encoded_chunk([MicroBatch(kind, 0, 0, 0, 0, (0, 1))], encoded)
    view = View(resize_rule=ResizeRule(mode="fixed", size_hw=(side, side)), augmentation=augmentation or "none")
    decoded = decode_chunk(chunk, view)
    assert images_of(decoded)["size_hw"].to_pylist() == [[side, side]] * 2
    print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert lines[:3] == [[], ["cv2"], ["cv2"]]
    assert lines[3] == ["torch", "cv2"] and "albumentations" in lines[4]
