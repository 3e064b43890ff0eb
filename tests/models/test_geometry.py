"""The resize against the Hugging Face image processors: same sizes, same bits."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ConditionalDetrImageProcessor, DetrImageProcessor, RTDetrImageProcessor, YolosImageProcessor

from raydet.models.families import FAMILIES
from raydet.models.geometry import ResizeRule, resize, resized_on_device, resized_planes
from raydet.models.processors import resize_rule_of, resized_processor

PROCESSORS: dict[str, Any] = {
    "rt_detr": RTDetrImageProcessor(size={"height": 96, "width": 128}),
    "rt_detr_bicubic": RTDetrImageProcessor(size={"height": 64, "width": 64}, resample=3),
    "detr_edges": DetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 133}),
    "detr_limits": DetrImageProcessor(size={"max_height": 96, "max_width": 96}, pad_size={"height": 96, "width": 96}),
    "detr_oblong_limits": DetrImageProcessor(size={"max_height": 60, "max_width": 120}),
    "conditional": ConditionalDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}),
    "yolos_edges": YolosImageProcessor(size={"shortest_edge": 80, "longest_edge": 133}),
    "yolos_limits": YolosImageProcessor(size={"max_height": 96, "max_width": 96}),
}


def processed(processor: Any, image: np.ndarray) -> np.ndarray:
    """Return the processor's output before normalisation, uint8 [H, W, 3]."""
    result = processor(
        images=Image.fromarray(image), do_rescale=False, do_normalize=False, do_pad=False, return_tensors="pt"
    )["pixel_values"][0]
    return np.asarray(result.to(torch.uint8).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size_hw", [(48, 64), (375, 500), (500, 333), (97, 131), (640, 100)])
def test_resize_equals_processor_bit_for_bit(name: str, size_hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    rule = resize_rule_of(PROCESSORS[name], where=name)
    expected = processed(PROCESSORS[name], image)
    resized = resize(image, rule.target_size_hw(size_hw), rule.resample)
    assert resized.dtype == np.uint8
    assert resized.shape == expected.shape
    np.testing.assert_array_equal(resized, expected)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_every_resampling_code_means_what_it_means_to_the_processor(resample: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    processor = RTDetrImageProcessor(size={"height": 32, "width": 96}, resample=resample)
    np.testing.assert_array_equal(resize(image, (32, 96), resample), processed(processor, image))


@pytest.mark.parametrize(("resample", "most_levels"), [(0, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("size_hw", [(375, 500), (97, 131), (640, 100)])
def test_resize_on_a_device_is_that_of_the_decoders(size_hw: tuple[int, int], resample: int, most_levels: int) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (size_hw[0] // 16 + 2, size_hw[1] // 16 + 2, 3), dtype=np.uint8)
    image = np.ascontiguousarray(resize(coarse, size_hw, 3))
    planes = torch.from_numpy(image).permute(2, 0, 1)
    for new_hw in ((96, 128), (200, 160)):
        resized = resized_on_device(planes, new_hw, resample)
        assert resized.dtype == torch.uint8
        expected = resize(image, new_hw, resample).astype(int)
        assert np.abs(resized.permute(1, 2, 0).numpy() - expected).max() <= most_levels
    assert resized_on_device(planes, size_hw, resample) is planes


def test_resize_of_real_pictures(test_data: Path) -> None:
    paths = sorted((test_data / "coco_mini" / "val").glob("*.jpg"))[:4]
    paths += sorted((test_data / "bccd").rglob("*.jpg"))[:2]
    assert len(paths) == 6
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        for name in ("rt_detr", "detr_edges", "yolos_edges"):
            rule = resize_rule_of(PROCESSORS[name], where=name)
            resized = resize(image, rule.target_size_hw(image.shape[:2]), rule.resample)
            np.testing.assert_array_equal(resized, processed(PROCESSORS[name], image))


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=60, deadline=None)
@given(height=st.integers(20, 400), width=st.integers(20, 400))
@example(height=80, width=80)
@example(height=100, width=80)
@example(height=80, width=100)
def test_target_size_is_the_processors(name: str, height: int, width: int) -> None:
    assume(max(height, width) < 8 * min(height, width))  # a YOLOS processor rounds a side of narrower images to zero
    image = torch.zeros((3, height, width), dtype=torch.uint8)
    expected = tuple(PROCESSORS[name].resize(image, size=PROCESSORS[name].size, resample=0).shape[-2:])
    assert resize_rule_of(PROCESSORS[name], where=name).target_size_hw((height, width)) == expected


@pytest.mark.parametrize(
    ("size", "step"),
    [
        ({"shortest": 800, "longest": 1333}, 32),
        ({"shortest": 480, "longest": 640}, 16),
        ({"shortest": 128, "longest": 213}, 8),
        ({"limit_hw": (320, 512)}, 16),
        ({"shortest": 10, "longest": 20}, 1),
    ],
)
def test_little_of_what_a_model_sees_is_padding(test_data: Path, size: dict[str, Any], step: int) -> None:
    rule = ResizeRule(mode="keep_aspect", **size)
    pictures = [
        (image["height"], image["width"])
        for part in ("train", "val")
        for image in json.loads((test_data / "coco_mini" / f"instances_{part}.json").read_text())["images"]
    ]
    seen = [rule.target_size_hw(size_hw) for size_hw in pictures]
    padded = [rule.padded_size_hw(size_hw) for size_hw in seen]
    for size_hw, padded_hw in zip(seen, padded, strict=True):
        assert all(0 <= after - before < step for before, after in zip(size_hw, padded_hw, strict=True))
        assert padded_hw[0] % step == padded_hw[1] % step == 0
    share = 1 - sum(map(math.prod, seen)) / sum(map(math.prod, padded))
    print(f"{size}: {share:.1%} of the pixels are padding, {len(set(seen))} sizes have become {len(set(padded))}")
    assert share < 0.05


def test_what_a_processor_pads_to_and_fixed_sizes_stay() -> None:
    square = ResizeRule(mode="keep_aspect", limit_hw=(100, 100), pad_to_hw=(100, 100))
    assert square.padded_size_hw((70, 100)) == (100, 100)
    assert ResizeRule(mode="fixed", size_hw=(50, 70)).padded_size_hw((50, 70)) == (50, 70)


def test_narrow_image_keeps_both_sides() -> None:
    rule = resize_rule_of(PROCESSORS["detr_limits"], where="")
    assert rule.target_size_hw((1, 4800)) == (1, 96)
    assert resize_rule_of(PROCESSORS["yolos_edges"], where="").target_size_hw((3, 3000)) == (16, 128)
    assert resize(np.full((1, 4800, 3), 7, np.uint8), (1, 96), 2).tolist() == np.full((1, 96, 3), 7).tolist()


def test_image_of_the_right_size_is_not_touched_and_read_only_ones_are_fine() -> None:
    image = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.shares_memory(resize(image, (40, 50), 2), image)
    image.flags.writeable = False
    assert resize(image, (20, 25), 2).flags.writeable
    assert resize(image[:1, :1], (2, 2), 2).shape == (2, 2, 3)


@pytest.mark.parametrize("name", PROCESSORS)
def test_rule_survives_json_and_pickle(name: str) -> None:
    rule = resize_rule_of(PROCESSORS[name], where=name)
    assert ResizeRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_resized_processor_has_the_longest_side_and_a_fixed_canvas() -> None:
    detr = resize_rule_of(resized_processor(DetrImageProcessor(), FAMILIES["detr"], 480), where="")
    assert (detr.target_size_hw((375, 500)), detr.pad_to_hw) == ((360, 480), (480, 480))
    yolos = resize_rule_of(resized_processor(YolosImageProcessor(), FAMILIES["yolos"], 512), where="")
    assert (yolos.target_size_hw((375, 500)), yolos.pad_to_hw) == ((384, 512), (512, 512))
    rt_detr = resize_rule_of(resized_processor(RTDetrImageProcessor(), FAMILIES["rt_detr"], 320), where="")
    assert (rt_detr.target_size_hw((375, 500)), rt_detr.pad_to_hw) == ((320, 320), None)


def test_rules_need_no_torch() -> None:
    code = "import sys, raydet.models.geometry; assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_resize_of_interleaved_channels_has_the_bits_of_planes() -> None:
    rng = np.random.default_rng(0)
    modes = {2: "bilinear", 3: "bicubic"}
    for number in range(400):
        size_hw, target_hw = rng.integers(2, 300, 2), [int(side) for side in rng.integers(1, 300, 2)]
        image = rng.integers(0, 256, (*size_hw, 3), np.uint8)
        image = image[:, ::-1] if number % 2 else image  # a mirrored view, as augmentation leaves it
        planes = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))[None]
        for resample, mode in modes.items():
            expected = torch.nn.functional.interpolate(planes, target_hw, mode=mode, antialias=True)[0]
            resized = resized_planes(image, (target_hw[0], target_hw[1]), resample)
            assert np.array_equal(resized, expected.numpy()), (size_hw, target_hw, mode)
            assert resized.flags.c_contiguous
