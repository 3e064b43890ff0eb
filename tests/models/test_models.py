"""All families: building, learning, saving, and the same boxes as plain transformers from the saved folder."""

import copy
import functools
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from raydet.common.boxes import xywh_to_xyxy
from raydet.common.errors import UserError
from raydet.engines.torch_engine import TorchEngine
from raydet.models.backbone import backbone_parameter_names, freeze_backbone
from raydet.models.collate import Batch, Example, collate
from raydet.models.detector import Detections, Detector
from raydet.models.families import FAMILIES, family_of
from raydet.models.geometry import resize
from raydet.models.loading import build_detector, load_detector
from raydet.models.small import SMALL_MODELS
from raydet.tables.schema import Category

pytestmark = pytest.mark.usefixtures("one_thread")

CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(90, "toothbrush"))
TINY = sorted(set(SMALL_MODELS) - {"rt_detr_v2_small"})


def build(name: str, image_size: int = 96, **options: Any) -> Detector:
    """Build a detector whose outputs depend on the image, unlike those of untrained heads and batch norms."""
    return copy.deepcopy(_built(name, image_size, **options))


@functools.cache
def _built(name: str, image_size: int, **options: Any) -> Detector:
    detector = build_detector(name, CATEGORIES, image_size=image_size, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in detector.model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in detector.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
            norm.momentum = 1.0
        batch = as_batch(detector, random_pictures([(96, 96)] * 4))
        detector.model.train()(**detector.model_inputs(batch))
    for norm in norms:
        norm.momentum = 0.1
    detector.model.eval()
    return detector


def random_pictures(sizes_hw: Sequence[tuple[int, int]]) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    pictures = []
    for height, width in sizes_hw:
        blocks = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(blocks).resize((width, height)))
    return pictures


def as_batch(detector: Detector, pictures: Sequence[Image.Image]) -> Batch:
    rule = detector.resize_rule
    examples = [
        Example(
            image_id=number,
            image=resize(np.asarray(picture), rule.target_size_hw((picture.height, picture.width)), rule.resample),
            original_size_hw=(picture.height, picture.width),
            boxes=np.array([[0.5, 0.5, 0.4, 0.3]], np.float32),
            categories=np.array([number % 3]),
        )
        for number, picture in enumerate(pictures)
    ]
    return collate(examples, pad_to_hw=rule.pad_to_hw)


def found_in(detector: Detector, pictures: Sequence[Image.Image]) -> list[Detections]:
    engine = TorchEngine(detector, pad_batches=False)
    return engine.predict(engine.prepare([np.asarray(picture) for picture in pictures]))


def plain_transformers(folder: Path, pictures: Sequence[Image.Image]) -> list[dict[str, torch.Tensor]]:
    """Return the detections of a saved folder without raydet, image by image."""
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    answers = []
    for picture in pictures:
        with torch.inference_mode():
            outputs = model(**processor(images=picture, return_tensors="pt"))
        sizes = [(picture.height, picture.width)]
        answers += processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    return answers


