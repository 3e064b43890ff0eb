"""Detectors that share the weights of their base: equal to merged models, and no adapter of another base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raydet.common.errors import UserError
from raydet.models.adapted.layers import AdaptedLinear
from raydet.models.adapted.loading import load_adapted
from raydet.models.adapters.description import ADAPTER_WEIGHTS, read_adapters
from raydet.models.loading import load_detector
from tests.adapted_models import RANK, save_adapted
from tests.vision_transformers import NAMES, save_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 96
CLASSES = {"pets": ("dog", "bus"), "cars": ("car", "van", "cat", "dog")}


def _outputs(model: nn.Module, **autocast: Any) -> list[torch.Tensor]:
    pixels = torch.rand((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), torch.autocast("cpu", **autocast or {"enabled": False}):
        outputs: Any = model(pixel_values=pixels)
    return [outputs.logits, outputs.pred_boxes]


@pytest.mark.parametrize("name", [*NAMES[:3], pytest.param(NAMES[3], marks=pytest.mark.slow)])
def test_each_detector_is_the_merged_model_and_frozen_weights_are_in_memory_once(name: str, tmp_path: Path) -> None:
    base = save_pretrained(name, tmp_path / "base", side=SIDE)
    saved = {
        run: save_adapted(base, tmp_path / run, classes, seed=seed)
        for seed, (run, classes) in enumerate(CLASSES.items())
    }
    adapters = read_adapters([adapter for adapter, _ in saved.values()])
    assert [adapter.name for adapter in adapters] == sorted(CLASSES)
    detectors = list(load_adapted(base, adapters))
    for adapter, detector in zip(adapters, detectors, strict=True):
        merged = load_detector(saved[adapter.name][1])
        assert [category.name for category in detector.categories] == list(CLASSES[adapter.name])
        assert detector.categories == merged.categories and detector.resize_rule == merged.resize_rule
        for autocast in ({}, {"dtype": torch.bfloat16}):
            for mine, its in zip(_outputs(detector.model, **autocast), _outputs(merged.model, **autocast), strict=True):
                assert torch.equal(mine, its)
    cars, pets = (dict(detector.model.named_parameters()) for detector in detectors)
    shared = {each for each in cars if each in pets and cars[each] is pets[each]}
    layers = {each for each, module in detectors[0].model.named_modules() if isinstance(module, AdaptedLinear)}
    assert len(layers) > 4 and {f"{layer}.weight" for layer in layers} < shared
    assert not torch.equal(_outputs(detectors[0].model)[1], _outputs(detectors[1].model)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Folders of a base, of an adapter and of the merged model."""
    folder = tmp_path_factory.mktemp("run")
    base = save_pretrained("rf_detr_tiny", folder / "base", side=SIDE)
    return base, *save_adapted(base, folder / "pets", CLASSES["pets"], seed=0)


def _load(base: str, *uris: str) -> None:
    list(load_adapted(base, read_adapters(uris)))


