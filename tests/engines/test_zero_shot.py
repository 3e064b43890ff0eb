"""Zero-shot detectors against plain transformers; each detection has its own label."""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from raydet.common.boxes import Boxes, clip_xywh, has_area, xyxy_to_xywh
from raydet.common.errors import UserError
from raydet.config import PredictConfig
from raydet.engines.zero_shot import check_zero_shot, load_zero_shot
from raydet.models.detector import Detections
from raydet.models.geometry import Image, SizeHW
from tests.zero_shot_models import TINY_ZERO_SHOT, write_zero_shot

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ["cat", "Remote control", "traffic light"]
GROUNDING = [model_type for model_type in TINY_ZERO_SHOT if model_type.endswith("grounding-dino")]
OWL = [model_type for model_type in TINY_ZERO_SHOT if model_type.startswith("owl")]
SIZES_HW = [(96, 72), (50, 120), (64, 64), (150, 150)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each type."""
    root = tmp_path_factory.mktemp("zero_shot")
    return {model_type: write_zero_shot(model_type, root / model_type) for model_type in TINY_ZERO_SHOT}


def load(folder: str, labels: Sequence[str] = LABELS, **options: Any) -> Any:
    config = PredictConfig(model=folder, labels=list(labels), data="images", out="out", **options)
    return load_zero_shot(config, device="cpu", num_threads=1)


def pictures(sizes_hw: Sequence[SizeHW]) -> list[Image]:
    generator = np.random.default_rng(0)
    found = []
    for height, width in sizes_hw:
        blocks = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        found.append(np.ascontiguousarray(blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]))
    return found


@cache
def plain_model(folder: str) -> tuple[Any, Any]:
    return AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def by_transformers(folder: str, images: Sequence[Image], labels: Sequence[str]) -> tuple[Any, Any, list[Any]]:
    """Return the model's outputs, its inputs, and the processor's detections at threshold 0."""
    model, processor = plain_model(folder)
    inputs = processor(text=[list(labels)] * len(images), images=list(images), return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    sizes_hw = [image.shape[:2] for image in images]
    return (
        outputs,
        inputs,
        processor.post_process_grounded_object_detection(outputs, threshold=0, target_sizes=sizes_hw),
    )


def in_picture(boxes_xyxy: Any, scores: Any, size_hw: SizeHW) -> tuple[Boxes, Any, Any]:
    """Return boxes clipped to the image and scores, in descending score order, and their original indices."""
    boxes_xywh = clip_xywh(xyxy_to_xywh(boxes_xyxy.numpy().astype(np.float64)), size_hw)
    order = np.argsort(-scores.numpy(), kind="stable")
    order = order[has_area(boxes_xywh)[order]]
    return boxes_xywh[order], scores.numpy()[order], order


def assert_same(first: Detections, second: Detections, *, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(first.scores, second.scores, atol=atol)
    np.testing.assert_allclose(first.boxes_xywh, second.boxes_xywh, atol=100 * atol)
    np.testing.assert_array_equal(first.categories, second.categories)


@pytest.mark.parametrize("model_type", TINY_ZERO_SHOT)
def test_finds_what_transformers_finds(model_type: str, folders: dict[str, str]) -> None:
    engine = load(folders[model_type])
    images = pictures(SIZES_HW)
    found = engine.predict(engine.prepare(images))
    assert [(category.id, category.name) for category in engine.categories] == list(enumerate(LABELS))
    # One by one: in a batch, transformers pads to the largest image, which changes the detections.
    expected = [by_transformers(folders[model_type], [image], LABELS)[2][0] for image in images]
    for detections, item, size_hw in zip(found, expected, SIZES_HW, strict=True):
        boxes_xywh, scores, order = in_picture(item["boxes"], item["scores"], size_hw)
        assert len(scores) > 10
        np.testing.assert_allclose(detections.scores, scores, atol=1e-3)
        np.testing.assert_allclose(detections.boxes_xywh, boxes_xywh, atol=0.5)
        if model_type in OWL:
            np.testing.assert_array_equal(detections.categories, item["labels"].numpy()[order])
    assert len(np.unique(np.concatenate([detections.categories for detections in found]))) > 1


@pytest.mark.parametrize("model_type", GROUNDING)
def test_phrases_become_their_labels(model_type: str, folders: dict[str, str]) -> None:
    engine = load(folders[model_type])
    for image in pictures(SIZES_HW):
        (detections,) = engine.predict(engine.prepare([image]))
        outputs, inputs, (item,) = by_transformers(folders[model_type], [image], LABELS)
        _, _, order = in_picture(item["boxes"], item["scores"], image.shape[:2])
        # An independent way to determine the label: count the full stops before a token.
        ids = inputs["input_ids"][0].tolist()
        blocks = [ids[:place].count(1012) for place in range(len(ids))]
        for category, query in zip(detections.categories, order, strict=True):
            best = int(outputs.logits[0, query, 1 : len(ids) - 1].argmax()) + 1
            assert category == blocks[best]
        # The processor's text for the best token is a word of the label.
        _, processor = plain_model(folders[model_type])
        for category, query in zip(detections.categories, order, strict=True):
            top = float(outputs.logits[0, query].sigmoid().max()) - 1e-6
            only = type(outputs)(
                logits=outputs.logits[:, query : query + 1],
                pred_boxes=outputs.pred_boxes[:, query : query + 1],
                input_ids=outputs.input_ids,
            )
            (phrase,) = processor.post_process_grounded_object_detection(only, threshold=top, text_threshold=top)
            assert set(phrase["text_labels"][0].split()) <= {*LABELS[category].lower().split(), "."}


@pytest.mark.parametrize("model_type", TINY_ZERO_SHOT)
def test_a_picture_does_not_depend_on_its_neighbours(model_type: str, folders: dict[str, str]) -> None:
    engine = load(folders[model_type], pad_batches=False)
    images = pictures([*SIZES_HW, SIZES_HW[0]])
    together = engine.predict(engine.prepare(images))
    for image, detections in zip(images, together, strict=True):
        assert_same(engine.predict(engine.prepare([image]))[0], detections)


@pytest.mark.parametrize("model_type", TINY_ZERO_SHOT)
def test_sees_pictures_at_the_size_that_it_says(model_type: str, folders: dict[str, str]) -> None:
    engine = load(folders[model_type], pad_batches=False)
    for image in pictures(SIZES_HW):
        ((_, inputs),) = engine.prepare([image]).parts
        height, width = engine.input_size_hw(image.shape[:2])
        assert engine.resize_rule.target_size_hw(image.shape[:2]) == (height, width)
        pixels = inputs["pixel_values"]
        if model_type in GROUNDING:
            assert tuple(pixels.shape[-2:]) == (height, width)
            assert bool(inputs["pixel_mask"].all())
        else:
            assert tuple(pixels.shape[-2:]) == (64, 64)
            assert (height, width) == (64, 64) or (max(height, width) == 64 and model_type == "owlv2")
            # Padding is black; at its edge the resize mixes it with the image.
            black = pixels[:, :, min(height + 2, 64) :, :], pixels[:, :, :, min(width + 2, 64) :]
            assert all((part == part[:, :, :1, :1]).all() for part in black if part.numel())
            assert pixels[:, :, height - 1].std() > 0.1
            assert pixels[:, :, :, width - 1].std() > 0.1


@pytest.mark.parametrize("model_type", TINY_ZERO_SHOT)
def test_odd_pictures(model_type: str, folders: dict[str, str]) -> None:
    engine = load(folders[model_type])
    images = pictures([(1, 1), (3, 50), (1, 400), (400, 1)])
    for detections, image in zip(engine.predict(engine.prepare(images)), images, strict=True):
        height, width = image.shape[:2]
        assert np.isfinite(detections.boxes_xywh).all()
        right_bottom = detections.boxes_xywh[:, :2] + detections.boxes_xywh[:, 2:]
        assert (detections.boxes_xywh[:, :2] >= 0).all()
        assert (right_bottom <= np.array([width, height]) + 1e-9).all()
        assert (np.diff(detections.scores) <= 0).all()


@pytest.mark.parametrize("model_type", TINY_ZERO_SHOT)
def test_keeps_the_best(model_type: str, folders: dict[str, str]) -> None:
    engine = load(folders[model_type])
    assert engine.max_detections == (20 if model_type in GROUNDING else 64)
    prepared = engine.prepare(pictures(SIZES_HW[:1]))
    (whole,) = engine.predict(prepared)
    engine.max_detections = 5
    (best,) = engine.predict(prepared)
    assert len(best.scores) == 5
    assert_same(best, Detections(whole.boxes_xywh[:5], whole.scores[:5], whole.categories[:5]))


@pytest.mark.parametrize("model_type", TINY_ZERO_SHOT)
def test_in_half_precision(model_type: str, folders: dict[str, str]) -> None:
    images = pictures(SIZES_HW[:1])
    whole, half = (load(folders[model_type], precision=precision) for precision in ("fp32", "bf16"))
    (first,), (second,) = (engine.predict(engine.prepare(images)) for engine in (whole, half))
    assert first.scores[0] == pytest.approx(second.scores[0], abs=0.1)
    assert not np.array_equal(first.scores[:5], second.scores[:5])
    with pytest.raises(UserError, match="--precision fp16"):
        load(folders[model_type], precision="fp16")


@pytest.mark.parametrize("model_type", TINY_ZERO_SHOT)
def test_channels_last(model_type: str, folders: dict[str, str]) -> None:
    images = pictures(SIZES_HW[:2])
    plain, other = (load(folders[model_type], channels_last=value) for value in (False, True))
    for first, second in zip(plain.predict(plain.prepare(images)), other.predict(other.prepare(images)), strict=True):
        assert_same(first, second, atol=1e-3)


def test_labels_with_full_stops(folders: dict[str, str]) -> None:
    folder = folders["grounding-dino"]
    engine, plain = load(folder, [" St. Bernard ", "dog?"]), load(folder, ["st bernard", "dog"])
    assert [category.name for category in engine.categories] == ["St. Bernard", "dog?"]
    images = pictures(SIZES_HW[:1])
    assert_same(engine.predict(engine.prepare(images))[0], plain.predict(plain.prepare(images))[0])


def test_order_of_labels_is_that_of_categories(folders: dict[str, str]) -> None:
    images = pictures(SIZES_HW[:1])
    for model_type in OWL:
        first, second = load(folders[model_type], LABELS), load(folders[model_type], LABELS[::-1])
        (one,), (other,) = (engine.predict(engine.prepare(images)) for engine in (first, second))
        names = [
            [engine.categories[index].name for index in found.categories]
            for engine, found in ((first, one), (second, other))
        ]
        assert names[0] == names[1]


@pytest.mark.parametrize(
    ("model_type", "labels", "message"),
    [
        (
            "owlvit",
            ["Remote  control", "remote control"],
            "--labels: 'Remote  control' and 'remote control'",
        ),
        ("owlv2", ["cat", "a very long label indeed"], "label.*22.*16"),
        ("grounding-dino", ["cat", "zebra"], "zebra"),
        ("grounding-dino", ["cat", "..."], r"'\.\.\.'"),
        ("grounding-dino", ["cat" + " cat" * index for index in range(8)], "labels.*46.*32"),
    ],
)
def test_unfit_labels(model_type: str, labels: list[str], message: str, folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=message):
        load(folders[model_type], labels)


def test_check_tells_the_model_type(folders: dict[str, str]) -> None:
    assert {model_type: check_zero_shot(folder) for model_type, folder in folders.items()} == {
        model_type: model_type for model_type in TINY_ZERO_SHOT
    }


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (
            "rt_detr_v2",
            "rt_detr_v2.*--checkpoint.*--labels",
        ),
        ("clip", r"clip.*OWL-ViT, OWLv2 and Grounding DINO"),
        ("omdet-turbo", "omdet-turbo"),
    ],
)
def test_other_models(model_type: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        check_zero_shot(str(tmp_path))


def test_broken_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        check_zero_shot(str(tmp_path / "absent"))
    folder = write_zero_shot("owlvit", tmp_path / "model")
    processor = Path(folder, "processor_config.json")
    content = processor.read_text()
    processor.write_text(content.replace('"height": 64', '"height": 32'))
    with pytest.raises(UserError, match=r"32 × 64.*64 × 64"):
        load(folder)
    processor.write_text(content)
    weights = load_file(f"{folder}/model.safetensors")
    weights["class_head.dense0.bias"] = torch.zeros(7)
    save_file({name: value for name, value in weights.items() if "box_head" not in name}, f"{folder}/model.safetensors")
    with pytest.raises(UserError, match=r"7 weights.*box_head\.dense0"):
        load(folder)
    Path(folder, "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot read"):
        load(folder)


def test_the_check_needs_no_torch() -> None:
    code = "import sys, raydet.engines.zero_shot; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
