"""The trainer's state: complete in `state_dict`, and restored on the same and on another number of workers."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raydet.config import ResolvedTrainConfig
from raydet.models.collate import Example, collate
from raydet.tables.schema import Category
from raydet.training.feeding.batches import ReadyBatch
from raydet.training.feeding.ordering import MicroBatch
from raydet.training.history import EpochRecord, ValidationRecord
from raydet.training.recovery.overrides import Override
from raydet.training.state import Position, TrainingState
from raydet.training.trainer import Trainer
from tests.vision_transformers import save_pretrained

CATEGORIES = (Category(1, "a"), Category(2, "b"))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group with a single rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _trainer(**changes: Any) -> Trainer:
    values: dict[str, Any] = {"model": "rt_detr_v2_tiny", "image_size": 64, "epochs": 2, "ema_decay": 0.5}
    config = ResolvedTrainConfig(train_data="t", val_data="v", out="o", **{**values, **changes})
    return Trainer(config, CATEGORIES, steps_per_epoch=3, device=torch.device("cpu"), rank=0, world_size=1)


def _step(trainer: Trainer) -> tuple[float, float]:
    """Take a step on random images seeded by the position; return loss and gradient norm."""
    position = trainer.position
    generator = np.random.default_rng([position.epoch, position.step])
    examples = [
        Example(
            image_id=number,
            image=generator.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            original_size_hw=(64, 64),
            boxes=np.array([[0.5, 0.5, 0.4, 0.3]], np.float32),
            categories=np.array([number % 2]),
        )
        for number in range(2)
    ]
    place = MicroBatch("train", position.epoch, position.step, 0, 0, ())
    batch = ReadyBatch(place, trainer.detector.resize_rule, collate(examples), {}, {})
    values = trainer.step(trainer.prepare([batch])).read()
    return values.loss, values.gradient_norm


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state after a round trip through a file."""
    buffer = io.BytesIO()
    torch.save({**state, "position": [state["position"].epoch, state["position"].step]}, buffer)
    loaded: dict[str, Any] = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    return {**loaded, "position": Position(*loaded["position"])}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "reduce_lr_on_plateau", "ema_decay": 0.0},
        {"lora": {"r": 4, "dropout": 0.1}, "freeze_backbone": "all"},
    ],
    ids=["ema", "plateau", "adapters"],
)
def test_a_trainer_resumes_from_its_state_to_the_last_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    if "lora" in changes:
        changes |= {"model": save_pretrained("yolos_tiny", tmp_path / "base")}
    first = _trainer(**changes)
    assert not first.begin_epoch()
    for _ in range(3):
        _step(first)
    assert first.position == Position(0, 3)
    first.end_epoch(EpochRecord(epoch=1, loss=1.5, validation=ValidationRecord(numbers={"AP": 0.5})))
    first.begin_epoch()
    _step(first)
    second = _trainer(**changes, seed=7)  # other weights until the state is loaded
    second.config = first.config
    second.load_state_dict(_saved(first.state_dict()))
    assert second.position == Position(1, 1) and second.history == first.history
    assert second.meter.to_state() == first.meter.to_state()
    second.begin_epoch()
    assert _step(second) == _step(first)
    with first.averaged(), second.averaged():
        mine, theirs = (each.detector.model.state_dict() for each in (second, first))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_step_that_is_skipped_leaves_no_trace_in_the_weights_or_the_means() -> None:
    trainer = _trainer()
    trainer.begin_epoch()
    _step(trainer)
    before = {name: value.clone() for name, value in trainer.detector.model.state_dict().items()}
    means = trainer.meter.to_state()["losses"]
    with _poisoned(trainer):
        loss, norm = _step(trainer)
    assert np.isnan([loss, norm]).all() and trainer.position == Position(0, 2)
    assert trainer.meter.to_state()["losses"] == means
    after = trainer.detector.model.state_dict()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == [
        name for name in before if name.endswith("num_batches_tracked")
    ]
    assert np.isfinite(_step(trainer)).all()


