"""Recipes: every row resolves to a consistent config, and what the user gives wins."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydet import TrainConfig, UserError
from raydet.augmentation.transforms import check_augmentation
from raydet.config import DECIDED_OPTIONS, ResolvedTrainConfig, identity
from raydet.config.options import load_file
from raydet.models.families import FAMILIES
from raydet.models.optim.schedules import check_schedule
from raydet.models.processors import side_multiple
from raydet.models.recipes.facts import check_side
from raydet.models.recipes.resolve import GIVEN, begun_values, default_space, resolve
from raydet.models.recipes.table import RECIPES
from raydet.models.recipes.variants import variant_of
from raydet.models.small import SMALL_MODELS

SIZES = (40, 1_000, 118_000)
FAMILY_MODELS = {model.model_type: name for name, model in SMALL_MODELS.items()}
PLAIN: dict[str, Any] = {
    "epochs": 50, "batch_size": 8, "learning_rate": 1e-4, "num_workers": 1, "multi_scale": [],
    "freeze_backbone": "none", "batch_norm": "as_is", "backbone_learning_rate": None, "layer_decay": 1.0,
    "learning_rate_factors": {}, "weight_decay": 1e-4, "warmup_steps": 0, "max_grad_norm": 0.1,
    "gradient_accumulation_steps": 1, "precision": "fp32", "ema_decay": 0.0, "ema_rise_steps": 300,
    "augmentation": "light", "close_mosaic": 0, "validate_every": 1, "early_stopping_patience": 0,
}  # fmt: skip
"""The values of `--recipe none`: those of the first version."""


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"train_data": "t", "val_data": "v", "out": "o", **changes})


def _resolve(num_images: int = 1_000, num_gpus: int = 0, begun: Any = None, **changes: Any) -> ResolvedTrainConfig:
    return resolve(_config(**changes), num_images=num_images, gpus=lambda: num_gpus, begun=begun).config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model folder of each family, with a config and without weights."""
    folders = {}
    for model_type, name in FAMILY_MODELS.items():
        folder = tmp_path_factory.mktemp(model_type)
        SMALL_MODELS[name].make_config().save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")
        folders[model_type] = str(folder)
    return folders


@pytest.mark.parametrize("recipe", ["auto", "none"])
def test_adapters_learn_at_the_rate_of_the_head_in_a_frozen_backbone(checkpoints: dict[str, str], recipe: Any) -> None:
    resolved = _resolve(model=checkpoints["rf_detr"], lora={"r": 8}, learning_rate=2e-4, recipe=recipe)
    assert (resolved.freeze_backbone, resolved.layer_decay, resolved.backbone_rate) == ("all", 1.0, 2e-4)
    given = _resolve(model=checkpoints["rf_detr"], lora={"r": 8}, backbone_learning_rate=1e-3, recipe=recipe)
    assert given.backbone_rate == 1e-3


