"""Inspection: statistics, findings, tables, and images that match what training sees."""

import io
import itertools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raydet.augmentation.view import View
from raydet.cli.main import main
from raydet.common.errors import UserError
from raydet.config import InspectConfig, ResolvedTrainConfig
from raydet.inspection import rows
from raydet.inspection.counting import QUANTITIES, Counts, distance
from raydet.inspection.findings import Findings, add_row_findings, duplicates, same_places
from raydet.inspection.galleries import FirstEpoch
from raydet.inspection.identical import identical_images
from raydet.inspection.inspect import inspect
from raydet.inspection.picks import Picker
from raydet.models.collate import Example
from raydet.models.geometry import ResizeRule
from raydet.tables.schema import LABELLED_COLUMN, OPTIONAL_FIELDS, Category, build_schema
from raydet.tables.table import Table, TableWriter, open_table
from raydet.training.feeding import stream
from raydet.training.feeding.batches import ready_batches
from raydet.training.feeding.chunks import decode_chunk
from raydet.training.feeding.ordering import RunPlan
from raydet.training.feeding.sources import merged
from raydet.training.feeding.views import Views
from tests.json_output import check_result
from tests.reporting.test_reporting import EVIL, Page

Row = dict[str, Any]
Box = tuple[float, float, float, float]

NAMES = ("cat", EVIL, "R&D <b>bold</b>", "never")
TABLES = ("summary", "per_class", "histograms", "co_occurrence", "box_centres", "findings")


