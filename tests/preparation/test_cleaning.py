import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydet.common.errors import UserError
from raydet.config import PrepareCocoConfig, PrepareImagesConfig
from raydet.preparation.prepare import prepare_coco, prepare_images
from raydet.preparation.report import PrepareReport
from raydet.preparation.sources.fitting import CLIPPED, OUTSIDE, REPEATED_DROPPED, REPEATED_KEPT, fit_objects
from raydet.preparation.sources.source import SourceObjects
from tests.small_sets import annotation, rows_of, save_coco, save_image


def prepare(folder: Path, annotations: str, out: Path, **options: Any) -> PrepareReport:
    return prepare_coco(PrepareCocoConfig(annotations=annotations, images=str(folder), out=str(out), **options))


def findings_of(out: Path) -> list[dict[str, Any]]:
    return rows_of(out / "__findings", "findings")


def test_all_findings_are_listed_with_their_position(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for seed, name in enumerate(["a.png", "b.png", "wrong size.png"]):
        save_image(folder / name, seed=seed)
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    names = ["a.png", "b.png", "wrong size.png", "copy.png", "broken.png", "missing.png"]
    images = [{"id": number, "file_name": name, "width": 40, "height": 30} for number, name in enumerate(names)]
    images[2] |= {"width": 41}
    annotations = [
        annotation(1, [5, 5, 10, 10], 0),
        annotation(2, [35, 5, 10, 10], 0),  # clipped
        annotation(3, [50, 5, 10, 10], 0),  # outside
        annotation(4, [5, 5, 0, 10], 0),  # no area
        annotation(5, [5.001, 5, 10, 10], 0),  # repeats the first box
        annotation(6, [1, 2, 3, 4], 77),  # unknown image
        annotation(7, [1, 2, 3, 4], 0) | {"category_id": 78},
        annotation(8, [1, 2, 3, 4], 2),
        annotation(9, [1, 2, 3, 4], 4),  # its image is rejected
    ]
    report = prepare(folder, save_coco(tmp_path, images, annotations), tmp_path / "out")
    assert (report.found, report.accepted, report.rejected) == (6, 4, 2)
    assert (report.clipped, report.dropped, report.outside, report.duplicate_boxes) == (1, 2, 1, 1)
    assert (report.duplicate_images, report.size_mismatches, report.without_boxes) == (1, 1, 2)
    assert rows_of(tmp_path / "out")[0]["objects"]["id"] == [1, 2, 5]
    assert [(row["path"], row["image_id"]) for row in rows_of(tmp_path / "out" / "__rejected", "rejected")] == [
        ("broken.png", 4),
        ("missing.png", 5),
    ]
    found = findings_of(tmp_path / "out")
    places = {(row["kind"], row["path"], row["image_id"], row["annotation_id"]) for row in found}
    assert places == {
        ("annotations of an unknown image, dropped", None, None, 6),
        ("annotations of an unknown category, dropped", "a.png", 0, 7),
        ("boxes clipped to their image", "a.png", 0, 2),
        ("boxes outside their image, dropped", "a.png", 0, 3),
        ("boxes without area, dropped", "a.png", 0, 4),
        ("boxes that repeat another of their class, kept", "a.png", 0, 5),
        ("boxes of rejected images, dropped", "broken.png", 4, None),
        ("images without boxes", "b.png", 1, None),
        ("images without boxes", "copy.png", 3, None),
        ("images whose size differs from the annotations", "wrong size.png", 2, None),
        ("images with the same content as an earlier one, kept", "copy.png", 3, None),
    }
    assert all(row["count"] == 1 for row in found)
    details = {(row["kind"].split(",")[0], row["image_id"]): row["detail"] for row in found}
    assert details["boxes clipped to their image", 0] == "35, 5, 10, 10 in 40 × 30"
    assert details["images whose size differs from the annotations", 2] == "annotations: 41 × 30, file: 40 × 30"
    assert details["images with the same content as an earlier one", 3] == "the same as a.png, image 0"
    lines = report.lines()
    assert f"findings, listed in {tmp_path}/out/__findings:" in lines
    assert (
        "  boxes outside their image, dropped: 1" in lines and "  annotations of an unknown image, dropped: 1" in lines
    )


def test_duplicates_can_be_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    save_image(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    images = [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}]
    boxes = [annotation(1, [1, 1, 5, 5], 7), annotation(2, [1, 1, 5, 5], 7), annotation(3, [2, 2, 5, 5], 3)]
    annotations = save_coco(tmp_path, images, boxes)
    report = prepare(folder, annotations, tmp_path / "out", duplicate_images="drop", duplicate_boxes="drop")
    assert (report.found, report.accepted, report.rejected) == (2, 1, 1)
    assert (report.duplicate_images, report.duplicate_boxes, report.boxes) == (1, 1, 1)
    (row,) = rows_of(tmp_path / "out")
    assert row["image_id"] == 7 and row["objects"]["id"] == [1]
    (rejected,) = rows_of(tmp_path / "out" / "__rejected", "rejected")
    assert rejected == {"path": "a.png", "image_id": 3, "reason": "the same content as an earlier image"}
    kinds = {row["kind"]: row["detail"] for row in findings_of(tmp_path / "out")}
    assert kinds["images with the same content as an earlier one, dropped"] == "the same as b.png, image 7"
    assert kinds["boxes that repeat another of their class, dropped"] == "1, 1, 5, 5 in 40 × 30"


def test_boxes_repeat_each_other_only_within_their_class_and_crowd_flag() -> None:
    objects = SourceObjects(
        ids=[1, 2, 3, 4, 5, 6],
        boxes_xywh=[(1, 1, 5, 5), (1, 1, 5, 5), (1, 1, 5, 5), (1.004, 1, 5, 5), (1.02, 1, 5, 5), (90, 1, 5, 5)],
        categories=[0, 1, 0, 0, 0, 0],
        areas=[25.0] * 6,
        iscrowd=[False, False, True, False, False, False],
    )
    kept = fit_objects(objects, (50, 50))
    assert kept.objects["id"] == [1, 2, 3, 4, 5]
    assert [number for number, _ in kept.findings[REPEATED_KEPT]] == [4]
    dropped = fit_objects(objects, (50, 50), drop_duplicates=True)
    assert dropped.objects["id"] == [1, 2, 3, 5]
    assert [number for number, _ in dropped.findings[REPEATED_DROPPED]] == [4]
    assert [number for number, _ in dropped.findings[OUTSIDE]] == [6]


STATES = st.sampled_from(["ok", "ok", "copy", "rotated", "missing", "empty", "truncated", "outside"])
NUMBERS = st.one_of(st.integers(-20, 60), st.just(float("nan")), st.just(0.0), st.none())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    states=st.lists(STATES, min_size=1, max_size=7),
    boxes=st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([5, 6, 9]), st.lists(NUMBERS, min_size=4, max_size=4)), max_size=12
    ),
    duplicates=st.sampled_from(["keep", "drop"]),
    val_fraction=st.sampled_from([None, 0.3]),
    storage=st.sampled_from(["inline", "reference"]),
)
def test_random_defects_are_all_accounted_for(
    tmp_path: Path,
    states: list[str],
    boxes: list[tuple[int, int, list[float | None]]],
    duplicates: str,
    val_fraction: float | None,
    storage: str,
) -> None:
    shutil.rmtree(tmp_path / "case", ignore_errors=True)
    folder, out = tmp_path / "case" / "images", tmp_path / "case" / "out"
    folder.mkdir(parents=True)
    for rank, state in enumerate(states):
        name = f"{'../' if state == 'outside' else ''}{rank}.png"
        save_image(folder / name, orientation=6 if state == "rotated" else 1, seed=0 if state == "copy" else rank + 1)
        data = (folder / name).read_bytes()
        if state == "missing":
            (folder / name).unlink()
        elif state in ("empty", "truncated"):
            (folder / name).write_bytes({"empty": b"", "truncated": data[:200]}[state])
    images = [
        {"id": rank, "file_name": f"{'../' if state == 'outside' else ''}{rank}.png", "width": 40, "height": 30}
        for rank, state in enumerate(states)
    ]
    annotations = [
        {"id": rank + 1, "image_id": image_id, "category_id": category, "bbox": bbox}
        for rank, (image_id, category, bbox) in enumerate(boxes)
    ]
    readable = [rank for rank, state in enumerate(states) if state in ("ok", "rotated", "copy")]
    contents = {rank: -1 if states[rank] == "copy" else rank for rank in readable}
    path = save_coco(tmp_path / "case", images, annotations, categories=(5, 6))
    options = {"duplicate_images": duplicates, "duplicate_boxes": duplicates, "image_storage": storage}
    if not readable or (val_fraction and len(set(contents.values())) < 2):
        with pytest.raises(UserError, match=r"none of the|two different images"):
            prepare(folder, path, out, val_fraction=val_fraction, **options)
        assert not out.exists()
        return
    report = prepare(folder, path, out, val_fraction=val_fraction, **options)
    copies = max(0, states.count("copy") - 1)
    assert report.duplicate_images == copies
    assert report.found == report.accepted + report.rejected == len(states)
    assert report.accepted == len(readable) - (copies if duplicates == "drop" else 0)
    tables = [rows_of(uri) for uri in report.tables.values()] or [rows_of(out)]
    rows = [row for table in tables for row in table]
    rejected = rows_of(out / "__rejected", "rejected")
    assert len(rows) == report.accepted and len(rejected) == report.rejected
    assert sorted([row["image_id"] for row in rows + rejected]) == list(range(len(states)))
    accepted = {row["image_id"] for row in rows}
    assert accepted <= set(readable)
    for table in tables:
        assert [row["image_id"] for row in table] == sorted(row["image_id"] for row in table)
    if val_fraction:
        train, val = ({contents[row["image_id"]] for row in table} for table in tables)
        assert train and val and not train & val
    kinds: Counter[str] = Counter()
    for row in findings_of(out):
        kinds[row["kind"]] += row["count"]
    known = [item for item in boxes if item[0] in accepted and item[1] != 9]
    left_out = report.dropped + (report.duplicate_boxes if duplicates == "drop" else 0)
    assert report.boxes + left_out == len(known)
    lost = [item for item in boxes if item[0] < len(states) and item[0] not in accepted and item[1] != 9]
    assert kinds["boxes of rejected images, dropped"] == len(lost)
    assert report.boxes == sum(len(row["objects"]["id"]) for row in rows) == sum(report.boxes_by_class.values())
    assert kinds["boxes outside their image, dropped"] == report.outside
    assert kinds["boxes without area, dropped"] == report.dropped - report.outside
    assert kinds["images without boxes"] == report.without_boxes
    assert kinds["annotations of an unknown image, dropped"] == sum(item[0] >= len(states) for item in boxes)
    assert kinds["annotations of an unknown category, dropped"] == sum(
        item[1] == 9 and item[0] < len(states) for item in boxes
    )