@pytest.mark.parametrize("is_pretrained", [True, False], ids=["pretrained", "scratch"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_has_a_consistent_recipe(
    checkpoints: dict[str, str], model_type: str, is_pretrained: bool
) -> None:
    model = checkpoints[model_type] if is_pretrained else FAMILY_MODELS[model_type]
    multiple = side_multiple(SMALL_MODELS[FAMILY_MODELS[model_type]].make_config(), FAMILIES[model_type])
    for num_images in SIZES:
        for num_gpus in (0, 4):
            config = _resolve(num_images, num_gpus, model=model)
            num_steps = -(-num_images // config.batch_size) * config.epochs
            assert 0 <= config.warmup_steps <= num_steps / 10
            assert all(side % multiple == 0 and side >= 32 for side in config.multi_scale)
            assert 0.9 < config.ema_decay < 1 and 100 <= config.ema_rise_steps <= 2000
            assert 12 <= config.epochs <= 150 and config.close_mosaic <= config.epochs / 2
            assert 0 < config.learning_rate <= 1e-3 and 0 < config.backbone_rate <= config.learning_rate
            assert config.precision == ("bf16" if num_gpus else "fp32")
            assert config.num_workers == max(1, num_gpus)
            assert config.freeze_backbone == "none" or is_pretrained
            check_schedule(config)
            check_augmentation(config.augmentation)
    few, many = (_resolve(num_images, model=model).epochs for num_images in (40, 118_000))
    assert few > many


def test_every_row_names_its_source() -> None:
    assert set(RECIPES) == set(FAMILIES)
    rows = {key: recipe for recipes in RECIPES.values() for key, recipe in recipes.items()}
    for key, recipe in rows.items():
        assert key == "small" or re.match(r"[\w.-]+/[\w.-]+: \S+\.(yml|py|sh|json|md)", recipe.source), recipe.source


@pytest.mark.parametrize(
    ("model_type", "content", "variant"),
    [
        ("rt_detr", {"backbone_config": {"depths": [2, 2, 2, 2], "layer_type": "basic"}}, "r18"),
        ("rt_detr_v2", {"backbone_config": {"depths": [3, 4, 6, 3], "layer_type": "basic"}}, "r34"),
        ("rt_detr_v2", {"backbone_config": {}}, "r50"),
        ("rt_detr", {"backbone_config": {"depths": [3, 4, 23, 3]}}, "r101"),
        ("rt_detr", {"backbone": "resnet18d.ra2_in1k"}, "r18"),
        ("rt_detr_v2", {"encoder_hidden_dim": 64}, "small"),
        ("d_fine", {"encoder_hidden_dim": 128, "decoder_layers": 3}, "n"),
        ("d_fine", {"decoder_layers": 3}, "s"),
        ("d_fine", {"decoder_layers": 4}, "m"),
        ("d_fine", {}, "l"),
        ("d_fine", {"encoder_hidden_dim": 384}, "x"),
        ("deimv2", {"encoder_hidden_dim": 64, "decoder_layers": 3}, "atto"),
        ("deimv2", {"encoder_hidden_dim": 112, "decoder_layers": 3}, "pico"),
        ("deimv2", {"backbone_config": {"model_type": "dinov3_vit"}, "encoder_hidden_dim": 192}, "dinov3_s"),
        ("deimv2", {"backbone_config": {"model_type": "dinov3_vit"}, "encoder_hidden_dim": 224}, "dinov3_l"),
        ("deimv2", {"backbone_config": {"model_type": "dinov3_vit"}}, "dinov3_x"),
        ("lw_detr", {"backbone_config": {"hidden_size": 192}}, "small"),
        ("lw_detr", {"backbone_config": {"hidden_size": 384}}, "medium"),
        ("lw_detr", {"d_model": 384}, "xlarge"),
        ("yolos", {"hidden_size": 192}, "tiny"),
        ("yolos", {}, "base"),
        ("detr", {}, ""),
    ],
)
def test_the_size_of_a_model_is_read_from_its_config(model_type: str, content: dict[str, Any], variant: str) -> None:
    assert variant_of(model_type, content) == variant
    assert variant in RECIPES[model_type]


def test_none_gives_the_values_of_the_first_version() -> None:
    assert set(PLAIN) == set(DECIDED_OPTIONS)
    for config in (
        _resolve(recipe="none", model="not read"),
        ResolvedTrainConfig(train_data="t", val_data="v", out="o"),
    ):
        assert {name: getattr(config, name) for name in PLAIN} == PLAIN
    assert _resolve(recipe="none", epochs=3).epochs == 3


def test_zoom_out_and_crops_are_for_long_runs(checkpoints: dict[str, str]) -> None:
    def preset(model_type: str, epochs: int) -> Any:
        return _resolve(40, model=checkpoints[model_type], epochs=epochs).augmentation

    assert [preset("rt_detr_v2", epochs) for epochs in (36, 100, 101)] == ["light", "light", "rtdetr"]
    assert [preset("d_fine", epochs) for epochs in (36, 101)] == ["light", "dfine"]
    assert preset("detr", 36) == "detr"


def test_what_the_user_gives_wins(checkpoints: dict[str, str]) -> None:
    given = PLAIN | {"backbone_learning_rate": 3e-5, "num_workers": 2}
    resolved = resolve(_config(model=checkpoints["deformable_detr"], **given), num_images=1_000, gpus=lambda: 8)
    assert {name: getattr(resolved.config, name) for name in given} == given
    assert set(resolved.sources.values()) == {GIVEN}


def test_rates_follow_the_batch_and_the_rest_follows_what_is_given(checkpoints: dict[str, str]) -> None:
    model = checkpoints["deformable_detr"]  # 2e-4 at a batch of 32
    assert [_resolve(model=model, batch_size=size).learning_rate for size in (8, 32, 64)] == [5e-5, 2e-4, 4e-4]
    config = _resolve(model=model, learning_rate=1e-3)
    assert config.backbone_rate == 1e-4
    assert config.learning_rate_factors == {"sampling_offsets": 0.1, "reference_points": 0.1}
    assert _resolve(model=model, epochs=1).warmup_steps == 12  # of 125 steps
    assert _resolve(model=model, schedule="one_cycle").warmup_steps == 0
    assert _resolve(model=model, compile=True).multi_scale == []
    assert len(_resolve(model=model).multi_scale) > 1
    # 20 queries need more than the 16 cells of 64 pixels.
    assert min(_resolve(model=checkpoints["rf_detr"], image_size=128).multi_scale) == 96


def test_a_damaged_config_neither_hangs_nor_ends_in_a_traceback(checkpoints: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["rf_detr"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())

    def sides(**wrong: Any) -> list[int]:
        file.write_text(json.dumps({**content, **wrong}))
        return _resolve(model=str(tmp_path / "model"), image_size=128).multi_scale

    assert sides(num_queries=10**18) == []
    with pytest.raises(UserError, match=r"cannot read the config of .*model: "):
        sides(num_queries=None)

    strides = {**json.loads((Path(checkpoints["rt_detr_v2"]) / "config.json").read_text()), "feat_strides": [0, 0, 0]}
    file.write_text(json.dumps(strides))
    check_side("image-size", 128, str(tmp_path / "model"), FAMILIES["rt_detr_v2"])  # the workers refuse it


def test_the_number_of_workers_decides_micro_batches_only(checkpoints: dict[str, str]) -> None:
    model = checkpoints["detr"]
    one, many = (vars(_resolve(10_000, number, model=model)) for number in (1, 8))
    assert {name for name in one if one[name] != many[name]} == {"num_workers", "gradient_accumulation_steps"}
    assert (one["gradient_accumulation_steps"], many["gradient_accumulation_steps"]) == (4, 1)


def test_a_run_that_has_begun_keeps_its_values(checkpoints: dict[str, str]) -> None:
    model = checkpoints["rt_detr"]
    first = resolve(_config(model=model, batch_size=4), num_images=100, gpus=lambda: 0)
    begun = begun_values(identity(first.config), first.sources)
    assert "batch_size" not in begun and "warmup_steps" in begun
    again = resolve(_config(model=model, batch_size=4, epochs=300), num_images=9_000, gpus=lambda: 1, begun=begun)
    assert identity(again.config) == identity(first.config) and again.config.epochs == 300
    assert {name: source for name, source in again.sources.items() if name in begun} == {
        name: source for name, (_, source) in begun.items()
    }


def test_the_yaml_names_sources_and_is_a_config(checkpoints: dict[str, str]) -> None:
    resolved = resolve(_config(model=checkpoints["rf_detr"], epochs=7), num_images=1_000, gpus=lambda: 0)
    text = resolved.to_yaml()
    assert TrainConfig(**yaml.safe_load(text)) == TrainConfig(**vars(resolved.config))
    assert "epochs: 7  # given\n" in text
    assert re.search(r"^learning_rate: 5.0e-05  # 0.0001 at a batch of 16, scaled to 8: rf_detr \(roboflow", text, re.M)
    lines = text.splitlines()
    assert all(any(line.startswith(f"{name}:") and "  # " in line for line in lines) for name in DECIDED_OPTIONS)


def test_a_model_from_scratch_on_few_images_gets_what_works_and_advice() -> None:
    resolved = resolve(_config(image_size=256), num_images=205, gpus=lambda: 0)
    config = resolved.config
    assert (config.learning_rate, config.backbone_rate, config.batch_size, config.warmup_steps) == (1e-3, 1e-3, 8, 52)
    assert 60 <= config.epochs <= 80 and 0.99 < config.ema_decay < 0.997 and config.max_grad_norm == 0.1
    assert "pretrained" in resolved.lines[1] and "pretrained" in resolved.advice


def test_the_run_file_of_bccd_means_what_its_benchmark_measured() -> None:
    path = Path(__file__).parents[3] / "jobs" / "configs" / "bccd.yaml"
    given = load_file(TrainConfig, str(path), train_data="t", val_data="v", out="o")
    config = resolve(given, num_images=205, gpus=lambda: 0).config
    measured = {"epochs": 60, "batch_size": 8, "learning_rate": 1e-3, "backbone_learning_rate": 1e-3, "close_mosaic": 4}
    assert {name: getattr(config, name) for name in measured} == measured
    assert config.warmup_steps == pytest.approx(50, abs=2) and config.ema_decay == pytest.approx(0.995, abs=2e-4)
    assert config.ema_rise_steps == pytest.approx(300, abs=15) and config.max_grad_norm == 0.1


def test_a_space_lies_around_the_recipe(checkpoints: dict[str, str]) -> None:
    config = _resolve(model=checkpoints["rt_detr"])
    space = default_space(config)
    low, high = space["learning_rate"]["loguniform"]
    assert low == pytest.approx(config.learning_rate / 3) and high == pytest.approx(config.learning_rate * 3)
    assert space["augmentation"]["choice"][0] == config.augmentation


def test_unknown_models_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_model"):
        _resolve(model="no_such_model")