@contextmanager
def _poisoned(trainer: Trainer) -> Iterator[None]:
    """While the block runs, the model sees NaN in place of images."""

    def poison(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "pixel_values": kwargs["pixel_values"] * torch.nan}

    hook = trainer.detector.model.register_forward_pre_hook(poison, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize("schedule", ["cosine", "reduce_lr_on_plateau"])
def test_an_override_changes_peaks_clipping_and_precision_from_its_step_on(schedule: str) -> None:
    changes: dict[str, Any] = {"schedule": schedule, "warmup_steps": 2, "learning_rate": 1e-3}
    settings: dict[str, Any] = {"learning_rate": 1e-4, "max_grad_norm": 5.0, "precision": "fp16"}
    trainer, plain = _trainer(**changes), _trainer(**changes)
    trainer.follow([Override(0, 2, settings)])
    for each in (trainer, plain):
        each.begin_epoch()
        _step(each)
        assert each.settings == each.config
        _step(each)
    assert trainer.settings == replace(trainer.config, **settings)
    rates, usual = ([group["lr"] for group in each.optimizer.param_groups] for each in (trainer, plain))
    assert rates == pytest.approx([rate / 10 for rate in usual]) and len(set(rates)) == 2
    saved = _saved(trainer.state_dict())
    _step(trainer)
    assert trainer.state_dict()["parts"]["scaler"]["scale"] > 0
    # A state of before the override, and one of after it, go on as the trainer itself did.
    for state in (saved, _saved(trainer.state_dict())):
        again = _trainer(**changes)
        again.follow([Override(0, 2, settings)])
        again.load_state_dict(state)
        again.begin_epoch()
        while again.position.step < 3:
            _step(again)
        assert again.settings == trainer.settings
        mine, theirs = again.detector.model.state_dict(), trainer.detector.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert again.schedule.get_last_lr() == trainer.schedule.get_last_lr()


def test_the_average_is_there_for_a_while_only() -> None:
    trainer = _trainer()
    trainer.begin_epoch()
    _step(trainer)
    before = {name: value.clone() for name, value in trainer.detector.model.state_dict().items()}
    with trainer.averaged():
        inside = trainer.detector.model.state_dict()
        assert any(not torch.equal(inside[name], value) for name, value in before.items())
    after = trainer.detector.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def _state_of(meters: list[dict[str, Any]], buffers: list[dict[str, torch.Tensor]]) -> TrainingState:
    first = {"position": Position(1, 2), "history": [], "model": {}, "parts": {}}
    locals_of_ranks = [{"meter": meter, "buffers": each} for meter, each in zip(meters, buffers, strict=True)]
    return TrainingState.of_ranks(first, locals_of_ranks)


def test_ranks_get_back_their_own_sums_and_statistics_and_other_numbers_of_ranks_what_those_add_up_to() -> None:
    meter: dict[str, Any] = {"losses": {"a": 1.0}, "num_images": 4, "unreadable": [3], "num_steps": 2}
    other: dict[str, Any] = {"losses": {"a": 2.0}, "num_images": 3, "unreadable": [5], "num_steps": 2}
    state = _state_of([meter, other], [{"mean": torch.zeros(2)}, {"mean": torch.ones(2)}])
    for rank, expected in enumerate((meter, other)):
        mine = state.of_rank(rank, 2)
        assert mine["meter"] == expected and mine["buffers"]["mean"].tolist() == [float(rank)] * 2
    alone = state.of_rank(0, 1)
    assert alone["meter"] == {"losses": {"a": 3.0}, "num_images": 7, "unreadable": [3, 5], "num_steps": 2}
    assert alone["buffers"]["mean"].tolist() == [0.5, 0.5]
    assert state.of_rank(1, 3)["meter"] is None and state.of_rank(2, 3)["buffers"]["mean"].tolist() == [0.5, 0.5]
