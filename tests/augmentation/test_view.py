"""The view of an image in training: what is shrunk, what is left alone, and boxes that stay on their objects."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydet.augmentation.samples import WorkingSize, sample_of
from raydet.augmentation.transforms import Augmenter
from raydet.augmentation.view import SeenImage, View, augmentation_seed, decoded
from raydet.config import AugmentationSpec
from raydet.models.geometry import ResizeRule, resize
from tests.augmentation.test_transforms import SPECS

SIDE = 64
RULE = ResizeRule(mode="fixed", size_hw=(SIDE, SIDE))
COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250))


def row_of_colours(size_hw: tuple[int, int], *, image_id: int = 7, encoding: str = "JPEG") -> dict[str, Any]:
    """Build a row whose three objects have the colour of their class, over thirds of the width."""
    height, width = size_hw
    boxes = [[width * (0.04 + 0.33 * column), height * (0.1 + 0.2 * column), width * 0.22, height * 0.35]
             for column in range(3)]  # fmt: skip
    pixels = np.full((height, width, 3), 90, np.uint8)
    for (x, y, w, h), colour in zip(boxes, COLOURS, strict=True):
        pixels[round(y) : round(y + h), round(x) : round(x + w)] = colour
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, encoding, **({"quality": 95, "subsampling": 0} if encoding == "JPEG" else {}))
    objects = {
        "id": [1, 2, 3],
        "bbox": boxes,
        "category": [0, 1, 2],
        "area": [w * h for _, _, w, h in boxes],
        "iscrowd": [False] * 3,
    }
    image = {"bytes": stream.getvalue(), "path": "a"}
    return {"image_id": image_id, "image": image, "height": height, "width": width, "objects": objects}


def _seen(row: dict[str, Any], spec: AugmentationSpec, *, rule: ResizeRule = RULE, epoch: int = 0) -> SeenImage:
    return View(resize_rule=RULE, augmentation=spec).augmented(row, epoch=epoch, resize_rule=rule)


@pytest.mark.parametrize("size_hw", [(50, 70), (300, 401), (1203, 905)])
def test_without_augmentation_training_sees_what_validation_sees(size_hw: tuple[int, int]) -> None:
    row, view = row_of_colours(size_hw), View(resize_rule=RULE)
    seen, plain = view.augmented(row, epoch=0, resize_rule=RULE), view.plain(row)
    np.testing.assert_array_equal(seen.planes, plain.planes)
    assert seen.original_size_hw == plain.original_size_hw == size_hw
    np.testing.assert_allclose(seen.boxes_cxcywh[:, 0], [0.15, 0.48, 0.81], rtol=1e-6)


@pytest.mark.parametrize("spec", ["flip", "light", "detr", "strong"])
def test_images_below_the_working_size_are_left_as_they_are(spec: AugmentationSpec) -> None:
    for number in range(8):
        row = row_of_colours((96, 120), image_id=number)
        image, _ = decoded(row["image"]["bytes"], max_pixels=10**6)
        sample = Augmenter(spec)(sample_of(image, row), seed=augmentation_seed(0, 0, number))
        seen = _seen(row, spec)
        np.testing.assert_array_equal(seen.image, resize(sample.image, (SIDE, SIDE), RULE.resample))
        assert seen.categories.tolist() == sample.categories.tolist()


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(90, 900),
    width=st.integers(90, 900),
    encoding=st.sampled_from(["JPEG", "PNG"]),
    spec=st.sampled_from(SPECS),
    image_id=st.integers(0, 2**40),
)
def test_objects_keep_their_class_and_place_whatever_is_shrunk(
    height: int, width: int, encoding: str, spec: AugmentationSpec, image_id: int
) -> None:
    row = row_of_colours((height, width), image_id=image_id, encoding=encoding)
    others = [row_of_colours((width, height), image_id=number) for number in range(4)]
    seen = _seen(row | {"mosaic": others[:3], "mixup": []}, spec)
    again = _seen(row | {"mosaic": others[:3], "mixup": []}, spec)
    np.testing.assert_array_equal(seen.planes, again.planes)
    assert seen.original_size_hw == (height, width)
    channels: dict[int, int] = {}
    for (x, y, w, h), category in zip(seen.boxes_cxcywh.tolist(), seen.categories.tolist(), strict=True):
        assert x - w / 2 >= -1e-6 and x + w / 2 <= 1 + 1e-6 and y - h / 2 >= -1e-6 and y + h / 2 <= 1 + 1e-6
        if min(w, h) * SIDE < 4:
            continue
        centre = seen.image[min(int(y * SIDE), SIDE - 1), min(int(x * SIDE), SIDE - 1)].astype(int)
        channel = channels.setdefault(category, int(centre.argmax()))
        assert centre.argmax() == channel and (channel == category or spec in ("rtdetr", "dfine"))
    assert len(set(channels.values())) == len(channels)


@pytest.mark.parametrize(("size_hw", "reduced_hw"), [((801, 1203), (101, 151)), ((400, 390), (100, 98))])
def test_boxes_in_a_jpeg_decoded_at_reduced_scale_are_exact(
    size_hw: tuple[int, int], reduced_hw: tuple[int, int]
) -> None:
    """The last pixel of a reduced side covers less of the source: the scale is the reduction, not the ratio."""
    row = row_of_colours(size_hw)
    part = round(size_hw[0] / reduced_hw[0])
    image, _ = decoded(row["image"]["bytes"], max_pixels=10**6, reduce_to=WorkingSize(RULE).least_hw)
    assert image.shape[:2] == reduced_hw
    for number in range(4):
        seen = _seen(row | {"image_id": number}, "flip")
        boxes = np.array(row["objects"]["bbox"]) / part / np.array(reduced_hw[::-1] * 2)
        centres = boxes[:, :2] + boxes[:, 2:] / 2
        is_mirrored = seen.boxes_cxcywh[0, 0] > 0.5
        centres[:, 0] = 1 - centres[:, 0] if is_mirrored else centres[:, 0]
        np.testing.assert_allclose(seen.boxes_cxcywh[:, :2], centres, atol=1e-6)
        np.testing.assert_allclose(seen.boxes_cxcywh[:, 2:], boxes[:, 2:], atol=1e-6)


def test_the_same_boxes_are_dropped_as_at_full_size() -> None:
    """An object of 26 pixels' area in a large image is kept, one of 24 dropped, as the Hugging Face guide does."""
    row = row_of_colours((640, 640))
    row["objects"] |= {"bbox": [[10, 10, 6.5, 4], [100, 100, 6, 4], [300, 300, 200, 200]]}
    for spec in ("light", [{"HorizontalFlip": None}]):
        seen = [_seen(row | {"image_id": number}, spec) for number in range(6)]
        assert all(one.categories.tolist() == [0, 2] for one in seen)


