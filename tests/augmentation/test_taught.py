"""Teachers' boxes go through the augmentation like labels, and keep their class scores."""

from typing import Any

import numpy as np
import pytest

from raydet.augmentation.taught import Taught
from raydet.augmentation.view import SeenImage, View
from raydet.config import AugmentationSpec
from tests.augmentation.test_transforms import SPECS
from tests.augmentation.test_view import RULE, row_of_colours


def _taught_row(image_id: int, weights: tuple[float, ...] = (1.0,), owners: tuple[int, ...] = (0, 0, 0)) -> Any:
    """Build a row whose teachers found exactly its labels, each with a class score that names image and class."""
    row = row_of_colours((120, 160), image_id=image_id)
    scores = np.zeros((3, 4), np.float16)
    scores[np.arange(3), [0, 1, 2]] = 0.5
    scores[:, 3] = image_id / 64
    row["teacher"] = {
        "bbox": np.array(row["objects"]["bbox"]),
        "class_scores": scores.reshape(-1),
        "owner": np.array(owners),
        "weights": np.array(weights, np.float32),
        "known": np.ones(4 * len(weights), bool),
    }
    return row


def _seen(row: dict[str, Any], spec: AugmentationSpec, epoch: int) -> SeenImage:
    return View(resize_rule=RULE, augmentation=spec, seed=3).augmented(row, epoch=epoch, resize_rule=RULE)


def _taught(seen: SeenImage) -> Taught:
    assert seen.taught is not None
    return seen.taught


@pytest.mark.parametrize("spec", [*SPECS, "rtdetr", "dfine", "detr"], ids=str)
def test_boxes_of_a_teacher_that_found_the_labels_stay_on_them(spec: AugmentationSpec) -> None:
    num_mixed = 0
    for epoch in range(12):
        row = _taught_row(1)
        if spec == "strong":
            row |= {"mosaic": [_taught_row(number) for number in (2, 3, 4)], "mixup": [_taught_row(5)]}
        seen = _seen(row, spec, epoch)
        taught = _taught(seen)
        classes = taught.class_scores[:, :3].argmax(axis=1)
        sources = np.rint(taught.class_scores[:, 3].astype(float) * 64)
        assert set(sources.tolist()) <= {1, 2, 3, 4, 5} and (taught.weights == [1.0]).all()
        num_mixed += len(set(sources.tolist())) > 1
        # Of copies of small objects, which only labels have, the rest of the labels remains.
        labels = {(*box.tolist(), int(one)) for box, one in zip(seen.boxes_cxcywh, seen.categories, strict=True)}
        found = {(*box.tolist(), int(one)) for box, one in zip(taught.boxes_cxcywh, classes, strict=True)}
        assert found <= labels and (spec == "strong" or found == labels)
        assert len(found) >= len(labels) - 8
    assert num_mixed > 0 or spec != "strong"


def test_the_labels_of_an_image_with_a_teacher_are_as_without() -> None:
    for epoch in range(6):
        row = _taught_row(1)
        alone = {name: value for name, value in row.items() if name != "teacher"}
        for spec in ("none", "flip"):
            one, other = _seen(row, spec, epoch), _seen(alone, spec, epoch)
            np.testing.assert_array_equal(one.planes, other.planes)
            np.testing.assert_array_equal(one.boxes_cxcywh, other.boxes_cxcywh)
            np.testing.assert_array_equal(one.categories, other.categories)
            assert other.taught is None


def test_a_teacher_counts_only_where_it_has_scored_all_images_that_are_mixed() -> None:
    both = (0.5, 2.0)
    row = _taught_row(1, both, (0, 1, 1))
    row |= {"mosaic": [_taught_row(2, (0.0, 2.0), (1, 1, 1)), _taught_row(3, both, (0, 0, 1))], "mixup": []}
    taught = _taught(_seen(row, "strong", 0))
    assert taught.weights.tolist() == [0.0, 2.0] and set(taught.owners.tolist()) == {1}
    del row["mosaic"][0]["teacher"]
    assert _seen(row, "strong", 0).taught is None


def test_a_teacher_that_found_nothing_has_still_seen_the_image() -> None:
    row = _taught_row(1)
    row["teacher"] |= {"bbox": np.zeros((0, 4)), "class_scores": np.zeros(0, np.float16), "owner": np.zeros(0, int)}
    for spec in ("none", "strong"):
        taught = _taught(_seen(row, spec, 0))
        assert taught.class_scores.shape == (0, 4) and taught.boxes_cxcywh.shape == (0, 4)
        assert taught.weights.tolist() == [1.0] and taught.known.shape == (1, 4)
