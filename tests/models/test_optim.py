"""Learning rates against independent formulas, parameter groups, and the moving average of the weights."""

import io
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from raydet.common.errors import UserError
from raydet.config import ResolvedTrainConfig, Schedule
from raydet.models.backbone import backbone_parameter_names
from raydet.models.loading import build_detector
from raydet.models.optim.moving_average import MovingAverage
from raydet.models.optim.optimizer import build_optimizer, parameter_groups
from raydet.models.optim.schedules import after_validation, build_schedule, check_schedule
from raydet.tables.schema import Category

EPOCHS, STEPS_PER_EPOCH, WARMUP = 4, 10, 8
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
RATES = {"backbone": 2e-4, "head": 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-5},
    "inverse_sqrt": {"timescale": 16},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 12, "decay_type": "linear", "min_lr_ratio": 0.1},
    "reduce_lr_on_plateau": {"patience": 1, "factor": 0.5},
    "one_cycle": {"pct_start": 0.25, "div_factor": 10.0, "final_div_factor": 100.0},
}


def _warm(step: int) -> float:
    return step / WARMUP


def _part(step: int) -> float:
    return (step - WARMUP) / (NUM_STEPS - WARMUP)


def _one_cycle(step: int) -> float:
    if step <= 9:  # a quarter of 40 steps, counted from 0
        return 0.55 - 0.45 * math.cos(math.pi * step / 9)
    return 1e-3 + (1 - 1e-3) * (0.5 + 0.5 * math.cos(math.pi * (step - 9) / 30))


FORMULAS: dict[str, Callable[[int], float]] = {
    "linear": lambda k: _warm(k) if k < WARMUP else 1 - _part(k),
    "cosine": lambda k: _warm(k) if k < WARMUP else math.cos(math.pi / 2 * _part(k)) ** 2,
    "cosine_with_restarts": lambda k: _warm(k) if k < WARMUP else math.cos(math.pi / 2 * (3 * _part(k) % 1)) ** 2,
    "polynomial": lambda k: _warm(k) if k < WARMUP else 0.01 + 0.99 * (1 - _part(k)) ** 2,
    "constant": lambda k: 1.0,
    "constant_with_warmup": lambda k: min(1.0, _warm(k)),
    "inverse_sqrt": lambda k: _warm(k) if k < WARMUP else math.sqrt(16 / (k + 8)),
    "reduce_lr_on_plateau": lambda k: min(1.0, _warm(k)),
    "cosine_with_min_lr": lambda k: _warm(k) if k < WARMUP else 0.1 + 0.9 * math.cos(math.pi / 2 * _part(k)) ** 2,
    "cosine_warmup_with_min_lr": lambda k: (
        0.2 + 0.8 * k / (WARMUP - 1) if k < WARMUP else 0.1 + 0.9 * math.cos(math.pi / 2 * _part(k + 1)) ** 2
    ),
    "warmup_stable_decay": lambda k: 0.1 + 0.9 * _warm(k) if k < WARMUP else 1.0 if k < 28 else 1 - 0.9 * (k - 28) / 12,
    "one_cycle": _one_cycle,
}


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.norm, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.backbone(values)))
        return result


def _config(**changes: Any) -> ResolvedTrainConfig:
    values: dict[str, Any] = {
        "train_data": "train",
        "val_data": "val",
        "out": "out",
        "epochs": EPOCHS,
        "learning_rate": RATES["head"],
        "backbone_learning_rate": RATES["backbone"],
    }
    return ResolvedTrainConfig(**{**values, **changes})


def _schedule_config(name: str, **changes: Any) -> ResolvedTrainConfig:
    warmup = 0 if name in ("constant", "one_cycle") else WARMUP
    return _config(schedule=name, schedule_options=OPTIONS.get(name), warmup_steps=warmup, **changes)


def _start(config: ResolvedTrainConfig) -> tuple[_Small, torch.optim.Optimizer, LambdaLR]:
    torch.manual_seed(0)
    model = _Small()
    optimizer = build_optimizer(model, config, {"backbone.weight", "backbone.bias"})
    return model, optimizer, build_schedule(optimizer, config, STEPS_PER_EPOCH)