def test_images_without_labels_are_not_said_to_lack_them(tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a.png")
    report = prepare_images(PrepareImagesConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out")))
    assert not findings_of(tmp_path / "out") and not [line for line in report.lines() if "findings" in line]


@pytest.mark.parametrize("seed", range(3))
def test_fitting_many_boxes_gives_what_fitting_each_alone_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = [tuple(box) for box in rng.uniform(-20, 60, (200, 4)).tolist()]
    objects = SourceObjects(
        ids=list(range(1, 201)),
        boxes_xywh=boxes,
        categories=rng.integers(0, 3, 200).tolist(),
        areas=rng.uniform(0, 900, 200).tolist(),
        iscrowd=rng.integers(0, 2, 200).astype(bool).tolist(),
    )
    together = fit_objects(objects, (40, 50))
    singly = [
        fit_objects(SourceObjects([i], [b], [c], [a], [w]), (40, 50))
        for i, b, c, a, w in zip(
            objects.ids, objects.boxes_xywh, objects.categories, objects.areas, objects.iscrowd, strict=True
        )
    ]
    for key, values in together.objects.items():
        assert values == [value for one in singly for value in one.objects[key]]
    assert together.findings[CLIPPED] and together.findings[OUTSIDE]
    for kind, cases in together.findings.items():
        assert cases == [case for one in singly for case in one.findings.get(kind, [])]
