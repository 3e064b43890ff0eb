"""Training with low-rank adapters: the run folder, two workers, resuming, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForObjectDetection

from raydet import TrainConfig, UserError, train
from raydet.common import packages
from raydet.models.adapted.loading import load_adapted
from raydet.models.adapters.description import read_adapters
from raydet.models.small import SMALL_MODELS
from tests.outcomes import RecordingConsole, outcome_of_training
from tests.small_sets import tiny_training
from tests.vision_transformers import save_pretrained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pretrained("lw_detr_tiny", tmp_path_factory.mktemp("base"))


def _config(shapes: Path, base: str, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "model": base,
        "image_size": None,
        "epochs": 2,
        "schedule_epochs": 2,
        "ema_decay": 0.5,
        "max_failures": 0,
    }
    options |= {"learning_rate": 1e-3, "lora": {"r": 4}}
    return TrainConfig(out=str(out), **tiny_training(shapes, **{**options, **changes}))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_leaves_a_plain_checkpoint_and_its_adapter(shapes: Path, base: str, tmp_path: Path) -> None:
    console = RecordingConsole()
    result = train(_config(shapes, base, tmp_path / "run", num_workers=2), console=console)
    assert result.adapter == f"{result.out}/adapter" and f"adapter: {result.adapter}" in result.lines()
    (line,) = [line for line in console.lines if "LoRA of rank 4" in line]
    assert f"trains {result.history[-1].num_trained_parameters:,} parameters" in line
    assert json.loads(Path(result.adapter, "adapter_config.json").read_text())["base_model_name_or_path"] == base

    merged = AutoModelForObjectDetection.from_pretrained(result.checkpoint).eval()
    config = AutoConfig.from_pretrained(result.adapter)
    plain = AutoModelForObjectDetection.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    adapted = PeftModel.from_pretrained(plain, result.adapter).eval()
    pixels = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        expected, found = merged(pixel_values=pixels), adapted(pixel_values=pixels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    assert result.load(threads_per_worker=1) is not None
    (shared,) = load_adapted(base, read_adapters([result.adapter]))
    with torch.inference_mode():
        found = shared.model(pixel_values=pixels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.pred_boxes, expected.pred_boxes)
    with pytest.raises(UserError, match=r"frozen weights that are not those of the base; it names .* as its base"):
        list(load_adapted(result.checkpoint, read_adapters([result.adapter])))

    again = train(_config(shapes, base, tmp_path / "run", num_workers=2))
    assert again.already_done and again.adapter == result.adapter
    with pytest.raises(UserError, match=r"--lora: \{'r': 4\} → \{'r': 8\}"):
        train(_config(shapes, base, tmp_path / "run", lora={"r": 8}))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_resumes_gives_the_same_bits(shapes: Path, base: str, tmp_path: Path) -> None:
    whole = train(_config(shapes, base, tmp_path / "whole"))
    train(_config(shapes, base, tmp_path / "parts", epochs=1))
    parts = train(_config(shapes, base, tmp_path / "parts"))
    assert outcome_of_training(parts.out) == outcome_of_training(whole.out)
    assert whole.adapter and parts.adapter
    weights = [Path(adapter, "adapter_model.safetensors").read_bytes() for adapter in (parts.adapter, whole.adapter)]
    assert weights[0] == weights[1]


def test_models_without_a_pretrained_vision_transformer_are_refused(shapes: Path, tmp_path: Path) -> None:
    for model, reason in (
        ("rt_detr_v2_tiny", "use one of deimv2 with a dinov3, lw_detr, rf_detr, yolos, or --freeze-backbone all"),
        ("deimv2_tiny", "is a deimv2 model with another backbone"),
        ("yolos_tiny", "yolos_tiny is built from scratch"),
    ):
        assert model in SMALL_MODELS
        with pytest.raises(UserError, match=reason):
            train(_config(shapes, model, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_missing_package_is_one_line(
    shapes: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packages._PACKAGES, "lora", ("peft_is_not_here",))
    with pytest.raises(UserError, match=r'lora requires peft_is_not_here; run: pip install "raydet\[lora\]"'):
        train(_config(shapes, base, tmp_path / "run"))
