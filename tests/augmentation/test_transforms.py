"""Augmentation keeps boxes on their objects and depends only on the seed."""

import dataclasses
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.augmentation.samples import Partners, Sample
from raydet.augmentation.transforms import Augmenter, check_augmentation, plain_of
from raydet.common.errors import UserError
from raydet.config import Augmentation, AugmentationSpec

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
PRESETS: tuple[Augmentation, ...] = get_args(Augmentation)
DISTORTED = ("rtdetr", "dfine")
PIPELINE: list[dict[str, Any]] = yaml.safe_load(
    """
- HorizontalFlip: {p: 0.5}
- OneOf:
    p: 0.9
    transforms:
      - RandomSizedCrop: {min_max_height: [120, 200], size: [200, 260]}
      - Sequential:
          p: 1
          transforms:
            - Affine: {scale: [0.7, 1.2], rotate: 0}
            - RandomRotate90:
- SomeOf: {n: 2, transforms: [GaussianBlur: {blur_limit: [3, 5]}, RandomGamma: , CLAHE: {p: 0.2}]}
"""
)
SPECS: tuple[AugmentationSpec, ...] = (*PRESETS, PIPELINE)


def _sample(*, first_id: int = 10, shift: int = 0) -> Sample:
    """Build a sample of three squares, filled with the colour of their label; other values derive from the id."""
    image = np.full((240, 320, 3), 90, np.uint8)
    boxes_xywh = np.array([[20.0 + shift, 30, 60, 50], [150, 100 + shift, 80, 90], [250 - shift, 20, 50, 40]])
    for (x, y, w, h), colour in zip(boxes_xywh.astype(int), COLOURS, strict=True):
        image[y : y + h, x : x + w] = colour
    ids = np.arange(first_id, first_id + 3)
    return Sample(image, boxes_xywh, np.arange(3), boxes_xywh[:, 2] * boxes_xywh[:, 3] * _fill(ids), ids % 2 == 0, ids)


def _fill(ids: Any) -> Any:
    """Return the share of its box that an object fills, different for each id."""
    return 1 / (1 + np.asarray(ids, np.float64) % 7)


def _partners() -> Partners:
    return Partners(mosaic=tuple(_sample(first_id=10 * number, shift=number) for number in (2, 3, 4)))


