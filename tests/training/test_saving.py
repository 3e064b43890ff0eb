"""Checkpoints beside the training: unchanged by later steps, whole after a kill, one line for a full disk, cheap."""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raydet.config import ResolvedTrainConfig
from raydet.models.checkpoints import STATES_FOLDER
from raydet.models.collate import collate
from raydet.tables.schema import Category
from raydet.training.failure import WorkerFailed
from raydet.training.feeding.batches import ReadyBatch
from raydet.training.feeding.ordering import MicroBatch
from raydet.training.saving import Saver
from raydet.training.state import Position, TrainingState, newest_state, parse_state, saved_states
from raydet.training.trainer import Trainer
from tests import s3_stand_in
from tests.drivers import wait_until
from tests.random_examples import random_examples


def _config(out: str, **changes: Any) -> ResolvedTrainConfig:
    return ResolvedTrainConfig(train_data="t", val_data="v", out=out, **changes)


def _state(step: int, weights: torch.Tensor) -> TrainingState:
    parts = {"optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
    return TrainingState(
        position=Position(0, step), history=[], meters=[], model={"w": weights}, buffers=[{}], parts=parts
    )


def _newest(out: str) -> TrainingState:
    data = newest_state(out)
    assert data is not None
    return parse_state(data, torch.device("cpu"))


def test_later_steps_do_not_change_a_state(tmp_path: Path) -> None:
    saver, weights = Saver(_config(str(tmp_path))), torch.zeros(1_000_000)
    for step in range(1, 4):
        weights.fill_(step)
        saver.save(_state(step, weights), [])
        weights.fill_(-1.0)
    saver.wait()
    saver.close()
    assert saved_states(str(tmp_path)) == ["00000-0000003.pt", "00000-0000002.pt"]
    state = _newest(str(tmp_path))
    assert state.position == Position(0, 3) and state.model["w"].unique().tolist() == [3.0]
    assert state.parts["optimizer"]["param_groups"] == [{"lr": 0.1, "params": [0]}]


def test_a_failed_write_is_one_line_at_the_next_step(tmp_path: Path) -> None:
    (tmp_path / STATES_FOLDER / "00000-0000002.pt" / "x").mkdir(parents=True)  # a folder in the place of the file
    saver = Saver(_config(str(tmp_path)))
    saver.save(_state(1, torch.zeros(3)), [])
    saver.save(_state(2, torch.zeros(3)), [])

    assert saver._write is not None
    wait_until(saver._write.done, lambda: "the write has not ended", timeout_s=20)
    with pytest.raises(WorkerFailed) as failed:
        saver.check()
    assert "cannot write the checkpoint after step 2 of epoch 1" in failed.value.failure.line
    saver.close()
    assert _newest(str(tmp_path)).position == Position(0, 1)


@pytest.fixture
def slow_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_stand_in.StandIn]:
    with s3_stand_in.started() as stand_in:
        stand_in.use(monkeypatch)
        yield stand_in


def test_a_kill_in_the_middle_of_a_write_leaves_the_state_before(slow_store: s3_stand_in.StandIn) -> None:
    out = f"{s3_stand_in.BUCKET}/killed"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    writer = context.Process(target=_write_two, args=(out, theirs), daemon=True)
    writer.start()
    try:
        assert ours.poll(120) and ours.recv() == "first"
        slow_store.put_delay_s = 5.0
        ours.send("go")
        assert ours.poll(60) and ours.recv() == "training"
        time.sleep(0.5)
    finally:
        writer.kill()
        writer.join()
    slow_store.put_delay_s = 0.0
    state = _newest(out)
    assert state.position == Position(0, 1) and state.model["w"].unique().tolist() == [1.0]


def _write_two(out: str, pipe: Any) -> None:
    saver = Saver(_config(out))
    saver.save(_state(1, torch.full((1_000_000,), 1.0)), [])
    saver.wait()
    pipe.send("first")
    pipe.recv()
    saver.save(_state(2, torch.full((1_000_000,), 2.0)), [])
    pipe.send("training")
    saver.wait()


@pytest.mark.slow
def test_steps_go_on_while_a_slow_store_takes_a_checkpoint(slow_store: s3_stand_in.StandIn) -> None:
    slow_store.put_delay_s = 2.0
    config = _config(f"{s3_stand_in.BUCKET}/slow", model="rt_detr_v2_tiny", image_size=64, keep_states=1)
    trainer = Trainer(
        config,
        (Category(1, "a"), Category(2, "b")),
        steps_per_epoch=1000,
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
    )
    place = MicroBatch("train", 0, 0, 0, 0, ())
    batch = ReadyBatch(place, trainer.detector.resize_rule, collate(random_examples(2, 64)), {}, {})
    saver = Saver(config)
    trainer.begin_epoch()
    own = trainer.state_dict()
    state = TrainingState.of_ranks(own, [{"meter": own["meter"], "buffers": own["buffers"]}])
    saver.save(state, trainer.history)
    upload, num_steps = saver._write, 0
    assert upload is not None
    while not upload.done():
        trainer.step(trainer.prepare([batch]))
        saver.check()
        num_steps += 1
    saver.close()
    assert num_steps > 1, "the step waited for the upload"
    assert _newest(config.out).position == Position(0, 0)
