"""Low-rank adapters in each family with a vision transformer: what they change, merge, and save for plain peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForObjectDetection

from raydet.common.errors import UserError
from raydet.models.adapters.lora import adapted_layers, merged, num_trained
from raydet.models.backbone import backbone_parameter_names
from raydet.models.checkpoints import check_local_config
from raydet.models.collate import collate
from raydet.models.detector import Detector
from raydet.models.loading import build_detector, load_detector
from raydet.models.step import StepSetting, apply_gradients, compute_gradients
from raydet.tables.schema import Category
from tests.random_examples import random_examples
from tests.vision_transformers import NAMES, save_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

# One class of the checkpoint keeps its rows, the other is new.
CATEGORIES = (Category(1, "dog"), Category(2, "bus"))
SIDE = 96


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save_pretrained(request.param, tmp_path / "base", side=SIDE)


def _adapted(base: str, **options: float) -> Detector:
    return build_detector(base, CATEGORIES, image_size=None, seed=0, freeze_backbone="all", lora={"r": 4, **options})


def _train(detector: Detector, steps: int = 2) -> None:
    trained = [parameter for parameter in detector.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, fused=True)
    setting = StepSetting(device=torch.device("cpu"), autocast_dtype=None, world_size=1)
    detector.model.train()
    for _ in range(steps):
        compute_gradients(detector, detector.model, [collate(random_examples(2, SIDE))], setting)
        apply_gradients(detector.model, optimizer, max_grad_norm=1.0)
    detector.model.eval()


def _outputs(model: nn.Module) -> Mapping[str, torch.Tensor]:
    pixels = torch.rand((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs: Any = model.eval()(pixel_values=pixels)
    return {"logits": outputs.logits, "boxes": outputs.pred_boxes}


def _assert_close(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-5)


def test_plain_peft_and_the_merged_checkpoint_give_the_same_outputs(base: str, tmp_path: Path) -> None:
    detector = _adapted(base)
    _train(detector)
    (tmp_path / "adapter").mkdir()
    detector.save_adapter(str(tmp_path / "adapter"), base=base)
    detector.save(str(tmp_path / "merged"))
    expected = _outputs(load_detector(str(tmp_path / "merged")).model)
    _assert_close(_outputs(detector.model), expected)
    _assert_close(_outputs(AutoModelForObjectDetection.from_pretrained(tmp_path / "merged")), expected)

    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    plain = AutoModelForObjectDetection.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    before = _outputs(plain)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    _assert_close(_outputs(adapted), expected)
    _assert_close(_outputs(adapted.merge_and_unload()), expected)
    assert (before["boxes"] - expected["boxes"]).abs().max() > 1e-3, "the training must have changed something"

    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == base and content["inference_mode"] and content["peft_type"] == "LORA"
    merged_names = torch.nn.Module.state_dict(load_detector(str(tmp_path / "merged")).model).keys()
    assert not [name for name in merged_names if "lora" in name or "base_layer" in name]
    with pytest.raises(UserError, match="holds an adapter of another model"):
        check_local_config(str(tmp_path / "adapter"))


def test_adapters_start_as_the_model_and_train_beside_a_frozen_backbone(base: str) -> None:
    plain = build_detector(base, CATEGORIES, image_size=None, seed=0)
    detector = _adapted(base, alpha=4)
    _assert_close(_outputs(detector.model), _outputs(plain.model))
    backbone = backbone_parameter_names(plain.model)
    own = {name: value.clone() for name, value in detector.model.named_parameters()}
    trained = {name for name, value in detector.model.named_parameters() if value.requires_grad}
    in_adapters = {name for name in trained if "lora_" in name}
    assert trained - in_adapters == {name for name, _ in plain.model.named_parameters()} - backbone
    layers = adapted_layers(detector.model)
    assert len(in_adapters) == 2 * len(layers) > 12 and all(
        layer.scaling == {"default": 1.0} for layer in layers.values()
    )
    assert in_adapters <= backbone_parameter_names(detector.model)
    assert f"trains {num_trained(detector.model):,} parameters" in detector.notes[-1]

    _train(detector)
    now = dict(detector.model.named_parameters())
    assert {name for name, value in own.items() if not torch.equal(now[name], value)} >= in_adapters
    assert all(torch.equal(now[name], value) for name, value in own.items() if name not in trained)


# The targets of DEIMv2's layers depend on all images of a micro-batch, with adapters or without.
@pytest.mark.parametrize("name", NAMES[:3])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name: str, tmp_path: Path) -> None:
    detector = _adapted(save_pretrained(name, tmp_path, side=SIDE))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # breaks the symmetry of new heads, with which matching is ambiguous
        for parameter in detector.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    detector.model.train()
    for module in detector.model.modules():
        if isinstance(module, nn.Dropout | nn.BatchNorm2d):
            module.eval()
        if isinstance(getattr(module, "dropout", None), float):
            setattr(module, "dropout", 0.0)  # noqa: B010, a probability in RF-DETR, a module elsewhere
    examples = random_examples(4, SIDE)
    setting = StepSetting(device=torch.device("cpu"), autocast_dtype=None, world_size=1)
    gradients = []
    for parts in ([examples], [examples[:1], examples[1:]]):
        for parameter in detector.model.parameters():
            parameter.grad = None
        compute_gradients(detector, detector.model, [collate(part) for part in parts], setting)
        own = [value.grad.flatten() for value in detector.model.parameters() if value.grad is not None]
        gradients.append(torch.cat(own))
    whole, cut = gradients
    assert len(whole) == num_trained(detector.model) and (cut - whole).norm() <= 1e-5 * whole.norm()


def test_merging_for_a_while_changes_no_bit(base: str) -> None:
    detector = _adapted(base, dropout=0.1)
    _train(detector)
    state = {name: value.clone() for name, value in detector.model.state_dict().items()}
    expected = _outputs(detector.model)
    with merged(detector.model):
        assert adapted_layers(detector.model) == {}
        _assert_close(_outputs(detector.model), expected)
    after = detector.model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.slow
def test_merging_again_compiles_nothing_again(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter  # takes a second to import

    detector, counter = _adapted(save_pretrained("rf_detr_tiny", tmp_path, side=SIDE)), CompileCounter()
    detector.compile(backend=counter)
    graphs = []
    for _ in range(3):
        _outputs(detector.model)
        with merged(detector.model):
            _outputs(detector.model)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert 0 < graphs[0] == graphs[1] == graphs[2]


def test_seeds_decide_the_adapters(tmp_path: Path) -> None:
    base = save_pretrained("rf_detr_tiny", tmp_path, side=SIDE)
    first, second = (_adapted(base).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_backbone_without_linear_layers_or_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the backbone of rt_detr_tiny has no linear layers"):
        build_detector("rt_detr_tiny", CATEGORIES, image_size=SIDE, seed=0, lora={"r": 4})
    base = save_pretrained("yolos_tiny", tmp_path, side=SIDE)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vit.layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"complete backbone to adapt, but .* lacks vit\.layernorm\.weight"):
        _adapted(base)