def _assert_paired(result: Sample) -> None:
    np.testing.assert_array_equal(result.categories, result.ids % 10)
    np.testing.assert_array_equal(result.iscrowd, result.ids % 2 == 0)
    np.testing.assert_allclose(
        result.areas, result.boxes_xywh[:, 2] * result.boxes_xywh[:, 3] * _fill(result.ids), rtol=1e-4
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_boxes_stay_on_their_objects(spec: AugmentationSpec) -> None:
    augment = Augmenter(spec)
    num_seen = 0
    for seed in range(40):
        result = augment(_sample(), seed=seed, partners=_partners())
        height, width = result.size_hw
        assert result.image.dtype == np.uint8
        _assert_paired(result)
        channels: dict[int, int] = {}
        for (x, y, w, h), label in zip(result.boxes_xywh, result.categories.tolist(), strict=True):
            assert 0 <= x < x + w <= width + 1e-6 and 0 <= y < y + h <= height + 1e-6
            centre = result.image[int(y + h / 2), int(x + w / 2)].astype(int)
            # Photometric distortion may permute the channels, but of the whole image.
            channel = channels.setdefault(label, int(centre.argmax())) if spec in DISTORTED else label
            assert centre.argmax() == channel, f"seed {seed}: box {label} lies on {centre}"
            num_seen += 1
        assert len(set(channels.values())) == len(channels)
    assert num_seen > (240 if spec == "strong" else 80)


_LEAVES = st.sampled_from(
    [
        {"HorizontalFlip": {"p": 1.0}},
        {"VerticalFlip": None},
        {"Transpose": {}},
        {"RandomRotate90": {"p": 0.7}},
        {"RandomCrop": {"height": 150, "width": 180, "pad_if_needed": True}},
        {"Affine": {"scale": [0.6, 1.4], "translate_percent": [-0.2, 0.2]}},
        {"RandomScale": {"scale_limit": 0.3}},
        {"LongestMaxSize": {"max_size": 200}},
        {"RandomBrightnessContrast": None},
        {"ToGray": {"p": 0.1}},
    ]
)
_PIPELINES = st.lists(
    st.one_of(
        _LEAVES,
        st.builds(
            lambda name, inner, p: {name: {"transforms": inner, "p": p}},
            st.sampled_from(["OneOf", "Sequential", "RandomOrder"]),
            st.lists(_LEAVES, min_size=1, max_size=3),
            st.sampled_from([0.5, 1.0]),
        ),
    ),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(spec=_PIPELINES, seed=st.integers(0, 2**32 - 1))
def test_random_pipelines_keep_all_of_an_object_together(spec: list[dict[str, Any]], seed: int) -> None:
    augment = Augmenter(spec)
    result, again = augment(_sample(), seed=seed), augment(_sample(), seed=seed)
    _assert_paired(result)
    assert np.array_equal(result.image, again.image) and np.array_equal(result.boxes_xywh, again.boxes_xywh)
    assert len(set(result.ids.tolist())) == len(result.ids)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_seed_decides_and_the_input_is_left_alone(spec: AugmentationSpec) -> None:
    sample = _sample()
    untouched = sample.image.copy()
    sample.image.setflags(write=False)
    partners = Partners(mosaic=_partners().mosaic, mixup=(_sample(first_id=50),))
    first, again = (Augmenter(spec)(sample, seed=3, partners=partners) for _ in range(2))
    for field in dataclasses.fields(Sample):
        assert np.array_equal(getattr(first, field.name), getattr(again, field.name))
    assert np.array_equal(sample.image, untouched)
    results = [Augmenter(spec)(sample, seed=seed).image.tobytes() for seed in range(12)]
    assert len(set(results)) > 1 or spec == "none"


def test_strong_mixes_what_it_is_given() -> None:
    augment = Augmenter("strong")
    alone = augment(_sample(), seed=5)
    mixed = [augment(_sample(), seed=seed, partners=Partners(mixup=(_sample(first_id=50),))) for seed in range(10)]
    assert set(alone.ids.tolist()) <= {10, 11, 12}
    assert {10, 11, 12, 50, 51, 52} == {number for result in mixed for number in result.ids.tolist()}
    for result in mixed:
        _assert_paired(result)


def test_flip_mirrors_boxes_exactly() -> None:
    augment = Augmenter("flip")
    results = [augment(_sample(), seed=seed) for seed in range(20)]
    mirrored = [result for result in results if not np.array_equal(result.image, _sample().image)]
    assert 0 < len(mirrored) < 20
    for result in mirrored:
        np.testing.assert_array_equal(result.boxes_xywh[:, 0], 320 - _sample().boxes_xywh[:, [0, 2]].sum(1))
        np.testing.assert_array_equal(result.areas, _sample().areas)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_boxes_and_boxes_that_run_out(spec: AugmentationSpec) -> None:
    sample = _sample()
    nothing = np.zeros(0, np.int64)
    bare = Sample(sample.image, np.zeros((0, 4)), nothing, np.zeros(0), np.zeros(0, bool), nothing)
    empty = Augmenter(spec)(bare, seed=1)
    assert empty.boxes_xywh.shape == (0, 4) and empty.categories.shape == (0,)
    outside = dataclasses.replace(sample, boxes_xywh=np.array([[-50.0, -50, 20, 20], [300, 200, 99, 99], [9, 9, 0, 5]]))
    assert set(Augmenter(spec)(outside, seed=1).categories.tolist()) <= {1}


def test_a_pipeline_drops_boxes_by_their_visible_share() -> None:
    """At 20 % visibility the middle square is dropped; at 60 % it is kept."""
    for width, is_kept in ((166, False), (198, True)):
        augment = Augmenter([{"Crop": {"x_min": 0, "y_min": 0, "x_max": width, "y_max": 240, "p": 1.0}}])
        result = augment(_sample(), seed=0)
        assert (11 in result.ids) == is_kept
        _assert_paired(result)


def test_the_last_epochs_flip_only_what_was_flipped_before() -> None:
    assert [plain_of(name) for name in PRESETS] == ["none", *["flip"] * 7]
    assert plain_of(PIPELINE) == "flip"
    assert plain_of([{"OneOf": {"transforms": [{"HorizontalFlip": None}, {"Blur": None}]}}]) == "flip"
    assert plain_of([{"RandomGamma": None}]) == "none"


@pytest.mark.parametrize("spec", [*SPECS, [], [{"RandomCrop": {"height": 9999, "width": 9999}}]], ids=str)
def test_good_augmentations_pass_the_check(spec: AugmentationSpec) -> None:
    check_augmentation(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([{"HorizontalFlop": {"p": 1}}], "augmentation: .*`HorizontalFlop` .*HorizontalFlip"),
        ([{"Zzz": None}], "`Zzz`.*albumentations"),
        ([{"BasicTransform": None}], "unknown transform `BasicTransform`"),
        ([{"RandomCrop3D": {"size": [1, 2, 3]}}], "unknown transform `RandomCrop3D`"),
        ([{"Compose": {"transforms": []}}], "unknown transform `Compose`"),
        ([{"Affine": {"scales": 2}}], "Affine .*`scales`.*scale"),
        ([{"Blur": {"blur_limit": "much"}}], "augmentation: Blur: blur_limit: Input should be .*, got 'much'$"),
        ([{"HorizontalFlip": {"p": 2}}], "HorizontalFlip: p: Input should be less than or equal to 1"),
        ([{"RandomCrop": None}], "augmentation: RandomCrop: height: Field required; width: Field required$"),
        ([{"LongestMaxSize": None}], "LongestMaxSize: .*max_size"),
        ([{"FDA": None}], "FDA .*fda_metadata"),
        ([{"Blur": 3}], "arguments of Blur .*got 3"),
        ([{"Blur": None, "CLAHE": None}], "`Name: {argument: value}`, got"),
        (["Blur"], "`Name: {argument: value}`, got Blur"),
        ([{"OneOf": {"transforms": [{"Blurr": None}]}}], "OneOf: .*`Blurr`.*Blur"),
        ([{"OneOf": {"transforms": {"Blur": None}}}], "OneOf requires `transforms`"),
        ([{"Sequential": None}], "Sequential requires `transforms`"),
        ([{"OneOf": {"p": 3, "transforms": [{"Blur": None}]}}], "OneOf: p .*got 3"),
        ([{"Normalize": None}], "Normalize .*8-bit RGB"),
        ([{"Mosaic": None}], "Mosaic .*mosaic_metadata"),
        ("medium", "`medium`.*none, flip, .*strong"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named_in_one_line(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_augmentation(spec)
    assert "\n" not in str(caught.value)


def test_presets_that_do_without_albumentations_do_not_import_it() -> None:
    code = (
        "import sys; from raydet.augmentation.transforms import Augmenter, check_augmentation\n"
        "for name in ('none', 'flip', 'detr', 'rfdetr', 'rtdetr', 'dfine'): Augmenter(name)\n"
        "check_augmentation('strong'); assert 'albumentations' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