def test_an_adapter_of_other_weights_is_refused(run: tuple[str, str, str], tmp_path: Path) -> None:
    _, adapter, merged = run
    with pytest.raises(UserError, match=r"frozen weights that are not those of the base; it names .*/base as its base"):
        _load(merged, adapter)
    other = save_pretrained("rf_detr_tiny", tmp_path / "other", side=SIDE)
    _load(other, adapter)  # a copy of the base fits, wherever it lies
    path = tmp_path / "other" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("q_proj.weight") or "query.weight" in name)
    save_file({**weights, name: weights[name][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights or has them in another shape, such as .*weight; it"):
        _load(other, adapter)


def test_plain_folders_of_peft_need_no_config_of_raydet(run: tuple[str, str, str], tmp_path: Path) -> None:
    base, adapter, _ = run
    weights = load_file(Path(adapter, ADAPTER_WEIGHTS))
    own = json.loads(Path(adapter, "adapter_config.json").read_text())
    plain = tmp_path / "plain"
    plain.mkdir()

    def write(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
        save_file(tensors, plain / ADAPTER_WEIGHTS)
        (plain / "adapter_config.json").write_text(json.dumps({**own, **changes}))

    factors = {name: value for name, value in weights.items() if "lora_" in name}
    write(factors, use_rslora=True)
    (described,) = read_adapters([str(plain)])
    (detector,) = load_adapted(base, [described])
    assert described.scale == own["lora_alpha"] / RANK**0.5
    assert detector.categories == load_detector(base).categories
    name = next(name for name in factors if name.endswith("lora_A.weight"))
    for tensors, reason in (
        ({**factors, name: factors[name][:-1].clone()}, "its matrices do not fit the layers of the base, such as"),
        ({**factors, name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)}, "does not support"),
        (
            {**factors, "base_model.model.nowhere.lora_A.weight": torch.ones(4, 4)},
            "a layer that the base does not have",
        ),
        (weights, r"\d+ of its weights are unknown to the base or of another shape, such as"),
    ):
        write(tensors)
        with pytest.raises(UserError, match=reason):
            _load(base, str(plain))
    (plain / ADAPTER_WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"cannot read {ADAPTER_WEIGHTS}"):
        _load(base, str(plain))
    for changes, reason in (
        ({"peft_type": "IA3"}, "is of the type IA3"),
        ({"use_dora": True}, "uses use_dora of peft"),
        ({"r": "4"}, "states no rank r"),
    ):
        write(factors, **changes)
        with pytest.raises(UserError, match=reason):
            read_adapters([str(plain)])


def test_folders_that_hold_no_adapter_or_have_the_same_name_are_refused(
    run: tuple[str, str, str], tmp_path: Path
) -> None:
    _, adapter, merged = run
    parent = str(Path(adapter).parent)
    for uri, reason in (
        (merged, f"holds a whole model .*did you mean {adapter}"),
        (parent, f"holds no adapter .*did you mean {adapter}"),
        (str(tmp_path / "nothing"), "no such folder"),
        ("s3://bucket/adapter", "must be a local folder"),
    ):
        with pytest.raises(UserError, match=reason):
            read_adapters([uri])
    (tmp_path / "Pets").mkdir()
    (tmp_path / "Pets" / "adapter").symlink_to(adapter)
    with pytest.raises(UserError, match=r"pets/adapter and .*Pets/adapter would both write OUT/Pets"):
        read_adapters([adapter, str(tmp_path / "Pets" / "adapter")])
    (tmp_path / "_x").symlink_to(adapter)
    with pytest.raises(UserError, match="rename the folder"):
        read_adapters([str(tmp_path / "_x")])


def test_adapters_for_other_image_sizes_need_runs_of_their_own(run: tuple[str, str, str], tmp_path: Path) -> None:
    base, adapter, _ = run
    larger, _ = save_adapted(base, tmp_path / "larger", ("dog",), seed=1, image_size=2 * SIDE)
    with pytest.raises(UserError, match=r"takes images of 96 × 96 pixels, but .* of 192 × 192 pixels"):
        _load(base, adapter, larger)


def test_what_peft_itself_saves_gives_what_peft_itself_computes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForObjectDetection

    base = save_pretrained("yolos_tiny", tmp_path / "base", side=SIDE)
    options: dict[str, Any] = {"r": RANK, "lora_alpha": 3, "use_rslora": True, "init_lora_weights": False}
    options |= {"target_modules": r"vit\..*(query|intermediate.dense)", "modules_to_save": ["class_labels_classifier"]}
    model = get_peft_model(AutoModelForObjectDetection.from_pretrained(base), LoraConfig(bias="lora_only", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    model.save_pretrained(str(tmp_path / "mine"))
    (detector,) = load_adapted(base, read_adapters([str(tmp_path / "mine")]))
    for mine, its, before in zip(
        *(_outputs(each) for each in (detector.model, model.eval(), load_detector(base).model)), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)
        assert (its - before).abs().max() > 1e-2