def test_the_augmentation_does_not_depend_on_the_size_of_the_step() -> None:
    rules = tuple(ResizeRule(mode="fixed", size_hw=(side, side)) for side in (48, 64, 96))
    view = View(resize_rule=RULE, augmentation="rtdetr", step_resize_rules=rules)
    for number in range(5):
        seen = [
            view.augmented(row_of_colours((700, 500), image_id=number), epoch=0, resize_rule=rule) for rule in rules
        ]
        for one in seen[1:]:
            np.testing.assert_array_equal(one.boxes_cxcywh, seen[0].boxes_cxcywh)


def test_partners_are_limited_by_the_pixels_that_they_hold() -> None:
    row = row_of_colours((700, 500))
    partners = [row_of_colours((700, 500), image_id=number) for number in range(3)]
    view = View(resize_rule=RULE, augmentation="strong", max_pixels=400_000)
    assert len(view._readable(partners, view._working_size(0), {}, first=1)) == 3
    assert len(view._readable(partners, None, {}, first=1)) == 1
    partners[1]["image"] = {"bytes": b"broken", "path": "a"}
    assert len(view._readable(partners, view._working_size(0), {}, first=1)) == 2
    assert view.augmented(row | {"mosaic": partners}, epoch=0, resize_rule=RULE).planes.shape == (3, SIDE, SIDE)
