"""The transforms of the families' recipes move boxes with their pixels, and choose what their sources choose."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from raydet.augmentation.families import ZoomAndCrop, photometric
from raydet.augmentation.samples import Sample, WorkingSize
from raydet.models.geometry import ResizeRule
from tests.augmentation.test_mixing import _assert_paired, _corners, _extent, _sample

BOXES: list[list[float]] = [[10, 12, 44, 30], [70, 10, 40, 40], [20, 60, 30, 35], [64, 58, 50, 38]]
SQUARE = ResizeRule(mode="fixed", size_hw=(64, 64))
BY_EDGES = ResizeRule(mode="keep_aspect", shortest=48, longest=90)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rule=st.sampled_from([None, SQUARE, BY_EDGES]))
def test_zoom_out_and_crop_keep_boxes_on_their_pixels(seed: int, rule: ResizeRule | None) -> None:
    sample = _sample((100, 120), BOXES)
    working_size = WorkingSize(rule) if rule else None
    result = ZoomAndCrop(working_size)(sample, np.random.default_rng(seed))
    _assert_paired(result)
    assert result.boxes_xywh.min(initial=1) >= 0
    assert (_corners(result.boxes_xywh)[:, 2:] <= result.size_hw[::-1]).all()
    for number, corners in zip(result.ids, _corners(result.boxes_xywh), strict=True):
        if (corners[2:] - corners[:2]).min() > 8:  # narrow boxes have no pixel of their pure colour
            np.testing.assert_allclose(_extent(result.image, number), corners, atol=1.5)
    if working_size:
        # No more pixels than the model needs, whatever the size of the canvas.
        needed_hw = working_size.least_hw(result.size_hw)
        assert max(needed / side for needed, side in zip(needed_hw, result.size_hw, strict=True)) > 0.7


@pytest.mark.slow
def test_zoom_out_and_crop_choose_as_torchvision_does() -> None:
    """Shares of images left alone, sides of the result, and boxes kept, over 250 images each."""
    theirs = v2.Compose(
        [
            v2.RandomZoomOut(fill=0),
            v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )
    sample, step, rng = _sample((100, 120), BOXES), ZoomAndCrop(None), np.random.default_rng(0)
    boxes = tv_tensors.BoundingBoxes(sample.boxes_xywh, format="XYWH", canvas_size=sample.size_hw)
    pixels, labels = tv_tensors.Image(torch.zeros(3, *sample.size_hw)), torch.arange(len(BOXES))
    torch.manual_seed(0)
    seen: dict[str, list[tuple[float, ...]]] = {"ours": [], "theirs": []}
    for _ in range(250):
        result = step(sample, rng)
        seen["ours"].append(_facts(result.size_hw, result.boxes_xywh))
        output = theirs({"image": pixels, "boxes": boxes, "labels": labels})
        seen["theirs"].append(_facts(tuple(output["image"].shape[1:]), output["boxes"].numpy()))
    ours, expected = (np.array(seen[name]) for name in ("ours", "theirs"))
    # Four standard errors of the difference between two means.
    margin = 4 * np.sqrt((ours.var(axis=0) + expected.var(axis=0)) / len(ours))
    np.testing.assert_array_less(np.abs(ours.mean(axis=0) - expected.mean(axis=0)), margin)


def _facts(size_hw: tuple[int, ...], boxes_xywh: npt.NDArray[np.float64]) -> tuple[float, ...]:
    height, width = size_hw
    share = boxes_xywh[:, 2:].prod(axis=1).sum() / (height * width)
    return size_hw == (100, 120), np.log(height), np.log(width / height), len(boxes_xywh), share


def test_zoom_out_and_crop_without_boxes_and_with_crowds() -> None:
    """A crowd is no reason for a crop; without other boxes the image is only zoomed out, as in torchvision."""
    sample = _sample((100, 120), BOXES)
    crowd = dataclasses.replace(sample, iscrowd=np.ones(len(BOXES), bool))
    for seed in range(20):
        result = ZoomAndCrop(None)(crowd, np.random.default_rng(seed))
        assert min(result.size_hw) >= 100 and len(result.ids) == len(BOXES)


def test_objects_of_less_than_a_pixel_of_the_model_are_dropped() -> None:
    sample = _sample((640, 640), [[100, 100, 9, 300], [300, 100, 200, 300]])
    step = ZoomAndCrop(WorkingSize(SQUARE))
    results = [step(sample, np.random.default_rng(seed)) for seed in range(30)]
    for result in results:
        assert (result.boxes_xywh[:, 2:] * 64 / np.array(result.size_hw[::-1]) >= 1 - 1e-9).all()
    # 0.9 pixels of the model's size in the whole image, more in a crop.
    assert any(1 in result.ids for result in results)
    assert any(1 not in result.ids and 2 in result.ids for result in results)


@pytest.mark.parametrize("grey", [False, True])
def test_colours_are_distorted_as_much_as_by_torchvision(grey: bool) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    if grey:
        image[:] = image[..., :1]
    sample = dataclasses.replace(_sample((24, 24), [[2, 2, 10, 10]]), image=image)
    theirs, source = v2.RandomPhotometricDistort(), torch.from_numpy(image).permute(2, 0, 1)
    torch.manual_seed(0)
    ours, expected = [], []
    for _ in range(150):
        result = photometric(sample, rng)
        assert result.image.dtype == np.uint8 and result.boxes_xywh is sample.boxes_xywh
        ours.append(_change(image, result.image))
        expected.append(_change(image, theirs(source).permute(1, 2, 0).numpy()))
    margin = 4 * np.sqrt((np.var(ours, axis=0) + np.var(expected, axis=0)) / len(ours)) + 0.25
    np.testing.assert_array_less(np.abs(np.mean(ours, axis=0) - np.mean(expected, axis=0)), margin)


def _change(before: npt.NDArray[np.uint8], after: npt.NDArray[np.uint8]) -> tuple[float, ...]:
    """Return the mean change, the mean value, the contrast, and the mean difference between two channels."""
    changed, values = np.abs(after.astype(float) - before).mean(), after.astype(float)
    return changed, values.mean(), values.std(), np.abs(values[..., 0] - values[..., 1]).mean()


def test_distorted_samples_leave_their_source_alone() -> None:
    sample: Sample = _sample((20, 30), [[2, 2, 9, 9]])
    sample.image.setflags(write=False)
    before = sample.image.copy()
    assert len({photometric(sample, np.random.default_rng(seed)).image.tobytes() for seed in range(30)}) > 15
    np.testing.assert_array_equal(sample.image, before)