def assert_same(found: Sequence[Detections], expected: Sequence[dict[str, torch.Tensor]]) -> None:
    """Check that detections match one to one; rounding may swap two detections with almost equal scores."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        scores, boxes_xyxy, labels = (theirs[key].numpy() for key in ("scores", "boxes", "labels"))
        assert len(mine.scores) == len(scores) > 0
        is_same = np.abs(mine.scores[:, None] - scores) <= 1e-3
        is_same &= np.abs(xywh_to_xyxy(mine.boxes_xywh)[:, None] - boxes_xyxy).max(axis=2) <= 0.5
        is_same &= mine.categories[:, None] == labels
        pairs = linear_sum_assignment(is_same, maximize=True)
        assert is_same[pairs].all()


def check_against_transformers(detector: Detector, pictures: Sequence[Image.Image], folder: Path) -> None:
    detector.save(str(folder))
    expected = plain_transformers(folder, pictures)
    found = found_in(detector, pictures)
    assert_same(found, expected)
    assert_same(found_in(load_detector(str(folder)), pictures), expected)
    for item in found:
        assert item.boxes_xywh.dtype == item.scores.dtype == np.float64
        assert item.categories.dtype == np.int64
        assert (np.diff(item.scores) <= 0).all()
        assert len(item.scores) <= detector.max_detections
    # Results must differ between images, otherwise mixed-up images would pass.
    assert len({tuple(np.round(item.scores, 6)) for item in found}) == len(pictures)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_tiny_and_deterministic(name: str) -> None:
    first = build_detector(name, CATEGORIES, image_size=None, seed=5)
    state = torch.random.get_rng_state()
    again = build_detector(name, CATEGORIES, image_size=None, seed=5)
    other = build_detector(name, CATEGORIES, image_size=None, seed=6)
    assert torch.equal(state, torch.random.get_rng_state())
    assert 50_000 <= sum(parameter.numel() for parameter in first.model.parameters()) <= 400_000
    weights = first.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in again.model.state_dict().items())
    assert not all(torch.equal(value, weights[key]) for key, value in other.model.state_dict().items())
    side = 256
    rule = first.resize_rule
    assert (rule.size_hw or rule.pad_to_hw) == (side, side)


def test_small_models_have_the_type_that_is_told_without_torch() -> None:
    for small in SMALL_MODELS.values():
        assert small.model_type == small.make_config().model_type
    assert {SMALL_MODELS[name].model_type for name in TINY} == FAMILIES.keys()


def test_small_model_has_the_size_that_its_figures_are_for() -> None:
    detector = build_detector("rt_detr_v2_small", CATEGORIES, image_size=None, seed=0)
    assert 1.75e6 < sum(parameter.numel() for parameter in detector.model.parameters()) < 1.9e6
    assert detector.num_queries == detector.max_detections == 100


@pytest.mark.parametrize("name", TINY)
def test_saved_folder_gives_the_same_boxes_in_plain_transformers(name: str, tmp_path: Path) -> None:
    pictures = random_pictures([(120, 160), (90, 90), (160, 70), (120, 160)])
    check_against_transformers(build(name), pictures, tmp_path / "model")


@pytest.mark.parametrize("name", TINY)
def test_saved_folder_gives_the_same_boxes_on_real_pictures(name: str, tmp_path: Path, test_data: Path) -> None:
    paths = sorted((test_data / "bccd" / "images").glob("*.jpg"))[:2]
    paths += sorted((test_data / "coco_mini" / "val").glob("*.jpg"))[:3]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    check_against_transformers(build(name, 128), pictures, tmp_path / "model")


@pytest.mark.parametrize("name", ["detr_tiny", "conditional_detr_tiny", "yolos_tiny"])
def test_a_processor_that_pads_to_the_largest_gives_every_image_its_own_answer(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(name).save(str(folder))
    content = json.loads((folder / "preprocessor_config.json").read_text())
    content |= {"size": {"shortest_edge": 64, "longest_edge": 112}, "pad_size": None}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    detector = load_detector(str(folder))
    assert detector.resize_rule.pad_to_hw is None
    pictures = random_pictures([(120, 160), (90, 90), (160, 70), (120, 160), (90, 90)])
    assert_same(found_in(detector, pictures), plain_transformers(folder, pictures))


@pytest.mark.parametrize("name", ["detr_tiny", "yolos_tiny"])
def test_boxes_are_relative_to_the_image_not_to_its_padding(name: str) -> None:
    """Check that a box around the complete input is the complete original image, for any padding."""
    detector = build_detector(name, CATEGORIES, image_size=96, seed=0)
    model: Any = detector.model
    head = model.bbox_predictor.layers[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.logit(torch.tensor([0.5, 0.5, 1 - 1e-6, 1 - 1e-6])))
    pictures = random_pictures([(60, 120), (120, 50), (100, 100)])
    for picture, found in zip(pictures, found_in(detector, pictures), strict=True):
        expected = np.tile([0.0, 0.0, picture.width, picture.height], (len(found.scores), 1))
        np.testing.assert_allclose(found.boxes_xywh, expected, atol=0.01)


@pytest.mark.parametrize("name", TINY)
def test_inputs_equal_the_processors(name: str) -> None:
    detector = build(name)
    pictures = random_pictures([(120, 160), (160, 70)])
    theirs = detector.processor(images=pictures, return_tensors="pt")
    mine = detector.model_inputs(as_batch(detector, pictures))
    assert torch.equal(mine["pixel_values"], theirs["pixel_values"])
    assert ("pixel_mask" in mine) == detector.family.uses_pixel_mask
    if "pixel_mask" in mine:
        assert torch.equal(mine["pixel_mask"], theirs.get("pixel_mask", torch.ones_like(mine["pixel_mask"])))


@pytest.mark.parametrize("name", TINY)
def test_predict_leaves_the_training_mode_as_it_was(name: str) -> None:
    detector = build(name)
    for mode in (True, False):
        detector.model.train(mode)
        found_in(detector, random_pictures([(80, 80)]))
        assert all(module.training == mode for module in detector.model.modules())


@pytest.mark.parametrize("name", TINY)
def test_folder_keeps_source_ids_and_names(name: str, tmp_path: Path) -> None:
    build(name).save(str(tmp_path))
    assert load_detector(str(tmp_path)).categories == CATEGORIES
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "cat", 1: "dog", 2: "toothbrush"}
    assert config.label2id == {"cat": 0, "dog": 1, "toothbrush": 2}
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))


def test_a_model_with_more_queries_than_cells_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    build_detector("rt_detr_v2_tiny", CATEGORIES, image_size=64, seed=0).save(str(tmp_path))
    content = json.loads((tmp_path / "config.json").read_text())
    del content["num_queries"]  # 300 by default
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="states 300 queries, but its images of 64 × 64 pixels have only"):
        load_detector(str(tmp_path))


@pytest.mark.parametrize("name", TINY)
def test_the_whole_backbone_learns(name: str) -> None:
    detector = build_detector(name, CATEGORIES, image_size=96, seed=0)
    names = backbone_parameter_names(detector.model)
    parameters = dict(detector.model.named_parameters())
    assert 0 < len(names) < len(parameters)
    assert all(parameters[key].requires_grad for key in names)
    assert not any("class" in key or "bbox" in key for key in names)
    if name.startswith(("rt_detr", "d_fine", "deimv2")):
        assert sum(isinstance(module, nn.BatchNorm2d) for module in detector.model.modules()) > 20


def test_batch_norms_of_models_from_scratch_let_the_signal_through() -> None:
    detector = build_detector("rt_detr_v2_small", CATEGORIES, image_size=None, seed=0)
    norms = [module for module in detector.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 50
    assert all((norm.weight == 1).all() and norm.weight.requires_grad for norm in norms)


STEMS = {
    "detr_tiny": ("backbone.model.embedder.", "backbone.model.encoder.stages.0."),
    "rt_detr_tiny": ("backbone.model.embedder.", "backbone.model.encoder.stages.0."),
    "deimv2_tiny": ("conv_encoder.model.embedder.", "conv_encoder.model.encoder.stages.0."),
    "lw_detr_tiny": ("backbone.backbone.embeddings.",),
    "rf_detr_tiny": ("backbone.backbone.embeddings.",),
    "yolos_tiny": ("vit.embeddings.", "vit.encoder.interpolation."),
}


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", TINY)
def test_frozen_part_of_the_backbone(name: str) -> None:
    detector = build_detector(name, CATEGORIES, image_size=96, seed=0, freeze_backbone="all")
    model = detector.model
    backbone, fixed = backbone_parameter_names(model), {"model.decoder.reg_scale", "model.decoder.up"}
    everything = {key for key, _ in model.named_parameters()} - fixed
    assert learning(model) == everything - backbone
    freeze_backbone(model, "none")
    assert learning(model) == everything
    freeze_backbone(model, "stem")
    stem = everything - learning(model)
    assert stem < backbone
    assert len(stem) > 1
    if name in STEMS:
        prefixes = tuple(prefix if name == "yolos_tiny" else f"model.{prefix}" for prefix in STEMS[name])
        assert stem == {key for key in backbone if key.startswith(prefixes)}
        assert all(any(key.startswith(prefix) for key in stem) for prefix in prefixes)


def test_unfreezing_leaves_frozen_batch_norms_alone() -> None:
    options: dict[str, Any] = {"image_size": 96, "seed": 0, "batch_norm": "freeze"}
    model = build_detector("rt_detr_tiny", CATEGORIES, freeze_backbone="all", **options).model
    freeze_backbone(model, "none")
    assert learning(model) == learning(build_detector("rt_detr_tiny", CATEGORIES, **options).model)
    norms = [module for module in model.model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())


def test_backbone_of_timm_loads_and_freezes(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": "resnet18"}
    config = DetrConfig(
        backbone_config=None,
        num_queries=20,
        id2label={index: category.name for index, category in enumerate(CATEGORIES)},
        d_model=32,
        **sizes,
    )
    saved = DetrForObjectDetection(config)
    saved.save_pretrained(tmp_path)
    detector = build_detector(str(tmp_path), CATEGORIES, image_size=64, seed=0, freeze_backbone="stem")
    assert detector.notes == ()
    weights = saved.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in detector.model.state_dict().items())
    backbone = backbone_parameter_names(detector.model)
    frozen = backbone - learning(detector.model)
    places = {key: key.removeprefix("model.backbone.model.").split(".")[0] for key in backbone}
    assert set(places.values()) == {"conv1", "layer1", "layer2", "layer3", "layer4"}
    assert frozen == {key for key, place in places.items() if place in ("conv1", "layer1")}
    freeze_backbone(detector.model, "all")
    assert not backbone & learning(detector.model)
    freeze_backbone(detector.model, "none")
    assert backbone <= learning(detector.model)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for is_on in (False, True):
        detector = build_detector("detr_tiny", CATEGORIES, image_size=96, seed=0, gradient_checkpointing=is_on)
        detector.model.train()
        batch = as_batch(detector, random_pictures([(96, 96)] * 2))
        torch.manual_seed(0)
        detector.model(**detector.model_inputs(batch), labels=batch.labels).loss.backward()
        assert any(getattr(module, "gradient_checkpointing", False) for module in detector.model.modules()) == is_on
        gradients.append([parameter.grad for parameter in detector.model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_frozen_batch_norms_stay_as_they_are_in_training(tmp_path: Path) -> None:
    detector = build("rt_detr_tiny", batch_norm="freeze")
    norms = [module for module in detector.model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    detector.model.train()
    detector.model(**detector.model_inputs(as_batch(detector, random_pictures([(80, 80)] * 2))))
    after = [norm.running_mean for norm in norms if norm.running_mean is not None]
    assert before
    assert all(torch.equal(then, now) for then, now in zip(before, after, strict=True))
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    detector.save(str(tmp_path))
    reopened = load_detector(str(tmp_path))
    assert all(
        torch.equal(value, reopened.model.state_dict()[key]) for key, value in detector.model.state_dict().items()
    )


class TestFineTuning:
    def test_same_classes_keep_the_head(self, tmp_path: Path) -> None:
        old = build("rt_detr_v2_tiny")
        old.save(str(tmp_path))
        new = build_detector(str(tmp_path), CATEGORIES, image_size=64, seed=9)
        weights = old.model.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in new.model.state_dict().items())
        assert old.notes == new.notes == ()
        assert new.resize_rule.size_hw == (64, 64)

    @pytest.mark.parametrize("name", TINY)
    @pytest.mark.parametrize("num_classes", [3, 5])
    def test_other_classes_get_a_new_head(
        self, name: str, num_classes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = build(name)
        old.save(str(tmp_path))
        categories = [Category(number, f"thing {number}") for number in range(num_classes)]
        with caplog.at_level(logging.INFO, "raydet"):
            new = build_detector(str(tmp_path), categories, image_size=None, seed=9)
        again = build_detector(str(tmp_path), categories, image_size=None, seed=9)
        weights, again_weights = old.model.state_dict(), again.model.state_dict()
        changed = set()
        for key, value in new.model.state_dict().items():
            assert torch.equal(value, again_weights[key]), key
            if value.shape != weights[key].shape or not torch.equal(value, weights[key]):
                changed.add(key)
        assert changed
        assert all("class" in key or "score_head" in key for key in changed), changed
        assert "classes that start anew" in caplog.text
        assert "thing 0" in caplog.text
        assert new.model.config.id2label == {index: item.name for index, item in enumerate(categories)}
        assert new.resize_rule == old.resize_rule
        found_in(new, random_pictures([(80, 80)]))

    def test_auxiliary_losses_are_on(self) -> None:
        for name in TINY:
            detector = build(name)
            assert getattr(detector.model.config, "auxiliary_loss", False) == (name != "yolos_tiny")


def test_nothing_but_the_log_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_detector("detr_tiny", CATEGORIES, image_size=96, seed=0).save(str(tmp_path))
    build_detector(str(tmp_path), [Category(1, "one")], image_size=64, seed=0)
    load_detector(str(tmp_path))
    assert capfd.readouterr() == ("", "")


class TestMistakes:
    def fails(self, name: str, message: str, image_size: int | None = 96) -> None:
        with pytest.raises(UserError, match=message) as caught:
            build_detector(name, CATEGORIES, image_size=image_size, seed=0)
        assert "\n" not in str(caught.value)

    def test_unknown_name_lists_the_small_models(self) -> None:
        self.fails("rt_detr_huge", "rt_detr_huge.*rt_detr_v2_small")
        with pytest.raises(UserError, match="runs/x/checkpoint"):
            load_detector("runs/x/checkpoint")

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        self.fails(str(tmp_path), r"config\.json")

    def test_hub_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        self.fails("nobody/nothing", "no folder nobody/nothing, and the Hub cannot be reached")

    @pytest.mark.parametrize(
        ("model_type", "product"), [("pp_doclayout_v3", "PP-DocLayout"), ("pp_ocrv5_server_det", "PP-OCR")]
    )
    def test_detector_that_transformers_cannot_train(self, model_type: str, product: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        self.fails(str(tmp_path), rf"{product}.*{model_type}.*rt_detr_v2")

    def test_every_detector_of_transformers_is_known(self) -> None:
        for model_type in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            if model_type not in FAMILIES:
                with pytest.raises(UserError, match="transformers"):
                    family_of(model_type, where="x")
        assert FAMILIES.keys() <= MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.keys()
        assert len(FAMILIES) == 12

    @pytest.mark.parametrize("model_type", ["bert", "resnet"])
    def test_model_that_is_no_trainable_detector(self, model_type: str, tmp_path: Path) -> None:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        self.fails(str(tmp_path), f"{model_type}.*rt_detr_v2")

    def test_model_type_that_transformers_does_not_know(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "fcos"}')
        self.fails(str(tmp_path), "fcos")

    def test_broken_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        self.fails(str(tmp_path), "JSON")

    def test_folder_without_weights_or_with_broken_ones(self, tmp_path: Path) -> None:
        build("detr_tiny").save(str(tmp_path))
        (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
        self.fails(str(tmp_path), "cannot read")
        (tmp_path / "model.safetensors").unlink()
        self.fails(str(tmp_path), r"model\.safetensors")

    def test_a_checkpoint_that_is_not_whole_is_not_scored_with(self, tmp_path: Path) -> None:
        detector = build("rt_detr_v2_tiny")
        detector.save(str(tmp_path))
        weights = load_file(tmp_path / "model.safetensors")
        (head,) = [name for name in weights if name.endswith("enc_score_head.weight")]
        for change, message in (
            ({head: torch.zeros(7, *weights[head].shape[1:])}, "1 weights.*enc_score_head"),
            (dict.fromkeys(weights), "weights"),
        ):
            changed = {name: value for name, value in (weights | change).items() if value is not None}
            save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
            with pytest.raises(UserError, match=message):
                load_detector(str(tmp_path))

    def test_checkpoint_without_class_names(self, tmp_path: Path) -> None:
        build("detr_tiny").save(str(tmp_path))
        content = json.loads((tmp_path / "config.json").read_text())
        for key in ("raydet", "id2label", "label2id"):
            del content[key]
        (tmp_path / "config.json").write_text(json.dumps(content | {"num_labels": 3}))
        with pytest.raises(UserError, match="id2label"):
            load_detector(str(tmp_path))

    def test_folder_without_a_processor_gets_the_default_one(self, tmp_path: Path) -> None:
        build("rt_detr_v2_tiny").save(str(tmp_path))
        (tmp_path / "preprocessor_config.json").unlink()
        assert load_detector(str(tmp_path)).resize_rule.size_hw == (640, 640)

    def test_unfit_image_size(self) -> None:
        self.fails("rt_detr_v2_tiny", "--image-size.*32.*rt_detr_v2_tiny.*100", 100)
        self.fails("rt_detr_v2_small", "--image-size must be at least 96 for rt_detr_v2_small, got 64", 64)
        build_detector("detr_tiny", CATEGORIES, image_size=100, seed=0)

    def test_gradient_checkpointing_that_transformers_lacks(self) -> None:
        with pytest.raises(UserError, match=r"--gradient-checkpointing.*rt_detr_tiny"):
            build_detector("rt_detr_tiny", CATEGORIES, image_size=96, seed=0, gradient_checkpointing=True)

    def test_sizes_that_windows_do_not_fit_into(self, tmp_path: Path) -> None:
        self.fails("lw_detr_tiny", "--image-size.*32.*lw_detr_tiny.*80", 80)
        self.fails("rf_detr_tiny", "--image-size must be at least 96 for rf_detr_tiny, got 64", 64)
        build("lw_detr_tiny").save(str(tmp_path))
        (tmp_path / "preprocessor_config.json").unlink()
        self.fails(str(tmp_path), "aspect ratio.*32.*--image-size", None)
        build_detector(str(tmp_path), CATEGORIES, image_size=128, seed=0)

    def test_no_categories(self) -> None:
        with pytest.raises(UserError, match="without classes"):
            build_detector("detr_tiny", [], image_size=None, seed=0)

    def test_weights_are_only_read_as_safetensors(self, tmp_path: Path) -> None:
        detector = build("detr_tiny")
        detector.save(str(tmp_path))
        (tmp_path / "model.safetensors").unlink()
        torch.save(detector.model.state_dict(), tmp_path / "pytorch_model.bin")
        self.fails(str(tmp_path), "cannot read")
        shutil.rmtree(tmp_path)