def picture_bytes(seed: int, width: int = 120, height: int = 90, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


def image_row(
    image_id: int, boxes: Sequence[tuple[Box, int]], *, size_wh: tuple[int, int] = (120, 90), data: bytes | None = b"x"
) -> Row:
    return {
        "image_id": image_id,
        "image": {"bytes": data, "path": f"pictures/{image_id}.png"},
        "width": size_wh[0],
        "height": size_wh[1],
        "objects": {
            "id": list(range(1, len(boxes) + 1)),
            "bbox": [list(box) for box, _ in boxes],
            "category": [category for _, category in boxes],
            "area": [box[2] * box[3] for box, _ in boxes],
            "iscrowd": [False] * len(boxes),
        },
    }


def write(folder: Path, content: Sequence[Row], names: Sequence[str] = NAMES) -> Table:
    categories = [Category(number + 1, name) for number, name in enumerate(names)]
    with TableWriter(str(folder), build_schema("images", categories), config_hash="x") as writer:
        writer.write_rows(content)
    return open_table(str(folder), "images")


def random_rows(seed: int, num_images: int = 40) -> list[Row]:
    rng = np.random.default_rng(seed)
    content = []
    for image_id in range(num_images):
        sides = np.exp(rng.uniform(-1, 5, (int(rng.integers(6)), 2)))
        boxes = [((float(rng.uniform(0, 300)), 5.0, *side), int(rng.integers(3))) for side in sides.tolist()]
        row = image_row(image_id, boxes, size_wh=(640, int(rng.integers(100, 900))))
        row["objects"]["iscrowd"] = (rng.random(len(boxes)) < 0.2).tolist()
        content.append(row)
    return content


def count(table: Table, batch_rows: int = 4096) -> Counts:
    counts = Counts(len(table.categories))
    for part in rows.stream_rows(table, batch_rows=batch_rows):
        counts.add(part)
    return counts


def found_in(table: Table, model_side_px: int = 256) -> dict[str, list[tuple[int | None, str | None]]]:
    """Return the image ids and classes of the listed findings, by kind."""
    findings = Findings()
    for part in rows.stream_rows(table):
        add_row_findings(findings, part, "data", [category.name for category in table.categories], model_side_px)
    return {kind: [(one.image_id, one.category) for one in cases] for (_, kind), cases in findings.listed.items()}


def page_of(result: Any) -> Page:
    return Page(Path(result.page).read_text("utf-8"))


@pytest.mark.parametrize("batch_rows", [7, 4096])
def test_numbers_are_those_of_counting_one_by_one(tmp_path: Path, batch_rows: int) -> None:
    content = random_rows(3)
    counts = count(write(tmp_path / "t", content), batch_rows)
    boxes: Counter[int] = Counter()
    crowds: Counter[int] = Counter()
    images: Counter[int] = Counter()
    together: Counter[tuple[int, ...]] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    for row in content:
        objects = row["objects"]
        present = sorted(set(objects["category"]))
        images.update(present)
        together.update(itertools.combinations(present, 2))
        for category, area, crowd in zip(objects["category"], objects["area"], objects["iscrowd"], strict=True):
            boxes[category] += 1
            crowds[category] += crowd
            if not crowd:
                sizes[category, 0 if area < 1024 else 1 if area < 9216 else 2] += 1
    assert counts.num_images == 40
    assert counts.num_empty == sum(not row["objects"]["id"] for row in content) > 0
    assert counts.boxes.tolist() == [boxes[index] for index in range(4)]
    assert counts.crowds.tolist() == [crowds[index] for index in range(4)] and counts.crowds.sum() > 0
    assert counts.images.tolist() == [images[index] for index in range(4)]
    assert counts.sizes.tolist() == [[sizes[index, size] for size in range(3)] for index in range(4)]
    found = {(one, other): number for one, other, number in zip(*counts.together(), strict=True)}
    assert found == together
    assert counts.centres.sum(axis=(1, 2)).tolist() == counts.boxes.tolist()
    for quantity in QUANTITIES:
        histogram = counts.histograms[quantity.name]
        assert histogram[-1].sum() == (counts.num_boxes if quantity.of_boxes else counts.num_images)
        assert histogram[:-1].sum(axis=1).tolist() == (counts.boxes if quantity.of_boxes else counts.images).tolist()


def test_values_go_into_the_bin_that_begins_with_them(tmp_path: Path) -> None:
    content = [image_row(1, [((0.0, 0.0, 32.0, 32.0), 0), ((0.0, 0.0, 5000.0, 5000.0), 0)]), image_row(2, [])]
    counts = count(write(tmp_path / "t", content))
    edges = {quantity.name: quantity.edges for quantity in QUANTITIES}
    by_side = dict(zip(edges["box_side_px"], counts.histograms["box_side_px"][-1].tolist(), strict=False))
    assert {side: number for side, number in by_side.items() if number} == {32: 1, 2048: 1}
    assert counts.sizes[0].tolist() == [0, 1, 1]
    # A box larger than its image falls into the last bin of the shares.
    assert counts.histograms["box_side_share"][0][-1] == 1
    per_image = dict(zip(edges["boxes_per_image"], counts.histograms["boxes_per_image"][-1].tolist(), strict=False))
    assert {boxes: number for boxes, number in per_image.items() if number} == {0: 1, 2: 1}


def test_the_centre_of_a_box_is_counted_by_row_and_column(tmp_path: Path) -> None:
    counts = count(write(tmp_path / "t", [image_row(1, [((110.0, 0.0, 10.0, 2.0), 1)])]))
    assert np.argwhere(counts.centres).tolist() == [[1, 0, 23]]


def test_repeated_boxes_and_boxes_in_one_place_as_by_trying_all_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    content = []
    for image_id in range(12):
        base = rng.uniform(5, 60, (6, 4))
        near = base[rng.integers(6, size=14)] * np.where(
            rng.random((14, 4)) < 0.6, 1.0, rng.uniform(0.97, 1.03, (14, 4))
        )
        boxes = [(tuple(box), int(rng.integers(3))) for box in np.concatenate([base, near]).tolist()]
        content.append(image_row(image_id, boxes))
    (part,) = rows.stream_rows(write(tmp_path / "t", content))
    repeated, same = [], set()
    for one, other in itertools.combinations(range(len(part.owners)), 2):
        if part.owners[one] != part.owners[other]:
            continue
        if part.categories[one] == part.categories[other]:
            if (part.boxes_xywh[one] == part.boxes_xywh[other]).all():
                repeated.append(other)
        else:
            a, b = part.boxes_xywh[one], part.boxes_xywh[other]
            sides = [min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
            both = max(sides[0], 0.0) * max(sides[1], 0.0)
            if both >= 0.95 * (a[2] * a[3] + b[2] * b[3] - both):
                same.add((one, other))
    assert duplicates(part).tolist() == sorted(set(repeated)) and repeated
    assert set(zip(*(side.tolist() for side in same_places(part)), strict=True)) == same and len(same) > 5


def test_each_oddity_is_found_and_nothing_else(tmp_path: Path) -> None:
    fine = ((10.0, 10.0, 30.0, 30.0), 0)
    content = [
        image_row(1, [fine, ((50.0, 50.0, 20.0, 20.0), 0)]),
        image_row(2, []),
        image_row(3, [fine, fine]),
        image_row(4, [((1.0, 1.0, 0.5, 0.5), 2)]),
        image_row(5, [((1.0, 1.0, 63.0, 3.0), 2), ((1.0, 40.0, 60.0, 3.0), 2)]),
        image_row(6, [((10.0, 10.0, 40.0, 40.0), 0), ((10.5, 10.0, 40.0, 40.0), 2)]),
        image_row(7, [fine], size_wh=(1025, 10)),
        image_row(8, [fine], size_wh=(1024, 10)),
    ]
    assert found_in(write(tmp_path / "t", content)) == {
        "image_without_boxes": [(2, None)],
        "duplicate_boxes": [(3, "cat")],
        "tiny_boxes": [(4, NAMES[2])],
        "extreme_aspect_ratio": [(5, NAMES[2])],
        "same_place": [(6, "cat")],
        "large_image": [(7, None)],
    }


def test_of_many_cases_all_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    findings = Findings()
    for part in rows.stream_rows(write(tmp_path / "t", [image_row(number, []) for number in range(1200)])):
        add_row_findings(findings, part, "data", NAMES, 256)
    key = ("data", "image_without_boxes")
    assert findings.counts[key] == 1200
    assert [case.image_id for case in findings.listed[key]] == list(range(1000))


def test_a_class_that_is_not_named_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "t", [image_row(1, [((1.0, 1.0, 5.0, 5.0), 4)])])
    with pytest.raises(UserError, match=r"category .*4 categories.*image 1"):
        count(table)


@pytest.mark.parametrize("seed", [0, 1])
def test_picks_do_not_depend_on_batches_and_hold_the_extremes(tmp_path: Path, seed: int) -> None:
    content = random_rows(11, num_images=60)
    table = write(tmp_path / "t", content)
    results = []
    for batch_rows in (5, 4096):
        picker = Picker(seed)
        for part in rows.stream_rows(table, batch_rows=batch_rows):
            picker.add(part)
        results.append(picker.picks(6))
    assert results[0] == results[1] and sorted(results[0]) == [0, 1, 2]
    for category, picks in results[0].items():
        sizes = {
            (position, number): box[2] * box[3]
            for position, row in enumerate(content)
            for number, box in enumerate(row["objects"]["bbox"])
            if row["objects"]["category"][number] == category and not row["objects"]["iscrowd"][number]
        }
        chosen = {pick.kind: sizes[pick.position, pick.number] for pick in picks}
        assert chosen["smallest"] == min(sizes.values()) and chosen["largest"] == max(sizes.values())
        assert chosen["smallest"] < chosen["median"] < chosen["largest"]
        assert len({pick.position for pick in picks}) == len(picks) == 6


def test_another_seed_shows_other_images(tmp_path: Path) -> None:
    table = write(tmp_path / "t", random_rows(11, num_images=60))
    results = []
    for seed in (0, 1):
        picker = Picker(seed)
        for part in rows.stream_rows(table):
            picker.add(part)
        results.append([pick for pick in picker.picks(6)[0] if pick.kind == "random"])
    assert results[0] != results[1]


def test_the_same_bytes_or_path_are_found_in_both_tables(tmp_path: Path) -> None:
    data = [b"one", b"two", b"six", None, None]
    val = [b"six", b"ten", b"one", None]
    first = [image_row(number, [], data=content) for number, content in enumerate(data)]
    second = [image_row(100 + number, [], data=content) for number, content in enumerate(val)]
    first[3]["image"]["path"] = second[3]["image"]["path"] = "/data/the same.png"
    tables = [write(tmp_path / "a", first[:3]), write(tmp_path / "c", first[3:])]
    twins = [*identical_images(tables, write(tmp_path / "b", second))]
    assert [(twin.image_id, twin.val_image_id) for twin in twins] == [(0, 102), (2, 100), (3, 103)]
    assert [twin.table for twin in twins] == [tables[0].uri, tables[0].uri, tables[1].uri]


def test_histograms_lie_as_far_apart_as_their_shares() -> None:
    assert distance(np.array([1, 1, 0]), np.array([2, 2, 0])) == 0
    assert distance(np.array([5, 0]), np.array([0, 7])) == 1
    assert distance(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)
    assert distance(np.array([0, 0]), np.array([1, 1])) is None


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Write thirty images into several files and row groups; many have an unreadable partner.

    Some have crowds, and some are labelled for two classes only.
    """
    content = []
    for number in range(30):
        boxes = [((10.0 + number, 10.0, 60.0, 50.0), number % 3), ((40.0, 20.0, 30.0, 30.0), 1)]
        size_wh = (120 + number, 90)
        row = image_row(1000 + number, boxes, size_wh=size_wh, data=picture_bytes(number, *size_wh))
        row["objects"]["iscrowd"] = [False, number % 4 == 0]
        row[LABELLED_COLUMN] = [0, 1] if number % 5 == 0 else None
        content.append(row)
    content[7]["image"]["bytes"] = b"no image"
    categories = [Category(number + 1, name) for number, name in enumerate(NAMES)]
    folder = tmp_path_factory.mktemp("photographs")
    fields = [pa.field(LABELLED_COLUMN, OPTIONAL_FIELDS["images"][LABELLED_COLUMN])]
    schema = build_schema("images", categories, extra_fields=fields)
    with TableWriter(str(folder), schema, config_hash="x", file_bytes=400_000) as writer:
        for start in range(0, 30, 6):
            writer.write_rows(content[start : start + 6])
            writer.flush()
    return open_table(str(folder), "images")


@pytest.mark.parametrize("sizes", [(), (64, 96, 128)], ids=["one size", "multi_scale"])
@pytest.mark.parametrize("spec", ["none", "flip", "light", "detr", "strong"])
def test_a_page_shows_what_the_first_epoch_trains_on(photographs: Table, spec: Any, sizes: tuple[int, ...]) -> None:
    config = ResolvedTrainConfig(
        train_data=photographs.uri, val_data=photographs.uri, out="-", model="rt_detr_v2_tiny",
        augmentation=spec, batch_size=4, epochs=2, close_mosaic=1, seed=5, shuffle_window_mb=1,
    )  # fmt: skip
    rules = tuple(ResizeRule(mode="fixed", size_hw=(side, side + 32)) for side in sizes)
    view = View.of_training(config, ResizeRule(mode="keep_aspect", limit_hw=(80, 80)), rules)
    plan = RunPlan.of_training(config, photographs, num_val=photographs.num_rows)
    trained: dict[int, Example] = {}
    unreadable: dict[int, str] = {}
    groups = {"train": photographs.row_groups()}
    source = stream.StreamSource(plan, {"train": photographs}, groups, world_size=2, ranks=(0, 1), views=Views(view))
    for segment in plan.segments():
        if segment.kind == "train" and segment.epoch == 0:
            for chunk in stream.read_segment(source, segment):
                for batch in ready_batches(decode_chunk(chunk, view)):
                    trained |= {example.image_id: example for example in batch.examples}
                    unreadable |= batch.unreadable
    shown = {
        row["image_id"]: seen
        for _, row, _, seen in FirstEpoch(table=photographs, plan=plan, view=view).rows(range(photographs.num_rows))
    }
    assert {image_id: seen for image_id, seen in shown.items() if isinstance(seen, str)} == unreadable
    assert unreadable.keys() == {1007} and shown.keys() == {*trained, 1007}
    for image_id, example in trained.items():
        seen = shown[image_id]
        assert not isinstance(seen, str)
        np.testing.assert_array_equal(seen.image, example.image)
        np.testing.assert_array_equal(seen.boxes_cxcywh, example.boxes)
        np.testing.assert_array_equal(seen.categories, example.categories)
    pictures = [seen for seen in shown.values() if not isinstance(seen, str)]
    assert len({seen.image.shape for seen in pictures}) >= len(sizes)
    is_mixed = [len(seen.categories) > 2 for seen in pictures]
    assert any(is_mixed) == (spec == "strong") and not all(is_mixed)


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a table whose names and paths contain markup, with a broken image and a `__rejected` list."""
    folder = tmp_path_factory.mktemp("evil")
    boxes = [((10.0, 10.0, 40.0, 40.0), 0), ((60.0, 20.0, 30.0, 30.0), 1)]
    content = [image_row(number, boxes, data=picture_bytes(number)) for number in range(4)]
    content += [image_row(4, [((1.0, 1.0, 100.0, 80.0), 2)], data=b"no picture"), image_row(5, [])]
    content[0]["image"]["path"] = f'/data/"><img src=x onerror=alert(1)>{EVIL}.png'
    write(folder / "data", content)
    with TableWriter(str(folder / "data" / "__rejected"), build_schema("rejected"), config_hash="x") as writer:
        writer.write_rows([{"path": f"{EVIL}.jpg", "reason": "empty file"}])
    return folder


@pytest.fixture(scope="module")
def inspected(evil: Path) -> Any:
    options: Row = {"augmentation": "flip", "model": "rt_detr_tiny", "image_size": 64}
    return inspect(InspectConfig(data=str(evil / "data"), out=str(evil / "out"), **options))


def test_nothing_of_the_users_becomes_markup(inspected: Any) -> None:
    page = page_of(inspected)
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", "text/plain", None]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not page.all("img") and EVIL in page.text and NAMES[2] in page.text
    assert EVIL not in Path(inspected.page).read_text("utf-8")
    assert page.charts["classes"] == list(NAMES)


def test_pictures_stand_in_pairs_and_a_broken_one_says_why(inspected: Any) -> None:
    page = page_of(inspected)
    links = [str(image["href"]) for image in page.all("image")]
    assert inspected.num_images_shown == 9 and len(links) == 16
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "not an image" in page.text
    assert "120 × 90 px → 2 boxes, 64 × 64 px" in page.text
    for tag, attributes in page.elements:
        assert "src" not in attributes and (tag != "link" or str(attributes["href"]).startswith("data:"))


def test_tables_hold_what_the_page_says(inspected: Any, evil: Path) -> None:
    tables = {}
    for name, kind in zip(
        TABLES,
        ("data_summary", "per_class", "histograms", "co_occurrence", "box_centres", "data_findings"),
        strict=True,
    ):
        tables[name] = open_table(str(evil / "out" / name), kind).read().to_pylist()  # type: ignore[arg-type]
    per_class = {row["category"]: row for row in tables["per_class"]}
    assert [per_class[name]["boxes"] for name in NAMES] == [4, 4, 1, 0]
    assert per_class["never"]["boxes_per_image"] is None and per_class["cat"]["medium_boxes"] == 4
    summary = {row["name"]: row["value"] for row in tables["summary"]}
    assert (summary["images"], summary["boxes"], summary["images_without_boxes"]) == (6, 9, 1)
    assert [(row["first"], row["second"], row["images"]) for row in tables["co_occurrence"]] == [("cat", EVIL, 4)]
    assert sum(row["boxes"] for row in tables["box_centres"]) == 9
    assert {row["kind"] for row in tables["findings"]} == {"rejected", "class_without_boxes", "image_without_boxes"}
    sides = [row for row in tables["histograms"] if row["quantity"] == "box_side_px" and row["category"] == "cat"]
    assert [(row["low"], row["high"], row["count"]) for row in sides] == [(32.0, 48.0, 4)]


def test_findings_of_prepare_are_taken_over_whatever_else_is_in_their_table(evil: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "data", [image_row(1, [((10.0, 10.0, 30.0, 30.0), 0)], data=picture_bytes(1))])
    schema = build_schema("findings", extra_fields=[pa.field("more", pa.int64())])
    with TableWriter(f"{table.uri}/__findings", schema, config_hash="x") as writer:
        writer.write_rows([{"kind": "box cut", "path": "a.png", "image_id": 1, "count": 3}])
        writer.write_rows([{"kind": "stray file", "count": 1, "detail": "b", "more": 2}])
    config = InspectConfig(data=table.uri, out=str(tmp_path / "out"), augmentation="none", num_images=0)
    result = inspect(config)
    assert (result.findings.counts["data", "box cut"], result.findings.counts["data", "stray file"]) == (3, 1)
    assert result.num_images_shown == 0 and "box cut" in page_of(result).text


def test_findings_beside_splits_are_told_of_the_split_whose_images_they_are_about(tmp_path: Path) -> None:
    boxes = [((10.0, 10.0, 30.0, 30.0), 0)]
    for split, first in (("train", 0), ("val", 2)):
        numbers = (first, first + 1)
        write(tmp_path / split, [image_row(number, boxes, data=picture_bytes(number)) for number in numbers])
    with TableWriter(str(tmp_path / "__rejected"), build_schema("rejected"), config_hash="x") as writer:
        writer.write_rows([{"path": "9.jpg", "image_id": 9, "reason": "empty file"}])
    with TableWriter(str(tmp_path / "__findings"), build_schema("findings"), config_hash="x") as writer:
        writer.write_rows([{"kind": "box cut", "image_id": number, "count": number + 1} for number in (0, 1, 3)])
        writer.write_rows([{"kind": "box lost", "image_id": 9, "count": 5}, {"kind": "stray file", "count": 1}])

    def counts(data: str, val: str | None = None) -> dict[tuple[str, str], int]:
        val_data = None if val is None else str(tmp_path / val)
        options: Row = {"out": str(tmp_path / f"out {data} {val}"), "augmentation": "none", "num_images": 0}
        config = InspectConfig(data=str(tmp_path / data), val_data=val_data, **options)
        found = inspect(config).findings.counts
        return {key: found[key] for key in found if key[1] in ("box cut", "box lost", "stray file", "rejected")}

    of_none = {"box lost": 5, "stray file": 1, "rejected": 1}
    left_out = {("data", kind): count for kind, count in of_none.items()}
    assert counts("train") == {("data", "box cut"): 3, **left_out}
    assert counts("val") == {("data", "box cut"): 4, **left_out}
    assert counts("train", "val") == {("data", "box cut"): 3, ("val", "box cut"): 4, **left_out}


def test_two_tables_are_compared_and_a_second_run_takes_the_place_of_the_first(shapes: Path, tmp_path: Path) -> None:
    out, val = str(tmp_path / "out"), tmp_path / "val"
    options: Row = {"data": str(shapes / "train"), "out": out, "augmentation": "none", "num_images": 1}
    shutil.copytree(shapes / "train", val)
    first = inspect(InspectConfig(**options, val_data=str(val)))
    assert check_result(first, "inspect")["counts"]["val"]["num_images"] > 0
    assert first.findings.counts["data", "identical_images"] == 24
    drifts = {
        row["name"]: row["value"]
        for row in open_table(f"{out}/summary", "data_summary").read().to_pylist()
        if row["name"].startswith("drift:")
    }
    assert len(drifts) == 7 and set(drifts.values()) == {0.0}
    assert "Same image in both tables" in page_of(first).text
    with pytest.raises(UserError, match=r"num-images: 1 → 2"):
        inspect(InspectConfig(**options | {"num_images": 2}, val_data=str(val)))
    shutil.rmtree(val)
    shutil.copytree(shapes / "val", val)
    second = inspect(InspectConfig(**options, val_data=str(val)))
    assert ("data", "identical_images") not in second.findings.counts
    assert "Same image in both tables" not in page_of(second).text
    assert open_table(f"{out}/per_class", "per_class").num_rows == 2 * len(second.names)
    assert any(line.startswith("validation: 10 images") for line in second.lines())


def test_several_tables_are_inspected_as_training_mixes_them(tmp_path: Path) -> None:
    """Inspect tables with other orders of their classes and with the same image ids, which one shows more often."""

    def rows_with(categories: tuple[int, ...], first: int, number: int) -> list[Row]:
        boxes = [((10.0 + 30 * place, 10.0, 25.0, 25.0), category) for place, category in enumerate(categories)]
        return [image_row(place, boxes, data=picture_bytes(first + place)) for place in range(number)]

    own = write(tmp_path / "own", rows_with((0, 1), 0, 3), names=("cat", "dog"))
    public = write(tmp_path / "public", [*rows_with((0, 0, 1), 10, 4), image_row(4, [])], names=("Dog", "lorry"))
    recipe = tmp_path / "train.yaml"
    recipe.write_text("{model: rt_detr_tiny, image_size: 64, augmentation: strong, rename_classes: {lorry: truck}}")
    data = [f"{own.uri}:3", f"{public.uri}:0.5"]
    out = str(tmp_path / "out")
    result = inspect(InspectConfig(data=data, val_data=own.uri, out=out, train_config=str(recipe)))
    assert result.names == ("cat", "dog", "truck") and result.num_images_shown == 3 + 6 + 4
    assert result.counts["data"].boxes.tolist() == [3, 11, 4] and result.counts["val"].boxes.tolist() == [3, 3]
    of_own, of_public = check_result(result, "inspect")["sources"]
    assert (of_own["weight"], of_own["num_images"], of_own["images_per_epoch"]) == (3, 3, 9)
    assert (of_public["num_boxes"], of_public["boxes_per_epoch"]) == ([0, 8, 4], [0, 4, 2])
    assert {"12 images per epoch, of 8 images:", "  dog: 13 = 9 + 4"} <= set(result.lines())
    found = [row for row in open_table(f"{out}/findings", "data_findings").read().to_pylist() if row["image_id"] == 0]
    assert [(row["kind"], row["table"]) for row in found] == [("identical_images", own.uri)]
    page = page_of(result)
    assert "8 (4)" in page.text and "weight 0.5" in page.text and f"in {public.uri}" in page.text
    mixture = merged([own, public], [1.0, 1.0], {})
    shown = [(at, row["image_id"].as_py(), row["objects"]["category"].as_py()) for at, row in mixture.rows_at([4, 2])]
    assert shown == [(2, 2, [0, 1]), (4, 1, [1, 1, 2])]


def test_images_without_labels_have_a_page_too(tmp_path: Path) -> None:
    table = write(
        tmp_path / "data", [image_row(number, [], data=picture_bytes(number)) for number in range(3)], names=()
    )
    result = inspect(InspectConfig(data=table.uri, out=str(tmp_path / "out"), augmentation="none"))
    assert "3 images with 0 boxes of 0 classes" in page_of(result).text
    assert result.lines()[0] == "3 images, 0 boxes, 0 classes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "{tmp}/absent"], "absent"),
        (["--data", "{tmp}"], "{tmp}"),
        (["--data", "{tmp}/empty"], "empty has no rows"),
        (["--data", "{data}", "{data}:0.5"], "twice; use a weight"),
        (["--data", "{data}:0"], ":0: the weight must be above 0"),
        (["--data", "{data}", "--val-data", "{tmp}/absent"], "absent"),
        (["--data", "{data}", "--augmentation", "[{{HorizontalFlop: {{}}}}]"], "HorizontalFlip"),
        (["--data", "{data}", "--augmentation", "lite"], "--augmentation"),
        (["--data", "{data}", "--train-config", "{tmp}/absent.yaml"], "absent.yaml"),
        (["--data", "{data}", "--train-config", "{tmp}/wrong.yaml"], "`epoch`"),
        (["--data", "{data}", "--model", "nothing"], "nothing"),
        (["--data", "{data}", "--num-images", "-1"], "--num-images"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    write(tmp_path / "empty", [])
    (tmp_path / "wrong.yaml").write_text("epoch: 3\n")
    options = [option.format(tmp=tmp_path, data=evil / "data") for option in options]
    assert main(["inspect", *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message.replace("{tmp}", str(tmp_path)) in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(evil: Path, tmp_path: Path) -> None:
    (tmp_path / "per_class").mkdir()
    (tmp_path / "per_class" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"did not write.*per_class/notes\.txt"):
        inspect(InspectConfig(data=str(evil / "data"), out=str(tmp_path)))
    with pytest.raises(UserError, match=r"notes\.txt.*--out"):
        inspect(InspectConfig(data=str(evil / "data"), out=str(tmp_path / "per_class" / "notes.txt")))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]


def test_the_recipe_says_what_the_pictures_follow(evil: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "train.yaml"
    recipe.write_text("model: rt_detr_tiny\nimage_size: 96\naugmentation: [{HorizontalFlip: {p: 1.0}}]\nseed: 3\n")
    arguments = ["--data", str(evil / "data"), "--out", str(tmp_path / "out"), "--train-config", str(recipe)]
    assert main(["inspect", *arguments]) == 0
    page = Page((tmp_path / "out" / "inspect.html").read_text("utf-8"))
    assert "→ 2 boxes, 96 × 96 px" in page.text and "HorizontalFlip" in page.text
    printed = capsys.readouterr().out
    assert "6 images, 9 boxes, 4 classes" in printed and "Class without boxes" in printed


@pytest.mark.timeout(60)
def test_the_job_hands_its_options_on(tmp_path: Path) -> None:
    job = Path(__file__).parents[2] / "jobs" / "inspect_data.py"
    command = [sys.executable, str(job), "--data", "absent", "--wrong", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
    assert run.returncode == 2 and "--wrong" in run.stderr


@pytest.mark.slow
def test_a_page_of_many_classes_stays_below_ten_megabytes(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(80)]
    pictures = [picture_bytes(number, 480, 480, "JPEG") for number in range(8)]
    content = [
        image_row(number, [((20.0, 20.0, 30.0 + number % 7, 60.0), number % 80)], size_wh=(480, 480), data=data)
        for number, data in enumerate(itertools.islice(itertools.cycle(pictures), 160))
    ]
    table = write(tmp_path / "data", content, names)
    result = inspect(InspectConfig(data=table.uri, out=str(tmp_path / "out"), augmentation="flip", image_size=320))
    # Noise takes the most bytes: not even every class has an image, and the page says so.
    assert result.num_bytes < 10e6 and 80 > result.num_images_shown > 10
    assert "of 80 classes have images" in page_of(result).text
