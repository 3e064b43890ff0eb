"""Augmentation keeps boxes on their objects and depends on the seed alone."""

import numpy as np
import pytest

from raydet.config import Augmentation
from raydet.transforms import Augmenter, Sample

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
PRESETS: tuple[Augmentation, ...] = ("none", "flip", "light", "strong")


def _sample() -> Sample:
    """Three squares, each filled with the colour that its label stands for."""
    image = np.full((240, 320, 3), 90, np.uint8)
    boxes_xywh = np.array([[20.0, 30, 60, 50], [150, 100, 80, 90], [250, 20, 50, 40]])
    for (x, y, w, h), colour in zip(boxes_xywh.astype(int), COLOURS, strict=True):
        image[y : y + h, x : x + w] = colour
    return Sample(image, boxes_xywh, np.arange(3))


@pytest.mark.parametrize("name", PRESETS)
def test_boxes_stay_on_their_objects(name: Augmentation) -> None:
    augment = Augmenter(name)
    num_seen = 0
    for seed in range(60):
        result = augment(_sample(), seed=seed)
        height, width = result.size_hw
        assert result.image.dtype == np.uint8
        for (x, y, w, h), label in zip(result.boxes_xywh, result.labels, strict=True):
            assert 0 <= x < x + w <= width + 1e-6 and 0 <= y < y + h <= height + 1e-6
            centre = result.image[int(y + h / 2), int(x + w / 2)].astype(int)
            assert centre.argmax() == label, f"seed {seed}: box {label} lies on {centre}"
            num_seen += 1
    assert num_seen > 120


@pytest.mark.parametrize("name", PRESETS)
def test_the_seed_decides_and_the_input_is_left_alone(name: Augmentation) -> None:
    sample = _sample()
    untouched = sample.image.copy()
    sample.image.setflags(write=False)
    first, again = Augmenter(name)(sample, seed=3), Augmenter(name)(sample, seed=3)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.boxes_xywh, again.boxes_xywh)
    assert np.array_equal(sample.image, untouched)
    results = [Augmenter(name)(sample, seed=seed).image.tobytes() for seed in range(12)]
    assert len(set(results)) > 1 or name == "none"


def test_flip_mirrors_boxes_exactly() -> None:
    augment = Augmenter("flip")
    results = [augment(_sample(), seed=seed) for seed in range(20)]
    mirrored = [result for result in results if not np.array_equal(result.image, _sample().image)]
    assert 0 < len(mirrored) < 20
    for result in mirrored:
        np.testing.assert_allclose(result.boxes_xywh[:, 0], 320 - _sample().boxes_xywh[:, [0, 2]].sum(1), atol=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_no_boxes_and_boxes_that_run_out(name: Augmentation) -> None:
    image = _sample().image
    empty = Augmenter(name)(Sample(image, np.zeros((0, 4)), np.zeros(0, np.int64)), seed=1)
    assert empty.boxes_xywh.shape == (0, 4) and empty.labels.shape == (0,)
    outside = np.array([[-50.0, -50, 20, 20], [300, 200, 100, 100]])
    result = Augmenter(name)(Sample(image, outside, np.array([0, 1])), seed=1)
    assert set(result.labels.tolist()) <= {1}