def _take_step(model: _Small, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> dict[str, float]:
    """Take one real step and return the learning rate of each group in it."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    return rates


@pytest.mark.parametrize("name", get_args(Schedule))
def test_rates_follow_the_formula_also_through_a_resume_and_beyond_the_end(name: str) -> None:
    config = _schedule_config(name)
    model, optimizer, schedule = _start(config)
    rates = [_take_step(model, optimizer, schedule) for _ in range(17)]
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model, optimizer, schedule = _start(config)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    rates += [_take_step(model, optimizer, schedule) for _ in range(17, NUM_STEPS + 5)]
    for step, rate in enumerate(rates[:NUM_STEPS]):
        factor = FORMULAS[name](step)
        for group, value in rate.items():
            assert value == pytest.approx(RATES[group.removesuffix("_no_decay")] * factor, rel=1e-9, abs=1e-15), step
    if name != "inverse_sqrt":
        # A schedule for fewer epochs than the run has keeps its last rate.
        assert rates[-1] == pytest.approx(rates[NUM_STEPS]) and rates[-1]["head"] <= RATES["head"]
        assert rates[NUM_STEPS]["head"] <= rates[NUM_STEPS - 1]["head"] + 1e-12


def test_one_cycle_has_torchs_rates() -> None:
    for options in ({}, {"pct_start": 0.1, "anneal_strategy": "linear"}, {"div_factor": 5.0, "final_div_factor": 7.0}):
        _, optimizer, schedule = _start(_config(schedule="one_cycle", schedule_options=options))
        theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
        reference = torch.optim.lr_scheduler.OneCycleLR(
            theirs, max_lr=RATES["head"], total_steps=NUM_STEPS, cycle_momentum=False, **options
        )
        for step in range(NUM_STEPS):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.get_last_lr()[0], rel=1e-9), step
            optimizer.step()
            theirs.step()
            schedule.step()
            if step < NUM_STEPS - 1:
                reference.step()


@pytest.mark.parametrize("metric_name", ["AP", "loss"])
@pytest.mark.parametrize(
    "options", [{"patience": 1, "factor": 0.5, "min_lr": 5e-5}, {"cooldown": 2, "patience": 0, "factor": 0.6}]
)
def test_a_plateau_lowers_the_rate_as_torchs_does_also_through_a_resume(
    metric_name: str, options: dict[str, Any]
) -> None:
    config = _config(
        schedule="reduce_lr_on_plateau", schedule_options=options, metric_for_best_model=metric_name, epochs=30
    )
    model, optimizer, schedule = _start(config)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATES["head"])
    mode: Any = "min" if metric_name == "loss" else "max"
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, mode=mode, **options)
    seen = set()
    for number, metric in enumerate(np.random.default_rng(0).uniform(0.2, 0.3, 25).tolist()):
        _take_step(model, optimizer, schedule)
        after_validation(schedule, metric)
        after_validation(schedule, None)
        reference.step(metric)
        if number == 12:
            states = optimizer.state_dict(), schedule.state_dict()
            model, optimizer, schedule = _start(config)
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["head"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        assert rates["backbone"] == pytest.approx(max(rates["head"] / 5, options.get("min_lr", 0.0)), rel=1e-9)
        assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        seen.add(rates["head"])
    assert len(seen) >= 4


def test_a_validation_changes_no_other_schedule() -> None:
    _, optimizer, schedule = _start(_schedule_config("cosine"))
    before = [group["lr"] for group in optimizer.param_groups]
    after_validation(schedule, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == before


def test_schedule_epochs_lay_out_the_schedule() -> None:
    _, optimizer, schedule = _start(_config(schedule="linear", schedule_epochs=2))
    rates = []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[10] == pytest.approx(RATES["head"] / 2) and rates[20:] == [0.0] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear", "schedule_options": {"power": 2}}, "linear.*power"),
        ({"schedule": "polynomial", "schedule_options": {"pwr": 2}}, "polynomial.*pwr.*lr_end, power"),
        ({"schedule": "warmup_stable_decay"}, "warmup_stable_decay.*num_decay_steps"),
        ({"schedule": "one_cycle", "warmup_steps": 5}, "one_cycle"),
        ({"schedule": "constant", "warmup_steps": 5}, "constant_with_warmup"),
        ({"schedule": "one_cycle", "schedule_options": {"pct_start": 1.0}}, r"pct_start.*1\.0"),
        ({"schedule": "one_cycle", "schedule_options": {"div_factor": 0}}, "div_factor.*0"),
        ({"schedule": "one_cycle", "schedule_options": {"anneal_strategy": "x"}}, "anneal_strategy.*cos, linear.*x"),
        ({"schedule": "cosine", "schedule_options": {"num_cycles": "3"}}, "num_cycles.*3"),
        ({"schedule": "polynomial", "schedule_options": {"lr_end": 1.0}}, r"lr_end.*--learning-rate.*0\.001"),
        (
            {"schedule": "cosine_with_min_lr", "schedule_options": {"min_lr": 1e-5, "min_lr_rate": 0.1}},
            "min_lr.*min_lr_rate",
        ),
    ],
)
def test_wrong_options_are_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_schedule(_config(**changes))
    assert "\n" not in str(raised.value)


def test_a_decay_longer_than_the_run_is_refused() -> None:
    config = _config(schedule="warmup_stable_decay", schedule_options={"num_decay_steps": 500})
    check_schedule(config)
    with pytest.raises(UserError, match=r"500.*40"):
        _start(config)


def test_the_driver_can_check_a_schedule_without_torch() -> None:
    script = (
        "import sys, raydet.models.optim.schedules; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_groups_hold_every_trainable_parameter_once_with_its_rate_and_decay() -> None:
    model = _Small()
    model.head.bias.requires_grad_(False)
    groups: list[Any] = parameter_groups(model, _config(weight_decay=0.01), {"backbone.weight", "backbone.bias"})
    by_name = {group["name"]: group for group in groups}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in by_name.items()} == {
        "head_no_decay": (1e-3, 0.0),
        "head": (1e-3, 0.01),
        "backbone_no_decay": (2e-4, 0.0),
        "backbone": (2e-4, 0.01),
    }
    places = {id(parameter): name for name, group in by_name.items() for parameter in group["params"]}
    assert {name: places.get(id(parameter)) for name, parameter in model.named_parameters()} == {
        "backbone.weight": "backbone",
        "backbone.bias": "backbone_no_decay",
        "norm.weight": "head_no_decay",
        "norm.bias": "head_no_decay",
        "head.weight": "head",
        "head.bias": None,
    }
    tenth: list[Any] = parameter_groups(model, _config(backbone_learning_rate=None), {"backbone.weight"})
    assert [group["lr"] for group in tenth if group["name"] == "backbone"] == [pytest.approx(1e-4)]


@pytest.mark.parametrize("name", ["rf_detr_tiny", "lw_detr_tiny", "yolos_tiny"])
def test_layers_of_a_vision_transformer_learn_the_slower_the_deeper_they_lie(name: str) -> None:
    model = build_detector(name, [Category(1, "a")], image_size=None, seed=0).model
    config = _config(layer_decay=0.5)
    groups = parameter_groups(model, config, backbone_parameter_names(model))
    rates = {id(parameter): group["lr"] for group in groups for parameter in cast(list[nn.Parameter], group["params"])}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part, depth in (("patch_embed", 4), ("embeddings.projection", 4), (".layer.0.", 3), (".layer.2.", 1)):
        chosen = [rate for name, rate in found.items() if part in name and not name.startswith("model.decoder")]
        assert all(rate == pytest.approx(RATES["backbone"] / 2**depth) for rate in chosen), part
    assert all(rate == RATES["head"] for name, rate in found.items() if name.startswith(("model.decoder", "class")))


def test_factors_apply_to_parts_of_names_and_layer_decay_needs_a_transformer() -> None:
    model = build_detector("deformable_detr_tiny", [Category(1, "a")], image_size=None, seed=0).model
    names = backbone_parameter_names(model)
    groups = parameter_groups(model, _config(learning_rate_factors={"sampling_offsets": 0.1}), names)
    slow = [cast(list[nn.Parameter], group["params"]) for group in groups if "x0.1" in cast(str, group["name"])]
    offsets = [parameter for name, parameter in model.named_parameters() if "sampling_offsets" in name]
    assert {id(parameter) for part in slow for parameter in part} == set(map(id, offsets)) and offsets
    with pytest.raises(UserError, match="--layer-decay"):
        parameter_groups(model, _config(layer_decay=0.5), names)


def test_the_optimizer_steps_as_adamw_is_defined() -> None:
    config = _config(schedule="constant", weight_decay=0.1)
    model, optimizer, _ = _start(config)
    weight = model.head.weight.detach().double().numpy().copy()
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 6):
        model(torch.randn(4, 3)).square().sum().backward()
        assert model.head.weight.grad is not None
        gradient = model.head.weight.grad.double().numpy().copy()
        optimizer.step()
        optimizer.zero_grad()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        unbiased = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weight = weight * (1 - 1e-3 * 0.1) - 1e-3 * unbiased
        np.testing.assert_allclose(model.head.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-7)


def test_the_average_follows_its_formula_and_resumes_from_a_saved_state() -> None:
    torch.manual_seed(0)
    model = _Small()
    average = MovingAverage(model, 0.9, rise_steps=5.0)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for step in range(1, 13):
        model(torch.randn(4, 3))  # updates the statistics and the counter of the batch norm
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        decay = 0.9 * (1 - math.exp(-step / 5))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
        if step == 6:
            saved = io.BytesIO()
            torch.save(average.state_dict(), saved)
            saved.seek(0)
            average = MovingAverage(model, 0.9, rise_steps=5.0)
            average.load_state_dict(torch.load(saved, weights_only=True))
    assert average.shadow["norm.num_batches_tracked"] == model.norm.num_batches_tracked == 12
    for name, value in average.shadow.items():
        if value.is_floating_point():
            assert not value.requires_grad and value.data_ptr() != model.state_dict()[name].data_ptr()
            np.testing.assert_allclose(value.numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-6)


def test_the_average_leaves_out_a_step_that_was_skipped() -> None:
    model = _Small()
    average = MovingAverage(model, 0.9, rise_steps=5.0)
    before = {name: value.clone() for name, value in average.shadow.items()}
    with torch.no_grad():
        model.head.weight.fill_(torch.inf)
    average.update(where=torch.tensor(False))
    assert average.num_updates == 1
    assert all(torch.equal(average.shadow[name], value) for name, value in before.items())
